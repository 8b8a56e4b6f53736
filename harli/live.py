"""The numbers of a run while it runs: those of the last seconds, and what has been attained so far."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from harli.rows import RequestRecord, StepRecord, UpdateRecord
from harli.types import Slo

RECENT_S = 10.0
RECENT_REQUESTS = 50


class Progress(NamedTuple):
    """What a run tells its caller every second; None where there is nothing to tell yet."""

    elapsed_s: float
    finished: int
    failed: int
    running: int
    waiting: int
    tpot_ms: float | None
    """Median over the last requests that finished."""
    itl_ms: float | None
    """99th percentile of the engine's gaps in the last seconds."""
    attainment: float | None
    """Of the requests that have ended: TPOT attainment if there is a TPOT SLO, else ITL attainment."""
    share: str
    """Compute units of decode and finetuning in the last step."""
    lent: float
    """Part of the KV cache that finetuning has in the last step."""
    tokens_per_s: float
    """Finetuning's, in the last seconds, from committed updates."""
    updates: int
    loss: float | None
    notice: str
    """Why finetuning has stopped, once it has."""


class LiveNumbers:
    """Keeps what ``Progress`` needs and nothing more."""

    def __init__(self, slo: Slo) -> None:
        self._slo = slo
        self._steps: deque[StepRecord] = deque()
        self._updates: deque[UpdateRecord] = deque()
        self._update_count = 0
        self._loss: float | None = None
        self._ended = self._failed = 0
        self._asked = self._attained = 0
        self._tpots: deque[float] = deque(maxlen=RECENT_REQUESTS)

    def add(
        self, steps: Sequence[StepRecord], updates: Sequence[UpdateRecord], records: Sequence[RequestRecord]
    ) -> None:
        """New steps and updates, and all requests that have ended so far."""
        self._steps.extend(steps)
        self._updates.extend(updates)
        self._update_count += len(updates)
        if updates:
            self._loss = updates[-1].loss
        for record in records[self._ended :]:
            self._count(record)
        self._ended = len(records)

    def progress(self, elapsed_s: float, running: int, notice: str) -> Progress:
        """The numbers at ``elapsed_s`` seconds since the run began."""
        for rows in (self._steps, self._updates):
            while rows and rows[0].time_s < elapsed_s - RECENT_S:
                rows.popleft()
        last = self._steps[-1] if self._steps else None
        gaps = sorted(step.gap_ms for step in self._steps if step.gap_ms == step.gap_ms)
        return Progress(
            elapsed_s=elapsed_s,
            finished=self._ended - self._failed,
            failed=self._failed,
            running=running,
            waiting=last.waiting if last and running else 0,
            tpot_ms=median(self._tpots) if self._tpots else None,
            itl_ms=gaps[int(0.99 * len(gaps))] if gaps else None,
            attainment=self._attained / self._asked if self._asked else None,
            share=f"{last.decode_units}/{last.finetune_units}" if last and running else "idle",
            lent=last.kv_blocks_lent / last.kv_blocks_total if last and last.kv_blocks_total else 0.0,
            tokens_per_s=sum(update.tokens for update in self._updates) / max(1.0, min(RECENT_S, elapsed_s)),
            updates=self._update_count,
            loss=self._loss,
            notice=notice,
        )

    def _count(self, record: RequestRecord) -> None:
        self._failed += bool(record.error)
        if record.output_tokens < 2:
            return
        if not record.error:
            self._tpots.append(record.tpot_ms)
        if self._slo.tpot_ms is not None:
            self._asked += 1
            self._attained += not record.error and record.tpot_ms <= self._slo.tpot_ms
        elif self._slo.itl_ms is not None:
            self._asked += record.output_tokens - 1
            if not record.error:
                self._attained += sum(gap <= self._slo.itl_ms for gap in record.itl_ms)
