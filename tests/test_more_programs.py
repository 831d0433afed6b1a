"""More unmodified programs: debuggers, other languages' runtimes, other allocators, and every corner of processes, threads and signals.

The situations of the design's pitfalls that concern programs (probes/pitfalls), and the tests that stand for them:

| pitfall | test |
|---|---|
| fork_multithreaded, fork_without_atfork | test_programs.py: test_fork_under_write_load; here: test_every_way_to_make_a_process |
| misc_calls: futexes, robust mutexes | test_futexes_and_mutexes |
| misc_calls: WIPEONFORK, mlock, mseal | test_programs.py: test_every_call_behaves_as_natively; here: test_memtester |
| close_range | test_programs.py: test_descriptors_cannot_be_closed_by_the_program; here: test_daemon |
| core_and_proc_mem | test_programs.py: test_core_dump; here: test_memory_seen_by_another_process, test_gdb_attaches |
| trap_without_aslr | test_without_address_randomisation, test_gdb_runs |
| listener_closed | test_failures.py: test_killed_gateway_leaves_programs_and_shells_running |
| fifo_starves_service | test_programs.py: test_realtime_programs_do_not_starve_their_own_faults |
| max_map_count_after | test_many_mappings_outlive_the_enclave |
| reopen_readonly_memfd | test_failures.py: test_tables_are_for_components_only; here: test_a_user_reopens_nothing |
| pinned_pages | elsewhere |
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import PROGRAMS, Enclave, wait_for
from test_programs import native

Build = Callable[..., Path]
USER = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
LIBRARIES = Path("/usr/lib/x86_64-linux-gnu")
as_both = pytest.mark.parametrize("become", [[], USER], ids=["root", "user"])


@pytest.fixture(scope="session")
def build(root_dir: Path) -> Build:
    """Compiles tests/programs/NAME.c with the given flags, once; the files can be executed by everybody."""

    def compile_(name: str, *flags: str) -> Path:
        target = root_dir / "-".join([name, *(f.strip("-").replace("=", "-") for f in flags)])
        if not target.exists():
            # -fno-builtin: or gcc sees that nobody looks at what malloc gave, and leaves it out.
            cmd = ["gcc", "-O2", "-fno-builtin", "-Wall", "-Wextra", "-Werror", *flags, "-o", target]
            subprocess.run([*cmd, PROGRAMS / f"{name}.c", "-lpthread", "-ldl"], check=True, timeout=60)
        return target

    return compile_


@pytest.fixture
def shared_tmp(root_dir: Path, tmp_path: Path) -> Iterator[Path]:
    """A directory that an ordinary user can reach and write."""
    path = root_dir / tmp_path.name
    path.mkdir()
    path.chmod(0o777)
    yield path
    shutil.rmtree(path)


def frames_kib(smaps: Path) -> int:
    """How much of a program's memory was frames of an enclave, from a copy of its smaps."""
    total, managed = 0, False
    for line in smaps.read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            managed = "memfd:sylvie-ram" in line
        elif managed and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


def same(
    enclave: Enclave,
    cmd: list[Any],
    where: Path,
    least_kib: int,
    run: Callable[..., subprocess.CompletedProcess[str]] | None = None,
    **kw: Any,
) -> str:
    """Runs cmd natively and managed: equal output and status, and at least least_kib of frames in the managed run.

    cmd copies its smaps to $SMAPS_TO, a file in ``where``. Returns the output.
    """
    smaps = where / "smaps"
    env = {**kw.pop("env", os.environ), "SMAPS_TO": str(smaps)}
    runs = []
    for how in (native, run or enclave.run):
        smaps.unlink(missing_ok=True)
        runs.append(how(cmd, env=env, **kw))
        if how is native:
            assert frames_kib(smaps) == 0
    a, b = runs
    assert (b.returncode, b.stdout, b.stderr) == (a.returncode, a.stdout, a.stderr)
    assert frames_kib(smaps) >= least_kib
    return a.stdout


# ---- tools that look into programs ----


