"""The tables of docs/doctor.md, made from what can be found: ``python -m shoal.doctor.page``. A test compares them."""

from __future__ import annotations

import re

from shoal.doctor import kinds


def table(check: str) -> str:
    """The rows of one check. What is named when it is found stands in capitals."""
    lines = ["| finding | | says | remedy |", "|---|---|---|---|"]
    lines += [
        f"| `{kind.name}` | {kind.outcome} | {_shown(kind.sentence)} | {_shown(kind.remedy)} |"
        for kind in kinds()
        if kind.check == check
    ]
    return "\n".join(lines)


def checks() -> list[str]:
    return list(dict.fromkeys(kind.check for kind in kinds()))


def _shown(template: str) -> str:
    words = re.sub(r"\{(\w+)(?:![a-z])?\}", lambda found: found[1].upper(), template)
    return re.sub(r"'(shoal[ -][^']*)'", r"`\1`", words).replace("|", "\\|")


if __name__ == "__main__":
    for name in checks():
        print(f"### {name}\n\n{table(name)}\n")
