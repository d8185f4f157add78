"""What can go wrong, named by what the caller can do about it.

Foreign exceptions (sockets, HTTP, obstore, botocore, SQLite) are converted to these once, at the seam that meets them,
with ``raise … from`` the original. Each message names the thing and the remedy, because it is often all a person sees.

The rule: a class exists only where a caller would do something different on catching it.
"""

from __future__ import annotations


class ShoalError(Exception):
    """Anything Shoal refuses or fails to do. Catch this for "Shoal said no"."""


class InvalidRequest(ShoalError, ValueError):
    """The input itself is wrong (a malformed URL, size, name or range): fix it, retrying is useless."""


class NotFound(ShoalError, FileNotFoundError):
    """The named thing does not exist. Also a ``FileNotFoundError``, as fsspec's callers expect."""


class DatasetNotFound(NotFound):
    """No dataset of that name, or none over that origin: register it with ``shoal dataset add``."""


class SnapshotNotFound(NotFound):
    """The dataset has no snapshot of that digest, or it was dropped: open the dataset without ``@``."""


class AlreadyExists(ShoalError, FileExistsError):
    """A dataset of that name is registered already."""


class ReadOnly(ShoalError, PermissionError):
    """Shoal never writes to an origin: write there directly, then ``shoal dataset refresh``."""


class Unavailable(ShoalError, ConnectionError):
    """A process does not answer: try another one, or later."""


class ClusterUnavailable(Unavailable):
    """Nothing answers at the endpoint: check ``SHOAL_ENDPOINT`` and that the cluster runs."""


class NodeUnavailable(Unavailable):
    """One cache node does not answer: the read goes to the next owner."""


class NotCached(ShoalError):
    """The node was asked for cached bytes only and does not hold them: ask elsewhere."""


class Overloaded(ShoalError):
    """The node has no room for the request now: wait and retry."""


class DeadlineExceeded(ShoalError, TimeoutError):
    """The read took longer than its ``timeout``: raise that storage option, or find out what is slow."""


class ShardCorrupt(ShoalError):
    """Bytes do not match their checksum: drop them and fetch again."""


class OriginError(ShoalError, OSError):
    """The origin failed: read the message, it is the origin's own."""


class OriginUnavailable(OriginError):
    """The origin does not answer, or fails for now: retried already, so try later.

    Attributes:
        is_busy: it asks for fewer requests, or answers none: whoever asks it should ask less at a time.
        retry_after_s: what it asks to wait before the next; 0 where it says nothing.
    """

    def __init__(self, sentence: str = "", *, is_busy: bool = False, retry_after_s: float = 0.0) -> None:
        super().__init__(sentence)
        self.is_busy = is_busy
        self.retry_after_s = retry_after_s


class OriginDenied(OriginError, PermissionError):
    """The origin refused the credentials: fix the dataset's storage options."""


class OriginNotFound(OriginError, FileNotFoundError):
    """The bucket, prefix or object is not there."""


class OriginChanged(OriginError):
    """The object is not the version that the snapshot lists: ``shoal dataset refresh NAME``."""


class DoesNotFit(ShoalError):
    """The cluster lacks the space for what was asked: free some, add nodes or ask for less."""


class StoreUnusable(ShoalError, OSError):
    """A data directory cannot be used (missing, not writable, another node's, no extended attributes)."""
