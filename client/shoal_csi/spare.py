"""A daemon that is loaded and waits for its turn: ``python -m shoal_csi.spare MODULE ARG…``.

Loading takes a daemon many times as long as taking a mount over. So one is loaded while another one serves: it says
``loaded`` on stdout, and becomes ``MODULE.main()`` when a byte comes on stdin. Where stdin ends without one nobody will
want it any more, and it ends.

The rule: until its turn it does nothing with what it inherited.
"""

from __future__ import annotations

import importlib
import os
import sys

GO = b"g"
LOADED = "loaded"


def main(module: str, args: list[str]) -> None:
    """Load `module`, wait, and be it."""
    loaded = importlib.import_module(module)
    print(LOADED, flush=True)
    if os.read(0, 1) == GO:
        sys.argv = [module, *args]
        loaded.main()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
