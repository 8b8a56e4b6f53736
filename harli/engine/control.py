"""Commands from outside the engine process: begin a run, see how it goes, collect its rows, finish the job."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from harli.config import FinetuneSettings
from harli.engine.weights import shared_bytes, weight_views
from harli.finetune import checkpoint
from harli.finetune.checkpoint import Job
from harli.finetune.dataset import Samples, read_samples
from harli.finetune.model import build_model
from harli.finetune.packing import BatchStream
from harli.finetune.trainer import Trainer
from harli.finetune.units import LayerwiseUpdate
from harli.runtime.controller import Controller
from harli.runtime.session import Session
from harli.types import HarliError, Slo
from policies.base import PolicyContext
from policies.registry import make_policy
from predictor.load import load_predictor

SWITCH_INTERVAL_S = 5e-4
"""How long one Python thread keeps the interpreter while the other waits for it."""


class Control:
    """Runs on the engine's thread, between steps. Arguments and results are plain JSON types."""

    def __init__(self, session: Session, engine_model: Any, model_config: Any, max_batch: int) -> None:
        """``max_batch``: most requests in a step."""
        self._session = session
        self._max_batch = max_batch
        self._engine_model = engine_model
        self._model_config = model_config

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
        try:
            limits = Slo(**slo)
            menu = self._session.partitioner.menu
            forecaster = load_predictor(Path(predictor)) if predictor else None
            instance = make_policy(policy, params, PolicyContext(menu, limits, seed, forecaster, self._max_batch))
        except HarliError as error:
            return {"error": str(error)}
        zero = time.monotonic() if clock_zero is None else clock_zero
        self._session.begin(Controller(instance, policy, forecaster), limits, zero)
        return {"clock_zero": zero, "menu": [str(share) for share in menu.shares]}

    def finetune(self, settings_json: str, folder: str | None, resume: str | None) -> dict[str, Any]:
        """Start a job, or go on with one. Returns what it shares with the engine and how the data was read.

        Args:
            settings_json: ``FinetuneSettings`` with a data file.
            folder: gets checkpoints and the adapter; nothing is saved without one.
            resume: a checkpoint.

        What the user can mend comes back as ``error``.
        """
        from transformers import AutoTokenizer

        settings = FinetuneSettings.model_validate_json(settings_json)
        assert settings.data is not None
        try:
            tokenizer = AutoTokenizer.from_pretrained(self._model_config.tokenizer)
            samples = read_samples(settings.data, tokenizer, max_tokens=settings.microbatch_tokens)
            job = self._job(samples, settings)
            done = checkpoint.restore(job, Path(resume)) if resume else 0
        except HarliError as error:
            return {"error": str(error)}
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        session = self._session
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

    def _job(self, samples: Samples, settings: FinetuneSettings) -> Job:
        config = self._model_config.hf_text_config
        views = weight_views(self._engine_model, config)
        model = build_model(config, views, settings.lora, name=self._model_config.model, seed=settings.seed)
        update = LayerwiseUpdate(
            model, learning_rate=settings.learning_rate, weight_decay=settings.weight_decay, seed=settings.seed
        )
        return Job(model, update, BatchStream(samples.items, settings.microbatch_tokens, settings.seed), settings)

    def status(self) -> dict[str, Any]:
        """How things stand; cheap enough to ask every second."""
        session, trainer = self._session, self._session.trainer
        predictor = session.controller.predictor if session.controller else None
        session.check_stall()
        status: dict[str, Any] = {
            "policy_failure": session.controller.failure if session.controller else "",
            "finetune_failure": session.failure,
            "training": session.finetune.ready,
            "predictor": predictor.state() if predictor else {},
        }
        if trainer is not None:
            status["finetune_failure"] = session.failure or trainer.failure or trainer.save_failure
            status["saved"] = trainer.saved
            status["ended"] = not trainer.is_alive()
        return status

    def drain(self) -> dict[str, Any]:
        """Steps and updates since the last call."""
        session = self._session
        steps, updates = [], []
        if session.controller is not None:
            rows = session.controller.rows
            steps = [list(rows.popleft()) for _ in range(len(rows))]
        if session.trainer is not None:
            done = session.trainer.updates
            updates = [list(done.popleft()) for _ in range(len(done))]
        return {"steps": steps, "updates": updates}

    def reshape(self, microbatch_tokens: int) -> dict[str, Any]:
        """Let the job go on with micro-batches of another length (for profiles). Returns an ``error`` if it cannot."""
        assert self._session.trainer is not None
        try:
            self._session.trainer.reshape(microbatch_tokens)
        except HarliError as error:
            return {"error": str(error)}
        return {}

    def drain_units(self) -> list[list[Any]]:
        """Finetuning's units since the last call, as rows of ``UnitRecord``."""
        trainer = self._session.trainer
        return [] if trainer is None else [list(trainer.unit_rows.popleft()) for _ in range(len(trainer.unit_rows))]

    def finish(self) -> None:
        """End the job after its running unit and save it; ``status`` says when that is done."""
        if self._session.trainer is not None:
            self._session.trainer.finish()

    def set_hooks(self, enabled: bool) -> None:
        """Switch the hooks off or on, to measure what they cost."""
        self._session.set_enabled(enabled)
