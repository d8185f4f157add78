"""How fast shards are moved: under a clock and a pressure that the test says."""

from __future__ import annotations

from shoal_cachenode.pace import FASTER, FIRST_BYTES_PER_S, IDLE_S, LEAST_BYTES_PER_S, LOOK_S, SLOWER, Pace, waited_s

MOST = 200 << 20


class Machine:
    """A clock, and the time in which somebody waited for a processor; `share` of the time is such a time."""

    def __init__(self, most: float = MOST, *, has_psi: bool = True) -> None:
        self.now, self.share, self._waited, self._has_psi = 100.0, 0.0, 5.0, has_psi
        self.pace = Pace(most, waited=lambda: self._waited if self._has_psi else None, clock=lambda: self.now)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self._waited += self.share * seconds

    def move_for(self, seconds: float, size_bytes: int = 1 << 20) -> int:
        """Move as fast as one may; return the bytes."""
        end, moved = self.now + seconds, 0
        while self.now < end:
            if wait := self.pace.room_in_s():
                self.sleep(wait)
            self.pace.spend(size_bytes)
            moved += size_bytes
        return moved


def test_a_machine_with_processors_to_spare_soon_moves_as_fast_as_it_may_and_no_faster() -> None:
    machine = Machine()
    machine.pace.spend(1)
    assert machine.pace.bytes_per_s == FIRST_BYTES_PER_S
    machine.move_for(5.0)
    assert machine.pace.bytes_per_s == MOST
    assert 0.98 * MOST * 10 <= machine.move_for(10.0) <= 1.02 * MOST * 10


def test_where_somebody_waits_for_a_processor_the_pace_falls_and_never_to_nothing() -> None:
    machine = Machine()
    machine.move_for(5.0)
    machine.share = 0.5
    machine.move_for(2 * LOOK_S)
    assert machine.pace.bytes_per_s <= MOST * SLOWER
    machine.move_for(5.0)
    assert machine.pace.bytes_per_s == LEAST_BYTES_PER_S
    machine.share = 0.0
    machine.move_for(1.5 * LOOK_S)
    assert LEAST_BYTES_PER_S < machine.pace.bytes_per_s <= LEAST_BYTES_PER_S * FASTER**2


def test_after_idling_it_begins_carefully_again_and_owes_nothing() -> None:
    machine = Machine()
    machine.move_for(5.0)
    machine.sleep(2 * IDLE_S)
    assert machine.pace.room_in_s() == 0.0
    machine.pace.spend(FIRST_BYTES_PER_S)
    assert machine.pace.room_in_s() == 1.0


def test_a_limit_below_the_least_pace_holds() -> None:
    machine = Machine(1000)
    machine.share = 1.0
    assert machine.move_for(10.0, 100) <= 10.3 * 1000  # and one at each end


def test_without_psi_the_limit_alone_counts() -> None:
    machine = Machine(has_psi=False)
    machine.share = 1.0
    machine.move_for(1.0)
    assert machine.pace.bytes_per_s == MOST


def test_a_part_that_takes_longer_than_idling_does_not_start_anew() -> None:
    machine = Machine(LEAST_BYTES_PER_S)
    machine.pace.spend(4 * LEAST_BYTES_PER_S)
    machine.sleep(4.0)
    machine.pace.spend(LEAST_BYTES_PER_S)
    assert machine.pace.room_in_s() == 1.0


def test_the_kernel_counts_upwards() -> None:
    first = waited_s()
    second = waited_s()
    assert (first is None) == (second is None)
    assert first is None or second is None or 0 <= first <= second
