"""A daemon that is loaded and waits for its turn: ``python -m shoal_csi.spare MODULE ARG…``.

Loading takes a daemon many times as long as taking a mount over. So one is loaded while another one serves: it says
``loaded`` on stdout, and becomes ``MODULE.main()`` when a byte comes on stdin. Where stdin ends without one nobody will
want it any more, and it ends.

It is not loaded where it could not go on with what the other one leaves: ``MODULE.check_state(fd)``, where there is
one, says so with a `ShoalError`. Then it ends with ``error: …``, and the other one serves on.

The rule: until its turn it changes nothing of what it inherited.
"""

from __future__ import annotations

import importlib
import os
import sys

from shoal import logs
from shoal.errors import ShoalError

GO = b"g"
LOADED = "loaded"


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
    print(LOADED, flush=True)
    if os.read(0, 1) == GO:
        sys.argv = [module, *args]
        loaded.main()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
