"""A contender's process: `python -m benchmarks.loading.child`, then a job or an epoch a line, in JSON both ways.

    -> {"contender": "files", "kind": "tokens", …}      until the next one, which may come at any time
    <- {"versions": {"torch": "2.13.0"}}                 it is ready; or {"missing": "…"}
    -> 0
    <- {"seconds": 3.1, "samples": 262144}

An epoch's time is that of the ``for`` over its batches. Epoch 0 is there to warm up, and all content is compared in it.

The rule: whatever libraries print goes to the standard error.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.loading.job import Check, Epoch, Job

#: By contender: the module and the function that makes it, and the packages whose versions are told.
CONTENDERS = {
    "files": ("local", "files", "torch"),
    "gathered": ("local", "gathered", "torch"),
    "stream": ("cluster", "stream", "shoal"),
    "samples": ("cluster", "samples", "shoal"),
    "mosaic": ("peers", "mosaic", "mosaicml-streaming"),
    "webdataset": ("peers", "webdataset", "webdataset"),
    "datasets": ("peers", "datasets", "datasets"),
}


def main() -> None:
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(word: dict[str, Any]) -> None:
        out.write(json.dumps(word) + "\n")

    epochs: Epoch | None = None
    for line in sys.stdin:
        word = json.loads(line)
        if isinstance(word, dict):
            epochs = None  # its workers end
            job = Job(**word)
            module, function, package = CONTENDERS[job.contender]
            try:
                epochs = getattr(importlib.import_module(f"benchmarks.loading.{module}"), function)(job)
            except ModuleNotFoundError as error:
                say({"missing": f"{error.name} is not installed in {sys.executable}"})
                continue
            say({"versions": {name: importlib.metadata.version(name) for name in (package, "torch")}})
            expected = np.load(Path(job.files).with_suffix(".npy"))
            continue
        assert epochs is not None
        check = Check(job.kind, expected, is_whole=word == 0)
        began = time.perf_counter()
        for batch in epochs(word):
            check.take(batch)
        seconds = time.perf_counter() - began
        say({"seconds": seconds, "samples": check.end()})


if __name__ == "__main__":
    main()
