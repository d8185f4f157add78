"""Signals as bytes of a pipe, for a thread that waits for them.

The C handler writes them. One of Python's runs only when the main thread is back from the kernel, and a signal that
comes just before read(2) would not have it come back; nor may it set a `threading.Event`, whose lock
that thread may hold.
"""

from __future__ import annotations

import os
import signal


def open_pipe(*numbers: signal.Signals) -> tuple[int, int]:
    """The pipe's ends: to read, a byte for each of these signals that comes, and to write, which never blocks."""
    reads, writes = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(writes, False)
    signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    for number in numbers:
        signal.signal(number, lambda *_: None)
    return reads, writes
