"""Commands from outside the engine process: begin a run, see how it goes, collect its rows, finish the job."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from harli.engine.heap import return_freed_memory
from harli.engine.job import JobMaker, Ready
from harli.engine.weights import shared_bytes
from harli.finetune.activations import KeptActivations
from harli.finetune.checkpoint import Job
from harli.finetune.trainer import Trainer
from harli.memory.arena import Arena
from harli.memory.layout import UnknownLayout, block_regions
from harli.rows import UnitRecord, UpdateRecord
from harli.runtime.controller import Controller
from harli.runtime.session import Session
from harli.transient import is_transient
from harli.types import HarliError, Slo, one_line
from policies.base import PolicyContext
from policies.registry import make_policy
from predictor.load import load_predictor

LOG = logging.getLogger("vllm.harli")
SWITCH_INTERVAL_S = 5e-4
"""How long one Python thread keeps the interpreter while the other waits for it."""


class Control:
    """Runs on the engine's thread, between steps. Arguments and results are plain JSON types."""

    def __init__(
        self, session: Session, engine_model: Any, model_config: Any, max_batch: int, kv_caches: Sequence[Tensor]
    ) -> None:
        """``max_batch``: most requests in a step. ``kv_caches``: the layers' tensors."""
        self._session = session
        self._max_batch = max_batch
        self._engine_model = engine_model
        self._jobs = JobMaker(engine_model, model_config, session.partitioner)
        self._kv_caches = kv_caches
        cores = os.sched_getaffinity(0)  # the engine's thread will be pinned, and what it starts then with it
        self._preparations = ThreadPoolExecutor(1, "harli-preparation", lambda: os.sched_setaffinity(0, cores))
        self._preparing: Future[Ready] | None = None
        self._folder: str
        self._begin_again: Callable[[Slo], None]

    def begin(
        self,
        policy: str,
        params: dict[str, Any],
        slo: dict[str, float | None],
        seed: int,
        clock_zero: float | None = None,
        predictor: str | None = None,
    ) -> dict[str, Any]:
        """Let a policy drive decode from here on. Returns the clock's zero and the menu, or an ``error``.

        ``clock_zero``: of the run that this one carries on; now, if it is a new one. ``predictor``: its folder.
        """
        menu = self._session.partitioner.menu
        zero = time.monotonic() if clock_zero is None else clock_zero

        def begin(limits: Slo) -> None:
            instance = make_policy(policy, params, PolicyContext(menu, limits, seed, forecaster, self._max_batch))
            self._session.begin(Controller(instance, policy, forecaster), limits, zero)

        try:
            forecaster = load_predictor(Path(predictor)) if predictor else None
            begin(Slo(**slo))
        except HarliError as error:
            return {"error": str(error)}
        self._begin_again = begin
        return {"clock_zero": zero, "menu": [str(share) for share in menu.shares]}

    def set_slo(self, slo: dict[str, float | None]) -> dict[str, Any]:
        """Begin the policy of the last ``begin`` again with another SLO. Returns an ``error`` if it cannot.

        Its predictor keeps what it has learned, and a policy that was switched off runs again.
        """
        before = self._session.controller
        assert before is not None
        try:
            self._begin_again(Slo(**slo))
        except HarliError as error:
            return {"error": str(error)}
        assert self._session.controller is not None
        self._session.controller.rows = before.rows  # steps in flight are still written into those
        return {}

    def finetune(self, settings_json: str, folder: str | None, resume: str | None) -> dict[str, Any]:
        """Start a job, or go on with one. Returns what it shares with the engine and how the data was read.

        Args:
            settings_json: ``FinetuneSettings`` with a data file.
            folder: gets checkpoints and the adapter; nothing is saved without one.
            resume: a checkpoint.

        What the user can mend comes back as ``error``.
        """
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        try:
            return self._start(self._jobs.make(settings_json, resume), folder)
        except HarliError as error:
            return {"error": str(error)}

    def prepare(self, settings_json: str, folder: str, resume: str | None) -> None:
        """Like ``finetune``, but made ready in a thread of its own while decode goes on; ``prepared`` starts it."""
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._preparing = self._preparations.submit(self._jobs.make, settings_json, resume)
        self._folder = folder

    def prepared(self) -> dict[str, Any] | None:
        """What ``finetune`` returns, once the job is ready and has started; None before.

        A problem of the machine, which may pass, comes back as ``transient`` rather than as ``error``.
        """
        preparing = self._preparing
        assert preparing is not None
        if not preparing.done():
            return None
        self._preparing = None
        try:
            return self._start(preparing.result(), self._folder)
        except BaseException as error:  # whatever happened in that thread, the engine goes on
            message = str(error) if isinstance(error, HarliError) else one_line(error)
            return {"transient" if is_transient(error) else "error": message}

    def _start(self, ready: Ready, folder: str | None) -> dict[str, Any]:
        session, (job, samples, done) = self._session, ready
        job.update.kept = self._kept_activations(job)
        session.attach(Trainer(job, session.new_gate(), session.partitioner, Path(folder) if folder else None, done))
        shared, base = shared_bytes(job.model, self._engine_model)
        return {
            "shared_bytes": shared,
            "base_bytes": base,
            "updates_done": done,
            "samples": len(samples.items),
            "truncated": samples.truncated,
            "dropped": samples.dropped,
        }

    def _kept_activations(self, job: Job) -> KeptActivations | None:
        """A place in the KV cache for the job's activations, if blocks can be lent."""
        loan = self._session.new_loan(job.settings.max_lent if job.settings.lending else 0.0)
        if loan is None:
            return None
        try:
            arena = Arena(block_regions(self._kv_caches, loan.total), loan, self._session.partitioner.wait_finetune)
        except UnknownLayout as error:
            LOG.warning("the KV cache is not lent to finetuning: %s", error)
            self._session.lender = None
            return None
        return KeptActivations(arena, (*job.model.parameters(), *job.model.buffers()))

    def status(self) -> dict[str, Any]:
        """How things stand; cheap enough to ask every second."""
        session, trainer = self._session, self._session.trainer
        predictor = session.controller.predictor if session.controller else None
        session.check_stall()
        session.idles_on()
        status: dict[str, Any] = {
            "policy_failure": session.controller.failure if session.controller else "",
            "finetune_failure": session.failure,
            "training": session.training,
            "capturing": trainer is not None and trainer.capturing,
            "predictor": predictor.state() if predictor else {},
        }
        if trainer is not None:
            status["finetune_failure"] = session.failure or trainer.failure or trainer.save_failure
            status["saved"] = trainer.saved
            status["complete"] = trainer.complete
            status["held_out"] = trainer.held_out
            status["ended"] = not trainer.is_alive()
            status["memory"] = trainer.memory()
        return status

    def drain(self) -> dict[str, Any]:
        """Steps and updates since the last call."""
        return {"steps": self.drain_steps(), "updates": self.drain_updates()}

    def drain_steps(self) -> list[list[Any]]:
        """Steps since the last call, as rows of ``StepRecord``."""
        self._session.observe()
        controller = self._session.controller
        return [] if controller is None else [list(controller.rows.popleft()) for _ in range(len(controller.rows))]

    def drain_updates(self) -> list[list[Any]]:
        """Updates since the last call, as rows of ``UpdateRecord``."""
        trainer = self._session.trainer
        return [] if trainer is None else self._since_zero(trainer.updates)

    def reshape(self, microbatch_tokens: int, keep: bool) -> dict[str, Any]:
        """Let the job go on with another shape (for profiles). Returns an ``error`` if it cannot.

        ``keep``: activations in borrowed memory, as far as there is any.
        """
        assert self._session.trainer is not None
        try:
            self._session.trainer.reshape(microbatch_tokens, keep=keep)
        except HarliError as error:
            return {"error": str(error)}
        return {}

    def drain_units(self) -> list[list[Any]]:
        """Finetuning's units since the last call, as rows of ``UnitRecord``."""
        trainer = self._session.trainer
        return [] if trainer is None else self._since_zero(trainer.unit_rows)

    def _since_zero(self, rows: deque[UpdateRecord] | deque[UnitRecord]) -> list[list[Any]]:
        """Take the rows, with their times since the run's zero."""
        taken = [rows.popleft() for _ in range(len(rows))]
        return [list(row._replace(time_s=row.time_s - self._session.clock_zero)) for row in taken]

    def finish(self) -> None:
        """End the job after its running unit and save it; ``status`` says when that is done."""
        if self._session.trainer is not None:
            self._session.trainer.finish()

    def release(self) -> None:
        """All is known of the job that has ended, and none is wanted that is made ready: their memory goes back."""
        self._preparing = None
        if self._session.trainer is not None:
            self._session.trainer.release()
        self._preparations.submit(return_freed_memory)

    def pause(self, paused: bool) -> None:
        """Hold finetuning back, or let it go on."""
        self._session.pause(paused)

    def set_hooks(self, enabled: bool) -> None:
        """Switch the hooks off or on, to measure what they cost."""
        self._session.set_enabled(enabled)
