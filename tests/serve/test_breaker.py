"""The circuit breaker, on a clock of its own."""

from __future__ import annotations

import pytest

from harli.serve.attainment import WINDOW_S, Counts
from harli.serve.breaker import FIRST_PAUSE_S, LEAST, LONGEST_PAUSE_S, Breaker

GOOD, BAD = Counts(100, 100), Counts(100, 90)


class Clock:
    """Tells a breaker every second."""

    def __init__(self, breaker: Breaker) -> None:
        self.breaker = breaker
        self.now_s = 1000.0

    def second(self, counts: Counts, *, finetuning: bool = True, objective: str = "itl") -> None:
        self.now_s += 1.0
        self.breaker.observe(self.now_s, {objective: counts}, finetuning)

    def pause(self) -> float:
        """How long it stays open, in seconds, with nothing attained meanwhile."""
        began = self.now_s
        while self.breaker.open:
            self.second(Counts(100, 0), finetuning=False)
        return self.now_s - began

    def trip(self) -> None:
        while not self.breaker.open:
            self.second(BAD)


@pytest.fixture
def clock() -> Clock:
    return Clock(Breaker(0.99))


def test_it_opens_below_the_limit_and_says_what_was_missed(clock: Clock) -> None:
    clock.second(GOOD)
    assert not clock.breaker.open
    clock.second(BAD, objective="tpot")
    assert clock.breaker.open
    assert "TPOT attainment of the last minute was 0.9000, below 0.99" in clock.breaker.reason


def test_at_the_limit_it_stays_closed(clock: Clock) -> None:
    for _ in range(300):
        clock.second(Counts(100, 99))
    assert not clock.breaker.open


def test_a_bad_second_in_a_good_minute_does_not_open_it(clock: Clock) -> None:
    for _ in range(30):
        clock.second(GOOD)
    clock.second(BAD)
    assert not clock.breaker.open


def test_seconds_that_are_over_a_minute_old_do_not_excuse_what_follows(clock: Clock) -> None:
    for _ in range(1000):
        clock.second(GOOD)
    clock.now_s += WINDOW_S
    clock.second(BAD)
    assert clock.breaker.open


def test_few_misses_are_chance(clock: Clock) -> None:
    clock.second(Counts(LEAST - 1, 0))
    assert not clock.breaker.open
    clock.second(Counts(1, 0))
    assert clock.breaker.open


def test_what_decode_misses_by_itself_is_not_held_against_finetuning(clock: Clock) -> None:
    for _ in range(300):
        clock.second(Counts(100, 0), finetuning=False)
    assert not clock.breaker.open


def test_pauses_double_up_to_a_limit_while_it_opens_again_soon(clock: Clock) -> None:
    pauses = []
    for _ in range(9):
        clock.trip()
        pauses.append(clock.pause())
    assert pauses == [min(FIRST_PAUSE_S * 2**n, LONGEST_PAUSE_S) for n in range(9)]
    assert clock.breaker.openings == 9


def test_after_a_good_time_the_pause_is_short_again(clock: Clock) -> None:
    for _ in range(2):
        clock.trip()
        last = clock.pause()
    for _ in range(int(last + WINDOW_S)):
        clock.second(GOOD)
    clock.trip()
    assert clock.pause() == FIRST_PAUSE_S


def test_it_tells_when_it_tries_again(clock: Clock) -> None:
    assert clock.breaker.retry_s(clock.now_s) is None
    clock.trip()
    assert clock.breaker.retry_s(clock.now_s + 20.0) == FIRST_PAUSE_S - 20.0


def test_a_reset_closes_it_and_forgets_the_misses(clock: Clock) -> None:
    clock.trip()
    clock.breaker.reset()
    assert not clock.breaker.open
    clock.second(GOOD)
    assert not clock.breaker.open


def test_a_limit_of_zero_never_opens() -> None:
    clock = Clock(Breaker(0.0))
    for _ in range(100):
        clock.second(Counts(100, 0))
    assert not clock.breaker.open
