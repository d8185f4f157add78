"""What programs write to stderr, in both formats."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from shoal import logs
from shoal_csi import journal

#: Everything that may write a line, in one process.
PROGRAM = """
import asyncio, logging, sys, threading, warnings
from shoal import logs
logs.configure("info", *sys.argv[1:], program="p")
log = logging.getLogger("shoal_x.y")
log.info("read %d bytes", 3, extra={"dataset": "imagenet", "node": "n1", "path": "\\udcff", "odd": {1, 2}})
log.debug("not said")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("two\\nlines")
warnings.warn("old", DeprecationWarning, stacklevel=1)
async def forget():
    asyncio.get_running_loop().call_exception_handler({"message": "a task was lost"})
asyncio.run(forget())
threading.Thread(target=lambda: [][0]).start()
{}["key"]
"""


def run(*words: str, **environment: str) -> list[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONWARNINGS": "always", **environment}
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    return done.stderr.splitlines()


def test_json_is_one_object_a_line_whoever_wrote_it() -> None:
    lines: list[dict[str, Any]] = [json.loads(line) for line in run("json")]
    for line in lines:
        assert datetime.fromisoformat(line["time"]).utcoffset() is not None
        assert list(line)[:4] == ["time", "level", "logger", "message"]
        assert line["program"] == "p"
    by_logger = {line["logger"]: line for line in lines}
    first = lines[0]
    assert (first["level"], first["message"]) == ("info", "read 3 bytes")
    assert (first["dataset"], first["node"], first["path"]) == ("imagenet", "n1", "\udcff")
    assert lines[1]["message"] == "two\nlines"
    assert lines[1]["exception"].endswith("ZeroDivisionError: division by zero")
    assert "DeprecationWarning: old" in by_logger["py.warnings"]["message"]
    assert by_logger["asyncio"]["message"] == "a task was lost"
    caught = [line["exception"].splitlines()[-1] for line in lines if line["logger"] == "shoal"]
    assert sorted(caught) == ["IndexError: list index out of range", "KeyError: 'key'"]


def test_the_environment_says_it_for_programs_that_are_not_told() -> None:
    assert json.loads(run(SHOAL_LOG_FORMAT="json")[0])["message"] == "read 3 bytes"


def test_text_is_for_people() -> None:
    lines = run()
    assert lines[0].endswith("INFO shoal_x.y: read 3 bytes")
    assert "imagenet" not in "".join(lines)


def test_a_field_does_not_hide_what_was_said() -> None:
    record = logging.makeLogRecord({"msg": "m", "levelname": "INFO", "name": "l", "time": "never", "level": 7})
    line = json.loads(logs.JsonFormatter({}).format(record))
    assert (line["level"], line["message"], line["time"][:2]) == ("info", "m", "20")


def test_the_last_words_of_a_daemon_in_either_format() -> None:
    own = logs.line("shoal_csi.supervisor", "daemon 7 starts")
    said, why = logs.line("shoal_csi.daemon", "it loads"), logs.line("shoal", "no such dataset", level="critical")
    assert journal.last_words([own, said, why, own]) == "no such dataset"
    assert journal.last_words([own, said, own]) == "it loads"
    assert journal.last_words(["it loads", "error: no such dataset", "bye"]) == "no such dataset"
    assert journal.last_words(["{is no JSON", ""]) == "{is no JSON"
    assert journal.last_words([own]) == ""


def test_programs_end_with_an_error_in_their_format(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "SHOAL_LOG_FORMAT": "json"}
    command = [sys.executable, "-m", "shoal_csi", "--endpoint", "nowhere", "--node-id", "n"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert json.loads(done.stderr)["message"].startswith("'nowhere' is no CSI endpoint")
    done = subprocess.run([*command, "--log-format", "text"], env=env, capture_output=True, text=True, check=False)
    assert done.stderr.startswith("error: 'nowhere' is no CSI endpoint")
