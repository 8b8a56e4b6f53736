"""Finetuning's side of a simulation: units back to back on whatever compute units they are allowed.

The rules are those of ``harli.compute.gate``: what a unit may have is settled when it starts, a unit that runs is
never interrupted, and a window takes the units that are expected to fit.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from itertools import accumulate

import numpy as np

from harli.config import FinetuneSettings
from harli.finetune.schedule import learning_rate
from harli.rows import UpdateRecord
from harli.simulate.device import Device
from harli.types import FinetuneState

CYCLE = 4096
"""Units, about, before their random ratios repeat."""


class UnitClock:
    """One job: which unit runs until when, and what has been done.

    The lengths of a cycle of updates are drawn and summed up once per number of compute units, so that any number of
    units passes with one look-up.
    """

    def __init__(self, device: Device, settings: FinetuneSettings, rng: np.random.Generator) -> None:
        """Raises HarliError when the device does not know the units of these micro-batches."""
        self.state = FinetuneState(
            ready=True, microbatch_tokens=settings.microbatch_tokens, kept_layers=device.kept_layers
        )
        self.updates: list[UpdateRecord] = []
        """Committed updates that nobody has taken yet."""
        self.tokens_done = 0.0
        """Training tokens of the units run so far, uncommitted ones included."""
        self.held = 0
        """Compute units of the unit that runs; 0 when none does."""
        self._held_until_s = -math.inf
        self._settings = settings
        self._all_units = device.units
        kept, passes = device.kept_layers, settings.accumulation
        recomputed = device.layers - kept
        forward = ["forward"] * recomputed + ["forward_kept"] * kept
        backward = ["backward_kept"] * kept + ["backward"] * recomputed
        micro_batch = ["embed", *forward, "loss", *backward]
        update = [*micro_batch * passes, *["optimizer"] * device.layers]
        cycle = update * math.ceil(CYCLE / len(update))
        ratios = device.noise.lognormal(rng, len(cycle))
        self._ends_s: dict[int, list[float]] = {}
        """By compute units: when each unit of a cycle ends, 0 before the first."""
        for units in sorted({share.finetune for share in device.menu.shares} - {0}):
            mean_ms = {kind: device.unit_ms(kind, units) for kind in set(update)}
            lengths_s = np.array([mean_ms[kind] for kind in cycle]) * ratios / 1e3
            self._ends_s[units] = [0.0, *np.cumsum(lengths_s).tolist()]
        self._expected_s = [mean_ms[kind] / 1e3 for kind in update]  # on the whole device, which came last
        per_unit = device.pass_tokens / len(micro_batch)
        self._tokens = [0.0, *accumulate(0.0 if kind == "optimizer" else per_unit for kind in update)]
        self._update_tokens = device.pass_tokens * passes
        self._update_units, self._cycle_units = len(update), len(cycle)
        self._next = 0
        """Place in the cycle of the unit that runs, or else of the next."""
        self._done = 0

    def run(self, begin_s: float, until_s: float, units: int, slowdown: float = 1.0) -> None:
        """From ``begin_s`` on, and before ``until_s``, units start on ``units`` compute units.

        They take ``slowdown`` times longer than alone, and the last may end after ``until_s``. With 0 units none
        starts; one that already runs ends when it ends.
        """
        if self.held:
            if self._held_until_s > until_s:
                return
            begin_s = max(begin_s, self.wait())
        while units and self.state.ready and begin_s < until_s:
            ends_s, first, stop = self._ends_s[units], self._next, self._stop()
            zero_s = begin_s - slowdown * ends_s[first]
            last = bisect_left(ends_s, (until_s - zero_s) / slowdown, first + 1, stop + 1) - 1
            self._complete(first, last, zero_s, slowdown, ends_s)
            begin_s = zero_s + slowdown * ends_s[last]
            if last < stop:  # it starts, the one after it does not
                self.held, self._held_until_s = units, zero_s + slowdown * ends_s[last + 1]
                if self._held_until_s <= until_s:
                    self.wait()
                return

    def held_ms(self, now_s: float) -> float:
        """How long the unit that runs still takes; 0 when none does."""
        return max(0.0, self._held_until_s - now_s) * 1e3 if self.held else 0.0

    def wait(self) -> float:
        """Let the unit that runs end; when it does."""
        self._complete(self._next, self._next + 1, self._held_until_s, 0.0, self._ends_s[self.held])
        self.held = 0
        return self._held_until_s

    def window(self, begin_s: float, length_ms: float, arrival_s: float) -> float:
        """Give the whole device to the units that are expected to fit; when the window ends.

        None starts once a request has arrived, at ``arrival_s``.
        """
        now_s, deadline_s = begin_s, begin_s + length_ms / 1e3
        if self.held:
            now_s = self.wait()
        ends_s = self._ends_s[self._all_units]
        while self.state.ready and now_s < arrival_s:
            unit = self._next
            if now_s + self._expected_s[unit % self._update_units] > deadline_s:
                break
            now_s += ends_s[unit + 1] - ends_s[unit]
            self._complete(unit, unit + 1, now_s, 0.0, ends_s)
        return now_s

    def coming_window(self, begin_s: float, most_ms: float) -> tuple[float, float, float]:
        """The longest window that will end within ``most_ms``, for those who may know the future.

        Returns the length to ask ``window`` for, how long it then takes, and the mean length of its units, in ms. If no
        unit fits, it is as long as the unit that runs has left, if that is not too long. Nothing happens yet.
        """
        ends_s, expected_s, end_s = self._ends_s[self._all_units], self._expected_s, begin_s + most_ms / 1e3
        unit = (self._next + (self.held > 0)) % self._cycle_units
        now_s = self._held_until_s if self.held else begin_s
        if now_s > end_s:
            return 0.0, 0.0, 0.0
        asked_ms, work_s = most_ms, 0.0
        while now_s + (mean_s := expected_s[unit % self._update_units]) <= end_s:
            later_s = now_s + ends_s[unit + 1] - ends_s[unit]
            if later_s > end_s:  # it will take longer than expected: ask for too little to start it
                asked_ms = (now_s + mean_s - begin_s) * 1e3 - 1e-6
                break
            now_s, unit, work_s = later_s, (unit + 1) % self._cycle_units, work_s + mean_s
        return asked_ms, (now_s - begin_s) * 1e3, work_s * 1e3

    def _stop(self) -> int:
        """The place in the cycle that units may reach before something other than time has to be looked at."""
        if self._settings.updates is None:
            return self._cycle_units
        begun = self._next - self._next % self._update_units
        return min(self._cycle_units, begun + (self._settings.updates - self._done) * self._update_units)

    def _complete(self, first: int, last: int, zero_s: float, slowdown: float, ends_s: list[float]) -> None:
        """Units ``first`` up to ``last`` have ended, each ``slowdown * ends_s`` after ``zero_s``."""
        length, tokens = self._update_units, self._tokens
        (whole, rest), (whole_before, rest_before) = divmod(last, length), divmod(first, length)
        self.tokens_done += (whole - whole_before) * self._update_tokens + tokens[rest] - tokens[rest_before]
        for place in range((whole_before + 1) * length, last + 1, length):
            rate, time_s = learning_rate(self._settings, self._done), zero_s + slowdown * ends_s[place]
            self.updates.append(UpdateRecord(self._done, time_s, math.nan, self._update_tokens, rate))
            self._done += 1
            self.state.ready = self._done != self._settings.updates
        self._next = last % self._cycle_units
