"""The one build path of the C parts: ``python -m kernel.native.build``.

Builds the cffi module ``kernel._sylvie`` (the gateway's C half with the ABI), the stub ``libsylvie.so``, the launcher and the keeper.
Builds only what is older than its sources. Exits 1 with a sentence when there is no compiler.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import cffi

HERE = Path(__file__).resolve().parent
KERNEL = HERE.parent
ABI = KERNEL / "abi" / "sylvie.h"
WARN = ["-O2", "-Wall", "-Wextra", "-Werror", "-std=gnu11"]
# The stub runs inside any program: no libc, no start files, nothing bound lazily, initialised before every other library.
STUB = ["-shared", "-fPIC", "-ffreestanding", "-fno-stack-protector", "-fcf-protection=none", "-fvisibility=hidden", "-nostdlib",
        "-Wl,-z,initfirst", "-Wl,-z,now", "-Wl,-z,noexecstack", "-Wl,-soname,libsylvie.so"]  # fmt: skip


def stale(target: Path, sources: list[Path]) -> bool:
    """True when target is missing or older than one of its sources."""
    return not target.exists() or any(s.stat().st_mtime > target.stat().st_mtime for s in sources)


def compile_c(cc: str, target: Path, source: str, flags: list[str]) -> None:
    """Compiles one C program or library. Raises CalledProcessError when the compiler refuses."""
    headers = [*HERE.glob("*.h"), ABI]
    if stale(target, [HERE / source, *headers, Path(__file__)]):
        fresh = target.with_suffix(".new")
        subprocess.run([cc, *WARN, *flags, "-o", fresh, str(HERE / source)], check=True)
        fresh.rename(target)  # in one step: programs may be running on the old one
        print(f"built {target.relative_to(KERNEL.parent)}")


def build_module() -> None:
    """Builds ``kernel/_sylvie*.so``: the gateway's C half and every layout of the ABI for Python."""
    target = KERNEL / f"_sylvie{sysconfig.get_config_var('EXT_SUFFIX')}"
    sources = [ABI, *HERE.glob("gateway*"), Path(__file__)]
    if not stale(target, sources):
        return
    ffi = cffi.FFI()
    ffi.cdef(ABI.read_text() + (HERE / "gateway.h").read_text())
    ffi.set_source(
        "kernel._sylvie",
        f'#include <stddef.h>\n#include <stdint.h>\n#include "{ABI}"\n#include "{HERE}/gateway.h"\n',
        sources=[str(HERE / "gateway.c")],
        extra_compile_args=["-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-std=gnu11", "-pthread"],
        libraries=["lz4"],
    )
    build_dir = KERNEL.parent / "build"
    built = ffi.compile(tmpdir=str(build_dir), verbose=False)
    Path(built).replace(target)
    print(f"built {target.relative_to(KERNEL.parent)}")


def main() -> int:
    """Builds everything; 0, or 1 with the reason on stderr."""
    cc = shutil.which("gcc") or shutil.which("cc")
    if cc is None:
        print("no C compiler: apt-get install gcc (or run `make setup` as root)", file=sys.stderr)
        return 1
    try:
        build_module()
        compile_c(cc, HERE / "libsylvie.so", "stub.c", STUB)
        compile_c(cc, HERE / "sylvie-launch", "launch.c", [])
        compile_c(cc, HERE / "sylvie-keeper", "keeper.c", [])
    except (subprocess.CalledProcessError, cffi.VerificationError) as e:
        print(f"the C parts did not build: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
