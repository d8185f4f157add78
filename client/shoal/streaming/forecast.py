"""What an epoch will read: of each rank, how many samples and bytes, and where they are. Pure.

The rule: it is the plan itself that is counted, step by step, so what is foretold is what ranks of that map will do.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shoal.streaming.index import Index
from shoal.streaming.plan import Homes, Plan

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Forecast:
    """Of each rank, shape (world size,).

    Attributes:
        steps: that were counted.
        samples: repeats included.
        local_samples: whose run begins in a shard that the rank's own node owns.
        local_bytes, peer_bytes: of the runs that it reads, each once, by whether its own node owns them.
        cold_bytes: of those, what no node holds yet, so that the origin is read.
    """

    steps: int
    samples: Counts
    local_samples: Counts
    local_bytes: Counts
    peer_bytes: Counts
    cold_bytes: Counts

    @property
    def local_share(self) -> float:
        """Of all samples."""
        return float(self.local_samples.sum() / max(1, self.samples.sum()))


def forecast(plan: Plan, index: Index, homes: Homes, is_held: npt.NDArray[np.bool_], steps: int) -> Forecast:
    """Count the first `steps` steps of a plan.

    Args:
        is_held: whether some node holds the shard that each run begins in. Shape (runs,).
    """
    world = plan.schedule.world_size
    steps = min(steps, plan.schedule.steps)
    samples, local_samples = np.zeros(world, np.int64), np.zeros(world, np.int64)
    reads = np.zeros((world, len(index)), np.bool_)
    for step in range(steps):
        _, runs = plan.step(step)
        is_home = _is_home(homes, runs)
        for rank, mine in enumerate(plan.assigned(step)):
            samples[rank] += len(mine)
            local_samples[rank] += np.count_nonzero(is_home[homes.ranks[rank], mine])
            reads[rank, runs[mine]] = True
    sizes = index.ends - index.starts
    local, peer, cold = (np.zeros(world, np.int64) for _ in range(3))
    for rank in range(world):
        runs = np.flatnonzero(reads[rank])
        at_home = (homes.of(runs) == homes.ranks[rank]).any(axis=1) if len(runs) else np.zeros(0, np.bool_)
        local[rank], peer[rank] = sizes[runs[at_home]].sum(), sizes[runs[~at_home]].sum()
        cold[rank] = sizes[runs[~is_held[runs]]].sum()
    return Forecast(steps, samples, local_samples, local, peer, cold)


def _is_home(homes: Homes, runs: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Whether a node owns each run. Shape (nodes + 1, n); the last row, which `NOWHERE` finds, is that of no node."""
    owners = homes.of(runs)
    found = np.zeros((int(max(owners.max(initial=0), homes.ranks.max(initial=0))) + 2, len(runs)), np.bool_)
    for column in owners.T:
        found[column, np.arange(len(runs))] = True
    return found
