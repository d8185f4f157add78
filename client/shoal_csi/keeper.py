"""What becomes of mounts whose driver, server or pods went away: looked after at the start, and from then on.

    answers, used by pods         taken over
    answers, used by none         detached
    lost its server, used         mounted anew, and bound again for each pod
    lost its server, unused       detached
    does not answer               left alone: its server is being replaced, or a person looks at it
    kept by the descriptor store  served again, before anything else
    served by another container   taken over, in the first round alone: the older of two containers takes nothing back

A pod whose volume was bound again sees it in its containers that start from then on; those that run see it too where
they mount the volume with ``mountPropagation: HostToContainer``.

The rule: a mount that pods use is replaced only once its server is gone for good, and is named in the log with what was
done. What fails is tried again in the next round.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from shoal.errors import ShoalError
from shoal_csi import bind, capability
from shoal_csi.locks import Locks
from shoal_csi.mount_table import Mount, MountTable
from shoal_csi.probing import State
from shoal_csi.refusals import Busy
from shoal_csi.shared import SharedMount, SharedMounts
from shoal_csi.targets import target_lock

log = logging.getLogger(__name__)


class Keeper:
    """Looks after all shared mounts of the node. `start` and `stop` its rounds.

    Args:
        every_s: from one round to the next.
        count: called with what was done for a mount that had lost processes.
    """

    def __init__(self, shared: SharedMounts, locks: Locks, *, every_s: float, count: Callable[[str], None]) -> None:
        self._count = count
        self._shared = shared
        self._locks = locks
        self._every_s = every_s
        self._is_first_round = True
        self._said: dict[str, str] = {}  # the last line about each mount, so that none is repeated each round
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._rounds, name="keeper", daemon=True)

    def start(self) -> None:
        """Begin the first round."""
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def round(self) -> None:
        """Look at every mount once. What cannot be done is logged."""
        try:
            self._look_at_all()
        finally:
            self._is_first_round = False

    def _look_at_all(self) -> None:
        self._supervise("revived", self._shared.revive)  # at once: it keeps its readers waiting, and would keep us
        are_well = True
        for name in self._shared.names():
            try:
                with self._shared.lock(name):
                    for mount in self._shared.all(MountTable.now()):
                        if mount.name == name:
                            are_well &= self._look_after(mount)
                    self._shared.tidy(name)
            except Busy:
                pass  # a call is at work on it, and leaves it in order
            except ShoalError as error:
                are_well = False
                self._say(logging.ERROR, name, f"{name} cannot be looked after, trying again: {error}")
            except OSError as error:
                are_well = False
                self._say(logging.ERROR, name, f"{name} cannot be looked after, trying again: {error!r}")
        if are_well:  # what is dead would be taken away by this, and its volumes with it
            self._supervise("supervised", self._shared.recover)
        if self._is_first_round:
            self._supervise("taken_over", self._shared.take_over)

    def _supervise(self, how: str, act: Callable[[], list[str]]) -> None:
        try:
            for sentence in act():
                self._count(how)
                log.warning("%s", sentence)
        except (ShoalError, OSError) as error:
            self._say(logging.ERROR, "supervisors", f"supervisors cannot be looked after, trying again: {error}")

    def _rounds(self) -> None:
        while True:
            try:
                self.round()
            except Exception:  # what went wrong in one round may be well in the next
                log.exception("the mounts cannot be looked after, trying again")
            if self._stopping.wait(self._every_s):
                return

    def _look_after(self, shared: SharedMount) -> bool:
        """Whether no volume has lost its mount, now."""
        state = self._shared.state(shared)
        users = self._shared.users(shared, MountTable.now())
        place = shared.mountpoint
        if state is State.SILENT and users:
            self._say(logging.WARNING, place, f"{place} does not answer: left alone for {_volumes(users)}")
        elif state is State.DEAD and users:
            fresh = self._shared.ensure(shared.dataset, shared.snapshot)
            self._count("mounted_anew")
            bound = [user for user in users if self._bind_again(user, fresh)]
            if not self._shared.release(shared):
                return False
            self._say(
                logging.WARNING,
                place,
                f"{place} had lost its server: mounted anew at {fresh.mountpoint}, bound again: {_volumes(bound)}",
            )
        elif users:
            if self._is_first_round:
                self._say(logging.INFO, place, f"taken over {place}, which answers, for {_volumes(users)}")
            elif self._said.pop(place, "").startswith(f"{place} does not answer"):
                log.info("%s answers again", place, extra={"mount": place})
        elif self._shared.release(shared):
            self._say(logging.INFO, place, f"detached {place}, which {state.value}: no volume uses it")
        return True

    def _bind_again(self, user: Mount, fresh: SharedMount) -> bool:
        target = user.mountpoint
        try:
            with target_lock(self._locks, target):
                seen = MountTable.now().at(target)
                if seen is None or seen.device != user.device:
                    return False  # unpublished meanwhile
                bind.replace(fresh.mountpoint, user.root.strip("/"), target, capability.flags_of(user.options))
                return True
        except ShoalError as error:
            log.error("%s could not be bound again: %s", target, error, extra={"volume": target})
            return False

    def _say(self, level: int, place: str, line: str) -> None:
        if self._said.get(place) != line:
            self._said[place] = line
            log.log(level, "%s", line, extra={"mount": place})


def _volumes(users: list[Mount]) -> str:
    return f"{len(users)} volumes: " + ", ".join(user.mountpoint for user in users)
