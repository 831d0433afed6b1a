"""Boots a machine with two NUMA nodes under QEMU (software emulation: no KVM needed) and runs pytest in it; ends with pytest's exit status.

    tests/vm/run.py [arguments of pytest]          (make vmtest)

The machine is Debian's cloud kernel, whose modules are not needed, and one initramfs: this Python, the virtual environment, this tree, and the programs that
the tests run, all at the paths that they have here. Everything is in build/vm and made anew when what it consists of has changed.
"""

from __future__ import annotations

import hashlib
import os
import re
import resource
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "vm"
KERNEL_PACKAGE = "linux-image-cloud-amd64"
NODE_MIB = 1536
DISTANCE = 26  # of the two nodes: none that anybody assumes
# Not what came with x86-64-v3: QEMU 7.2 emulates it for the first time, and NumPy's argsort, which uses it, gave wrong results.
CPU = "max,-avx,-avx2,-bmi1,-bmi2,-f16c,-fma"
SLOW = 10  # the emulated machine beside a real one; tests wait so much longer
LIMIT = float(os.environ.get("SYLVIE_VM_LIMIT", 900))  # seconds for everything in the machine

# What is run there: the real topology, and the core on it.
TESTS = [
    "tests/test_numa.py::test_the_kernels_topology_is_shown",
    "tests/test_numa.py::test_each_nodes_ram_is_its_own",
    "tests/test_numa.py::test_pages_come_to_the_cpu_that_touches_them",
    "tests/test_numa.py::test_hot_pages_come_to_the_fast_node",
    "tests/test_numa.py::test_what_this_kernel_lacks",
    "tests/test_numa.py::test_heat_comes_from_hint_faults",
    "tests/test_autonuma.py::test_interleaved",
    "tests/test_autonuma.py::test_all_components_killed_at_once",
    "tests/test_autonuma.py::test_the_machines_own_nodes",
    "tests/test_autonuma.py::test_shown",
    "tests/test_thp.py::test_mapped_by_huge_entries_while_threads_write",
    "tests/test_thp.py::test_who_does_not_want_them_has_none[never]",
    "tests/test_programs.py::test_memory_is_really_managed",
    "tests/test_programs.py::test_every_call_behaves_as_natively",
    "tests/test_programs.py::test_calls_and_forks_past_libc",
    "tests/test_programs.py::test_bash_pipeline",
    "tests/test_programs.py::test_fork_under_write_load",
    "tests/test_fork.py::test_memory_only_for_what_is_written",
]
PROGRAMS = ["bash", "cat", "echo", "ls", "mount", "prlimit", "seq", "setpriv", "sha256sum", "sleep", "sort", "tr", "true",
            "umount", "wc"]  # fmt: skip
# Of the standard library, of the packages and of this tree, what no test there needs: unpacking takes time, and memory.
LIBRARY_WITHOUT = r"test|idlelib|tkinter|turtledemo|lib2to3|ensurepip|pydoc_data|(site|dist)-packages|config-.*|.*\.opt-[12]\.pyc|.*\.[ao]"
PACKAGES_WITHOUT = r"tests|(mypy|mypyc|pip|ruff|matplotlib|ast_serialize|librt)([-.].*)?|[0-9a-f]+__mypyc.*"
TREE_WITHOUT = r"\..*|build|results|fuzz"


class Missing(Exception):
    """Something that has to be here is not; says what, and how to get it."""


# ---- the kernel ----
def kernel() -> Path:
    """Debian's kernel image, unpacked below build/vm, nothing of it installed."""
    if found := sorted(BUILD.glob("kernel/boot/vmlinuz-*")):
        return found[-1]
    if not shutil.which("apt-get"):
        raise Missing(f"no kernel: put a vmlinuz, such as of Debian's package {KERNEL_PACKAGE}, into {BUILD}/kernel/boot")
    fresh = BUILD / "kernel.new"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    if not fetched(fresh):  # apt's lists are old, or there are none
        if os.geteuid() == 0:
            subprocess.run(["apt-get", "-qq", "update"], timeout=300)
        if not fetched(fresh):
            raise Missing(f"apt-get cannot download {KERNEL_PACKAGE}: apt-get update, as root")
    deb = next(fresh.glob("*.deb"))
    subprocess.run(["dpkg-deb", "-x", deb, fresh], check=True, timeout=120)
    deb.unlink()
    shutil.rmtree(fresh / "lib", ignore_errors=True)  # its modules
    fresh.rename(BUILD / "kernel")
    return kernel()


