"""One engine process's co-location: what the scheduler's and the worker's hooks call at every step.

The order of calls in a step, all on the engine's thread: ``decide`` (scheduler), ``begin_step`` and
``end_step`` (worker), ``observe`` (scheduler); ``idle`` when the last request has left.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from harli.compute.base import Partitioner
from harli.compute.gate import Gate
from harli.finetune.trainer import Trainer
from harli.memory.lender import Lender
from harli.memory.loan import Loan
from harli.runtime.controller import Controller
from harli.types import Decision, DecodeState, FinetuneState, Slo, StepRecord

STALL_S = 5.0
"""A unit that holds the device this long while decode waits for it has stalled."""


class Session:
    """Scheduler and worker share it, since both live in the engine process (``current``)."""

    def __init__(self, partitioner: Partitioner, interrupted: Callable[[], bool]) -> None:
        """``interrupted``: whether a request has reached the engine but not the scheduler yet."""
        self.partitioner = partitioner
        self.gate = Gate(partitioner.units, interrupted)
        self.enabled = True
        self.paused = False
        """Finetuning is held back for now (``pause``)."""
        self.controller: Controller | None = None
        self.trainer: Trainer | None = None
        self.lender: Lender | None = None
        """Set by the scheduler's hook, if this engine's KV blocks can be lent."""
        self.failure = ""
        self.slo = Slo()
        self.run = 0
        """Counts the runs begun, so that the scheduler's hook starts each with fresh state."""
        self._interrupted = interrupted
        self._no_finetuning = FinetuneState()
        self._alone = Decision(partitioner.menu.decode_alone)
        self._adopted = False
        self._clock_zero = 0.0
        self._is_idle = True
        self._step: Decision | None = None
        self._cpu_ms: tuple[float, float]
        self._predicted_ms: tuple[float, float]
        self._reset_step()

    @property
    def active(self) -> bool:
        """A run has begun and the hooks are on."""
        return self.controller is not None and self.enabled

    def begin(self, controller: Controller, slo: Slo, clock_zero: float) -> None:
        """Let ``controller`` drive from the next step on. Called on the engine's thread."""
        self.run += 1
        self.slo = slo
        if not self._adopted:
            self.partitioner.adopt_decode()
            self._adopted = True
        self.controller, self._clock_zero = controller, clock_zero
        if self.trainer is not None:
            self.trainer.clock_zero = clock_zero
        self._timer.interrupt()
        if self._is_idle:
            self.idle()

    def attach(self, trainer: Trainer) -> None:
        """Start a finetuning job; it runs when the controller lets it."""
        self.failure = ""
        self.gate = trainer.gate
        self.trainer = trainer
        if self.controller is not None:
            trainer.clock_zero = self._clock_zero
        self._tokens_seen = 0.0
        trainer.start()
        if self._is_idle:
            self.idle()

    def new_gate(self) -> Gate:
        """A gate for the next job: a closed one stays closed."""
        return Gate(self.partitioner.units, self._interrupted)

    def new_loan(self, most: float) -> Loan | None:
        """What the next job may borrow: at most this fraction of the KV cache; None if that is nothing.

        Ends the loan of the job before.
        """
        if self.lender is None:
            return None
        return self.lender.open(most) if self.lender.close() and most else None

    @property
    def loan(self) -> Loan | None:
        """The loan of the present job."""
        return None if self.lender is None else self.lender.loan

    @property
    def borrows(self) -> bool:
        """Finetuning has a use for lent memory."""
        return self.enabled and self.finetune.ready

    @property
    def finetune(self) -> FinetuneState:
        if self.trainer is None or self.failure or self.paused:
            return self._no_finetuning
        return self.trainer.state

    @property
    def training(self) -> bool:
        """There is a job that has neither ended nor failed; it may be paused."""
        return self.trainer is not None and not self.failure and self.trainer.state.ready

    # The hooks

    def decide(self, observe_decode: Callable[[], DecodeState]) -> Decision:
        """The decision for the step that ``observe_decode`` describes; only while ``active``."""
        controller = self.controller
        assert controller is not None
        cpu, wall = time.thread_time_ns(), time.perf_counter_ns()
        self._decode = observe_decode()
        finetune = self.finetune
        finetune.held_units = self._held
        finetune.held_ms = self.gate.held_ms
        decision = controller.decide(self._decode, finetune)
        if self.paused:
            decision = self._alone
        if not decision.exclusive_ms:  # no unit starts any more that the step would have to wait for
            self.gate.allow(min(self.gate.allowed, decision.share.finetune))
        self._decide_wall_us = (time.perf_counter_ns() - wall) / 1e3
        self._decide_cpu_us = (time.thread_time_ns() - cpu) / 1e3
        controller.decided(self._decide_cpu_us / 1e3)
        return decision

    def begin_step(self, decision: Decision | None) -> None:
        """Run the window, then give decode its part of the device. Waits for a unit only if it holds everything."""
        self._step = decision
        self._is_idle = False
        if decision is None:
            return
        if self.trainer is not None:
            self.trainer.beside_decode = True
        began = time.perf_counter()
        gate, share = self.gate, decision.share
        self._window_ms = 0.0
        if decision.exclusive_ms > 0.0 and self.finetune.ready:
            self._wait(lambda limit: gate.window(decision.exclusive_ms, limit))
        gate.allow(share.finetune)
        if not gate.free:
            self._wait(gate.wait_free)
        else:
            self.check_stall()
        self._decode_units = self.partitioner.units if self.failure else self._largest(min(share.decode, gate.free))
        self.partitioner.set_decode(self._decode_units)
        if self.controller is not None:
            self._predicted_ms = self.controller.predicted_ms(self._decode_units)
        self._finetune_units = max(self._held, share.finetune if self.finetune.ready else 0)
        self._hook_us = (time.perf_counter() - began) * 1e6 - self._window_ms * 1e3
        self._timer.begin()

    def end_step(self) -> None:
        """The step's tokens are there."""
        if self._step is not None:
            self._timer.end()

    def observe(self) -> None:
        """Write down the step that just ended."""
        decision, controller = self._step, self.controller
        if decision is None or controller is None:
            return
        self._step = None
        if (times := self._timer.take()) is None:
            return
        began = time.perf_counter()
        decode, trainer = self._decode, self.trainer
        lender = self.lender if self.loan is not None else None
        tokens = 0.0
        if trainer is not None:
            tokens, self._tokens_seen = trainer.tokens_done - self._tokens_seen, trainer.tokens_done
        decode_cpu_ms, finetune_cpu_ms = self.partitioner.cpu_ms()
        controller.observe(
            StepRecord(
                step=decode.step,
                time_s=decode.time_s - self._clock_zero,
                batch=decode.batch,
                context_sum=decode.context_sum,
                context_max=decode.context_max,
                prefill_tokens=decode.prefill_tokens,
                admitted=decode.admitted,
                waiting=decode.waiting,
                kv_blocks_free=decode.kv_blocks_free,
                kv_blocks_total=decode.kv_blocks_total,
                kv_blocks_lent=decode.kv_blocks_lent,
                slack_ms=decode.slack_ms,
                microbatch_tokens=self.finetune.microbatch_tokens,
                kept_layers=self.finetune.kept_layers,
                wanted_finetune=decision.share.finetune,
                decode_units=self._decode_units,
                finetune_units=self._finetune_units,
                exclusive_ms=decision.exclusive_ms,
                window_ms=self._window_ms + (lender.waited_ms if lender else 0.0),
                reclaim_ms=lender.reclaim_ms if lender else math.nan,
                latency_ms=times.latency_ms,
                gap_ms=times.gap_ms,
                predicted_ms=self._predicted_ms[0],
                bound_ms=self._predicted_ms[1],
                finetune_tokens=tokens,
                decode_cpu_ms=decode_cpu_ms - self._cpu_ms[0],
                finetune_cpu_ms=finetune_cpu_ms - self._cpu_ms[1],
                decide_cpu_us=self._decide_cpu_us,
                decide_wall_us=self._decide_wall_us,
                hook_us=self._hook_us + (lender.hook_us if lender else 0.0) + (time.perf_counter() - began) * 1e6,
            )
        )
        self._cpu_ms = decode_cpu_ms, finetune_cpu_ms

    def idle(self) -> None:
        """Decode has no request: finetuning may have what the policy gives it, up to the whole device."""
        self._is_idle = True
        self._timer.interrupt()
        self._cpu_ms = (math.nan, math.nan)
        if self.trainer is not None:
            self.trainer.beside_decode = False
        if self.lender is not None:
            self.lender.idle(self.borrows)
        if self.controller is not None and self.enabled and not self.paused:
            self.gate.allow(self.controller.idle(self.finetune).finetune)

    def request_arrived(self) -> None:
        """A request has reached the scheduler: idling ends within the running unit."""
        if self._is_idle:
            self.gate.allow(0)

    def pause(self, paused: bool) -> None:
        """Hold finetuning back after its running unit, or let it go on; the job stays as it is, and steps are noted."""
        self.paused = paused
        self.gate.allow(0)
        if self._is_idle:
            self.idle()

    def set_enabled(self, enabled: bool) -> None:
        """Switch all hooks on or off, to measure what they cost; off, decode has the device alone."""
        self.enabled = enabled
        self.gate.allow(0)
        self.partitioner.set_decode(self.partitioner.units)
        self._timer.interrupt()
        if self.lender is not None and not enabled:
            self.lender.give_back()
        if self._is_idle:
            self.idle()

    def close(self) -> None:
        """End the finetuning thread, within a unit; nothing is saved."""
        self.gate.close()
        if self.trainer is not None:
            self.trainer.finish()
            self.trainer.join(STALL_S)

    # Details

    @property
    def _held(self) -> int:
        """Compute units of the unit that runs, perhaps one of the share before."""
        return 0 if self.failure else self.partitioner.units - self.gate.free

    def _wait(self, until: Callable[[float], bool]) -> None:
        """Wait for finetuning to give way."""
        if self.failure:
            return
        began = time.perf_counter()
        if not until(STALL_S):
            self._stalled()
        self._window_ms += (time.perf_counter() - began) * 1e3

    def check_stall(self) -> None:
        """Write off a unit that has been running for too long."""
        if not self.failure and self.gate.held_s > STALL_S:
            self._stalled()

    def _stalled(self) -> None:
        """Write the unit off: decode uses the whole device from here on, beside it."""
        self.failure = f"finetuning stopped: a unit has been running for more than {STALL_S:.0f} s"
        self.gate.close()

    def _largest(self, units: int) -> int:
        """The largest decode part on the menu that is no more than ``units``; 0 if there is none."""
        return max((share.decode for share in self.partitioner.menu.shares if share.decode <= units), default=0)

    def _reset_step(self) -> None:
        self._decode = DecodeState()
        self._decode_units = self.partitioner.units
        self._finetune_units = 0
        self._window_ms = self._hook_us = 0.0
        self._decide_cpu_us = self._decide_wall_us = 0.0
        self._timer = self.partitioner.timer()
        self._tokens_seen = 0.0
        self._predicted_ms = (math.nan, math.nan)
        self._cpu_ms = (math.nan, math.nan)


_current: Session | None = None


def install(session: Session) -> None:
    """Make ``session`` this process's session."""
    global _current
    _current = session


def current() -> Session:
    """This process's session. Raises RuntimeError before the worker has installed one."""
    if _current is None:
        raise RuntimeError("the Harli worker must be loaded before the Harli scheduler: set worker_cls too")
    return _current
