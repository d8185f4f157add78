"""Whether an address is alive: a request that costs its event loop microseconds and waits for no disk and no origin.

    Probe     one such request under way, to be polled beside something else (`shoal.watch`)
    Prober    asks addresses with an open circuit now and then, on a thread of its own, and closes the circuits of
              those that answer; so no read ever pays for the trial

The rule: only silence counts that this process was awake for. Its own pauses (it was stopped, or starved of processors)
are no fault of a node's.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
import weakref
from typing import TYPE_CHECKING

from shoal.errors import ShoalError

if TYPE_CHECKING:
    from shoal.connection import Connection
    from shoal.transport import Transport

log = logging.getLogger(__name__)

#: What is asked. 507 means: alive, but its drive hangs. Any other answer will do, 503 too: a server with no connection
#: or descriptor left gives it to whoever comes.
TARGET = "/v1/alive"
#: An address that leaves a probe unanswered for so long is grey: it accepts connections and nothing else.
PROBE_S = 0.3
#: Between two looks at the clock while a probe is out. A look that comes later than it should was a pause of this
#: process or of the machine, and the shorter the wait, the less of a pause is taken for the address's silence.
SLICE_S = 0.01
DRIVE_HANGS = "its drive hangs"
_DRIVE_HANGS_HEAD = b"HTTP/1.1 507"
_HEAD_BYTES = len(_DRIVE_HANGS_HEAD)


class Awake:
    """A clock of the time that this process was awake for."""

    __slots__ = ("_seen",)

    def __init__(self) -> None:
        self._seen = time.monotonic()

    def passed(self, wanted_s: float) -> float:
        """Seconds since the last call, no more than `wanted_s`, which the caller meant to wait."""
        now = time.monotonic()
        seconds, self._seen = now - self._seen, now
        return min(seconds, wanted_s)


class Probe:
    """One probe under way. Raises NodeUnavailable where it cannot be sent. Not thread-safe."""

    def __init__(self, transport: Transport, address: str) -> None:
        self._transport = transport
        self.address = address
        self._connection: Connection = transport.knock(address, TARGET)

    def fileno(self) -> int:
        return self._connection.fileno()

    def verdict(self) -> str | None:
        """To call when there is something to read: "" where the address is well, else what is wrong with it.

        None: nobody can say yet, because a kept connection was found closed; the probe was sent anew.
        """
        try:
            head = self._connection.peek(_HEAD_BYTES)
        except BlockingIOError:
            return None
        except OSError as error:
            head, reason = b"", str(error)
        else:
            reason = "it closed the connection"
        if not head:
            was_kept = not self._connection.is_fresh
            self.close()
            if not was_kept:
                return reason
            try:
                self._connection = self._transport.knock(self.address, TARGET, fresh=True)
            except ShoalError as error:
                return str(error)
            return None
        if head == _DRIVE_HANGS_HEAD:
            return DRIVE_HANGS
        return ""

    def close(self) -> None:
        """End it. Its answer was only looked at, so the connection is not used again."""
        self._connection.close()


def verdict_of(transport: Transport, address: str, timeout_s: float = PROBE_S) -> str:
    """Probe `address` and wait: "" where it is well, else what is wrong with it."""
    try:
        probe = Probe(transport, address)
    except ShoalError as error:
        return str(error)
    awake, waited_s = Awake(), 0.0
    try:
        while waited_s < timeout_s:
            poll = select.poll()
            poll.register(probe.fileno(), select.POLLIN)
            if poll.poll(SLICE_S * 1000):
                verdict = probe.verdict()
                if verdict is not None:
                    return verdict
            waited_s += awake.passed(SLICE_S)
        return silence(timeout_s)
    finally:
        probe.close()


def silence(seconds: float) -> str:
    """The sentence for an address that leaves a probe unanswered."""
    return f"it accepts connections and did not answer for {seconds * 1000:.0f} ms"


class Prober:
    """Asks the addresses of one transport whose circuits are open. Its thread lives as long as one is."""

    def __init__(self, transport: Transport) -> None:
        self._transport = weakref.ref(transport)
        self.reset()
        _probers.add(self)

    def reset(self) -> None:
        """Start anew, for a fork's child: the thread stayed in the parent."""
        self._lock = threading.Lock()  # guards _thread, _asked
        self._news = threading.Event()
        self._thread: threading.Thread | None = None
        self._asked: set[str] = set()

    def wake(self) -> None:
        """A circuit was opened."""
        with self._lock:
            self._news.set()
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="shoal-probe", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:  # no thread is to be had: reads go on, and the next failure tries again
                    log.warning("nobody probes silent addresses now: %s", error)
                    return
                self._thread = thread

    def keep_on(self) -> None:
        """A circuit is open: see that somebody probes it. In a fork's child nobody does yet."""
        if self._thread is None:
            self.wake()

    def ask(self, address: str) -> None:
        """Find out soon whether `address` is alive, and open its circuit where it is not."""
        with self._lock:
            self._asked.add(address)
        self.wake()

    def end(self) -> None:
        """The transport is closed: the thread ends as soon as it has no probe out."""
        self._news.set()

    def _run(self) -> None:
        while self._round():
            pass

    def _round(self) -> bool:
        """One round of probes; whether there will be another."""
        transport = self._transport()
        if transport is None:
            return False
        health = transport.health
        with self._lock:
            asked, self._asked = self._asked, set()
            self._news.clear()
        if transport.is_closed:  # looked at after the news are cleared: what `end` tells is not lost
            return False
        for address in {*asked, *health.due(time.monotonic())}:
            if transport.is_closed:
                return False
            verdict = verdict_of(transport, address)
            if verdict:
                if health.failed(address, verdict, time.monotonic()):
                    log.warning("%s is not asked first any more: %s", address, verdict)
            elif health.answered(address):
                log.info("%s answers again", address)
        del transport  # so that one that nobody uses can go
        due_at = health.next_due_at()
        if due_at is not None:
            self._news.wait(max(0.0, due_at - time.monotonic()))
            return True
        with self._lock:
            if self._asked or self._news.is_set():
                return True
            self._thread = None
            return False


_probers: weakref.WeakSet[Prober] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for prober in _probers:
        prober.reset()


os.register_at_fork(after_in_child=_after_fork_in_child)
