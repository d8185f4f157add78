"""What the CSI driver runs in place of ``shoal mount`` where a test is about the driver alone.

    mount NAME@SNAPSHOT DIR     a tmpfs with the files of $STAND_IN/NAME, read-only: a device of its own, as FUSE's is
    umount DIR

Files in ``$STAND_IN`` make it misbehave: ``slow`` holds seconds to wait before each step, ``refuse`` the sentence with
which it fails.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    folder = Path(os.environ["STAND_IN"])
    refusal = folder / "refuse"
    if refusal.exists():
        sys.exit(f"error: {refusal.read_text()}")
    match sys.argv[1:]:
        case ["mount", name, place]:
            _wait(folder)
            subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", name, place], check=True)
            _wait(folder)
            shutil.copytree(folder / name.partition("@")[0], place, symlinks=True, dirs_exist_ok=True)
            subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        case ["umount", place]:
            _wait(folder)
            subprocess.run(["umount", place], check=True)
        case words:
            sys.exit(f"error: {words} is no command")


def _wait(folder: Path) -> None:
    slow = folder / "slow"
    time.sleep(float(slow.read_text()) if slow.exists() else 0)


if __name__ == "__main__":
    main()
