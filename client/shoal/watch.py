"""What to do about a node that is silent: find out whether it is grey or merely slow, and ask another one meanwhile.

A node may be silent because it fills the shard from a slow origin; then it keeps its fill and the reader waits, for
another one that was asked would fetch the same bytes again. Or it is stopped, or its drive hangs; then waiting is all
that could go wrong. So, when nothing came for as long as the node usually takes, in one poll(2):

    the answer      of the node itself, which may still come: go on with it
    a probe         on another connection (`shoal.liveness`). No answer: the circuit opens, the next node is asked
    a hedge         the same bytes from other nodes in turn, if they have them cached: the first that has them wins

A node that sends, but next to nothing, is hedged in the same way, without the probe.

The rule: one thread looks at all of them, and the loser's connection is closed before the winner's bytes are received;
so no two ever write into one buffer.
"""

from __future__ import annotations

import logging
import math
import select
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from shoal import liveness
from shoal.connection import Connection, Interrupted
from shoal.errors import DeadlineExceeded, ShoalError
from shoal.liveness import SLICE_S, Awake, Probe

if TYPE_CHECKING:
    from shoal.transport import Pending, Transport

log = logging.getLogger(__name__)

#: An address that leaves a probe unanswered for so long is taken for grey where others can be asked instead, and where
#: there is nobody else: a machine so short of processors that its servers are late is better waited for.
HASTY_S, PATIENT_S = 0.3, 5.0
#: Between two looks at the clock while no probe is out.
IDLE_S = 0.05
#: Fewer bytes a second than this are worth asking another node.
SLOW_BYTES_PER_S = 1 << 20
#: A node that answered a probe and is still silent is probed again after this.
PROBE_AGAIN_S = 0.25
_GOOD_ANSWER = b"HTTP/1.1 20"

Hedges = Callable[[int], "Iterator[Pending]"]
"""Asks other nodes in turn for what is missing after the first n bytes; each only when the iterator is advanced."""


class Superseded(Exception):
    """Another node was faster: `pending` is its answer, of the bytes after the first `received`."""

    def __init__(self, pending: Pending, received: int) -> None:
        super().__init__(pending, received)
        self.pending, self.received = pending, received


class Watch:
    """The watch over one request (see `shoal.connection.Watch`). Not thread-safe: it belongs to the request.

    Args:
        until: `time.monotonic` at which the caller's time is over.
        hedges: None where no other node is asked meanwhile.
        is_hasty: others can be asked instead, so that the first sign of trouble is enough.
    """

    __slots__ = ("_address", "_hedges", "_is_hasty", "_pulse", "_transport", "until")

    def __init__(
        self,
        transport: Transport,
        address: str,
        until: float = math.inf,
        hedges: Hedges | None = None,
        is_hasty: bool = False,
    ) -> None:
        self._transport = transport
        self._address = address
        self._hedges = hedges
        self._is_hasty = is_hasty
        self._pulse: _Pulse | None = None
        self.until = until

    def look(self, came: int, seconds: float, good: int) -> None:
        """See `shoal.connection.Watch`. Asks others for what they have cached, where the bytes come too slowly.

        Raises:
            Superseded: another node has the bytes.
            DeadlineExceeded: the caller's time is over.
        """
        if time.monotonic() > self.until:
            raise self._expired()
        if self._hedges is None or came >= SLOW_BYTES_PER_S * seconds:
            return
        for hedge in self._hedges(good):
            poll = select.poll()
            poll.register(hedge.fileno(), select.POLLIN)
            if poll.poll(int(HASTY_S * 1000)) and hedge.peek(len(_GOOD_ANSWER)) == _GOOD_ANSWER:
                log.info("%s sent %d bytes in %.1f s, another node has them", self._address, came, seconds)
                raise Superseded(hedge, good)
            hedge.close()

    def _expired(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"{self._address} did not give all bytes in time")

    def silent(self, connection: Connection, good: int) -> None:
        """See `shoal.connection.Watch`.

        Raises:
            Interrupted: the node is grey, or was silent for as long as the transport waits at most.
            Superseded: another node has the bytes.
            DeadlineExceeded: the caller's time is over.
        """
        reason = self._transport.health.reason(self._address)
        if reason and self._is_hasty:  # another thread has just found out
            raise Interrupted(f"{self._address} is silent: {reason}", good)
        if self._pulse is None:
            self._pulse = _Pulse(self._transport, self._address, HASTY_S if self._is_hasty else PATIENT_S)
        vigil = _Vigil(self._transport, self._address, connection, good, self._pulse)
        try:
            vigil.keep(self.until, self._hedges(good) if self._hedges is not None else iter(()))
        except TimeoutError as error:
            raise self._expired() from error
        finally:
            vigil.end()

    def end(self) -> None:
        """The request is over."""
        if self._pulse is not None:
            self._pulse.end()


