"""Pages spread evenly over the nodes by their address, 2 MiB in turn, as mbind's MPOL_INTERLEAVE does with huge pages: bandwidth of all nodes
for everybody, and nobody near."""

from __future__ import annotations

import numpy as np

from components.autonuma.migration import MAPPED, MigrationPolicy
from kernel.abi import lib


class Policy(MigrationPolicy):
    """interleave"""

    gather = 0.2

    def step(self) -> None:
        if self.asleep() or not self.may_move():
            return
        ours = np.flatnonzero(self.frames["state"] == MAPPED)
        turn = self.frames["vpage"][ours].astype(np.int64) // lib.SY_CHUNK_PAGES % len(self.nodes)
        for node in range(len(self.nodes)):
            self.move(ours[(turn == node) & (self.frames["node"][ours] != node)], node)
