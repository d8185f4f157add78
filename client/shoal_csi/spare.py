"""A daemon that is loaded and waits for its turn: ``python -m shoal_csi.spare MODULE ARG…``.

Loading takes a daemon many times as long as taking a mount over. So one is loaded while another one serves: it says
``loaded`` on stdout, and becomes ``MODULE.main()`` when a byte comes on stdin. Where stdin ends without one nobody will
want it any more, and it ends.

``MODULE.prepare(ARGS)``, where there is one, has what the mount is of at hand before: so a daemon can take over while
nobody of the cluster answers. Until that succeeds this one is not loaded, and tries again; its turn may come meanwhile.
One whose turn it is from the start does not: it would only ask twice.

It is not loaded where it could not go on with what the other one leaves: ``MODULE.check_state(fd)``, where there is
one, says so with a `ShoalError`. Then it ends with ``error: …``, and the other one serves on.

The rule: until its turn it changes nothing of what it inherited.
"""

from __future__ import annotations

import importlib
import logging
import os
import select
import sys
from collections.abc import Callable

from shoal import logs
from shoal.errors import ShoalError

log = logging.getLogger(__name__)

GO = b"g"
LOADED = "loaded"
#: Between two attempts to prepare.
PREPARE_AGAIN_S = 5.0


def main(module: str, args: list[str]) -> None:
    """Load `module`, wait, and be it."""
    loaded = importlib.import_module(module)
    check = getattr(loaded, "check_state", None)
    if check is not None:
        try:
            check(int(args[args.index("--state-fd") + 1]))
        except ShoalError as error:
            logs.fail(str(error))
            sys.exit(1)
    prepare = getattr(loaded, "prepare", None)
    if prepare is None or _is_its_turn(0.0) or _prepared(prepare, args):
        print(LOADED, flush=True)
    if os.read(0, 1) == GO:
        sys.argv = [module, *args]
        loaded.main()


def _prepared(prepare: Callable[[list[str]], None], args: list[str]) -> bool:
    """Prepare, or try until its turn has come; whether it succeeded."""
    said = ""
    while True:
        try:
            prepare(args)
            return True
        except (ShoalError, OSError) as error:
            if str(error) != said:
                said = str(error)
                log.warning("a spare daemon waits for the cluster: %s", said)
        if _is_its_turn(PREPARE_AGAIN_S):
            return False


def _is_its_turn(within_s: float) -> bool:
    """Whether stdin has something, or has ended."""
    return bool(select.select([0], [], [], within_s)[0])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
