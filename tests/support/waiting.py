"""Waiting for what another process will do, without guessing how long that takes."""

from __future__ import annotations

from collections.abc import Callable

import tenacity


def wait_for(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Return as soon as `condition` holds; fail where it does not within `timeout_s`."""
    stop = tenacity.stop_after_delay(timeout_s)
    for attempt in tenacity.Retrying(wait=tenacity.wait_fixed(0.1), stop=stop, reraise=True):
        with attempt:
            assert condition()
