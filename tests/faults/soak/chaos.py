"""The plan, carried out: one thread a track, and a log of what was really done when.

The rule: what was begun is ended (a stopped process goes on, a killed one comes back) before the thread is over.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from shoal.cli.control import Control
from shoal.errors import ShoalError
from tests.faults.soak import content, plan
from tests.faults.soak.origin import Mood
from tests.faults.soak.plan import Action, Kind
from tests.faults.soak.world import DATASETS, SMALL_DISKS, World
from tests.support.processes import stopped
from tests.support.waiting import wait_for

MOODS = {
    Kind.ORIGIN_SLOWS_DOWN: Mood.SLOW_DOWN,
    Kind.ORIGIN_RESETS: Mood.RESETS,
    Kind.ORIGIN_STALLS: Mood.STALLS,
    Kind.ORIGIN_LATE: Mood.LATE,
    Kind.ORIGIN_GONE: Mood.GONE,
}
CHANGED_AT_ONCE = 4
#: No fault of the controller lasts so long.
UNDRAIN_S = 90.0
_FILL_STEP_BYTES = 1 << 20


@dataclass(slots=True)
class Happening:
    """An action as it went: seconds on the monotonic clock, and why nothing was done, or ""."""

    action: Action
    start: float
    end: float = float("inf")
    skipped: str = ""


class Chaos:
    """Carries the plan out on a world. `run` returns when the plan is over, or `stop` was set.

    Attributes:
        happenings: in the order of their beginnings; complete when `run` has returned.
        failures: what raised although it should not have.
    """

    def __init__(self, world: World, seed: int, end_s: float, log: Callable[[str], None]) -> None:
        self.happenings: list[Happening] = []
        self.failures: list[str] = []
        self.stop = threading.Event()
        self._world, self._seed, self._end_s, self._log = world, seed, end_s, log
        self._generation = 0
        self.began = time.monotonic()

    def run(self) -> None:
        self.began = time.monotonic()
        threads = [threading.Thread(target=self._follow, args=(track,), name=track.name) for track in plan.TRACKS]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _follow(self, track: plan.Track) -> None:
        for action in plan.actions_until(track, self._seed, self._world.node_count, self._end_s):
            if self.stop.wait(max(0.0, self.began + action.at_s - time.monotonic())):
                return
            happening = Happening(action, time.monotonic())
            self.happenings.append(happening)
            self._log(f"{happening.start - self.began:8.2f}  {action.kind}, node {action.node}, {action.for_s:.1f} s")
            try:
                happening.skipped = self._do(action) or ""
            except Exception as error:  # noqa: BLE001 - one action must not end the others
                self.failures.append(f"{action.kind} at {action.at_s:.1f} s: {error!r}")
            happening.end = time.monotonic()
            if happening.skipped:
                self._log(f"{'':8}  … not done: {happening.skipped}")

    def _do(self, action: Action) -> str | None:
        match action.kind:
            case Kind.NODE_KILLED:
                return self._kill_node(action)
            case Kind.NODE_STOPPED:
                with self._world.unsteady(action.node):
                    self._stop_process(self._world.cluster.nodes[action.node].pid, action.for_s)
            case Kind.NODE_RESTARTED:
                with self._world.unsteady(action.node):
                    self._world.cluster.nodes[action.node].stop()
                    self._world.cluster.nodes[action.node].start()
            case Kind.NODE_JOINED:
                with self._world.unsteady(action.node):
                    self._world.cluster.nodes[action.node].start()
                    self._pause(action.for_s)
                    self._world.cluster.nodes[action.node].stop()
            case Kind.NODE_DRAINED:
                return self._drain(action)
            case Kind.DISK_FULL:
                return self._fill_disk(action)
            case Kind.BIT_FLIPPED | Kind.FILE_TRUNCATED:
                return self._damage(action)
            case Kind.CONTROLLER_KILLED:
                self._world.cluster.controller.kill()
                self._pause(action.for_s)
                self._world.cluster.controller.start()
            case Kind.CONTROLLER_STOPPED:
                self._stop_process(self._world.cluster.controller.pid, action.for_s)
            case Kind.REFRESHED:
                return self._refresh(action)
            case Kind.PREFETCHED:
                return self._prefetch(action)
            case Kind.READER_KILLED:
                self._generation += 1
                self._world.replace_reader(action.reader(len(self._world.readers)), self._generation)
            case _:
                self._world.origin.set_mood(MOODS[action.kind])
                self._pause(action.for_s)
                self._world.origin.set_mood(Mood.WELL)
        return None

    def _pause(self, seconds: float) -> None:
        self.stop.wait(seconds)

    def _kill_node(self, action: Action) -> None:
        node = self._world.cluster.nodes[action.node]
        with self._world.unsteady(action.node):
            node.kill()
            self._pause(action.for_s)
            node.start()

    def _stop_process(self, pid: int, for_s: float) -> None:
        with stopped(pid):
            self._pause(for_s)

    def _drain(self, action: Action) -> str | None:
        # No excuse for an error: a node that drains serves, whatever was or was not handed over when it is undrained.
        node_id = str(self._world.cluster.nodes[action.node].ready["id"])
        try:
            with Control(self._world.cluster.controller_grpc) as control:
                control.drain_node(node_id)
            self._pause(action.for_s)
        except ShoalError as error:
            return str(error)
        finally:
            # Also after an answer that was lost; the controller may be away just now.
            wait_for(lambda: self._undrain(node_id), UNDRAIN_S)
        return None

    def _undrain(self, node_id: str) -> bool:
        with Control(self._world.cluster.controller_grpc) as control:
            return not control.undrain_node(node_id).draining

    def _fill_disk(self, action: Action) -> str | None:
        if self._world.why_no_small_disk:
            return self._world.why_no_small_disk
        node = action.node % SMALL_DISKS
        filler = self._world.filler(node)
        with self._world.unsteady(node):
            try:
                with _full(filler):
                    self._pause(action.for_s)
            finally:
                filler.unlink(missing_ok=True)
        return None

    def _damage(self, action: Action) -> str | None:
        files = self._world.harmed_files(action.node)
        files = [path for path in files if path.stat().st_size]
        if not files:
            return "the node holds nothing that may be harmed"
        path = files[int(action.draw * len(files))]
        self._world.damaged.add((action.node, path.name))
        place = int(action.draw * path.stat().st_size)
        path.chmod(0o644)
        if action.kind is Kind.FILE_TRUNCATED:
            os.truncate(path, place)
        else:
            with path.open("rb+", buffering=0) as file:
                (byte,) = os.pread(file.fileno(), 1, place)
                os.pwrite(file.fileno(), bytes([byte ^ 1 << int(action.draw * 1000) % 8]), place)
        path.chmod(0o444)
        return None

    def _refresh(self, action: Action) -> str | None:
        rng = random.Random(action.draw)
        sizes = {path: size for name in DATASETS for path, size in content.objects(name).items()}
        for path in rng.sample(sorted(sizes), CHANGED_AT_ONCE):
            self._world.put(path, self._world.newest_version(path) + 1, sizes[path])
        self._world.write_versions()
        try:
            self._world.refresh()
        except ShoalError as error:
            return f"changed, but not refreshed: {error}"
        return None

    def _prefetch(self, action: Action) -> str | None:
        name = list(DATASETS)[int(action.draw * len(DATASETS))]
        try:
            with Control(self._world.cluster.controller_grpc) as control:
                control.start_prefetch(name, "")
        except ShoalError as error:
            return str(error)
        return None


@contextlib.contextmanager
def _full(filler: os.PathLike[str]) -> Iterator[None]:
    """A file that takes whatever room its file system has left."""
    fd = os.open(filler, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        place = 0
        with contextlib.suppress(OSError):  # that it is full is what is wanted
            while True:
                os.posix_fallocate(fd, place, _FILL_STEP_BYTES)
                place += _FILL_STEP_BYTES
        step = 4096
        with contextlib.suppress(OSError):
            while True:
                os.posix_fallocate(fd, place, step)
                place += step
        yield
    finally:
        os.close(fd)
