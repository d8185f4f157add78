"""The trainer that a worker of torch's DataLoader reads for: with it the worker ends.

torch's worker looks between two batches whether its parent is still who it was when it began to look. So there are
times at which a trainer may be killed and its workers stay, with all they have open, for minutes or for ever:

    before a worker began to look     it takes whoever inherited it for its trainer
    while it waits for a node         within a batch it does not look
    while batches fill its pipe       its exit waits until they are taken; its siblings keep the pipe from breaking

The rule: a worker whose trainer is gone ends within `LOOK_S`, whatever it waits for.
"""

from __future__ import annotations

import os
import threading
import time

#: From one look for the trainer to the next.
LOOK_S = 1.0

_parent_pid = os.getppid()  # since this process began
_following_pid = 0


def follow() -> None:
    """End this process, a worker, when its trainer has ended. May be called again and again."""
    global _following_pid
    if _following_pid != os.getpid():
        _following_pid = os.getpid()
        threading.Thread(target=_run, name="shoal-trainer", daemon=True).start()


def _run() -> None:
    while os.getppid() == _parent_pid:
        time.sleep(LOOK_S)
    os._exit(1)


def _after_fork_in_child() -> None:
    global _parent_pid
    _parent_pid = os.getppid()


os.register_at_fork(after_in_child=_after_fork_in_child)
