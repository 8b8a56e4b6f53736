"""Measuring: what is visited in which order until the budget is used up."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from harli.records.profile import ProfileInfo
from harli.types import HarliError
from profiling.collect import Collector
from profiling.folder import ProfileFolder
from profiling.measure import alone_tokens_per_s, costs, unit_times
from profiling.plan import DROPPED, Group, Plan, Segment
from profiling.report import Report, assess
from profiling.settings import ProfileSettings

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

REFERENCE_EVERY = 8
"""Groups between two visits to the reference."""
WINDOWS_EVERY = 24
WINDOW_STEPS = DROPPED + 4
WINDOW_UNITS = (1.5, 4.0)
"""Lengths of the windows, in units of finetuning alone."""
ALONE_FRACTION = 0.1
"""Of the budget, for finetuning alone."""
LONGEST_ALONE_S = 6.0
WRITE_EVERY_S = 10.0


class Progress(NamedTuple):
    """What a profile tells its caller after every visit."""

    elapsed_s: float
    points: int
    steps: int
    phase: str


class Sitting:
    """Measures with one engine, from where the folder stands."""

    def __init__(
        self,
        engine: AsyncLLM,
        plan: Plan,
        settings: ProfileSettings,
        info: ProfileInfo,
        folder: ProfileFolder,
        on_progress: Callable[[Progress], None],
    ) -> None:
        """``info``: what is known when measuring begins, or goes on."""
        self._plan = plan
        self._info = info
        self._settings = settings
        self._layers = int(engine.model_config.hf_text_config.num_hidden_layers)
        self._folder = folder
        self._on_progress = on_progress
        self._spent_s = self._info.duration_s
        self._began = time.monotonic()
        self._written = self._began
        done = folder.segments
        self._collector = Collector(engine, plan, self._began - self._spent_s, len(done))
        self._segments = Counter(row["group"] for row in done.to_pylist() if row["purpose"] != "window")
        self._spreads: dict[int, float] = {}

    async def run(self) -> ProfileInfo:
        """Corners, finetuning alone, the space with the reference in between, then repeats until the time is over."""
        self._write("running")
        try:
            await self._corners()
            if not self._visits(self._plan.reference):
                await self._visit(self._plan.reference, "the reference")
            await self._alone()
            await self._space()
            await self._repeats()
        except asyncio.CancelledError:
            self._write("interrupted")
            raise
        except BaseException:
            self._write("failed")
            raise
        return self._write("finished")

    @property
    def _elapsed_s(self) -> float:
        return self._spent_s + time.monotonic() - self._began

    @property
    def _over(self) -> bool:
        return self._elapsed_s >= self._settings.budget_s

    def _visits(self, group: Group) -> int:
        return self._segments[group.number] // (2 * len(group.shares))

    async def _corners(self) -> None:
        corners = self._plan.groups[: self._plan.corners]
        for number, group in enumerate(corners):
            if self._over:
                needed_s = self._elapsed_s / max(number, 1) * len(corners) * 2
                raise HarliError(
                    f"{self._settings.budget_s:g} s are too short for one pass over the corners; "
                    f"give it --budget-minutes {np.ceil(needed_s / 6) / 10:g} or more"
                )
            if not self._visits(group):
                await self._visit(group, "corners")

    async def _alone(self) -> None:
        shares = [share for share in self._plan.menu.shares if share.finetune]
        cases = [(share, shape) for shape in self._plan.microbatches for share in shares]
        seconds = min(LONGEST_ALONE_S, ALONE_FRACTION * self._settings.budget_s / len(cases))
        for share, shape in cases:
            known = self._folder.units.to_pylist()
            key = (share.finetune, shape, False)
            if not any((row["units"], row["microbatch_tokens"], row["beside_decode"]) == key for row in known):
                self._folder.add_units(await self._collector.alone(share, shape, seconds))
                self._tell(f"finetuning alone on {share.finetune}")

    async def _space(self) -> None:
        for number, group in enumerate(self._plan.groups[self._plan.corners :]):
            if self._over:
                return
            if not self._visits(group):
                if number % REFERENCE_EVERY == REFERENCE_EVERY - 1:
                    await self._visit(self._plan.reference, "the reference")
                if number % WINDOWS_EVERY == 0:
                    await self._windows()
                await self._visit(group, f"group {number + 1} of {len(self._plan.groups) - self._plan.corners}")

    async def _repeats(self) -> None:
        """Where repeats disagree most, first; a group's turn counts less the more visits it had."""
        number = 0
        while not self._over:
            number += 1
            if number % REFERENCE_EVERY == 0:
                group = self._plan.reference
            else:
                group = max(self._plan.groups, key=lambda one: self._disagreement(one) / max(1, self._visits(one)))
            await self._visit(group, "repeats where they disagree most")

    def _disagreement(self, group: Group) -> float:
        """Largest distance between log medians of segments at the same point; cached until the next visit."""
        if group.number not in self._spreads:
            segments = self._folder.segments
            steps = self._folder.steps
            mine = segments.filter(np.equal(segments["group"].to_numpy(), group.number))
            ids, gaps = steps["segment"].to_numpy(), steps["gap_ms"].to_numpy()
            logs: dict[int, list[float]] = {}
            for row in mine.to_pylist():
                values = gaps[ids == row["segment"]]
                values = values[np.isfinite(values)]
                if len(values):
                    logs.setdefault(row["point"], []).append(float(np.log(np.median(values))))
            self._spreads[group.number] = max((max(of) - min(of) for of in logs.values()), default=1.0)
        return self._spreads[group.number]

    async def _visit(self, group: Group, phase: str) -> None:
        script = self._plan.script(group, self._visits(group))
        visit = await self._collector.visit(group, script)
        self._folder.add(visit)
        self._segments[group.number] += len(script)
        self._spreads.pop(group.number, None)
        self._tell(phase)

    async def _windows(self) -> None:
        """Exclusive windows at the reference; their length follows the units'."""
        times = unit_times(self._folder.units, self._layers, self._settings.finetune.accumulation)
        everything = self._plan.menu.finetune_alone.finetune
        longest_ms = max((unit.mean_ms for unit in times if unit.units == everything), default=0.0)
        if not longest_ms:
            return
        script = [
            Segment(segment.share, segment.exclusive_ms, WINDOW_STEPS)
            for segment in self._plan.windows([longest_ms * factor for factor in WINDOW_UNITS])
        ]
        self._folder.add(await self._collector.visit(self._plan.reference, script, "window"))
        self._tell("exclusive windows")

    def _tell(self, phase: str) -> None:
        points = len(set(self._folder.segments["point"].to_pylist()))
        self._on_progress(Progress(self._elapsed_s, points, len(self._folder.steps), phase))
        if time.monotonic() - self._written > WRITE_EVERY_S:
            self._write("running")
            self._written = time.monotonic()

    def _write(self, status: Literal["running", "finished", "interrupted", "failed"]) -> ProfileInfo:
        times = unit_times(self._folder.units, self._layers, self._settings.finetune.accumulation)
        rates = alone_tokens_per_s(times, self._folder.units)
        everything = self._plan.menu.finetune_alone
        report = report_on(self._folder.steps, self._folder.segments, self._plan)
        self._info = self._info.model_copy(
            update={
                "status": status,
                "duration_s": self._elapsed_s,
                "unit_times": times,
                "finetune_alone_tokens_per_s": {f"0/{size} {shape}": rate for (size, shape), rate in rates.items()},
                "costs": costs(self._folder.steps, everything.finetune),
                "summary": report.summary(),
                "verdict": report.verdict,
            }
        )
        self._folder.write(self._info)
        return self._info


def report_on(steps: Any, segments: Any, plan: Plan) -> Report:
    """The report on tables that were measured by ``plan``."""
    limits = plan.described["limits"]
    return assess(steps, segments, plan.menu, len(plan.groups), (limits["max_batch"], limits["max_context"]))
