"""The mounts of whole datasets that all volumes of a node share: one a dataset and snapshot, whoever uses it.

    FOLDER/imagenet@3f9a…/5e11   the mount; the volumes are bind mounts of it or of its folders
    FOLDER/imagenet@3f9a…/b0a7   the one that takes its place where the first has lost its server

Which volumes use a mount is read off the kernel's table: they are the other mounts of its device. When the last one is
gone the mount goes too.

The rule: a mount is made, used for the first time and taken away under the lock of its name, so that none is taken away
between being found and being bound.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from shoal.errors import ShoalError
from shoal_csi import bind
from shoal_csi.locks import Locks
from shoal_csi.mount_table import Mount, MountTable
from shoal_csi.mounting import Mounts
from shoal_csi.probing import Prober, State
from shoal_csi.refusals import NotAnswering

log = logging.getLogger(__name__)

_PLACE = re.compile(r"(?P<dataset>[^/@]+)@(?P<snapshot>[0-9a-f]{32})/[0-9a-f]+")


@dataclass(frozen=True, slots=True)
class SharedMount:
    """One of the mounts.

    Attributes:
        snapshot: its whole digest.
        device: as in `shoal_csi.mount_table.Mount`.
    """

    dataset: str
    snapshot: str
    mountpoint: str
    device: str

    @property
    def name(self) -> str:
        return f"{self.dataset}@{self.snapshot}"


class SharedMounts:
    """All of the node's. They are found in the kernel's table, whoever made them.

    Args:
        folder: absolute and without symbolic links, as the kernel will name it.
        before_end: called with the mount point of a mount that is about to be unmounted.
    """

    def __init__(
        self, folder: Path, mounts: Mounts, locks: Locks, prober: Prober, before_end: Callable[[str], None]
    ) -> None:
        self._before_end = before_end
        self._folder = folder
        self._mounts = mounts
        self._locks = locks
        self._prober = prober

    def lock(self, name: str, *, wait_s: float = 0.0) -> AbstractContextManager[None]:
        """The lock of all mounts of ``DATASET@SNAPSHOT``. Raises Busy."""
        return self._locks.hold(f"the mount of {name}", wait_s=wait_s)

    def all(self, table: MountTable) -> list[SharedMount]:
        """Those that are mounted."""
        return [shared for mount in table.under(str(self._folder)) if (shared := self._shared(mount)) is not None]

    def of(self, mount: Mount, table: MountTable) -> SharedMount | None:
        """The one of which `mount` is a bind mount."""
        return next((shared for shared in self.all(table) if shared.device == mount.device), None)

    def users(self, shared: SharedMount, table: MountTable) -> list[Mount]:
        """The bind mounts of it."""
        return [mount for mount in table.of_device(shared.device) if self._shared(mount) is None]

    def state(self, shared: SharedMount) -> State:
        return self._prober.probe(shared.mountpoint).state

    def revive(self) -> list[str]:
        """See `shoal_csi.mounting.Mounts`."""
        return self._mounts.revive(str(self._folder))

    def recover(self) -> list[str]:
        """See `shoal_csi.mounting.Mounts`. Not while a mount that volumes use is dead: it would be taken away."""
        return self._mounts.recover(str(self._folder))

    def take_over(self) -> list[str]:
        """See `shoal_csi.mounting.Mounts`."""
        return self._mounts.take_over(str(self._folder))

    def ensure(self, dataset: str, snapshot: str) -> SharedMount:
        """One that answers: the one that is there, or a new one. Hold its lock.

        Raises:
            NotAnswering: it is there and says nothing.
            MountFailed: it cannot be mounted.
        """
        wanted = f"{dataset}@{snapshot}"
        found = {shared: self.state(shared) for shared in self.all(MountTable.now()) if shared.name == wanted}
        for shared, state in found.items():
            if state is State.ALIVE:
                return shared
        for shared, state in found.items():
            if state is State.SILENT:
                raise NotAnswering(
                    f"the mount of {wanted} at {shared.mountpoint} does not answer: its server is being replaced, "
                    "or is stuck ('shoal umount' it where that lasts)"
                )
        place = self._new_place(wanted)
        try:
            self._mounts.mount(dataset, snapshot, str(place))
            mount = MountTable.now().at(str(place))
            if mount is None or not self._mounts.is_answering(str(place)):
                raise NotAnswering(f"{wanted} was mounted at {place} and does not answer there")
        except BaseException:
            self._clear(str(place))
            raise
        log.info("mounted %s at %s", wanted, place, extra={"dataset": dataset, "mount": str(place)})
        return SharedMount(dataset, snapshot, str(place), mount.device)

    def release(self, shared: SharedMount) -> bool:
        """Unmount it unless somebody uses it; whether nobody did. Hold its lock."""
        table = MountTable.now()
        if shared not in self.all(table):
            return False  # another process did it
        if self.users(shared, table):
            return False
        self._clear(shared.mountpoint)
        return True

    def count_volumes(self) -> int:
        """Bind mounts of all of them."""
        table = MountTable.now()
        return sum(len(self.users(shared, table)) for shared in self.all(table))

    def names(self) -> list[str]:
        """``DATASET@SNAPSHOT`` of all that have a folder, mounted or not."""
        return sorted(path.name for path in self._folder.iterdir() if _PLACE.fullmatch(f"{path.name}/0"))

    def tidy(self, name: str) -> None:
        """Remove the folders that nothing is mounted at. Hold the lock of `name`."""
        table = MountTable.now()
        folder = self._folder / name
        for each in _names_in(folder):
            if table.at(str(folder / each)) is None:
                _remove(folder / each)
        _remove(folder)

    def _clear(self, mountpoint: str) -> None:
        """Leave nothing at `mountpoint`, whatever state it is in."""
        try:
            if MountTable.now().at(mountpoint) is not None:
                self._before_end(mountpoint)
                self._mounts.unmount(mountpoint)
        except ShoalError as error:
            log.warning("detaching %s without its server's help: %s", mountpoint, error, extra={"mount": mountpoint})
        finally:
            bind.detach(mountpoint)
            _remove(Path(mountpoint))
            _remove(Path(mountpoint).parent)

    def _new_place(self, name: str) -> Path:
        # Never one that was used before: the command of a driver that was killed may mount there yet.
        place = self._folder / name / secrets.token_hex(4)
        place.mkdir(mode=0o755, parents=True)
        return place

    def _shared(self, mount: Mount) -> SharedMount | None:
        folder = f"{self._folder}/"
        match = mount.mountpoint.startswith(folder) and _PLACE.fullmatch(mount.mountpoint.removeprefix(folder))
        return SharedMount(match["dataset"], match["snapshot"], mount.mountpoint, mount.device) if match else None


def _names_in(folder: Path) -> list[str]:
    """The names alone: to look at a mount itself would ask its server."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except FileNotFoundError:
        return []


def _remove(folder: Path) -> None:
    """An empty folder; one that is in use stays."""
    try:
        folder.rmdir()
    except OSError:
        pass
