"""How Shoal's programs log to stderr: lines of text for people, or JSON for whatever collects logs, one object a line.

    {"time": "2026-01-31T12:00:00.123456+00:00", "level": "warning", "logger": "shoal_csi.node",
     "message": "…", "dataset": "imagenet", "mount": "/var/lib/kubelet/…"}

Fields beside the first four are those that the line was logged with (``extra=``), and those of the whole process. A
traceback is one field, `exception`. What libraries log is the same: asyncio, uvloop, gRPC's Python, warnings, and what
nobody caught.

Of the standard library alone: python-json-logger does what `JsonFormatter` does, and would be one more package in every
image that mounts or reads; structlog would be another way to log at every call.

The rule: what is logged is said once, for both formats. Secrets are hidden before that (`shoal.origin.redact`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, NamedTuple

TEXT, JSON = "text", "json"
FORMATS = (TEXT, JSON)
#: Of all programs; each has a variable of its own, too, that counts first.
VARIABLE = "SHOAL_LOG_FORMAT"

_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
#: What every record has; anything else was given with ``extra=``.
_USUAL = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

#: The level of what `fail` says.
_LAST = "critical"

_of_process: dict[str, object] = {}
_is_json: bool | None = None  # None: nobody has said


def configure(level: str, format: str = "", **fields: object) -> None:
    """Log to stderr from now on.

    Args:
        level: ``debug``, ``info``, …
        format: of `FORMATS`; "" for what `VARIABLE` says, and text where that says nothing.
        fields: of every line of this process, where lines are JSON.
    """
    global _is_json
    _is_json = is_json(format)
    logging.basicConfig(level=level.upper(), stream=sys.stderr, format=_TEXT)
    note(**fields)
    if not _is_json:
        return
    for handler in logging.getLogger().handlers:
        handler.setFormatter(JsonFormatter(_of_process))
    logging.captureWarnings(True)
    sys.excepthook = _uncaught
    threading.excepthook = lambda found: _uncaught(
        found.exc_type, found.exc_value or found.exc_type(), found.exc_traceback
    )


def note(**fields: object) -> None:
    """Fields of every line of this process from now on, where lines are JSON."""
    _of_process.update(fields)


def is_json(format: str = "") -> bool:
    """Whether `format`, or where that is "" the environment, asks for JSON."""
    return (format or os.environ.get(VARIABLE, TEXT)) == JSON


def fail(sentence: str) -> None:
    """Say why this process ends: the line ``error: …``, or that as JSON."""
    as_json = is_json() if _is_json is None else _is_json
    print(
        line("shoal", sentence, _of_process, level=_LAST) if as_json else f"error: {sentence}",
        file=sys.stderr,
        flush=True,
    )


def line(logger: str, message: str, fields: Mapping[str, object] | None = None, *, level: str = "info") -> str:
    """One line of JSON, without its end: for processes that log without `logging`."""
    return _line(datetime.now(UTC), level, logger, message, fields or {})


class Said(NamedTuple):
    """A line of a log. `is_last`: `fail` said it."""

    logger: str
    message: str
    is_last: bool


def parse(text: str) -> Said:
    """What a line of either format says; of one for people the logger is "". Pure."""
    if text.startswith("{"):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            found = json.loads(text)
            return Said(found["logger"], found["message"], found["level"] == _LAST)
    if text.lower().startswith("error:"):
        return Said("", text.partition(":")[2].strip(), True)
    return Said("", text, False)


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON.

    Args:
        fields: of every line, as they are when it is logged.
    """

    def __init__(self, fields: Mapping[str, object]) -> None:
        super().__init__()
        self._fields = fields

    def format(self, record: logging.LogRecord) -> str:
        own = {name: value for name, value in vars(record).items() if name not in _USUAL}
        fields: dict[str, object] = {**self._fields, **own}
        if record.exc_info and record.exc_info[0] is not None:
            fields["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            fields["stack"] = record.stack_info
        when = datetime.fromtimestamp(record.created, UTC)
        return _line(when, record.levelname.lower(), record.name, record.getMessage(), fields)


def _line(when: datetime, level: str, logger: str, message: str, fields: Mapping[str, Any]) -> str:
    said = {"time": when.isoformat(timespec="microseconds"), "level": level, "logger": logger, "message": message}
    # ASCII: names of files may be no Unicode, and a line must have no end but its own. `said` wins over a field.
    return json.dumps({**said, **fields, **said}, default=str)


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt | SystemExit):
        sys.__excepthook__(kind, error, trace)
    else:
        logging.getLogger("shoal").critical("nobody expected %r", error, exc_info=(kind, error, trace))
