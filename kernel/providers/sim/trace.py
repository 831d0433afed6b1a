"""What programs touch, in order: read from a file, or made.

A trace file is a NumPy archive (``.npz``, readable by ``numpy.load`` without pickle) with

- ``vpage``: uint32 or uint64, shape (accesses,): the page of each access. Any numbers will do; those of a recorded trace are
  asid << 24 | page of the arena, so that programs are kept apart;
- ``about``: a 0-d string array, JSON: ``version`` 1 and whatever else there is to say (``name``; of a recorded trace ``command``,
  ``interval`` in seconds, ``lost`` events).

There are no times, no writes and no unmapping in it: a page that a program gives back and maps again is the same page touched again.
"""

from __future__ import annotations

import inspect
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

VERSION = 1
MOST = 1 << 28  # accesses, and pages, of a made trace


class BadTrace(ValueError):
    """What is wrong, and what would be right."""


@dataclass
class Trace:
    """``vpages``: the distinct pages, ascending, uint64, shape (pages,); ``pages``: of each access its index there, int64."""

    vpages: NDArray[np.uint64]
    pages: NDArray[np.int64]
    about: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.pages)

    def save(self, path: Path) -> None:
        """Writes the file. :raises OSError: it cannot be written"""
        with path.open("wb") as f:
            about = np.array(json.dumps({"version": VERSION} | self.about))
            np.savez_compressed(f, vpage=self.vpages[self.pages], about=about)


def trace_of(vpage: NDArray[Any], about: dict[str, Any]) -> Trace:
    """Of the page of each access, integers of shape (accesses,)."""
    vpages, pages = np.unique(np.asarray(vpage, np.uint64), return_inverse=True)
    return Trace(vpages, pages.astype(np.int64), about)


def load(path: Path) -> Trace:
    """:raises BadTrace: not a trace; OSError: cannot be read"""
    try:
        with np.load(path, allow_pickle=False) as z:
            vpage, about = z["vpage"], json.loads(str(z["about"]))
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, AttributeError, TypeError):
        raise BadTrace(f"{path} is not a trace: make one with `sylvie record -o FILE -- COMMAND`") from None
    if not isinstance(about, dict) or about.get("version") != VERSION:
        raise BadTrace(f"{path} is not a trace of version {VERSION}: record it again")
    if vpage.ndim != 1 or vpage.dtype.kind != "u" or not len(vpage):
        raise BadTrace(f"{path}: vpage must be unsigned integers of one dimension, at least one")
    return trace_of(vpage, about)


# ---- made ones: deterministic; their parameters are the arguments ----
def loop(pages: int = 10_000, accesses: int = 200_000) -> NDArray[np.int64]:
    """Round and round over all pages: what LRU can do nothing about unless all fit."""
    return np.arange(accesses) % pages


def zipf(pages: int = 10_000, accesses: int = 200_000, seed: int = 0, s: float = 1.0) -> NDArray[np.int64]:
    """Independent accesses; the k-th most wanted page with probability proportional to k**-s."""
    random = np.random.default_rng(seed)
    share = np.arange(1, pages + 1) ** -float(s)
    cumulated = np.cumsum(share / share.sum())
    rank = np.minimum(np.searchsorted(cumulated, random.random(accesses)), pages - 1)
    return np.asarray(random.permutation(pages)[rank])


def scan_plus_hot(
    pages: int = 10_000, accesses: int = 200_000, seed: int = 0, hot: float = 0.1, share: float = 0.5
) -> NDArray[np.int64]:
    """A part ``hot`` of the pages gets a ``share`` of the accesses, at random; the others are read through, round and round."""
    random = np.random.default_rng(seed)
    warm = min(pages - 1, max(1, int(pages * hot)))
    to_hot = random.random(accesses) < share
    return np.where(to_hot, random.integers(0, warm, accesses), warm + np.cumsum(~to_hot) % (pages - warm))


def phases(pages: int = 10_000, accesses: int = 200_000, seed: int = 0, phases: int = 8) -> NDArray[np.int64]:
    """One working set after the other: each a random third of the pages, touched at random (Denning's phases and transitions)."""
    random = np.random.default_rng(seed)
    sets = [random.permutation(pages)[: max(1, pages // 3)] for _ in range(phases)]
    bounds = np.linspace(0, accesses, phases + 1).astype(int)
    return np.concatenate([random.choice(s, n) for s, n in zip(sets, np.diff(bounds), strict=True)])


GENERATORS: dict[str, Callable[..., NDArray[np.int64]]] = {f.__name__: f for f in (loop, zipf, scan_plus_hot, phases)}


def describe(name: str) -> str:
    """How a generator is written, with its parameters and what they are if left out."""
    known = inspect.signature(GENERATORS[name]).parameters.values()
    return f"{name}:{','.join(f'{p.name}={p.default}' for p in known)}"


def generate(text: str) -> Trace:
    """The trace of "zipf:pages=10000,seed=1"; what is not given is as ``describe`` says. :raises BadTrace: cannot be made"""
    name, _, rest = text.partition(":")
    if name not in GENERATORS:
        raise BadTrace(f"{text} is neither a file nor a generator: write {'; '.join(map(describe, GENERATORS))}")
    known = inspect.signature(GENERATORS[name]).parameters
    given: dict[str, Any] = {}
    for pair in filter(None, rest.split(",")):
        key, _, value = pair.partition("=")
        if key not in known:
            raise BadTrace(f"{text}: {name} has no parameter {key!r}: write {describe(name)}")
        try:
            given[key] = type(known[key].default)(value)
        except ValueError:
            raise BadTrace(f"{text}: {key}={value} is not a number: write {describe(name)}") from None
    for key in ("pages", "accesses", "phases"):
        if not 1 <= given.get(key, 1) <= MOST:
            raise BadTrace(f"{text}: {key} must be from 1 to {MOST}")
    if given.get("seed", 0) < 0 or not all(0 <= given.get(key, 0) <= 1 for key in ("hot", "share")):
        raise BadTrace(f"{text}: seed must not be negative, hot and share must be from 0 to 1")
    if not 0 <= given.get("s", 0) <= 100:
        raise BadTrace(f"{text}: s must be from 0 to 100")
    if name == "scan_plus_hot" and given.get("pages", 2) < 2:
        raise BadTrace(f"{text}: scan_plus_hot needs two pages at least")
    return trace_of(GENERATORS[name](**given), {"name": text})
