"""argv: MiB, then what to do. Fills that much with patterns and checks it again and again; prints one line for each thing done."""

import ctypes
import hashlib
import mmap
import os
import random
import signal
import sys
import threading

MIB = 1 << 20
libc = ctypes.CDLL(None, use_errno=True)


def pattern(i):
    """Pages for every tier of the store, in turn: what no compressor makes smaller, half text, a word repeated, zeros."""
    r = random.Random(i).randbytes(4096)
    return (r + r[:2048] + b"such text " * 204 + bytes(8) + r[:8] * 512 + bytes(4096)) * 63 + i.to_bytes(4 * 4096, "little")


def new():
    return mmap.mmap(-1, MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def fill(i):
    m = new()
    m[:] = d = pattern(i)
    return m, hashlib.blake2b(d).digest()


def lost(held):
    return sum(hashlib.blake2b(m[:MIB]).digest() != h for m, h in held)


def address(m):
    return ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(m)))


def zero(some):
    return not any(any(m[::4096]) for m in some)


def calls():
    """Every call that meets pages in the store."""
    for m, _ in held[:20]:
        m.close()
    del held[:20]
    print("mapped anew:", zero([new() for _ in range(20)]))
    held.extend(fill(1000 + i) for i in range(20))
    for m, _ in held[:30]:
        m.resize(2 * MIB)
    print("grown:", lost(held), zero([memoryview(m)[MIB:] for m, _ in held[:30]]))
    for m, _ in held[:30]:
        m.resize(MIB)
    for m, _ in held[:30]:
        assert libc.mprotect(address(m), MIB, mmap.PROT_READ) == 0
    print("read-only:", lost(held))
    for m, _ in held[:30]:
        assert libc.mprotect(address(m), MIB, mmap.PROT_READ | mmap.PROT_WRITE) == 0
        m[0:1] = m[0:1]
    for m, _ in held[30:40]:
        m.madvise(mmap.MADV_DONTNEED)
    print("dropped:", zero([m for m, _ in held[30:40]]))
    del held[30:40]
    print("locked:", libc.mlock(address(held[0][0]), MIB), lost(held))
    vec = (ctypes.c_ubyte * 256)()
    print("resident:", libc.mincore(address(held[0][0]), MIB, vec), sum(vec))


def forks():
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            os._exit(min(lost(held), 100))
        print("child:", os.waitpid(pid, 0)[1])


def threads():
    """Four threads count in every page, all at once."""
    pages = [memoryview(m).cast("Q") for m, _ in held]
    start = [[v[k * 512 + 1] for k in range(0, 256, 16)] for v in pages]

    def work(n):
        r = random.Random(n)
        for _ in range(20000):
            v, k = r.choice(pages), r.randrange(0, 256, 16)
            with locks[k // 16]:
                v[k * 512 + 1] = (v[k * 512 + 1] + 1) % 2**64

    locks = [threading.Lock() for _ in range(16)]
    some = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for t in some:
        t.start()
    for t in some:
        t.join()
    counted = sum(
        (v[k * 512 + 1] - s) % 2**64
        for v, row in zip(pages, start, strict=True)
        for k, s in zip(range(0, 256, 16), row, strict=True)
    )
    print("counted:", counted)


def release():
    """vmsplice: the memory must be the kernel's own first."""
    pipe = os.pipe()
    vec = (ctypes.c_size_t * 2)(address(held[0][0]).value, 4096)
    print("vmsplice:", libc.vmsplice(pipe[1], vec, 1, 0), lost(held))


def waits():
    """Until SIGTERM, looking at all of it; says so after each round."""
    rounds = 0
    while going:
        assert lost(held) == 0
        rounds += 1
        if rounds == 1:
            print("there", flush=True)
    print("waited:", lost(held))


going = [True]
if "waits" in sys.argv:
    signal.signal(signal.SIGTERM, lambda *_: going.clear())
held = [fill(i) for i in range(int(sys.argv[1]))]
print("filled:", lost(held), flush=True)
for what in sys.argv[2:]:
    globals()[what]()
    print("after", what + ":", lost(held) if what != "threads" else 0, flush=True)