def test_memtester(enclave: Enclave) -> None:
    """As an ordinary user who may lock nothing: it goes on unlocked, as natively."""

    def no_locks() -> None:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))

    def verdicts(done: subprocess.CompletedProcess[str]) -> list[str]:
        text = re.sub(r"[^\n]*\x08", "", done.stdout)  # what it wrote over
        return [line for line in text.splitlines() if not line.startswith(("memtester", "Copyright"))]

    before = enclave.idle()["counters"]["grants"]
    cmd = [*USER, "memtester", "8M", "1"]
    a = native(cmd, preexec_fn=no_locks)
    b = enclave.run(cmd, preexec_fn=no_locks)
    assert a.returncode == b.returncode == 0
    assert verdicts(a) == verdicts(b)
    assert "unlocked" in b.stdout + b.stderr and "FAILURE" not in b.stdout
    assert enclave.idle()["counters"]["grants"] > before


GDB = ["gdb", "-q", "-nx", "-batch"]


def gdb(*commands: str) -> list[str]:
    return [arg for c in commands for arg in ("-ex", c)]


def test_gdb_runs(enclave: Enclave, build: Build, tmp_path: Path) -> None:
    """Under a debugger that is managed itself, without address randomisation: break, backtrace, variables in the arena, continue."""
    cmd = [
        *GDB,
        *gdb("break inner if depth == 0", "run", "backtrace", "print *box->next", "print box->text", "print b->number"),
        *gdb("next", "next", "print b->untouched[100 << 12]", "set var b->number = 30", "info threads", "continue"),
        build("debuggee", "-g", "-O0"),
    ]
    smaps = tmp_path / "smaps"
    outs = []
    for run in (native, enclave.run):
        done = run(cmd, env=os.environ | {"SMAPS_TO": str(smaps)})
        text = re.sub(r"0x[0-9a-f]+|process \d+|LWP \d+", "N", done.stdout)
        outs.append((done.returncode, re.sub(r" <repeats.*?>", "", text)))
    assert outs[0] == outs[1]
    assert '"box number 3"' in outs[1][1] and "exited with code 041" in outs[1][1], outs[1][1]  # 30 + 3 calls
    assert frames_kib(smaps) > 500


@contextlib.contextmanager
def running_debuggee(enclave: Enclave, build: Build, become: list[str]) -> Iterator[tuple[int, Callable[[], None]]]:
    """A managed program whose threads count; the function asks whether they go on."""
    p = enclave.popen([*become, build("debuggee", "-g", "-O0"), "wait"], stdin=subprocess.PIPE)
    assert p.stdin and p.stdout and p.stdout.readline() == "runs\n"

    def goes_on() -> None:
        assert p.stdin and p.stdout
        p.stdin.write("c")
        p.stdin.flush()
        assert p.stdout.readline() == "goes on\n"

    try:
        yield p.pid, goes_on
        goes_on()
        p.stdin.close()
        assert p.stdout.read() == "4\n" and p.wait(20) == 4
    finally:
        p.kill()
        p.wait(10)


@as_both
def test_gdb_attaches(enclave: Enclave, build: Build, become: list[str]) -> None:
    """To a running managed program; it sees its memory, calls a function in it, detaches, and the program goes on."""
    with running_debuggee(enclave, build, become) as (pid, goes_on):
        for _ in range(2):
            done = native(
                [
                    *[*GDB, "-p", pid],
                    *gdb("print box->number", "print box->next->next->text", "thread apply all bt"),
                    *gdb("print inner(box, 1)", "break work", "delete", "detach"),
                ]
            )
            assert "$1 = 4" in done.stdout and '$2 = "box number 2"' in done.stdout, done
            assert "$3 = 4" in done.stdout and len(re.findall(r"\bwork \(", done.stdout)) == 2, done.stdout
            goes_on()


