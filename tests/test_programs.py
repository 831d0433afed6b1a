"""Unmodified programs on managed memory produce what they produce natively, and the invariants hold after each."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import PROGRAMS, ROOT, Enclave, wait_for

WORK = [sys.executable, PROGRAMS / "work.py"]
Compiled = Callable[[str], Path]


def native(cmd: list[Any], **kw: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, cmd)), capture_output=True, text=True, timeout=120, **kw)


def same(enclave: Enclave, cmd: list[Any], **kw: Any) -> str:
    """Runs cmd natively and managed; output and status must be equal. Returns the output."""
    a, b = native(cmd, **kw), enclave.run(cmd, **kw)
    assert (b.returncode, b.stdout, b.stderr) == (a.returncode, a.stdout, a.stderr)
    return a.stdout


@pytest.mark.parametrize("malloc", ["pymalloc", "malloc"])
def test_cpython(enclave: Enclave, malloc: str) -> None:
    """Threads, multiprocessing with fork and spawn, subprocess."""
    before = enclave.status()["counters"]["notifications"]
    out = same(enclave, WORK, env=os.environ | {"PYTHONMALLOC": malloc})
    assert "fork" in out and "spawn" in out
    assert enclave.status()["counters"]["notifications"] == before, "libc made memory calls past the stub"


def test_memory_is_really_managed(enclave: Enclave) -> None:
    """A program's large allocation consists of frames of the enclave, and they all return when it ends."""
    free = enclave.idle()["frames"]["free"]
    p = enclave.popen(
        [
            sys.executable,
            "-c",
            "b=bytearray(100<<20); b[::4096]=b'x'*len(b[::4096]); print('there', flush=True); input()",
        ],
        stdin=subprocess.PIPE,
    )
    assert p.stdout and p.stdin
    assert p.stdout.readline() == "there\n"
    s = wait_for(lambda: (s := enclave.status())["frames"]["mapped"] >= 25600 and s, 5, "100 MiB are not mapped")
    space = next(a for a in s["address_spaces"] if a["pid"] == p.pid)
    assert space["mapped"] >= 25600 and space["native_pages"] == 0
    assert space["native_kib"] < 30 << 10  # stacks, the loader's memory, .bss
    smaps = Path(f"/proc/{p.pid}/smaps").read_text()
    assert "sylvie-ram" in smaps
    enclave.check()
    p.stdin.write("\n")
    p.stdin.close()
    assert p.wait(20) == 0
    s = enclave.idle()
    assert s["frames"]["mapped"] == s["frames"]["granted"] == 0
    assert s["frames"]["free"] + s["frames"]["reserved"] == s["frames"]["total"]
    assert s["frames"]["free"] >= free - 20000  # the rest is buddy's growing reserve


def test_huge_pages(enclave: Enclave) -> None:
    """A sequential toucher gets 2 MiB blocks, mapped by one entry each. It rests after each, as buddy refills in its own
    time: how many a program finds that does not rest depends on the machine's speed (bench/memory.py measures that)."""
    code = """
import mmap, time
b = memoryview(mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
for at in range(0, len(b), 2 << 20):
    b[at : at + (2 << 20) : 4096] = b"x" * 512
    time.sleep(0.05)
print(sum(int(l.split()[1]) for l in open("/proc/self/smaps") if l.startswith("ShmemPmdMapped")))
"""
    assert int(enclave.run([sys.executable, "-c", code]).stdout) >= 32 << 10


def test_threads_in_c(enclave: Enclave, compiled: Compiled) -> None:
    assert enclave.run([compiled("memory_stress"), 4, 150]).stdout == "ok\n"


def test_every_call_behaves_as_natively(enclave: Enclave, compiled: Compiled) -> None:
    out = same(enclave, [compiled("calls")])
    assert len(out.splitlines()) > 50


def test_every_call_as_an_ordinary_user(enclave: Enclave, compiled: Compiled) -> None:
    """Launched by the user (no privilege anywhere), and by root who becomes the user before exec."""
    calls = compiled("calls")
    become = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", calls]
    expected = native(become).stdout
    assert enclave.run(become).stdout == expected
    launch = ROOT / "kernel" / "native"
    # The launcher itself rather than the console script: where Python is installed below /root a user cannot execute that.
    cmd = [launch / "sylvie-launch", enclave.run_dir, launch / "libsylvie.so", launch / "sylvie-keeper", "--", calls]
    assert native(cmd, user=65534, group=65534, extra_groups=[]).stdout == expected
    assert len(expected.splitlines()) > 50


def test_calls_and_forks_past_libc(enclave: Enclave, compiled: Compiled) -> None:
    """Inline system calls: the net below libc serves them; a fork there first releases the address space."""
    before = enclave.status()["counters"]["notifications"]
    out = same(enclave, [compiled("past_libc")])
    assert "fork past libc: child exited 0" in out
    assert enclave.status()["counters"]["notifications"] >= before + 6


def test_fork_under_write_load(enclave: Enclave, compiled: Compiled) -> None:
    """The child's view is of one instant, also past pthread_atfork; nested forks."""
    done = enclave.run([compiled("fork_threads"), 20])
    assert done.stdout == "torn 0 crashed 0 leaked 0\n", done


