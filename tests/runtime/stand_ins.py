"""A session and everything around it, so that tests can play scheduler, worker and trainer."""

from __future__ import annotations

import queue
import threading
import time

from harli.compute.base import Partitioner
from harli.compute.gate import Gate
from harli.rows import StepRecord
from harli.runtime.controller import Controller
from harli.runtime.session import Session
from harli.types import Decision, DecodeState, FinetuneState, Menu, Share, Slo
from policies.base import Policy, PolicyContext

MENU = Menu((Share(4, 0), Share(3, 1), Share(2, 2), Share(1, 3), Share(0, 4)))
ALONE, LITTLE, HALF, MOST, FINETUNE = MENU.shares
PATIENCE_S = 20.0
A_WHILE_S = 0.05


class RecordingPartitioner(Partitioner):
    def __init__(self) -> None:
        self.menu = MENU
        self.calls: list[str | int] = []

    def adopt_decode(self) -> None:
        self.calls.append("adopt_decode")

    def adopt_finetune(self) -> None:
        self.calls.append("adopt_finetune")

    def set_decode(self, units: int) -> None:
        self.calls.append(units)

    def set_finetune(self, units: int) -> None:
        self.calls.append(f"finetune {units}")


class Units(threading.Thread):
    """What the session sees of a trainer; each unit runs until it is ended."""

    def __init__(self, gate: Gate) -> None:
        super().__init__(daemon=True)
        self.gate = gate
        self.state = FinetuneState(ready=True)
        self.tokens_done = 0.0
        self._entered: queue.Queue[int] = queue.Queue()
        self._end = threading.Semaphore(0)
        self._out = threading.Semaphore(0)

    def run(self) -> None:
        while units := self.gate.enter(0.0):
            self._entered.put(units)
            self._end.acquire()
            self.tokens_done += 10.0
            self.gate.leave()
            self._out.release()

    def entered(self) -> int:
        return self._entered.get(timeout=PATIENCE_S)

    def stays_out(self) -> bool:
        try:
            self._entered.get(timeout=A_WHILE_S)
        except queue.Empty:
            return True
        return False

    def end(self) -> None:
        """End the running unit, and return when it has left."""
        self._end.release()
        assert self._out.acquire(timeout=PATIENCE_S)


class Scripted(Policy):
    def __init__(self) -> None:
        super().__init__(PolicyContext(MENU, Slo()))
        self.decision = Decision(ALONE)
        self.idle_share = FINETUNE

    def decide(self, decode: DecodeState, finetune: FinetuneState) -> Decision:
        return self.decision

    def idle(self, finetune: FinetuneState) -> Share:
        return self.idle_share


class Engine:
    """A session and everything around it; plays the scheduler and the worker."""

    def __init__(self, partitioner: RecordingPartitioner | None = None) -> None:
        self.arrived = threading.Event()
        self.partitioner = RecordingPartitioner() if partitioner is None else partitioner
        self.session = Session(self.partitioner, self.arrived.is_set)
        self.policy = Scripted()
        self.controller = Controller(self.policy, "scripted")
        self.clock_zero = time.monotonic()
        self.units = Units(self.session.new_gate())
        self._state = DecodeState()

    def begin(self) -> None:
        self.session.begin(self.controller, Slo(), self.clock_zero)

    def attach(self) -> Units:
        self.session.attach(self.units)  # type: ignore[arg-type]
        return self.units

    def start_step(self, share: Share, exclusive_ms: float = 0.0) -> None:
        """``decide`` and ``begin_step``."""
        self.policy.decision = Decision(share, exclusive_ms)
        self.session.begin_step(self.session.decide(self._observe))

    def start_step_aside(self, share: Share) -> threading.Thread:
        """The same on another thread, to see whether it waits."""
        thread = threading.Thread(target=self.start_step, args=(share,), daemon=True)
        thread.start()
        return thread

    def end_step(self) -> StepRecord:
        self.session.end_step()
        self.session.observe()
        return self.controller.rows[-1]

    def step(self, share: Share, exclusive_ms: float = 0.0) -> StepRecord:
        self.start_step(share, exclusive_ms)
        return self.end_step()

    def _observe(self) -> DecodeState:
        self._state.time_s = time.monotonic()
        self._state.step += 1
        return self._state
