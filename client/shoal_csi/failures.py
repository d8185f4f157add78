"""What a program that reads a mounted file is told when its bytes cannot be had: an errno; the log has the sentence.

    ENOENT      the dataset, its snapshot or the object is not there any more
    ESTALE      the object was changed at its origin. Not EIO: nothing is broken, and the remedy is another one, to
                refresh the dataset and to mount the new snapshot
    EACCES      the origin refuses the dataset's credentials
    ETIMEDOUT   not within the client's time limit
    EIO         anything else; the client has tried all nodes, and again, for as long as its time limit says

The rule: each failure is one line that names the file and what to do about it.
"""

from __future__ import annotations

import errno

from shoal.errors import DeadlineExceeded, NotFound, OriginChanged, OriginDenied, OriginNotFound, ShoalError

_ERRNOS: tuple[tuple[type[ShoalError], int], ...] = (
    (OriginChanged, errno.ESTALE),
    (OriginDenied, errno.EACCES),
    (OriginNotFound, errno.ENOENT),
    (NotFound, errno.ENOENT),
    (DeadlineExceeded, errno.ETIMEDOUT),
)

#: All that there are.
ERRNOS = (*dict.fromkeys(number for _, number in _ERRNOS), errno.EIO)


def errno_of(error: ShoalError) -> int:
    """The errno for `error`."""
    return next((number for kind, number in _ERRNOS if isinstance(error, kind)), errno.EIO)


def sentence(path: str, dataset: str, error: ShoalError) -> str:
    """The line for the log."""
    told, remedy = errno.errorcode[errno_of(error)], ""
    if isinstance(error, OriginChanged):
        remedy = f"; of a mount that is 'shoal dataset refresh {dataset}', then unmount and mount again"
    elif isinstance(error, NotFound):
        remedy = "; a mount of it is unmounted, and mounted again where the dataset is there again"
    elif isinstance(error, DeadlineExceeded):
        remedy = "; a mount's timeout is 'shoal mount --timeout'"
    return f"{path!r} of dataset {dataset} cannot be read, its reader gets {told}: {error}{remedy}"
