"""fsspec's `filecache` over s3fs: a cache that every Python installation has, on one machine's disk.

Its check for new versions is off (`check_files=False`, the default) and nothing expires, which is its fastest.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import fsspec

from benchmarks import reads
from benchmarks.harness import Outcome
from benchmarks.origin import Origin

SETTINGS = "fsspec filecache: over s3fs, on the same file system, check_files off, no expiry"


@functools.cache
def filesystem(origin: Origin, directory: str) -> Any:
    return fsspec.filesystem(
        "filecache",
        target_protocol="s3",
        target_options=origin.storage_options,
        cache_storage=directory,
        check_files=False,
        expiry_time=None,
        skip_instance_cache=True,
    )


def read_whole(origin: Origin, directory: str, paths: Sequence[str]) -> Outcome:
    return reads.whole(filesystem(origin, directory).open, paths)
