"""The event loop of a simulated decode instance: what the engine, the session and the trainer do, on its own clock.

Events are arrivals, the beginning and the end of a decode step, and the ends of units. A step takes the same course
as in ``harli.runtime.session``, through the same controller: decide, window, wait if a unit holds the whole device,
run on the largest part of the menu that is free, observe. What it costs to switch shares or to open a window is not
added: it follows from the units.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from harli.rows import RequestRecord, StepRecord
from harli.runtime.controller import Controller
from harli.simulate.device import Device
from harli.simulate.finetune import UnitClock
from harli.simulate.scheduler import BatchScheduler
from harli.workload.base import Request

STEPS_PER_TURN = 8192


class SimulatedEngine:
    """One decode instance and the finetuning beside it; ``run`` lets time pass."""

    def __init__(self, device: Device, scheduler: BatchScheduler, finetune: UnitClock, controller: Controller) -> None:
        self.finished: list[RequestRecord] = []
        """Requests that have ended and that nobody has taken yet."""
        self.now_s = 0.0
        self._device = device
        self._scheduler = scheduler
        self._finetune = finetune
        self._controller = controller
        self._last_end_s = math.nan
        self._tokens_seen = 0.0

    def run(self, requests: Sequence[Request], duration_s: float) -> Iterator[None]:
        """Serve ``requests``, which are in order of arrival, and go on until ``duration_s``.

        Yields after every ``STEPS_PER_TURN`` steps, for the caller to take the rows.
        """
        scheduler, finetune, coming = self._scheduler, self._finetune, 0
        arrivals_s = [*(request.arrival_s for request in requests), math.inf]
        steps = 0
        while True:
            while arrivals_s[coming] <= self.now_s:
                scheduler.add(coming, requests[coming])
                coming += 1
            if scheduler.empty:
                until_s = arrivals_s[coming] if coming < len(requests) else max(duration_s, self.now_s)
                finetune.run(self.now_s, until_s, self._controller.idle(finetune.state).finetune)
                self.now_s, self._last_end_s = until_s, math.nan
                if coming == len(requests):
                    return
                continue
            self._step(arrivals_s[coming])
            steps += 1
            if steps % STEPS_PER_TURN == 0:
                yield

    def _step(self, arrival_s: float) -> None:
        """One decode step; the next request arrives at ``arrival_s``."""
        device, finetune, controller = self._device, self._finetune, self._controller
        begun_s = self.now_s
        decode = self._scheduler.schedule(begun_s)
        finetune.state.held_units = finetune.held
        finetune.state.held_ms = finetune.held_ms(begun_s)
        decision = controller.decide(decode, finetune.state)
        share, exclusive_ms = decision.share, decision.exclusive_ms
        now_s = begun_s
        if exclusive_ms > 0.0 and finetune.state.ready:
            now_s = finetune.window(begun_s, exclusive_ms, arrival_s)
        elif finetune.held == device.units:
            now_s = finetune.wait()
        free = device.units - finetune.held  # a unit of the share before may still run
        decode_units = share.decode if share.decode <= free else device.menu.largest_decode(free)
        predicted_ms, bound_ms = controller.predicted_ms(decode_units)
        row = StepRecord.begun(
            decode,
            finetune.state,
            decision,
            decode_units=decode_units,
            held_units=finetune.held,
            predicted_ms=predicted_ms,
            bound_ms=bound_ms,
            window_ms=(now_s - begun_s) * 1e3,
        )
        finetune_units = row.finetune_units
        slowdown = device.slowdown(decode, finetune.state, decode_units, finetune_units) if finetune_units else 1.0
        took_ms = device.draw_step_ms(decode, finetune.state, decode_units, finetune_units)
        end_s = now_s + took_ms / 1e3
        finetune.run(now_s, end_s, share.finetune, slowdown)
        for served in self._scheduler.stepped(end_s):
            self.finished.append(served.record(self._scheduler.step_ends_s))
        tokens, self._tokens_seen = finetune.tokens_done - self._tokens_seen, finetune.tokens_done
        row = row._replace(latency_ms=took_ms, gap_ms=(end_s - self._last_end_s) * 1e3, finetune_tokens=tokens)
        controller.observe(row)
        self.now_s = self._last_end_s = end_s