def test_sort_of_a_file_larger_than_its_buffer(enclave: Enclave, tmp_path: Path) -> None:
    rng = random.Random(7)
    big = tmp_path / "big"
    big.write_text("".join(f"{rng.getrandbits(64):x}\n" for _ in range(1_000_000)))
    cmd = ["bash", "-c", f"sort -S 4M -T {tmp_path} {big} | sha256sum"]
    assert same(enclave, cmd, env=os.environ | {"LC_ALL": "C"})


def test_gcc(enclave: Enclave, tmp_path: Path) -> None:
    source = PROGRAMS / "memory_stress.c"
    digests = []
    for name, run in (("native", native), ("managed", enclave.run)):
        out = tmp_path / "out.o"
        out.unlink(missing_ok=True)
        done = run(["gcc", "-O2", "-c", source, "-o", out])
        assert done.returncode == 0, (name, done)
        digests.append(hashlib.sha256(out.read_bytes()).hexdigest())
    assert digests[0] == digests[1]


def test_bash_pipeline(enclave: Enclave) -> None:
    cmd = "for i in $(seq 20); do echo $i | tr 1 2; done | sort -n | (cat; echo end) | sha256sum; x=$(printf %s a b c); echo $x"
    same(enclave, ["bash", "-c", cmd])


def test_perl(enclave: Enclave) -> None:
    same(
        enclave,
        [
            "perl",
            "-e",
            "my %h; $h{$_ * 7919 % 100003} = 'v' x ($_ % 100) for 1 .. 200000; print scalar(keys %h), ' ', join(',', (sort keys %h)[0 .. 5]), qq(\\n)",
        ],
    )


def test_sqlite3(enclave: Enclave) -> None:
    sql = """PRAGMA cache_size=-40000; CREATE TABLE t(a INTEGER PRIMARY KEY, b TEXT);
    WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM c WHERE x<200000) INSERT INTO t SELECT x, hex(x*7919 % 1000003) FROM c;
    CREATE INDEX i ON t(b); SELECT count(*), max(b), sum(a) FROM t; SELECT b, count(*) FROM t GROUP BY b ORDER BY 2 DESC, 1 LIMIT 5; PRAGMA integrity_check;"""
    assert "ok" in same(enclave, ["sqlite3", ":memory:", sql])


REDIS = r"""
set -e
cd "$1"
redis-server --port 0 --unixsocket "$1/sock" --save "" --dir "$1" --dbfilename dump.rdb --enable-debug-command yes > log 2>&1 &
trap 'kill $! 2>/dev/null; wait' EXIT
cli="redis-cli -s $1/sock"
for i in $(seq 100); do $cli ping > /dev/null 2>&1 && break; sleep 0.05; done
awk 'BEGIN{for(i=0;i<40000;i++) printf "SET key:%d %0" 100+i%900 "d\r\n", i, i*7919}' | $cli --pipe > /dev/null
$cli debug digest
redis-benchmark -s "$1/sock" -t get,lpush -n 20000 -P 16 -q > /dev/null
$cli del mylist > /dev/null
$cli debug digest
$cli bgsave > /dev/null
for i in $(seq 200); do $cli info persistence | grep -q rdb_bgsave_in_progress:0 && break; sleep 0.05; done
$cli info persistence | grep rdb_last_bgsave_status
$cli debug reload
$cli debug digest
$cli dbsize
"""


def test_redis_with_benchmark_and_bgsave(enclave: Enclave, tmp_path: Path) -> None:
    assert shutil.which("redis-server"), "make setup installs it"
    outs = []
    for run in (native, enclave.run):
        (tmp_path / "dump.rdb").unlink(missing_ok=True)
        done = run(["bash", "-c", REDIS, "redis", tmp_path])
        assert done.returncode == 0, done
        assert "rdb_last_bgsave_status:ok" in done.stdout
        outs.append(done.stdout)
    assert outs[0] == outs[1]


def test_environment_arguments_and_status(enclave: Enclave, tmp_path: Path) -> None:
    """Same environment, descriptors, directory, standard streams, exit status and signals as natively."""
    show = [
        "bash",
        "-c",
        'env | grep -v ^_= | sort; pwd; ls /proc/self/fd | wc -l; printf "%s|" "$@"; cat; exit 7',
        "x",
        "a b",
        "",
        "$c",
    ]
    env = os.environ | {"LD_PRELOAD": "", "X": "1"}
    a = native(show, input="in\n", cwd=tmp_path, env=env)
    b = enclave.run(show, input="in\n", cwd=tmp_path, env=env)
    assert (a.stdout, a.stderr, a.returncode) == (b.stdout, b.stderr, b.returncode) and a.returncode == 7
    assert enclave.run(["bash", "-c", "kill -TERM $$"]).returncode == -15
    assert enclave.run(["bash", "-c", "kill -SEGV $$"]).returncode == -11


