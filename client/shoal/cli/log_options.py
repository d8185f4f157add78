"""The flag ``--log-format`` of the servers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from shoal import logs


def format_option(prefix: str) -> Callable[[Any], Any]:
    """``--log-format``, of a program whose environment variables begin with `prefix`."""
    return click.option(
        "--log-format",
        envvar=[f"{prefix}_LOG_FORMAT", logs.VARIABLE],
        default=logs.TEXT,
        type=click.Choice(logs.FORMATS),
        help="Lines for people, or one JSON object a line.",
    )
