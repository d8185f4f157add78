"""How commands print: data on stdout, remarks on stderr, tables with aligned columns, JSON as one document.

The rule: JSON keys are snake_case and stay, sizes in it are bytes; text is for people and may change.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import click

from shoal import sizes
from shoal.errors import InvalidRequest

json_option: Callable[[Any], Any] = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


def data(text: str) -> None:
    click.echo(text)


def remark(text: str) -> None:
    click.echo(text, err=True)


def document(value: object) -> None:
    """Print `value` as the command's one JSON document."""
    click.echo(json.dumps(value, indent=2))


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lines of left-aligned columns; a header that ends in ">" is one of a right-aligned column."""
    names = [header.rstrip(">") for header in headers]
    cells = [names, *([*row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
    return "\n".join(
        "  ".join(
            text.rjust(width) if header.endswith(">") else text.ljust(width)
            for text, width, header in zip(row, widths, headers, strict=True)
        ).rstrip()
        for row in cells
    )


def fields(pairs: Iterable[tuple[str, str]]) -> str:
    """Lines of ``name  value``."""
    known = list(pairs)
    width = max(len(name) for name, _ in known)
    return "\n".join(f"{name.ljust(width)}  {value}".rstrip() for name, value in known)


def percent(part: float, whole: float) -> str:
    """Rounded down, so that 100 % means all of it; nothing of nothing is all of it."""
    return f"{int(100 * part / whole) if whole else 100} %"


class SizeType(click.ParamType[int]):
    """A size option, as bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return sizes.parse(value)
        except InvalidRequest as error:
            self.fail(str(error), param, ctx)
