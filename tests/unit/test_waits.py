"""Where the time went: causes add up to what the consumer spent, whoever the loads waited for."""

from __future__ import annotations

import json

import pytest

from shoal.streaming.waits import Cause, Span, Trace, Waits

PEER = {(Cause.PEER, "node-a"): 1.0}


def test_a_wait_counts_for_what_the_load_did_meanwhile() -> None:
    trace = Trace([Span(6.0, 8.0, {(Cause.DECODE, ""): 1.0})])
    trace.reading(1.0, 9.0, PEER)
    waits = Waits()
    waits.waited(4.0, 10.0, trace)
    waits.inside(7.0)
    assert waits.by_cause() == {"peer": 3.0, "decode": 2.0, "stream": 2.0}
    assert sum(waits.by_cause().values()) == waits.total_s


def test_what_was_over_before_the_wait_is_not_waited_for() -> None:
    trace = Trace()
    trace.reading(1.0, 2.0, PEER)
    waits = Waits()
    waits.waited(3.0, 3.5, trace)
    waits.inside(0.5)
    assert waits.by_cause() == {"stream": 0.5}


def test_shares_of_several_sources() -> None:
    trace = Trace()
    trace.reading(0.0, 4.0, {(Cause.PEER, "node-a"): 0.25, (Cause.ORIGIN, "node-b"): 0.75})
    waits = Waits()
    waits.waited(0.0, 4.0, trace)
    waits.inside(4.0)
    assert waits.by_cause() == {"origin": 3.0, "peer": 1.0, "stream": 0.0}
    assert waits.to_dict()["by_node_s"] == {"node-b": 3.0, "node-a": 1.0}


def test_the_report_names_causes_and_nodes() -> None:
    waits = Waits()
    trace = Trace()
    trace.reading(0.0, 3.0, {(Cause.ORIGIN, "node-abcdef"): 1.0})
    waits.waited(0.0, 3.0, trace)
    waits.inside(4.0)
    waits.elapsed_s, waits.steps, waits.samples = 8.0, 10, 2560
    lines = waits.report().splitlines()
    assert lines[0] == "10 steps, 2,560 samples in 8.00 s (320/s); waited 4.00 s (50.0%)"
    assert lines[1].split() == ["origin", "3.00", "s", "75.0%", "node-abc", "3.00", "s"]
    json.dumps(waits.to_dict())


def test_decoding_is_timed() -> None:
    trace = Trace()
    with pytest.raises(ValueError), trace.decoding():
        raise ValueError
    assert [list(span.shares) for span in trace.spans] == [[(Cause.DECODE, "")]]