class _Pulse:
    """Probes of one address during one request.

    A probe that is not answered yet outlives the silence in which it was sent: the kernel of a stopped process may yet
    send what it has, up to 200 ms late where it waits to fill a packet, and that is no sign of life.
    """

    def __init__(self, transport: Transport, address: str, patience_s: float) -> None:
        self._transport = transport
        self._address = address
        self._patience_s = patience_s
        self._waited_s = 0.0
        self._again_in_s = 0.0
        self.probe: Probe | None = None

    def begin(self) -> str:
        """Send a probe where one is due; "", or why it cannot be sent."""
        if self.probe is None and self._again_in_s <= 0:
            try:
                self.probe, self._waited_s = Probe(self._transport, self._address), 0.0
            except ShoalError as error:
                return str(error)
        return ""

    def passed(self, seconds: float, *, is_answered: bool) -> str:
        """So much time went by; "", or what is wrong with the address."""
        if self.probe is None:
            self._again_in_s -= seconds
            return ""
        self._waited_s += seconds
        verdict = self.probe.verdict() if is_answered else None
        if verdict is None:
            return liveness.silence(self._patience_s) if self._waited_s >= self._patience_s else ""
        self.end()
        self._again_in_s = PROBE_AGAIN_S
        if verdict == liveness.DRIVE_HANGS and self._patience_s == PATIENT_S:
            return ""  # nobody else is left to ask, and it lives: soon it gives its drive up and reads elsewhere
        return verdict

    def end(self) -> None:
        if self.probe is not None:
            self.probe.close()
            self.probe = None


class _Vigil:
    """One silence, and what is polled during it."""

    def __init__(self, transport: Transport, address: str, connection: Connection, good: int, pulse: _Pulse) -> None:
        self._transport = transport
        self._address = address
        self._connection = connection
        self._good = good
        self._pulse = pulse
        self._hedge: Pending | None = None

    def end(self) -> None:
        """Close the hedge that lost."""
        if self._hedge is not None:
            self._hedge.close()

    def keep(self, until: float, others: Iterator[Pending]) -> None:
        """Wait until there is something to read. Raises as `Watch.silent`, TimeoutError at `until`."""
        awake, silent_s = Awake(), 0.0
        self._hedge = next(others, None)
        while silent_s < self._transport.read_timeout_s:
            self._heed(self._pulse.begin())
            left_s = until - time.monotonic()
            if left_s <= 0:
                raise TimeoutError
            slice_s = SLICE_S if self._pulse.probe is not None else IDLE_S
            ready = self._ready(min(slice_s, left_s))
            if self._connection.fileno() in ready:
                return
            if self._hedge is not None and self._hedge.fileno() in ready:
                self._look_at_hedge(self._hedge)
                self._hedge = next(others, None)
            passed_s = awake.passed(slice_s)
            silent_s += passed_s
            probe = self._pulse.probe
            self._heed(self._pulse.passed(passed_s, is_answered=probe is not None and probe.fileno() in ready))
        raise Interrupted(f"{self._address} was silent for {silent_s:.0f} s", self._good)

    def _ready(self, timeout_s: float) -> set[int]:
        poll = select.poll()
        for each in (self._connection, self._pulse.probe, self._hedge):
            if each is not None:
                poll.register(each.fileno(), select.POLLIN)
        return {number for number, _ in poll.poll(max(1, int(timeout_s * 1000)))}

    def _look_at_hedge(self, hedge: Pending) -> None:
        """Raises Superseded where it has the bytes; else closes it."""
        if hedge.peek(len(_GOOD_ANSWER)) != _GOOD_ANSWER:
            hedge.close()
            return
        self._hedge = None
        if self._pulse.probe is not None:
            self._transport.suspect(self._address)  # nobody waits for the verdict now, but the next reader needs it
        log.info("%s is silent, another node has the bytes", self._address)
        raise Superseded(hedge, self._good)

    def _heed(self, verdict: str) -> None:
        if verdict:
            self._transport.failed(self._address, verdict)
            raise Interrupted(f"{self._address} is silent: {verdict}", self._good)
