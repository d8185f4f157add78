"""When a dataset's origin is listed again: by an interval or by a cron expression, in UTC. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import cronsim

from shoal.errors import InvalidRequest

_DURATION = re.compile(r"(\d+)(h|m|s)")
_SECONDS = {"h": 3600, "m": 60, "s": 1}
#: Listings of an origin cost requests; whoever needs more asks for one with the annotation.
MIN_INTERVAL_S = 60.0


@dataclass(frozen=True, slots=True)
class Schedule:
    """Either `interval_s` > 0 or a cron expression."""

    interval_s: float = 0.0
    cron: str = ""

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Schedule | None:
        """A dataset's ``refresh``; None where it has none.

        Raises:
            InvalidRequest: it is neither an interval nor a cron expression.
        """
        if cron := raw.get("cron"):
            try:
                cronsim.CronSim(cron, datetime.now(UTC))
            except cronsim.CronSimError as error:
                raise InvalidRequest(
                    f"{cron!r} is no cron expression ({error}): write minute, hour, day, month and weekday, such as "
                    "'0 3 * * *' for three o'clock each night (UTC)"
                ) from error
            return cls(cron=cron)
        if interval := raw.get("interval"):
            return cls(interval_s=max(MIN_INTERVAL_S, duration_s(interval)))
        return None

    def next_utc_s(self, since_utc_s: float) -> float:
        """The first time after `since_utc_s`; infinity for a date that never comes."""
        if not self.cron:
            return since_utc_s + self.interval_s
        after = datetime.fromtimestamp(since_utc_s, UTC)
        found = next(cronsim.CronSim(self.cron, after), None)
        return found.timestamp() if found else float("inf")


def duration_s(text: str) -> float:
    """``1h30m`` in seconds.

    Raises:
        InvalidRequest: `text` is no duration.
    """
    parts = _DURATION.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise InvalidRequest(f"{text!r} is no duration: write hours, minutes and seconds, such as 1h, 90m or 1h30m")
    return float(sum(int(number) * _SECONDS[unit] for number, unit in parts))