def test_own_preload_survives(enclave: Enclave) -> None:
    """A program's own LD_PRELOAD works, and it sees just that."""
    lib = next(Path("/lib/x86_64-linux-gnu").glob("libz.so.1"), None) or next(
        Path("/lib/x86_64-linux-gnu").glob("libm.so.6")
    )
    done = enclave.run(
        [
            "bash",
            "-c",
            f"echo $LD_PRELOAD; grep -c {lib.name.split('.')[0]} /proc/self/maps; env -i cat /proc/self/maps | grep -c sylvie-ram",
        ],
        env=os.environ | {"LD_PRELOAD": str(lib)},
    )
    lines = done.stdout.split()
    assert lines[0] == str(lib) and int(lines[1]) > 0 and int(lines[2]) > 0, done


def test_static_and_setuid_programs_run_natively(enclave: Enclave, tmp_path: Path) -> None:
    src = tmp_path / "s.c"
    src.write_text(
        '#include <stdio.h>\n#include <stdlib.h>\nint main(void){char*p=malloc(1<<20);p[5]=1;puts("static");return 3;}\n'
    )
    subprocess.run(["gcc", "-static", "-o", tmp_path / "s", src], check=True, timeout=60)
    done = enclave.run([tmp_path / "s"])
    assert (done.stdout, done.returncode) == ("static\n", 3)
    assert len(done.stderr.splitlines()) == 1 and "natively" in done.stderr
    nested = enclave.run(["bash", "-c", f"{tmp_path}/s; echo $?"])
    assert nested.stdout == "static\n3\n" and nested.stderr == ""
    subprocess.run(["gcc", "-o", tmp_path / "u", src], check=True, timeout=60)
    shutil.chown(tmp_path / "u", 65534)
    (tmp_path / "u").chmod(0o4755)
    done = enclave.run([tmp_path / "u"])
    assert done.returncode == 3 and "setuid" in done.stderr


def test_many_processes(enclave: Enclave) -> None:
    done = enclave.run(
        [
            "bash",
            "-c",
            "for i in $(seq 300); do /bin/ls / > /dev/null; done; for i in $(seq 60); do /bin/ls / > /dev/null & done; wait; echo done",
        ]
    )
    assert done.stdout == "done\n" and done.stderr == ""


def test_run_inside_run(enclave: Enclave, own_enclave: Enclave) -> None:
    """A managed program starts another one, on the same enclave and on another."""
    show = "grep -c sylvie-ram /proc/self/maps"
    for inner in (enclave, own_enclave):
        before = inner.status()["counters"]["registered"]
        done = enclave.run(
            [
                "bash",
                "-c",
                f"{inner.command(['bash', '-c', show])[0]} --run-dir {inner.run_dir} run -- bash -c '{show}'",
            ]
        )
        assert done.returncode == 0 and int(done.stdout) > 0, done
        assert inner.status()["counters"]["registered"] > before


def test_descriptors_cannot_be_closed_by_the_program(enclave: Enclave) -> None:
    """Daemons close everything; faults are served all the same, and the next descriptor is the lowest, as natively."""
    code = "import os; os.closerange(3, 1 << 16); b = bytearray(40 << 20); b[::4096] = b'x' * len(b[::4096]); print(b.count(b'x'), os.open('/', 0))"
    assert enclave.run([sys.executable, "-c", code]).stdout == f"{40 * 256} 3\n"


def test_realtime_programs_do_not_starve_their_own_faults(enclave: Enclave) -> None:
    """Every CPU is taken by a spinning SCHED_FIFO process, and one faults: it is done before the spinners are."""
    code = """
import os, time
os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(60))
pids = []
for _ in range(os.cpu_count()):
    if not (pid := os.fork()):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))
        end = time.time() + 4
        while time.time() < end: pass
        os._exit(0)
    pids.append(pid)
time.sleep(0.2)
for _ in range(10):
    b = bytearray(4 << 20); b[::4096] = b'x' * 1024
print([os.waitpid(pid, os.WNOHANG) for pid in pids] == [(0, 0)] * len(pids))
for pid in pids: os.waitpid(pid, 0)
"""
    assert enclave.run([sys.executable, "-c", code]).stdout == "True\n"


def test_core_dump(enclave: Enclave, compiled: Compiled, tmp_path: Path) -> None:
    """The core holds the program's memory, and neither the empty arena nor our tables."""
    if Path("/proc/sys/kernel/core_pattern").read_text().strip() != "core":
        pytest.skip("this machine pipes core dumps to a program (kernel.core_pattern)")
    done = enclave.run(["bash", "-c", f"ulimit -c unlimited; cd {tmp_path}; exec {compiled('crash')}"])
    assert done.returncode == -6
    core = next(tmp_path.glob("core*"))
    assert core.stat().st_size < 256 << 20
    data = core.read_bytes()
    assert b"heap of the crashed" in data and b"mapping of the crashed" in data


def test_strace(enclave: Enclave, compiled: Compiled, tmp_path: Path) -> None:
    done = enclave.run(["strace", "-f", "-o", tmp_path / "trace", compiled("memory_stress"), 2, 20])
    assert done.stdout == "ok\n" and done.returncode == 0