def fetched(to: Path) -> bool:
    """Whether apt has put the package that KERNEL_PACKAGE stands for there."""
    depends = subprocess.run(["apt-cache", "depends", KERNEL_PACKAGE], capture_output=True, text=True, timeout=60).stdout
    if not (name := re.search(r"Depends: (linux-image-\S+)", depends)):
        return False
    print(f"fetching {name[1]}", flush=True)
    # As root apt would fetch as a user of its own, who may not write there.
    done = subprocess.run(["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", name[1]], cwd=to, timeout=300)
    return done.returncode == 0


# ---- the image ----
class Files:
    """What goes into an archive, at the paths that it has here; but for what is in ``before``, an archive that the machine has, too."""

    def __init__(self, before: Files | None = None) -> None:
        self.before: set[Path] = before.paths if before else set()
        self.paths: set[Path] = set()

    def add(self, path: Path) -> None:
        """A file, directory (alone) or symbolic link; with the directories above it and what links lead to."""
        if path in self.paths or path in self.before:
            return
        if path != path.parent:
            self.add(path.parent)
            if (real := path.parent.resolve()) != path.parent:  # the links are there now; what is named goes to where they lead
                self.add(real / path.name)
                return
        self.paths.add(path)
        if path.is_symlink():
            self.add(path.parent / os.readlink(path))

    def tree(self, top: Path, without: str = "-") -> None:
        """Everything below ``top`` but directories and files of names that match ``without``."""
        self.add(top)
        for directory, names, files in os.walk(top):
            names[:] = sorted(n for n in names if not re.fullmatch(without, n))
            for name in [*names, *sorted(files)]:
                if not re.fullmatch(without, name):
                    self.add(Path(directory, name))

    def libraries(self) -> None:
        """The shared libraries of every program and library so far."""
        objects = [p for p in self.paths if p.is_file() and not p.is_symlink() and (os.access(p, os.X_OK) or ".so" in p.name)]
        elf = [str(p) for p in objects if p.open("rb").read(4) == b"\x7fELF"]
        said = subprocess.run(["ldd", *elf], capture_output=True, text=True, timeout=120).stdout
        for path in sorted(set(re.findall(r"(?:=> |^\s+)(/\S+) \(0x", said, re.M))):
            self.add(Path(os.path.normpath(path)))

    def key(self) -> str:
        """Changes when anything does."""
        h = hashlib.sha256(Path(__file__).read_bytes())
        for path in sorted(self.paths):
            s = path.lstat()
            h.update(f"{path} {s.st_mode} {0 if stat.S_ISDIR(s.st_mode) else (s.st_size, s.st_mtime_ns)}\n".encode())
        return h.hexdigest()

    def archive(self) -> Iterator[bytes]:
        """As cpio's newc format (Documentation/driver-api/early-userspace/buffer-format.rst)."""
        for path in sorted(self.paths - {Path("/")}):
            s = path.lstat()
            content = os.readlink(path).encode() if path.is_symlink() else path.read_bytes() if path.is_file() else b""
            yield member(str(path).lstrip("/"), s.st_mode, content, int(s.st_mtime))
        yield member("TRAILER!!!", 0, b"")


def member(name: str, mode: int, content: bytes, mtime: int = 0) -> bytes:
    """One of a newc archive, owned by root."""
    fields = [0, mode, 0, 0, 1, mtime, len(content), 0, 0, 0, 0, len(name) + 1, 0]
    head = b"070701" + b"".join(b"%08X" % f for f in fields) + name.encode() + b"\0"
    return head + b"\0" * (-len(head) % 4) + content + b"\0" * (-len(content) % 4)


