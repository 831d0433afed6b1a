"""Threads, pipes and processes that work on one result: a number that only comes out if nobody was lost. Until its input ends."""

import hashlib
import os
import subprocess
import sys
import threading
import time

over = threading.Event()
rounds = [0] * 4


def ring(n: int) -> None:
    """A token round three threads, over pipes; each adds to it."""
    pipes = [os.pipe() for _ in range(3)]

    def station(k: int) -> None:
        while token := os.read(pipes[k][0], 32):
            if token == b"end":
                os.write(pipes[(k + 1) % 3][1], token) if k < 2 else None
                return
            os.write(pipes[(k + 1) % 3][1], hashlib.blake2b(token, digest_size=32).digest())

    threads = [threading.Thread(target=station, args=(k,)) for k in (1, 2)]
    for t in threads:
        t.start()
    token = bytes(32)
    expected = token
    while not over.is_set():
        os.write(pipes[1][1], token)
        token = os.read(pipes[0][0], 32)
        expected = hashlib.blake2b(hashlib.blake2b(expected, digest_size=32).digest(), digest_size=32).digest()
        assert token == expected
        rounds[n] += 1
        time.sleep(0.002)  # (else nothing that is not scheduled gets on beside it)
    os.write(pipes[1][1], b"end")
    for t in threads:
        t.join(20)
        assert not t.is_alive()


work = [threading.Thread(target=ring, args=(n,)) for n in range(4)]
for t in work:
    t.start()
children = 0
threading.Thread(target=lambda: (sys.stdin.read(), over.set())).start()
while not over.is_set():
    assert subprocess.run(["sh", "-c", "echo $((6 * 7)) | cat"], capture_output=True, text=True, check=True).stdout == "42\n"
    children += 1
    time.sleep(0.02)
for t in work:
    t.join()
print("sound", min(rounds) > 0, children > 0, flush=True)
