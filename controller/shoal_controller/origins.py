"""Lists an origin into a snapshot: the one place of the controller that touches origins.

The rule: credentials are resolved here, live as long as the listing, and go nowhere else.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

from shoal import origin, snapshot
from shoal.errors import ShoalError
from shoal.origin import Origin
from shoal.snapshot import Snapshot
from shoal_controller.catalog import Listing
from shoal_controller.model import SnapshotInfo


def list_origin(url: str, storage_options: str, shard_size: int, directory: Path, stop: threading.Event) -> Listing:
    """A `shoal_controller.catalog.ListOrigin` over real origins. Blocks, for as long as the origin takes.

    Raises:
        InvalidRequest: the URL or the options are wrong, or the origin holds what no snapshot can.
        OriginError: the origin's own answer.
        StoreUnusable: `directory` cannot be written.
        ShoalError: `stop` was set.
    """
    opened = origin.open_origin(url, origin.parse_options(storage_options))
    try:
        path = snapshot.write(
            directory,
            origin=opened.url,
            identity=opened.identity,
            key_prefix=opened.key_prefix,
            shard_size=shard_size,
            rows=_rows(opened, stop),
        )
        listed = Snapshot.open(path)
        info = SnapshotInfo(listed.digest, len(listed), listed.total_bytes)
        return Listing(opened.url, opened.endpoint, info, path)
    finally:
        opened.close()


def _rows(opened: Origin, stop: threading.Event) -> Iterator[tuple[str, int, str]]:
    for page in opened.list():
        if stop.is_set():
            raise ShoalError(f"listing {opened.url} was stopped: nobody waits for it any more")
        for found in page:
            yield found.path, found.size_bytes, found.version