def system() -> Files:
    """Python, the virtual environment, programs, libraries: what seldom changes."""
    f = Files()
    for name in PROGRAMS:
        if not (found := shutil.which(name)):
            raise Missing(f"{name} is not installed")
        f.add(Path(found))
    if not (busybox := shutil.which("busybox")):
        raise Missing("busybox is not installed: tools/system-packages vm")
    f.add(Path(busybox))
    for path in ("/bin", "/sbin", "/lib", "/lib64", "/bin/sh", "/etc/passwd", "/etc/group", "/etc/nsswitch.conf", "/usr/lib/locale/C.utf8"):
        if os.path.exists(path):
            f.add(Path(path))
    f.add(Path(sys.base_prefix))
    for directory in {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib", vars={"platbase": sys.base_exec_prefix})}:
        f.tree(Path(directory), LIBRARY_WITHOUT)
    venv = Path(sys.prefix)
    f.add(venv / "pyvenv.cfg")
    f.tree(venv / "bin", PACKAGES_WITHOUT)
    for directory in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        f.tree(Path(directory), PACKAGES_WITHOUT)
    f.libraries()
    return f


def tree(programs: Path, system: Files) -> Files:
    """This repository as it is, and the C programs of the tests."""
    f = Files(system)
    f.tree(ROOT, TREE_WITHOUT)
    f.tree(programs)
    f.libraries()
    return f


def compile_programs() -> Path:
    """tests/programs/*.c, as the tests' fixture compiles them."""
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import PROGRAMS as SOURCES
    from conftest import compile_program

    to = BUILD / "programs"
    to.mkdir(parents=True, exist_ok=True)
    for source in SOURCES.glob("*.c"):
        target = to / source.stem
        if not target.exists() or target.stat().st_mtime < max(p.stat().st_mtime for p in (source, *SOURCES.glob("*.h"))):
            compile_program(source.stem, target)
    return to


def image(arguments: list[str]) -> Path:
    """The initramfs: three archives, one after the other."""
    programs = compile_programs()
    # Compiled here in a second, there in a minute.
    subprocess.run([sys.executable, "-m", "compileall", "-q", "bus", "components", "kernel", "sylvie"], cwd=ROOT, timeout=120)
    base = system()
    parts = []
    for name, files in (("system", base), ("tree", tree(programs, base))):
        at, key = BUILD / f"{name}.cpio", files.key()
        noted = at.with_suffix(".key")
        if not at.exists() or not noted.exists() or noted.read_text() != key:
            with at.open("wb") as out:
                out.writelines(files.archive())
            noted.write_text(key)
            print(f"built {at.relative_to(ROOT)}: {at.stat().st_size >> 20} MiB", flush=True)
        parts.append(at)
    env = {"SYLVIE_TEST_SLOW": SLOW, "SYLVIE_TEST_PROGRAMS": programs, "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
    lines = [f"export {k}={shlex.quote(str(v))}" for k, v in env.items()]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-p", "no:xdist", "--color=no", "-v", "--tb=short",
               "--durations=0", f"--timeout={180 * SLOW}", *arguments]  # fmt: skip
    lines += [f"cd {shlex.quote(str(ROOT))}", shlex.join(command)]
    whole = BUILD / "initramfs.cpio"
    with whole.open("wb") as out:
        for part in parts:
            with part.open("rb") as f:
                shutil.copyfileobj(f, out)
            out.write(b"\0" * (-out.tell() % 512))
        out.write(member("init", 0o100755, (HERE / "init").read_bytes()))
        out.write(member("tests.sh", 0o100644, "\n".join([*lines, ""]).encode()))
        out.write(member("TRAILER!!!", 0, b""))
    return whole


# ---- the machine ----
def boot(vmlinuz: Path, initramfs: Path) -> int:
    """Runs it to its end, its console is ours; the status that it wrote to its second serial line."""
    if not (qemu := shutil.which("qemu-system-x86_64")):
        raise Missing("qemu-system-x86_64 is not installed: tools/system-packages vm")
    status = BUILD / "status"
    status.write_text("")
    command = [qemu, "-nodefaults", "-no-reboot", "-display", "none", "-accel", "tcg,thread=multi,tb-size=512", "-cpu", CPU, "-smp", "2",
               "-m", f"{2 * NODE_MIB}M", "-serial", "stdio", "-serial", f"file:{status}", "-kernel", str(vmlinuz), "-initrd", str(initramfs)]  # fmt: skip
    for node in range(2):
        command += ["-object", f"memory-backend-ram,id=m{node},size={NODE_MIB}M", "-numa", f"node,nodeid={node},cpus={node},memdev=m{node}"]
    command += ["-numa", f"dist,src=0,dst=1,val={DISTANCE}"]
    command += ["-append", "console=ttyS0 quiet panic=-1 mitigations=off norandmaps tsc=reliable no_timer_check random.trust_cpu=on"]
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by way of what ends the machine
    p = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    over = threading.Timer(LIMIT, p.kill)
    over.start()
    try:
        assert p.stdout
        for line in p.stdout:
            print(f"[{time.monotonic() - began:6.1f}] " + line.decode(errors="replace").rstrip("\r\n"), flush=True)
        p.wait(10)
    finally:
        late = not over.is_alive()
        over.cancel()
        p.kill()
        p.wait(10)
    text = status.read_text().strip()
    if not text.isdigit():
        print(f"vmtest: {f'not done after {LIMIT:g} s' if late else 'the machine ended without a result'}", file=sys.stderr)
        return 1
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"vmtest: {time.monotonic() - began:.0f} s ({used.ru_utime + used.ru_stime:.0f} of CPU time); pytest ended with {text}")
    return int(text)


def main() -> int:
    try:
        return boot(kernel(), image(sys.argv[1:] or TESTS))
    except Missing as what:
        print(f"vmtest: {what}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
