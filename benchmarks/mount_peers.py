"""The mounts of JuiceFS and rclone over the bytes that a Shoal mount has, for `benchmarks.mounted`.

Their data lie in one SeaweedFS of this machine: rclone mounts what was put there as objects; JuiceFS stores files in
blocks of its own, so what it is to have is copied in through another of its mounts, whose cache the measured one does
not share.

The rule: a peer that this machine lacks, or that does not come up, is left out by name; the others run.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import Missing
from benchmarks.origin import Origin
from benchmarks.peers import juicefs, rclone
from tests.support.weed import Weed

BUCKET, JUICEFS_BUCKET = "bench", "juicefs"
COPIES_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Peer:
    """A mount with the set's directories below `path`, and the processes behind it.

    Attributes:
        settings: how it was set up.
    """

    name: str
    path: Path
    servers: tuple[int, ...]
    settings: str


@dataclass(frozen=True, slots=True)
class Peers:
    """Those that run, the server that their bytes and a cold dataset's come from, and why others do not run."""

    running: tuple[Peer, ...]
    weed: Weed | None
    left_out: dict[str, str]


def start(stack: ExitStack, directory: Path, origin: Path, names: Sequence[str], warm: Sequence[str]) -> Peers:
    """Mount whatever peer there is, until `stack` closes.

    Args:
        directory: for what they keep.
        origin: a directory with the bytes.
        names: the directories in it that they are to have.
        warm: those of them that JuiceFS fetches into its cache now; the others it has never read.
    """
    left_out = {}
    for name, require in (("JuiceFS", juicefs.find), ("rclone", rclone.version)):
        try:
            require()
        except Missing as reason:
            left_out[name] = str(reason)
    if len(left_out) == 2:
        return Peers((), None, left_out)
    weed = stack.enter_context(Weed())
    weed.create_bucket(BUCKET)
    weed.create_bucket(JUICEFS_BUCKET)
    for name in names:
        weed.filesystem().put(str(origin / name), f"{BUCKET}/{name}", recursive=True)
    at = Origin(weed.endpoint_url, weed.access_key, weed.secret_key)
    running = []
    for name, begin in (("JuiceFS", _juicefs), ("rclone", _rclone)):
        if name not in left_out:
            try:
                running.append(begin(stack, at, weed, directory / name.lower(), origin, names, warm))
            except Missing as reason:
                left_out[name] = str(reason)
    return Peers(tuple(running), weed, left_out)


def _juicefs(
    stack: ExitStack, at: Origin, weed: Weed, directory: Path, origin: Path, names: Sequence[str], warm: Sequence[str]
) -> Peer:
    volume = juicefs.make(at, JUICEFS_BUCKET, directory)
    size_bytes = sum(path.stat().st_size for path in _files(origin, names))
    with juicefs.serve(volume, "copying", 1 << 30) as (point, _):
        _copy(origin, point, names)
    point, pid = stack.enter_context(juicefs.serve(volume, "mount", 2 * size_bytes + (1 << 30)))
    juicefs.warm_up(volume, *(point / name for name in warm))
    return Peer("JuiceFS", point, (pid, weed.pid), juicefs.SETTINGS)


def _rclone(
    stack: ExitStack, at: Origin, weed: Weed, directory: Path, origin: Path, names: Sequence[str], warm: Sequence[str]
) -> Peer:
    point, pid = stack.enter_context(rclone.serve(at, BUCKET, directory))
    return Peer("rclone", point, (pid, weed.pid), f"{rclone.SETTINGS} ({rclone.version()})")


def _files(directory: Path, names: Sequence[str]) -> list[Path]:
    return [path for name in names for path in (directory / name).rglob("*") if path.is_file()]


def _copy(origin: Path, target: Path, names: Sequence[str]) -> None:
    files = _files(origin, names)
    for folder in sorted({path.parent for path in files}):
        (target / folder.relative_to(origin)).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(COPIES_AT_ONCE) as pool:
        list(pool.map(lambda path: shutil.copyfile(path, target / path.relative_to(origin)), files))
