"""When a dataset is prefetched without that anybody asked by name, and how a job stands. Pure.

A dataset is prefetched whole where it is declared eager, or where a pod's gate waits for it: a pod that holds no GPU
reads nothing, so without a prefetch nothing would ever warm what it waits for.
"""

from __future__ import annotations

from shoal_controller import core
from shoal_controller.events import PrefetchRequested
from shoal_controller.model import Dataset, Job, JobState, State

#: Space may come free and nodes may come back, so what failed is tried again after so long.
RETRY_S = 300.0


def latest_job(dataset: Dataset, state: State) -> Job | None:
    """The job over all of the newest snapshot: an unfinished one, else the newest."""
    wanted = PrefetchRequested("", dataset.name, dataset.newest.digest, "")
    return next(iter(core.matching_jobs(state.jobs, wanted)), None)


def is_due(dataset: Dataset, state: State, now_utc_s: float) -> bool:
    """Whether a job is to be started for a dataset that is to be warm."""
    if not state.map.owners():
        return False  # it would be refused
    job = latest_job(dataset, state)
    if job is None:
        return True
    if not job.is_finished or job.state is JobState.DONE:
        return False
    return now_utc_s - (job.finished_utc_s or 0.0) >= RETRY_S


def percent(done: int, total: int) -> int:
    """In whole percent, rounded down: 100 is all."""
    return 100 * done // total if total else 100
