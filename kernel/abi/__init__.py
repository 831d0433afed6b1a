"""The ABI as Python sees it: ``sylvie.h`` through cffi, and NumPy dtypes made from its structs (nothing is retyped)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from kernel._sylvie import ffi, lib

__all__ = [
    "CPU_DTYPE", "FRAME_DTYPE", "HEAT_DTYPE", "MSG_DTYPE", "OP_DTYPE", "STORED_DTYPE", "TASK_DTYPE", "TASK_MSG_DTYPE",
    "dtype_of", "ffi", "lib", "names",
]  # fmt: skip


def dtype_of(name: str) -> np.dtype[Any]:
    """NumPy structured dtype of a C type, e.g. ``struct sy_msg``: same offsets, same size. TypeError for what has no such form."""
    return _dtype(ffi.typeof(name))


def _dtype(ctype: Any) -> np.dtype[Any]:
    if ctype.kind == "primitive":
        if ctype.cname in ("float", "double"):
            return np.dtype(f"f{ffi.sizeof(ctype)}")
        return np.dtype(f"{'u' if ctype.cname.startswith('u') else 'i'}{ffi.sizeof(ctype)}")
    if ctype.kind == "array":
        return np.dtype((_dtype(ctype.item), (ctype.length,)))
    if ctype.kind == "struct":
        fields = ctype.fields
        return np.dtype({
            "names": [n for n, _ in fields],
            "formats": [_dtype(f.type) for _, f in fields],
            "offsets": [f.offset for _, f in fields],
            "itemsize": ffi.sizeof(ctype),
        })  # fmt: skip
    raise TypeError(f"{ctype.cname} has no NumPy form")


@functools.cache
def names(prefix: str) -> Mapping[int, str]:
    """Value -> name of the ABI's constants that begin with prefix, e.g. ``names("SY_FRAME_")[1] == "FREE"``."""
    return MappingProxyType({getattr(lib, n): n[len(prefix) :] for n in dir(lib) if n.startswith(prefix) and isinstance(getattr(lib, n), int)})


MSG_DTYPE = dtype_of("struct sy_msg")
FRAME_DTYPE = dtype_of("struct sy_frame")
OP_DTYPE = dtype_of("struct sy_op")
HEAT_DTYPE = dtype_of("struct sy_heat")
STORED_DTYPE = dtype_of("struct sy_stored")
TASK_DTYPE = dtype_of("struct sy_task")
CPU_DTYPE = dtype_of("struct sy_cpu")
TASK_MSG_DTYPE = dtype_of("struct sy_task_msg")  # MSG_DTYPE seen otherwise: events.view(TASK_MSG_DTYPE)
