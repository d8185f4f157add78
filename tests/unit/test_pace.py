"""How fast shards are moved: under a clock and a pressure that the test says."""

from __future__ import annotations

import pytest

from shoal_cachenode.pace import FIRST_BYTES_PER_S, FREE_SHARE, IDLE_S, LEAST_BYTES_PER_S, LOOK_S, Pace, much, waited_s

MOST = 200 << 20


class Machine:
    """A clock, and the time in which somebody waits for a processor.

    Attributes:
        share: of the time, in how much somebody waits without moves.
        cost: what each byte a second of moves adds to that.
    """

    def __init__(self, most: float = MOST, *, share: float = 0.0, cost: float = 0.0, has_psi: bool = True) -> None:
        self.now, self.share, self.cost, self._waited, self._has_psi = 100.0, share, cost, 5.0, has_psi
        self.pace = Pace(most, waited=lambda: self._waited if self._has_psi else None, clock=lambda: self.now)
        self.sleep(3 * IDLE_S)

    def sleep(self, seconds: float, bytes_per_s: float = 0.0) -> None:
        self.now += seconds
        self._waited += min(1.0, self.share + self.cost * bytes_per_s) * seconds

    def move_for(self, seconds: float, size_bytes: int = 1 << 20) -> int:
        """Move as fast as one may; return the bytes."""
        end, moved = self.now + seconds, 0
        while self.now < end:
            if wait := self.pace.room_in_s():
                self.sleep(wait, self.pace.bytes_per_s)
            self.pace.spend(size_bytes)
            moved += size_bytes
        return moved


def test_a_machine_with_processors_to_spare_soon_moves_as_fast_as_it_may_and_no_faster() -> None:
    machine = Machine()
    machine.pace.spend(1)
    assert machine.pace.bytes_per_s == FIRST_BYTES_PER_S
    machine.move_for(60.0)
    assert machine.pace.bytes_per_s == MOST
    assert 0.98 * MOST * 10 <= machine.move_for(10.0) <= 1.02 * MOST * 10


@pytest.mark.parametrize("share", [0.1, 0.6])
def test_a_busy_machine_that_moves_do_not_make_busier_moves_as_fast_as_it_may(share: float) -> None:
    machine = Machine(share=share)
    machine.move_for(60.0)
    assert machine.pace.bytes_per_s == MOST


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.9])
def test_moves_add_no_more_waiting_than_is_tolerated(share: float) -> None:
    """All of the limit would add as much again as there is without moves, or saturate the machine."""
    machine = Machine(share=share, cost=share / MOST)
    machine.move_for(80.0)
    tolerable = (much(share) - share) / machine.cost
    moved = machine.move_for(200.0) / 200
    assert LEAST_BYTES_PER_S < moved <= tolerable < MOST


def test_where_somebody_waits_for_the_move_the_pace_falls_and_never_to_nothing() -> None:
    machine = Machine(cost=1.0)  # the slowest move is too much
    machine.move_for(10.0)
    assert machine.pace.bytes_per_s == LEAST_BYTES_PER_S
    assert machine.move_for(50.0) >= 0.98 * LEAST_BYTES_PER_S * 50
    machine.cost = 0.0
    machine.move_for(60.0)
    assert machine.pace.bytes_per_s == MOST


def test_trainers_that_begin_meanwhile_slow_a_move_until_it_is_known_that_it_is_they() -> None:
    machine = Machine(share=0.05)
    machine.move_for(60.0)
    machine.share = 0.5
    paces = []
    for _ in range(200):
        machine.move_for(LOOK_S)
        paces.append(machine.pace.bytes_per_s)
    assert min(paces) == LEAST_BYTES_PER_S
    assert paces[-1] == MOST


def test_nodes_that_move_side_by_side_do_not_take_each_other_for_trainers() -> None:
    """The others' moves, as many as four nodes' on one machine, add waiting at this one's least pace too."""
    machine = Machine(share=0.1)
    machine.move_for(5.0)
    machine.share, machine.cost = 0.14, 0.02 / LEAST_BYTES_PER_S
    machine.move_for(4.0)
    assert machine.pace.bytes_per_s == LEAST_BYTES_PER_S
    assert machine.move_for(6.0) <= 1.2 * LEAST_BYTES_PER_S * 6


def test_when_others_have_gone_no_more_is_tolerated_than_half_as_much_again() -> None:
    """A first look often falls into the start of everything."""
    machine = Machine(share=0.9)
    machine.pace.spend(1)
    machine.share, machine.cost = 0.1, 0.5 / MOST
    machine.move_for(80.0)
    assert machine.share + machine.cost * machine.move_for(100.0) / 100 <= 1.5 * much(0.1)


def test_what_is_too_much() -> None:
    assert much(0.0) == FREE_SHARE, "a move alone waits for itself"
    assert much(0.4) == pytest.approx(0.44)
    assert much(0.9) == 0.95, "there is no more than all of the time"


def test_after_idling_it_begins_carefully_again_and_owes_nothing() -> None:
    machine = Machine()
    machine.move_for(60.0)
    machine.sleep(2 * IDLE_S)
    assert machine.pace.room_in_s() == 0.0
    machine.pace.spend(FIRST_BYTES_PER_S)
    assert machine.pace.room_in_s() == 1.0


def test_a_limit_below_the_least_pace_holds() -> None:
    machine = Machine(1000, share=1.0)
    assert machine.move_for(10.0, 100) <= 10.3 * 1000  # and one at each end


def test_without_psi_the_limit_alone_counts() -> None:
    machine = Machine(share=1.0, has_psi=False)
    machine.move_for(2 * LOOK_S)
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
