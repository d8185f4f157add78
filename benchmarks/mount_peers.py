"""The mounts of JuiceFS and rclone over the bytes that a Shoal mount has, for `benchmarks.mounted`.

Their data lie in one SeaweedFS of this machine: rclone mounts what was put there as objects; JuiceFS stores files in
blocks of its own, so what it is to have is copied in through another of its mounts, whose cache the measured one does
not share.

The rule: a peer that this machine lacks, or that does not come up, is left out by name; the others run.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
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


def start(stack: ExitStack, directory: Path, origin: Path, warm: Sequence[str], cold: Mapping[str, str]) -> Peers:
    """Mount whatever peer there is, until `stack` closes.

    Args:
        directory: for what they keep.
        origin: a directory with the bytes.
        warm: the directories in it that all are to have, and JuiceFS in its cache.
        cold: one more for each peer, by name, that it has never read; those of other names are on the S3 server, too.
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
    for bucket in (BUCKET, JUICEFS_BUCKET):
        weed.create_bucket(bucket)
    running = []
    for name, begin in (("JuiceFS", _juicefs), ("rclone", _rclone)):
        if name not in left_out:
            try:
                running.append(begin(stack, weed, directory / name.lower(), origin, warm, cold))
            except Missing as reason:
                left_out[name] = str(reason)
    _upload(weed, origin, [folder for name, folder in cold.items() if name not in ("JuiceFS", "rclone")])
    return Peers(tuple(running), weed, left_out)


def _juicefs(
    stack: ExitStack, weed: Weed, directory: Path, origin: Path, warm: Sequence[str], cold: Mapping[str, str]
) -> Peer:
    names = [*warm, cold["JuiceFS"]]
    files = [path for name in names for path in (origin / name).rglob("*") if path.is_file()]
    volume = juicefs.make(_origin(weed), JUICEFS_BUCKET, directory)
    with juicefs.serve(volume, "copying", 1 << 30) as (point, _):
        for folder in sorted({path.parent for path in files}):
            (point / folder.relative_to(origin)).mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(COPIES_AT_ONCE) as pool:
            list(pool.map(lambda path: shutil.copyfile(path, point / path.relative_to(origin)), files))
    cache_bytes = 2 * sum(path.stat().st_size for path in files) + (1 << 30)
    point, pid = stack.enter_context(juicefs.serve(volume, "mount", cache_bytes))
    juicefs.warm_up(volume, *(point / name for name in warm))
    return Peer("JuiceFS", point, (pid, weed.pid), juicefs.SETTINGS)


def _rclone(
    stack: ExitStack, weed: Weed, directory: Path, origin: Path, warm: Sequence[str], cold: Mapping[str, str]
) -> Peer:
    _upload(weed, origin, [*warm, cold["rclone"]])
    point, pid = stack.enter_context(rclone.serve(_origin(weed), BUCKET, directory))
    return Peer("rclone", point, (pid, weed.pid), f"{rclone.SETTINGS} ({rclone.version()})")


def _upload(weed: Weed, origin: Path, names: Sequence[str]) -> None:
    for name in names:
        weed.filesystem().put(str(origin / name), f"{BUCKET}/{name}", recursive=True)


def _origin(weed: Weed) -> Origin:
    return Origin(weed.endpoint_url, weed.access_key, weed.secret_key)
