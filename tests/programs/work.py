"""A CPython program that uses memory in every way CPython has; prints digests only, so two runs can be compared."""

import hashlib
import multiprocessing as mp
import subprocess
import sys
import threading


def square_sum(n: int) -> int:
    return sum(i * n for i in range(20000))


def main() -> None:
    words = sorted(str(i * 7919 % 1000003) for i in range(200000))
    print(hashlib.sha256("".join(words).encode()).hexdigest())
    sizes: list[int] = []

    def fill() -> None:
        table = {i: str(i) * 3 for i in range(20000)}
        sizes.append(sum(map(len, table.values())))

    threads = [threading.Thread(target=fill) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    print(sizes)
    for method in ("fork", "spawn"):
        with mp.get_context(method).Pool(3) as pool:
            print(method, pool.map(square_sum, range(8)))
    print(subprocess.check_output(["sh", "-c", "echo $((6*7)) | tr 4 5"]))
    block = bytearray(64 << 20)
    block[::4096] = b"x" * len(block[::4096])
    print(hashlib.sha256(block).hexdigest(), file=sys.stdout)


if __name__ == "__main__":
    main()
