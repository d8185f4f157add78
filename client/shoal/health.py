"""How well each address answers, as one process sees it: its latency, and a circuit that opens when it fails.

    latency    the time to the first byte of the last answers; a multiple of their 95th percentile is the *patience*
               with the next one. It decides when to ask what is the matter, never that a node is dead
    circuit    opens when nobody listens, or a silent node does not answer a probe either. Open means: asked last.
               It is half-open while a probe is out, on a thread of its own (`shoal.prober`), so no read pays for the
               trial; the first answer of any kind closes it

The rule: this is advice about the order. A node with an open circuit is still asked when nobody else answers. No I/O
here, and no clock: the time is an argument.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from dataclasses import dataclass

#: What patience can be, in seconds: few steps, because a connection is told of each change. The first is as long as a
#: busy node may take on a good day, the last as long as a reader may be kept in the dark.
PATIENCE_STEPS_S = (0.02, 0.03, 0.05, 0.075, 0.1, 0.15)
#: Patience with an address that has not answered often enough.
FIRST_PATIENCE_S = 0.1
PATIENCE_FACTOR = 4
QUANTILE = 0.95
SAMPLES = 64
#: Answers between two looks at the quantile: sorting is dearer than an answer is worth.
LOOK_EVERY = 16
#: Between probes of an open circuit; each is drawn from half to all of it, so that clients do not come in step.
MIN_BACKOFF_S, MAX_BACKOFF_S = 0.1, 3.0
#: Addresses remembered. More than any map has; a bound for processes that see many maps.
MAX_ADDRESSES = 4096


class Latency:
    """First-byte latency of one address. Threads may race: an answer more or less changes nothing.

    Attributes:
        patience_s: how long a silence is ordinary.
    """

    __slots__ = ("_samples", "_until_look", "patience_s")

    def __init__(self) -> None:
        self._samples: deque[float] = deque(maxlen=SAMPLES)
        self._until_look = LOOK_EVERY
        self.patience_s = FIRST_PATIENCE_S

    def add(self, seconds: float) -> None:
        self._samples.append(seconds)
        self._until_look -= 1
        if self._until_look <= 0:
            self._until_look = LOOK_EVERY
            ranked = sorted(self._samples.copy())
            wanted = PATIENCE_FACTOR * ranked[int(QUANTILE * (len(ranked) - 1))]
            self.patience_s = next((step for step in PATIENCE_STEPS_S if step >= wanted), PATIENCE_STEPS_S[-1])


@dataclass(slots=True)
class Circuit:
    """An open circuit: why, and when the next probe is due."""

    reason: str
    backoff_s: float
    due_at: float


class Health:
    """All addresses that one `Transport` knows. Thread-safe.

    Attributes:
        circuits: the open ones by address; mostly none is. To be looked at only.
    """

    def __init__(self, draw: random.Random | None = None) -> None:
        self._latencies: dict[str, Latency] = {}
        self.circuits: dict[str, Circuit] = {}
        self._draw = draw or random.Random()
        self.reset_lock()

    def reset_lock(self) -> None:
        """A new lock, for a fork's child: the thread that held the old one is not there to release it."""
        self._lock = threading.Lock()  # guards changes of circuits; reads of single keys go without

    def latency(self, address: str) -> Latency:
        found = self._latencies.get(address)
        if found is None:
            if len(self._latencies) >= MAX_ADDRESSES:
                self._latencies = {}
            found = self._latencies.setdefault(address, Latency())
        return found

    def is_open(self, address: str) -> bool:
        return address in self.circuits

    def reason(self, address: str) -> str:
        """Why the circuit is open; "" where it is not."""
        circuit = self.circuits.get(address)
        return circuit.reason if circuit is not None else ""

    def failed(self, address: str, reason: str, now: float) -> bool:
        """`address` did not answer: open its circuit, or wait longer until the next probe. Whether it was closed."""
        with self._lock:
            known = self.circuits.get(address)
            backoff_s = MIN_BACKOFF_S if known is None else min(MAX_BACKOFF_S, 2 * known.backoff_s)
            if known is not None and now < known.due_at:
                return False  # of many readers that find the same, the first sets the pace
            if known is None and len(self.circuits) >= MAX_ADDRESSES:
                return False
            due_at = now + backoff_s * self._draw.uniform(0.5, 1.0)
            self.circuits[address] = Circuit(reason, backoff_s, due_at)
            return known is None

    def answered(self, address: str) -> bool:
        """`address` gave an answer: close its circuit. Whether it was open."""
        if address not in self.circuits:
            return False
        with self._lock:
            return self.circuits.pop(address, None) is not None

    def due(self, now: float) -> list[str]:
        """Addresses whose next probe is due."""
        with self._lock:
            return [address for address, circuit in self.circuits.items() if circuit.due_at <= now]

    def next_due_at(self) -> float | None:
        """When the next probe is due; None where no circuit is open."""
        with self._lock:
            return min((circuit.due_at for circuit in self.circuits.values()), default=None)