def test_one_thread_under_gdb(enclave: Enclave, build: Build) -> None:
    """docs/limits.md: a first touch by the one thread that gdb lets run waits until the others run, too; gdb can interrupt it."""
    p = enclave.popen([build("debuggee", "-g", "-O0"), "wait"], stdin=subprocess.PIPE)
    debugger = None
    try:
        assert p.stdout and p.stdout.readline() == "runs\n"
        commands = gdb("set scheduler-locking on", "print inner(box, 3)", "set scheduler-locking off", "finish")
        cmd = [*GDB, "-p", str(p.pid), *commands]
        debugger = subprocess.Popen(cmd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        wchan = Path(f"/proc/{p.pid}/wchan")
        for _ in range(2):
            wait_for(lambda: wchan.read_text() == "handle_userfault", 30, "it does not wait")
            time.sleep(0.5)
        debugger.send_signal(signal.SIGINT)
        out = debugger.communicate(timeout=30)[0]
        assert "received signal SIGINT" in out and "Value returned is $1 = 1\n" in out, out
    finally:
        for process in (debugger, p):
            if process:
                process.kill()
                process.wait(10)


def test_strace_attaches(enclave: Enclave, build: Build, tmp_path: Path) -> None:
    """strace -f of a program started under it is in test_programs.py."""
    with running_debuggee(enclave, build, []) as (pid, goes_on):
        trace = tmp_path / "trace"
        tracer = subprocess.Popen(["strace", "-f", "-p", str(pid), "-o", trace], stderr=subprocess.DEVNULL)
        wait_for(lambda: trace.exists() and trace.read_text().count("mprotect(") > 10, 20, "nothing is traced")
        goes_on()
        tracer.send_signal(signal.SIGINT)
        tracer.wait(20)


def test_without_address_randomisation(enclave: Enclave, build: Build, tmp_path: Path) -> None:
    a = native(["setarch", "-R", build("calls")])
    b = enclave.run(["setarch", "-R", build("calls")])
    assert (a.returncode, a.stdout, a.stderr) == (b.returncode, b.stdout, b.stderr)
    shell = f"{build('inherited')} > /dev/null; {build('inherited')} > /dev/null; echo $?"
    assert same(enclave, ["setarch", "-R", "bash", "-c", shell], tmp_path, 8 << 10) == "0\n"


@as_both
def test_memory_seen_by_another_process(enclave: Enclave, build: Build, shared_tmp: Path, become: list[str]) -> None:
    same(enclave, [*become, build("looked_at")], shared_tmp, 4)


def test_untouched_memory_seen_by_another_process(enclave: Enclave, build: Build) -> None:
    """docs/limits.md: /proc/PID/mem of a page that was never touched is an error; nothing waits."""
    expected = native([build("looked_at"), "untouched"]).stdout
    assert enclave.run([build("looked_at"), "untouched"]).stdout == expected.replace("mem 16", "mem -1")


MAPS_LINE = re.compile(
    r"([0-9a-f]{8,16})-([0-9a-f]{8,16}) [r-][w-][x-][ps] [0-9a-f]{8,} [0-9a-f]{2,}:[0-9a-f]{2,} \d+ *(?: (\S.*))?"
)
PARSER = """
import re, sys
b = [bytearray(300_000) for _ in range(50)]
end = 0
for line in open('/proc/self/maps'):
    m = re.fullmatch(sys.argv[1], line.rstrip('\\n'))
    assert m, line
    assert end <= int(m[1], 16) < int(m[2], 16), line
    end = int(m[2], 16)
print('sorted', flush=True)
sys.stdin.read()
"""


def test_maps_are_for_parsers(enclave: Enclave) -> None:
    """Every line of /proc/PID/maps as documented, sorted, without overlaps; psutil and gdb read it too."""
    p = enclave.popen([sys.executable, "-c", PARSER, MAPS_LINE.pattern], stdin=subprocess.PIPE)
    try:
        assert p.stdout and p.stdin and p.stdout.readline() == "sorted\n"
        maps = psutil.Process(p.pid).memory_maps(grouped=False)
        assert sum(m.rss for m in maps if "sylvie-ram" in m.path) >= 10 << 20
        listing = native([*GDB, "-p", p.pid, *gdb("info proc mappings", "detach")]).stdout
        assert listing.count("sylvie-ram") >= sum("sylvie-ram" in m.path for m in maps) > 0
        p.stdin.close()
        assert p.wait(20) == 0
    finally:
        p.kill()


# ---- other languages, other allocators ----

GO = """
package main
%s
import ("fmt"; "hash/fnv"; "os"; "runtime"; "sync")
type node struct { l, r *node; v [6]uint64 }
func grow(d int, s uint64) *node {
	n := &node{}
	for i := range n.v { n.v[i] = s * uint64(i+1) }
	if d > 0 { n.l, n.r = grow(d-1, s*3+1), grow(d-1, s*5+7) }
	return n
}
func sum(n *node) (t uint64) {
	if n == nil { return }
	for _, x := range n.v { t += x }
	return t ^ (sum(n.l)*31 + sum(n.r))
}
func main() {
	var wg sync.WaitGroup
	out := make([]uint64, 8)
	for g := range out {
		wg.Add(1)
		go func(g int) {
			defer wg.Done()
			for i := 0; i < 6; i++ { out[g] += sum(grow(13, uint64(g*100+i))) }
			b := make([]byte, 8<<20)
			h := fnv.New64()
			for i := range b { b[i] = byte(i * g) }
			h.Write(b)
			out[g] ^= h.Sum64()
		}(g)
	}
	wg.Wait()
	runtime.GC()
	maps, _ := os.ReadFile("/proc/self/smaps")
	os.WriteFile(os.Getenv("SMAPS_TO"), maps, 0o666)
	fmt.Println(out)
}
"""
# With cgo a C allocation too, from many goroutines.
CGO = """
/*
#include <stdlib.h>
#include <string.h>
static char *volatile kept;
static void fill(void) { kept = malloc(4 << 20); memset(kept, 1, 4 << 20); }
*/
import "C"
"""


@pytest.mark.parametrize("kind", ["static", "cgo"])
def test_go(enclave: Enclave, shared_tmp: Path, kind: str) -> None:
    """A static Go binary runs natively. With cgo, C's memory is managed; Go's own heap has an address of its choice and is native."""
    if not shutil.which("go"):
        pytest.skip("no Go compiler here")
    source, program = shared_tmp / "main.go", shared_tmp / "program"
    source.write_text(GO % CGO + "func init() { C.fill() }\n" if kind == "cgo" else GO % "")
    env = os.environ | {"CGO_ENABLED": str(int(kind == "cgo")), "GO111MODULE": "off", "GOCACHE": str(shared_tmp / "c")}
    subprocess.run(["go", "build", "-o", program, source], check=True, timeout=120, env=env, cwd=shared_tmp)
    for become in ([], USER):
        if kind == "cgo":
            same(enclave, [*become, program], shared_tmp, 4 << 10)
            continue
        expected = native([program]).stdout
        done = enclave.run([*become, program], env=os.environ | {"SMAPS_TO": "/dev/null"})
        assert (done.returncode, done.stdout) == (0, expected)
        assert become or "natively" in done.stderr


JAVA = """
import java.nio.file.*;
import java.util.*;
public class Main {
  public static void main(String[] a) throws Exception {
    Thread[] t = new Thread[4];
    long[] r = new long[4];
    for (int k = 0; k < 4; k++) {
      int kk = k;
      t[k] = new Thread(() -> {
        Random x = new Random(kk);
        List<byte[]> l = new ArrayList<>();
        for (int i = 0; i < 40000; i++) {
          byte[] b = new byte[1 + x.nextInt(4000)];
          Arrays.fill(b, (byte) i);
          if (l.size() > 300) l.set(x.nextInt(300), b); else l.add(b);
          r[kk] += b[b.length - 1];
        }
        java.nio.ByteBuffer d = java.nio.ByteBuffer.allocateDirect(3 << 20);
        for (int i = 0; i < d.capacity(); i += 512) d.put(i, (byte) (i >> 9));
        for (int i = 0; i < d.capacity(); i += 512) r[kk] = r[kk] * 31 + d.get(i);
        for (byte[] b : l) for (byte c : b) r[kk] = r[kk] * 31 + c;
      });
      t[k].start();
    }
    for (Thread q : t) q.join();
    System.gc();
    Files.copy(Path.of("/proc/self/smaps"), Path.of(System.getenv("SMAPS_TO")), StandardCopyOption.REPLACE_EXISTING);
    System.out.println(Arrays.toString(r));
  }
}
"""


@pytest.mark.parametrize("collector", ["-XX:+UseSerialGC", "-XX:+UseG1GC"])
def test_java(enclave: Enclave, shared_tmp: Path, collector: str) -> None:
    if not shutil.which("javac"):
        pytest.skip("no Java compiler here")
    (shared_tmp / "Main.java").write_text(JAVA)
    subprocess.run(["javac", "-d", shared_tmp, shared_tmp / "Main.java"], check=True, timeout=120)
    for become in ([], USER):
        (shared_tmp / "smaps").unlink(missing_ok=True)
        same(enclave, [*become, "java", "-Xmx96m", collector, "-cp", shared_tmp, "Main"], shared_tmp, 6 << 10)


NODE = """
const { Worker, isMainThread, parentPort, workerData } = require('worker_threads');
const crypto = require('crypto'), fs = require('fs');
if (isMainThread) {
  const out = [];
  for (let i = 0; i < 3; i++)
    new Worker(__filename, { workerData: i }).on('message', m => {
      out[i] = m;
      if (out.filter(x => x).length < 3) return;
      fs.writeFileSync(process.env.SMAPS_TO, fs.readFileSync('/proc/self/smaps'));
      console.log(out.join(' '));
    });
} else {
  const h = crypto.createHash('sha256'), kept = [];
  for (let i = 0; i < 40; i++) {
    const b = Buffer.alloc(1 << 20, i + workerData);
    b.writeUInt32LE(i, 77);
    h.update(b);
    const o = [];
    for (let k = 0; k < 3000; k++) o.push({ k, s: 'x'.repeat(k % 100) });
    h.update(JSON.stringify(o));
    if (i % 8 == 0) kept.push(b);
  }
  for (const b of kept) h.update(b);
  parentPort.postMessage(h.digest('hex'));
}
"""


def test_node(enclave: Enclave, shared_tmp: Path) -> None:
    """Buffers and workers."""
    if not shutil.which("node"):
        pytest.skip("no Node.js here")
    (shared_tmp / "main.js").write_text(NODE)
    for become in ([], USER):
        (shared_tmp / "smaps").unlink(missing_ok=True)
        same(enclave, [*become, "node", shared_tmp / "main.js"], shared_tmp, 4 << 10)


@pytest.mark.parametrize("name", ["libjemalloc", "libmimalloc"])
def test_other_allocators(enclave: Enclave, build: Build, tmp_path: Path, name: str) -> None:
    """Preloaded by the user: its memory is managed, forks and threads work, and LD_PRELOAD is what the user gave."""
    library = next((p.name for p in sorted(LIBRARIES.glob(f"{name}.so.?"))), None)
    if not library:
        pytest.skip(f"no {name} here")
    env = os.environ | {"LD_PRELOAD": str(LIBRARIES / library)}
    code = "import os, sys; b = [bytes(i % 250 for i in range(n)) for n in range(0, 200_000, 4001)]; print(os.environ['LD_PRELOAD'], sum(map(sum, b)), len({id(x) for x in b})); os.fork() or os._exit(len([bytes(9999) for i in range(1000)]) % 7); print(os.wait()[1])"
    env["PYTHONMALLOC"] = "malloc"
    a, b = native([sys.executable, "-c", code], env=env), enclave.run([sys.executable, "-c", code], env=env)
    assert (a.returncode, a.stdout, a.stderr) == (b.returncode, b.stdout, b.stderr) and str(
        LIBRARIES / library
    ) in b.stdout
    tls = build("many_threads", "-DTLS_BLOCK", "-shared", "-fPIC")
    for cmd, least in (
        ([build("many_threads"), tls], 16 << 10),
        ([build("stacks")], 1 << 10),
        ([build("inherited")], 4 << 10),
    ):
        assert same(enclave, cmd, tmp_path, least, env=env)
    shell = 'echo "$LD_PRELOAD"; bash -c \'echo "$LD_PRELOAD"; grep -c malloc.so /proc/self/maps\''
    a, b = native(["bash", "-c", shell], env=env), enclave.run(["bash", "-c", shell], env=env)
    assert a.stdout == b.stdout and a.stdout.count(library) == 2


# ---- threads, stacks, signals, locks ----


def test_threads_by_the_thousand(enclave: Enclave, build: Build, tmp_path: Path) -> None:
    """A library with large thread-local memory and 1,000 threads that end; 64 threads that fault the same pages, and different ones."""
    library = build("many_threads", "-DTLS_BLOCK", "-shared", "-fPIC")
    out = same(enclave, [build("many_threads"), library], tmp_path, 32 << 10)
    assert "1000 of 1000" in out and "torn write: 0" in out


@as_both
def test_stacks_and_signals_in_the_arena(enclave: Enclave, build: Build, shared_tmp: Path, become: list[str]) -> None:
    """1,000 coroutines, alternate signal stacks, threads' stacks; handlers that allocate or jump away while threads fault."""
    assert "something else: 0" in same(enclave, [*become, build("stacks")], shared_tmp, 4 << 10)


@as_both
def test_futexes_and_mutexes(enclave: Enclave, build: Build, shared_tmp: Path, become: list[str]) -> None:
    """Private and other futexes, robust mutexes whose owner ends, locks between managed processes."""
    assert "four processes counted 8000" in same(enclave, [*become, build("locks")], shared_tmp, 4)


# ---- processes ----


@as_both
def test_every_way_to_make_a_process(enclave: Enclave, build: Build, shared_tmp: Path, become: list[str]) -> None:
    """fork, _Fork, raw clone, clone onto a stack, vfork, posix_spawn, nested forks, orphans, exec without environment and through static."""
    static, dynamic, smaps = build("processes", "-static"), build("processes"), shared_tmp / "smaps"
    runs = []
    for run in (native, enclave.run):
        smaps.unlink(missing_ok=True)
        runs.append(run([*become, dynamic, static, dynamic], env=os.environ | {"SMAPS_TO": str(smaps)}))
    a, b = runs
    # What is put back into the environment for the next image is seen by a static one (docs/limits.md).
    out = re.sub(r"(static: LD_BIND_NOW=1) LD_PRELOAD=\S+libsylvie.so _SYLVIE=\S+", r"\1", b.stdout)
    assert (b.returncode, out, b.stderr) == (a.returncode, a.stdout, a.stderr)
    assert "dynamic again" in a.stdout and frames_kib(smaps) >= 1 << 10


def test_last_thread_leaves_by_itself(enclave: Enclave, build: Build, tmp_path: Path) -> None:
    """exit(2) of the last thread ends the process, with its status: no thread of ours keeps it."""
    for args in (["0"], ["1"], ["3"], ["0", "released"], ["2", "released"], *[["8", "together"]] * 5):
        same(enclave, [build("last_thread"), *args], tmp_path, 4)


def test_namespaces(enclave: Enclave, build: Build, tmp_path: Path) -> None:
    out = same(enclave, [build("namespaces")], tmp_path, 1 << 10)
    assert "setns mnt: ok" in out and "process 1 of its namespace" in out
    # A user namespace may only be made by a process of one thread: docs/decisions/0005.
    assert enclave.run([build("namespaces"), "user"]).stdout == native([build("namespaces"), "user"]).stdout


def test_daemon(enclave: Enclave, tmp_path: Path) -> None:
    """daemon(3), then all descriptors closed: the grandchild has its memory, and more of it."""
    out = tmp_path / "out"
    code = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
before = bytes(range(256)) * 20000
assert libc.daemon(0, 0) == 0
libc.close_range(3, 0xffffffff, 0)
assert os.open('/', os.O_RDONLY) == 3
b = bytearray(40 << 20)
b[::4096] = b'x' * len(b[::4096])
line = f"{before == bytes(range(256)) * 20000} {b.count(b'x')} {os.getppid() != int(sys.argv[2])} {os.getcwd()} {'sylvie-ram' in open('/proc/self/maps').read()}"
with open(sys.argv[1] + '.new', 'w') as f: f.write(line)
os.rename(sys.argv[1] + '.new', sys.argv[1])
"""
    for run, managed in ((native, False), (enclave.run, True)):
        out.unlink(missing_ok=True)
        assert run([sys.executable, "-c", code, out, os.getpid()]).returncode == 0
        wait_for(out.exists, 20, "the daemon says nothing")
        assert out.read_text() == f"True {40 * 256} True / {managed}"


def test_a_thousand_processes(enclave: Enclave, build: Build) -> None:
    """One after another; and a hundred at once, all with memory of the enclave."""
    counters = enclave.status()["counters"]
    shell = f'for i in $(seq 1000); do {build("last_thread")} || s=$?; [ $s = 5 ] || echo "status $s"; done; echo done'
    assert enclave.run(["bash", "-c", shell]).stdout == "done\n"
    after = enclave.idle()["counters"]
    assert after["registered"] - counters["registered"] >= 1000
    shell = f"for i in $(seq 100); do {build('last_thread')} hold <&0 & done; wait"
    p = enclave.popen(["bash", "-c", shell], stdin=subprocess.PIPE)
    try:
        assert p.stdin and p.stdout
        for _ in range(100):
            assert p.stdout.readline() == "there\n"
        wait_for(lambda: len([a for a in enclave.status()["address_spaces"] if a["mapped"] >= 256]) >= 100, 10, "not all have their memory")
        enclave.check()
        p.stdin.close()
        assert p.stdout.read() == "intact\n" * 100 and p.wait(20) == 0
    finally:
        if p.stdin:
            p.stdin.close()  # for what bash has started
        p.kill()
        p.wait(10)
    nothing_leaked(enclave)


def nothing_leaked(enclave: Enclave) -> None:
    frames = enclave.idle(30)["frames"]
    assert frames["mapped"] == frames["granted"] == 0
    assert frames["free"] + frames["reserved"] == frames["total"]
    enclave.check()


def test_exit_at_every_moment(enclave: Enclave, build: Build) -> None:
    """In every way, while threads are in the middle of faults; the status is the native one, and every frame returns."""
    rng = random.Random(11)
    ways = ["exit", "abort", "kill", "crash", "exec", "exec-thread", "spawn", "fork"]
    expected = {w: native([build("exits"), w, 100]).returncode for w in ways}
    cases = [(w, rng.randrange(0, 8000)) for w in ways for _ in range(8)]
    rng.shuffle(cases)
    shell = "; ".join(f"{build('exits')} {w} {us}; echo {w} $?" for w, us in cases)
    done = enclave.run(["bash", "-c", f"ulimit -c 0; {shell}"])
    status = {w: s if s >= 0 else 128 - s for w, s in expected.items()}
    assert done.stdout.splitlines() == [f"{w} {status[w]}" for w, _ in cases]
    nothing_leaked(enclave)


def test_kill_and_stop_at_random_moments(enclave: Enclave, build: Build) -> None:
    rng = random.Random(5)
    for _ in range(15):
        p = enclave.popen([build("exits"), "exit", 60_000_000])
        time.sleep(0.06 + rng.random() * 0.06)
        for _ in range(rng.randrange(4)):
            os.kill(p.pid, signal.SIGSTOP)
            time.sleep(rng.random() * 0.01)
            os.kill(p.pid, signal.SIGCONT)
            time.sleep(rng.random() * 0.01)
        if rng.random() < 0.3:
            os.kill(p.pid, signal.SIGSTOP)  # killed while it is stopped
        p.kill()
        assert p.wait(20) == -signal.SIGKILL
        assert p.stdout and p.stdout.read() == ""
    nothing_leaked(enclave)


# ---- what a program sees of its surroundings ----


def arrange() -> None:
    """Everything that exec hands on, other than usual."""
    os.umask(0o027)
    os.nice(3)
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGWINCH, signal.SIGRTMIN + 3])
    for s in (signal.SIGHUP, signal.SIGUSR2, signal.SIGURG):
        signal.signal(s, signal.SIG_IGN)
    for s in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(s, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGWINCH)  # stays pending
    signal.setitimer(signal.ITIMER_REAL, 600)
    for limit, values in {
        resource.RLIMIT_NOFILE: (200, 300), resource.RLIMIT_CORE: (0, 12345), resource.RLIMIT_STACK: (4 << 20, 16 << 20),
        resource.RLIMIT_FSIZE: (1 << 30, 1 << 31), resource.RLIMIT_MEMLOCK: (1 << 16, 1 << 17), resource.RLIMIT_NICE: (5, 10),
        resource.RLIMIT_CPU: (500, 600), resource.RLIMIT_SIGPENDING: (50, 60), resource.RLIMIT_MSGQUEUE: (7777, 8888),
    }.items():  # fmt: skip
        hard = resource.getrlimit(limit)[1]
        resource.setrlimit(limit, values if hard < 0 else tuple(min(v, hard) for v in values))
    null = os.open("/etc/passwd", os.O_RDONLY)
    os.lseek(null, 3, os.SEEK_SET)
    os.dup2(null, 40, inheritable=True)
    os.dup2(null, 17, inheritable=True)
    os.close(null)


BELOW = {
    "itself": [],
    "shell": ["sh", "-c", '"$@"; s=$?; echo "status $s"; exit $s', "sh"],
    "exec in a shell": ["bash", "-c", 'exec "$@"', "bash"],
    "Python": [
        sys.executable,
        "-c",
        "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:], close_fds=False, restore_signals=False).returncode % 256)",
    ],
    "env": ["env", "-i", "A=1", "LC_ALL=C", "SMAPS_TO=/dev/null"],
    "session": ["setsid", "-w"],
}


@as_both
def test_transparency(enclave: Enclave, build: Build, shared_tmp: Path, become: list[str]) -> None:
    """Environment, arguments, descriptors, limits, signals, umask, nice, policy, directory, ids, status: as natively."""
    smaps = shared_tmp / "smaps"
    env = {"PATH": os.environ["PATH"], "Z": "1", "EMPTY": "", "A B": "c d", "LC_TIME": "C", "SMAPS_TO": str(smaps)}
    for below, prefix in BELOW.items():
        cmd = [*become, *prefix, build("inherited"), "exit", "33", "an argument", "", "$x"]
        runs = []
        for run in (native, enclave.run):
            smaps.unlink(missing_ok=True)
            runs.append(run(cmd, env=env, cwd=shared_tmp, preexec_fn=arrange, stdin=subprocess.DEVNULL))
        a, b = runs
        assert a.stdout.splitlines() == b.stdout.splitlines(), below
        assert (a.returncode, a.stderr) == (b.returncode, b.stderr) == (33, ""), below
        assert below == "env" or frames_kib(smaps) >= 8 << 10, below


def test_closed_standard_streams(enclave: Enclave, build: Build, tmp_path: Path) -> None:
    """A program that is started with descriptors 0 and 2 closed sees them closed."""
    out = []
    for prefix in ([], enclave.command([])):
        done = subprocess.run(
            ["bash", "-c", 'exec "$@" 0<&- 2>&-', "x", *prefix, build("inherited")],
            env={"PATH": os.environ["PATH"]}, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        out.append((done.returncode, done.stdout))
    assert out[0] == out[1]


def test_every_end_is_seen(enclave: Enclave, build: Build) -> None:
    """Exit statuses and every terminating signal, by the shell and by the caller of `sylvie run`."""
    program = build("inherited")
    signals = [s for s in range(1, 32) if s not in (17, 18, 19, 20, 21, 22, 23, 28)] + [34, 50, 64]
    shell = "ulimit -c 0; " + "; ".join(
        [f"{program} signal {s} > /dev/null; echo {s} $?" for s in signals]
        + [f"{program} exit {n} > /dev/null; echo $?" for n in (0, 1, 127, 255, 256)]
    )
    a, b = native(["bash", "-c", shell]), enclave.run(["bash", "-c", shell])
    assert a.stdout == b.stdout and len(a.stdout.splitlines()) == len(signals) + 5
    for s in (signal.SIGHUP, signal.SIGSYS, signal.SIGPIPE, signal.SIGXCPU):
        cmd = [program, "signal", int(s)]
        assert native(cmd).returncode == enclave.run(cmd).returncode == -s


def test_a_user_reopens_nothing(enclave: Enclave) -> None:
    """The service threads have a descriptor table of their own, which /proc shows: an ordinary user's program gets nothing from there."""
    code = """
import glob, os
b = bytearray(b'x' * 3_000_000)
seen = opened = 0
for name in glob.glob('/proc/self/task/*/fd/*') + glob.glob('/proc/self/map_files/*'):
    try: link = os.readlink(name)
    except OSError: continue
    if 'sylvie' not in link and 'userfaultfd' not in link: continue
    seen += 1
    for flags in (os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC):
        try: opened += os.open(name, flags) >= 0
        except OSError: pass
print(seen > 0, opened, b.count(b'x'))
"""
    done = enclave.run([*USER, sys.executable, "-c", code])
    if done.returncode == 126 or "Permission" in done.stderr:
        done = enclave.run([*USER, "/usr/bin/python3", "-c", code])
    assert done.stdout == "True 0 3000000\n", done


@pytest.mark.alone
def test_many_mappings_outlive_the_enclave(own_enclave: Enclave) -> None:
    """A program with more mappings than the machine usually allows goes on after `sylvie down` put vm.max_map_count back."""
    code = """
import ctypes, mmap, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
m = mmap.mmap(-1, 4096 * 40_000, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
at = ctypes.addressof(ctypes.c_char.from_buffer(m))
m[::4096] = b'x' * 40_000
for i in range(0, 40_000, 2):
    assert libc.mprotect(at + i * 4096, 4096, 1) == 0, i
print('there', flush=True)
sys.stdin.readline()
kept = []
for i in range(200):
    kept.append(bytearray(b'y' * 500_000))
    if i % 3: kept.pop(0)
assert m[::4096] == b'x' * 40_000
print('ok', len(kept))
"""
    p = own_enclave.popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    try:
        assert p.stdin and p.stdout and p.stdout.readline() == "there\n"
        own_enclave.cli("down")
        p.stdin.write("\n")
        p.stdin.close()
        assert p.stdout.read() == "ok 67\n" and p.wait(20) == 0
    finally:
        p.kill()
        p.wait(10)
