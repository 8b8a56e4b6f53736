"""Takes a plan to a running engine and collects what the engine measured."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from harli.engine.launch import command
from harli.records.profile import SegmentRecord
from harli.rows import StepRecord, UnitRecord
from harli.types import HarliError, Share
from profiling.plan import Group, Plan, Segment
from profiling.script import POLICY, encode_script, segments_of

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

VISITOR_EVERY_S = 0.4
VISITOR_TOKENS = 3


@dataclass
class Visit:
    """What one visit to a group brought."""

    steps: list[tuple[Any, ...]] = field(default_factory=list)
    """Rows of PROFILE_STEPS."""
    segments: list[SegmentRecord] = field(default_factory=list)
    units: list[UnitRecord] = field(default_factory=list)


class Collector:
    """Visits groups one by one; the engine must have a finetuning job and nothing else to do."""

    def __init__(self, engine: AsyncLLM, plan: Plan, clock_zero: float, first_segment: int) -> None:
        """``clock_zero``: what times count from. ``first_segment``: the id of the next segment."""
        self._engine = engine
        self._plan = plan
        self._clock_zero = clock_zero
        self._segment = first_segment
        self._visits = 0
        self._shape_now = (0, False)

    async def visit(self, group: Group, script: Sequence[Segment], purpose: str | None = None) -> Visit:
        """Let the group's requests run through ``script``. Raises HarliError if the engine cannot serve them."""
        await self._shape(group.microbatch_tokens, group.keeps)
        await self._begin(encode_script(script), group.batch, self._plan.menu.decode_alone)
        tokens = self._plan.output_tokens(group, script)
        requests = [self._request(prompt, tokens) for prompt in group.contexts]
        visitors = asyncio.create_task(self._visitors(group))
        try:
            await asyncio.gather(*requests)
        finally:
            visitors.cancel()
            await asyncio.wait({visitors})
        rows = [StepRecord(*row) for row in (await command(self._engine, "drain"))["steps"]]
        units = await self._units()
        return self._labelled(group, script, rows, units, purpose or group.purpose)

    async def alone(self, share: Share, microbatch_tokens: int, seconds: float) -> list[UnitRecord]:
        """Finetuning with nothing beside it: half of the time without, half with activations kept."""
        units = []
        for keeps in (False, True):
            await self._shape(microbatch_tokens, keeps)
            await self._units()
            await self._begin("", 1, share)
            await asyncio.sleep(seconds / 2)
            await self._begin("", 1, self._plan.menu.decode_alone)
            units += await self._units()
        return units

    # Details

    async def _begin(self, script: str, batch: int, idle: Share) -> None:
        params = {"script": script, "batch": batch, "idle": str(idle)}
        limits = {"itl_ms": None, "tpot_ms": None}
        await command(self._engine, "begin", POLICY, params, limits, 0, self._clock_zero)

    async def _shape(self, microbatch_tokens: int, keeps: bool) -> None:
        if (microbatch_tokens, keeps) != self._shape_now:
            await command(self._engine, "reshape", microbatch_tokens, keeps)
            self._shape_now = (microbatch_tokens, keeps)

    async def _units(self) -> list[UnitRecord]:
        return [UnitRecord(*row) for row in await command(self._engine, "drain_units")]

    async def _visitors(self, group: Group) -> None:
        """Short requests that come and go one after the other while there is room for one."""
        if group.batch + 1 >= self._engine.vllm_config.scheduler_config.max_num_seqs:
            return
        while True:
            await asyncio.sleep(VISITOR_EVERY_S)
            await self._request(group.visitor_tokens, VISITOR_TOKENS)

    async def _request(self, prompt_tokens: int, output_tokens: int) -> None:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        self._visits += 1
        number = self._visits
        vocabulary = self._engine.model_config.get_vocab_size()
        prompt = np.random.default_rng(number).integers(vocabulary, size=prompt_tokens).tolist()
        params = SamplingParams(
            max_tokens=output_tokens,
            ignore_eos=True,
            temperature=0.0,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        async for _ in self._engine.generate({"prompt_token_ids": prompt}, params, f"profile-{number}"):
            pass

    def _labelled(
        self, group: Group, script: Sequence[Segment], rows: list[StepRecord], units: list[UnitRecord], purpose: str
    ) -> Visit:
        labels = segments_of(rows, script, group.batch)
        visit = Visit(units=units)
        points = [group.point(segment.share, self._plan.menu) for segment in script]
        for number, segment in enumerate(script):
            kept = [row for row, label in zip(rows, labels, strict=True) if label == number]
            if not kept:
                raise HarliError("the engine ended a request early; it may be out of KV cache: raise --kv-cache-gib")
            share, window = segment.share, segment.exclusive_ms
            visit.segments.append(
                SegmentRecord(
                    segment=self._segment + number,
                    point=points[number],
                    group=group.number,
                    purpose=purpose,
                    time_s=kept[0].time_s,
                    decode_units=share.decode,
                    finetune_units=share.finetune,
                    exclusive_ms=window,
                    steps=len(kept),
                )
            )
        for row, label in zip(rows, labels, strict=True):
            ids = (-1, -1) if label < 0 else (self._segment + label, points[label])
            visit.steps.append((*ids, *row))
        self._segment += len(script)
        return visit
