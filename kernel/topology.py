"""Which CPUs are near which of an enclave's nodes, and how far the nodes are from each other.

Where the machine has as many nodes with memory as the enclave, they are the machine's: each node's RAM is bound to its own (mbind), CPUs and distances are
the kernel's. Otherwise RAM is only divided, for trying things: CPUs in equal parts, in order, and distances as for two sockets.

``measure`` asks the caches instead, as MCTOP does (Chatzopoulos et al., EuroSys '17): how long a line takes from one CPU to another and back, for each pair;
pairs whose times are alike are at the same level of the machine.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernel.abi import ffi, lib

NEAR, FAR = 10, 20  # distances where nobody says any: ACPI's for here and elsewhere (Documentation of the SLIT)
ALIKE = 1.5  # times within this ratio of each other are of one level


@dataclass(frozen=True)
class Topology:
    """``cpu_node``: by CPU, the enclave's node that it is near. ``distance``: shape (nodes, nodes), 10 = here.
    ``kernel_node``: by node, the machine's whose memory it is; -1: wherever. ``source``: "kernel" or "divided"."""

    cpu_node: list[int]
    distance: list[list[int]]
    kernel_node: list[int]
    source: str

    def as_dict(self) -> dict[str, Any]:
        return {"source": self.source, "cpu_node": self.cpu_node, "distance": self.distance, "kernel_node": self.kernel_node}


def numbers(text: str) -> list[int]:
    """[0, 1, 2, 5] of "0-2,5", as in sysfs. ValueError if it is none."""
    out: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        out += range(int(first), int(last or first) + 1)
    return out


def machine_nodes(root: Path = Path("/")) -> list[int]:
    """The machine's nodes that have memory; [0] where the kernel knows no nodes."""
    try:
        return numbers((root / "sys/devices/system/node/has_memory").read_text()) or [0]
    except (OSError, ValueError):
        return [0]


def find(nodes: int, root: Path = Path("/"), cpus: int | None = None) -> Topology:
    """That of an enclave with so many nodes on this machine (``root``: another place than /, for tests)."""
    cpus = min((os.cpu_count() or 1) if cpus is None else cpus, lib.SY_MAX_CPUS)
    at = root / "sys/devices/system/node"
    real = machine_nodes(root)
    if len(real) == nodes and nodes > 1:
        try:
            rows = {n: [int(x) for x in (at / f"node{n}/distance").read_text().split()] for n in numbers((at / "online").read_text())}
            order = sorted(rows)
            distance = [[rows[a][order.index(b)] for b in real] for a in real]
            cpu_node = [0] * cpus
            for n in order:  # a node without memory is near the next that has some
                near = min(range(nodes), key=lambda i: rows[n][order.index(real[i])])
                for cpu in numbers((at / f"node{n}/cpulist").read_text()):
                    if cpu < cpus:
                        cpu_node[cpu] = near
            return Topology(cpu_node, distance, real, "kernel")
        except (OSError, ValueError, IndexError):
            pass
    return Topology(
        [cpu * nodes // cpus for cpu in range(cpus)],
        [[NEAR if a == b else FAR for b in range(nodes)] for a in range(nodes)],
        [-1] * nodes,
        "divided",
    )


def measure(cpus: list[int], rounds: int = 2000) -> NDArray[np.float64]:
    """Nanoseconds that a cache line takes from CPU to CPU, half of there and back, shape (n, n), symmetric; 0 on the diagonal.

    :raises OSError: a CPU may not be used
    """
    out = np.zeros((len(cpus), len(cpus)))
    for i, a in enumerate(cpus):
        for j in range(i):
            ns = lib.sy_probe_latency(a, cpus[j], rounds)
            if ns < 0:
                raise OSError(ffi.errno, f"cannot measure between CPU {a} and CPU {cpus[j]}")
            out[i, j] = out[j, i] = ns
    return out


def levels(latency: NDArray[np.float64]) -> list[tuple[float, list[list[int]]]]:
    """From near to far: (nanoseconds, groups of indices that are within that of each other), the last one of all.

    :param latency: as from ``measure``
    """
    n = len(latency)
    times = np.sort(latency[np.triu_indices(n, 1)])
    out: list[tuple[float, list[list[int]]]] = []
    for time in [float(t) for k, t in enumerate(times) if k + 1 == len(times) or times[k + 1] > ALIKE * t]:
        group = list(range(n))
        for i in range(n):  # single linkage: who is near one of a group belongs to it
            for j in range(i):
                if latency[i, j] <= time:
                    old, new = group[i], group[j]
                    group = [new if g == old else g for g in group]
        found = [[i for i in range(n) if group[i] == g] for g in dict.fromkeys(group)]
        out.append((time, found))
    return out
