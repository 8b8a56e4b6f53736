"""Watches decode once a second: figures, records, and whether finetuning may go on."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from vllm.v1.engine.exceptions import EngineDeadError

from harli.config import RunSettings, SloSettings
from harli.engine.launch import command
from harli.rows import StepRecord, UpdateRecord
from harli.serve.attainment import LatencyCounter, Window
from harli.serve.breaker import Breaker
from harli.serve.jobs import Status
from harli.serve.metrics import Metrics, keep_newest_series
from harli.serve.recorder import Recorder, RecordingThread
from harli.serve.store import Store
from harli.types import Slo

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

LOG = logging.getLogger(__name__)
POLL_S = 1.0
MINUTE_S = 60.0
NO_ANSWER_S = 60.0
"""An engine that has not answered for this long hangs: a step, and loading an adapter, take far less."""


class Monitor:
    """Finetuning runs while an operator lets it (``switch``) and the circuit breaker is closed."""

    def __init__(
        self,
        engine: AsyncLLM,
        store: Store,
        settings: RunSettings,
        recorder: Recorder,
        breaker: Breaker,
        metrics: Metrics,
    ) -> None:
        """The engine has begun with the policy and SLO of ``settings``; its statistics must be on."""
        self.settings = settings
        self.enabled = True
        """What an operator wants."""
        self.breaker = breaker
        self.status: dict[str, Any] = {}
        """The engine's last."""
        self._engine = engine
        self._store = store
        self._recording = RecordingThread(recorder)
        self._metrics = metrics
        self._latencies = LatencyCounter(self._slo)
        assert engine.logger_manager is not None
        self._loggers = engine.logger_manager.stat_loggers
        self._loggers.append(self._latencies)
        self._attainment = {"itl": Window(), "tpot": Window()}
        self._share = ""
        self._paused = False
        self._answered_s = time.monotonic()
        self._minute_s = time.monotonic()
        self._changing = asyncio.Lock()
        metrics.objectives(self._slo)

    # What routes ask for

    @property
    def decode(self) -> str:
        """``ok``, ``not answering`` or ``dead``."""
        if self._engine.errored:
            return "dead"
        return "not answering" if time.monotonic() - self._answered_s > NO_ANSWER_S else "ok"

    @property
    def held_back(self) -> bool:
        """Finetuning may not run."""
        return not self.enabled or self.breaker.open

    @property
    def finetuning(self) -> str:
        """``training``, ``no job``, ``switched off``, ``breaker open``, ``policy failed`` or ``job failed``."""
        if not self.enabled:
            return "switched off"
        if self.breaker.open:
            return "breaker open"
        if self.status.get("policy_failure"):
            return "policy failed"
        if self.status.get("training"):
            return "training"
        return "job failed" if self.status.get("finetune_failure") else "no job"

    def state(self) -> dict[str, Any]:
        """How things stand; plain JSON values."""
        now, settings = time.monotonic(), self.settings
        counts = {name: window.counts(now) for name, window in self._attainment.items()}
        running = self._store.jobs_in(Status.RUNNING)
        return {
            "policy": {
                "name": settings.policy,
                "params": dict(settings.params),
                "failure": self.status.get("policy_failure", ""),
            },
            "slo": settings.slo.model_dump(),
            "attainment": {name: kept.attained / kept.asked if kept.asked else None for name, kept in counts.items()},
            "share": self._share,
            "decode": self.decode,
            "finetuning": {
                "enabled": self.enabled,
                "state": self.finetuning,
                "job": running[0].id if running else None,
                "failure": self.status.get("finetune_failure", ""),
            },
            "breaker": {
                "open": self.breaker.open,
                "limit": self.breaker.limit,
                "openings": self.breaker.openings,
                "reason": self.breaker.reason,
                "retry_s": self.breaker.retry_s(now),
            },
            "predictor": self.status.get("predictor", {}),
        }

    async def switch(self, enabled: bool) -> None:
        """Let finetuning run or not, after its running unit. Switching on closes the breaker."""
        self.enabled = enabled
        if enabled:
            self.breaker.reset()
        await self._apply()

    async def set_slo(self, slo: SloSettings) -> None:
        """Begin the policy again with another objective. Raises HarliError if it cannot do with it."""
        async with self._changing:
            await command(self._engine, "set_slo", slo.model_dump())
            self.settings = self.settings.model_copy(update={"slo": slo})
            self._latencies.slo = self._slo
            self._latencies.take()
            for window in self._attainment.values():
                window.clear()
            self.breaker.reset()
            self._metrics.objectives(self._slo)
            self._recording.change_settings(self.settings)
        await self._apply()

    def add_updates(self, rows: Sequence[UpdateRecord]) -> None:
        """Updates that a job has committed."""
        self._metrics.updates(rows)
        self._recording.add_updates(rows)

    # Once a second

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Watch inside."""
        task = asyncio.create_task(self._forever())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait({task})
            await asyncio.to_thread(self._recording.close)

    async def _forever(self) -> None:
        """Whatever goes wrong here, requests are served on."""
        while True:
            try:
                await self._poll()
            except EngineDeadError:
                return
            except Exception:
                LOG.exception("watching decode failed; it is tried again")
            await asyncio.sleep(POLL_S)

    async def _poll(self) -> None:
        status = await command(self._engine, "status")
        steps = [StepRecord(*row) for row in await command(self._engine, "drain_steps")]
        now = self._answered_s = time.monotonic()
        self.status = status
        training = status["training"] and not self._paused
        counts = self._latencies.take()
        for name, new in counts.items():
            self._attainment[name].add(now, new)
            self._metrics.attained(name, new, self._attainment[name].counts(now))
        self._recording.add_steps(steps)
        self._share = f"{steps[-1].decode_units}/{steps[-1].finetune_units}" if steps else "idle"
        self._metrics.steps(steps)
        self._metrics.correction(status["predictor"])
        openings = self.breaker.openings
        self.breaker.observe(now, counts, training)
        if self.breaker.openings > openings:
            self._note_opening()
        await self._apply()
        self._metrics.finetuning(enabled=self.enabled, training=training, breaker_open=self.breaker.open)
        if now - self._minute_s > MINUTE_S:
            self._minute_s = now
            self._recording.write()
            keep_newest_series(self._loggers)

    async def _apply(self) -> None:
        """Tell the engine whether finetuning may run, if that has changed."""
        async with self._changing:
            paused = self.held_back
            if paused != self._paused:
                await command(self._engine, "pause", paused)
                self._paused = paused

    def _note_opening(self) -> None:
        self._metrics.breaker_opened()
        LOG.warning("%s", self.breaker.reason)
        for job in self._store.jobs_in(Status.RUNNING):
            self._store.add_event(job.id, self.breaker.reason, "warn")

    @property
    def _slo(self) -> Slo:
        return self.settings.slo.objective
