"""Where the time went: how long a stream's consumer waited, on what, and for which node.

Whoever loads samples keeps a trace of spans: from when to when it read, from whom, and when it decoded. Of the time
that the consumer waited for a load, each moment counts for what the load did at that moment; the rest of the time
inside the stream (plan, putting a batch together) counts as the stream's own.

The rule: the causes add up to the time that the consumer spent inside the stream, no more and no less.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from shoal.provenance import Observation
from shoal.wire.stream_post import Cause

Who = tuple[Cause, str]
"""What was waited on, and for which node; "" where it is none."""


@dataclass(frozen=True, slots=True)
class Span:
    """From when to when (`time.perf_counter`), and on what, in shares that add up to 1."""

    begin: float
    end: float
    shares: Mapping[Who, float]


@dataclass(slots=True)
class Trace:
    """What one load did. Written by its thread, read when it is over."""

    spans: list[Span] = field(default_factory=list)

    def reading(self, begin: float, end: float, shares: Mapping[Who, float]) -> None:
        """The load went from `begin` to `end`; the time that it did not decode, it read."""
        at = begin
        for span in sorted(self.spans, key=lambda span: span.begin):
            self.spans.append(Span(at, span.begin, shares))
            at = span.end
        self.spans.append(Span(at, end, shares))

    @contextmanager
    def decoding(self) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.spans.append(Span(begin, time.perf_counter(), {(Cause.DECODE, ""): 1.0}))


def shares_of(seen: Observation) -> dict[Who, float]:
    """By what the answers to a load's reads took; where none took any time, by their number."""
    sums: dict[Who, float] = defaultdict(float)
    is_timed = any(each.seconds for each in seen.causes)
    for each in seen.causes:
        sums[each.cause, each.node_id] += each.seconds if is_timed else 1.0
    total = sum(sums.values())
    return {who: seconds / total for who, seconds in sums.items()} if total else {(Cause.STREAM, ""): 1.0}


class Waits:
    """The sums of one stream. For one thread."""

    def __init__(self) -> None:
        self.seconds: dict[Who, float] = defaultdict(float)
        self.total_s = 0.0  #: inside the stream
        self.elapsed_s = 0.0  #: inside it and in the consumer
        self.steps = 0
        self.samples = 0
        self._waited_s = 0.0
        self._told: dict[Who, float] = {}

    def waited(self, begin: float, end: float, trace: Trace) -> None:
        """The consumer waited from `begin` to `end` for the load of `trace`."""
        for span in trace.spans:
            overlap = min(end, span.end) - max(begin, span.begin)
            if overlap > 0:
                self._waited_s += overlap
                for who, share in span.shares.items():
                    self.seconds[who] += overlap * share

    def inside(self, seconds: float) -> None:
        """The consumer spent so long inside the stream for one batch, waits included."""
        self.total_s += seconds
        self.seconds[Cause.STREAM, ""] = max(0.0, self.total_s - self._waited_s)

    def news(self) -> dict[Who, float]:
        """Seconds that came since the last call."""
        news = {who: seconds - self._told.get(who, 0.0) for who, seconds in self.seconds.items()}
        self._told = dict(self.seconds)
        return {who: seconds for who, seconds in news.items() if seconds > 0}

    def by_cause(self) -> dict[str, float]:
        """Seconds by cause, largest first."""
        sums: dict[str, float] = defaultdict(float)
        for (cause, _), seconds in self.seconds.items():
            sums[cause.name.lower()] += seconds
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    def to_dict(self) -> dict[str, object]:
        """For machines: seconds, and seconds by cause and by node."""
        nodes: dict[str, float] = defaultdict(float)
        for (_, node), seconds in self.seconds.items():
            if node:
                nodes[node] += seconds
        return {
            "elapsed_s": self.elapsed_s,
            "waited_s": self.total_s,
            "by_cause_s": self.by_cause(),
            "by_node_s": dict(sorted(nodes.items(), key=lambda item: -item[1])),
            "steps": self.steps,
            "samples": self.samples,
        }

    def report(self) -> str:
        """For people: a line, and one for each cause that took time."""
        share = self.total_s / self.elapsed_s if self.elapsed_s else 0.0
        rate = self.samples / self.elapsed_s if self.elapsed_s else 0.0
        lines = [
            f"{self.steps:,} steps, {self.samples:,} samples in {self.elapsed_s:.2f} s ({rate:,.0f}/s); "
            f"waited {self.total_s:.2f} s ({share:.1%})"
        ]
        by_node: dict[str, list[tuple[float, str]]] = defaultdict(list)
        for (which, node), seconds in self.seconds.items():
            if node:
                by_node[which.name.lower()].append((seconds, node))
        for cause, seconds in self.by_cause().items():
            nodes = sorted(by_node[cause], reverse=True)
            named = ", ".join(f"{node[:8]} {s:.2f} s" for s, node in nodes[:4])
            lines.append(f"  {cause:<7}{seconds:9.2f} s {seconds / max(self.total_s, 1e-9):6.1%}   {named}".rstrip())
        return "\n".join(lines)
