"""What the benchmarks' commands have in common: their options, where data lie meanwhile, and where figures go."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

#: As `json_path`.
json_option: Callable[[Any], Any] = click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Also write the result here."
)
#: As `workdir`, for `scratch`.
workdir_option: Callable[[Any], Any] = click.option(
    "--workdir",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    help="Where data lie during the run, on the disk to measure; default: the system's temporary directory.",
)


@contextlib.contextmanager
def scratch(workdir: Path | None) -> Iterator[Path]:
    """A directory in `workdir` that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="shoal-bench-", dir=workdir, ignore_cleanup_errors=True) as directory:
        yield Path(directory)


def save(result: object, path: Path | None) -> None:
    """Write a result as JSON, and the directories above it; nothing where there is no path."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
