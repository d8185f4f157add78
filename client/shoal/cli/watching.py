"""What commands have in common that watch something which the controller and the nodes do.

The rule: to end the watching ends nothing else, and who ends it is told so.
"""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any, Self

import click
from tqdm import tqdm

from shoal.cli import output

#: A controller that is silent for so long is reported; what is watched may go on without it.
SILENCE_TIMEOUT_S = 600.0
#: As a shell tells of a program that SIGINT ended.
INTERRUPTED_STATUS = 130


class Bar:
    """Bytes, rate and time left on stderr; nothing where that is no terminal. A context manager.

    Ctrl-C within it says `goes_on` and exits with `INTERRUPTED_STATUS`.
    """

    def __init__(self, goes_on: str) -> None:
        self._goes_on = goes_on
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        if isinstance(error, KeyboardInterrupt):
            output.remark(self._goes_on)
            raise click.exceptions.Exit(INTERRUPTED_STATUS) from None

    def show(self, what: str, done_bytes: int, total_bytes: int, note: str) -> None:
        """Draw it. What was done at the first call is not counted in the rate."""
        if self._bar is None:
            bar: tqdm[Any] = tqdm(
                desc=what,
                initial=done_bytes,
                total=total_bytes,
                unit="B",
                unit_scale=True,
                unit_divisor=1024,
                disable=not sys.stderr.isatty(),
            )
            self._bar = bar
        self._bar.total = total_bytes
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(done_bytes - self._bar.n)
