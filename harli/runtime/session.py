"""One engine process's co-location: what the scheduler's and the worker's hooks call at every step.

The order of calls in a step, all on the engine's thread: ``decide`` (scheduler), ``begin_step`` and
``end_step`` (worker), ``observe`` (scheduler); ``idle`` when the last request has left and no step is in
flight. With asynchronous scheduling the next step is decided, begun and ended before one is observed.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from harli.compute.base import Partitioner
from harli.compute.gate import Gate
from harli.finetune.trainer import Trainer
from harli.memory.lender import Lender
from harli.memory.loan import Loan
from harli.runtime.controller import Controller
from harli.runtime.steps import Hooks, Steps
from harli.types import Decision, DecodeState, FinetuneState, Slo

STALL_S = 5.0
"""A unit that holds the device this long while decode waits for it has stalled."""
PAUSED_S = 1.0
"""A unit that ends within this time after all had not stalled: the whole process was paused."""


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
        self.clock_zero = 0.0
        """The present run's zero, in ``time.monotonic()``."""
        self._interrupted = interrupted
        self._no_finetuning = FinetuneState()
        self._alone = Decision(partitioner.menu.decode_alone)
        self._adopted = False
        self._is_idle = True
        self._decode = DecodeState()
        self._steps = Steps(partitioner)
        self._hooks = Hooks()

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
        self.controller, self.clock_zero = controller, clock_zero
        self._steps.interrupt()
        if self._is_idle:
            self.idle()

    def attach(self, trainer: Trainer) -> None:
        """Start a finetuning job; it runs when the controller lets it."""
        self.failure = ""
        self.gate = trainer.gate
        self.trainer = trainer
        self._steps.tokens_seen = 0.0
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
        self._decode = decode = observe_decode()
        if self._steps.in_flight:  # the step will begin when those are over
            decode.slack_ms -= self._steps.busy_ms(decode.time_s)
        finetune = self.finetune
        finetune.held_units = self._held
        finetune.held_ms = self.gate.held_ms
        decision = controller.decide(decode, finetune)
        if self.paused:
            decision = self._alone
        if not decision.exclusive_ms:  # no unit starts any more that the step would have to wait for
            self.gate.allow(min(self.gate.allowed, decision.share.finetune))
        hooks = self._hooks
        hooks.decide_wall_us = (time.perf_counter_ns() - wall) / 1e3
        hooks.decide_cpu_us = (time.thread_time_ns() - cpu) / 1e3
        controller.decided(hooks.decide_cpu_us / 1e3)
        return decision

    def begin_step(self, decision: Decision | None) -> None:
        """Run the window, then give decode its part of the device. Waits for a unit only if it holds everything."""
        self._is_idle = False
        controller = self.controller
        if decision is None or controller is None:
            self._steps.skip()
            return
        if self.trainer is not None:
            self.trainer.beside_decode = True
        gate, hooks, finetune_units = self.gate, self._hooks, decision.share.finetune
        hooks.began()
        if decision.exclusive_ms > 0.0 and self.finetune.ready:
            if self._steps.in_flight:  # a window begins when decode has stopped
                hooks.drained_ms = _wall_ms(self.partitioner.wait_decode)
            self._wait(lambda limit: gate.window(decision.exclusive_ms, limit))
        elif self._steps.in_flight:  # what the step before holds is free when that is observed
            free = self.partitioner.units - self._steps.last_decode_units
            finetune_units = self.partitioner.menu.largest_finetune(min(finetune_units, free))
        gate.allow(finetune_units)
        if not gate.free:
            self._wait(gate.wait_free)
        else:
            self.check_stall()
        decode_units = self.partitioner.units
        if not self.failure:
            decode_units = self.partitioner.menu.largest_decode(min(decision.share.decode, gate.free))
        self.partitioner.set_decode(decode_units)
        hooks.lender = self.lender if self.loan is not None else None
        units = decode_units, self._held
        self._steps.begin(controller, decision, self._decode, self.finetune, units, hooks, self.clock_zero)

    def end_step(self) -> None:
        """The step has been given to the device; on a CPU its tokens are there."""
        self._steps.end()

    def observe(self) -> None:
        """Write down the steps whose times are known by now."""
        while self._steps.take(self.trainer):
            if self._steps.in_flight and self.finetune.ready:
                self.gate.allow(self._steps.next_finetune_units)

    def idle(self) -> None:
        """Nothing runs or waits: finetuning may have what the policy gives it, up to the whole device."""
        self._is_idle = True
        self._steps.interrupt()
        if self.trainer is not None:
            self.trainer.beside_decode = False
        if self.lender is not None:
            self.lender.idle(self.borrows)
        if self.controller is not None and self.enabled and not self.paused:
            self.gate.allow(self.controller.idle(self.finetune).finetune)

    def idles_on(self) -> None:
        """Time has passed: if decode still idles, what the last requests let expect may be lent by now."""
        if self._is_idle and self.lender is not None:
            self.lender.idle(self.borrows)

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
        self._steps.interrupt()
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
        self._hooks.window_ms += (time.perf_counter() - began) * 1e3

    def check_stall(self) -> None:
        """Write off a unit that has been running for too long."""
        if not self.failure and self.gate.held_s > STALL_S:
            self._stalled()

    def _stalled(self) -> None:
        """Write the unit off, unless it ends after all: decode uses the whole device from here on, beside it."""
        if not self.gate.outlasts(PAUSED_S):
            return
        self.failure = f"finetuning stopped: a unit has been running for more than {STALL_S:.0f} s"
        self.gate.close()


def _wall_ms(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1e3


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
