"""Settings of a profile."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, FiniteFloat

from harli.config import EngineSettings, FinetuneSettings, Settings

MIN_BUDGET_S = 5.0


class ProfileSettings(Settings):
    """Everything that ``harli profile`` needs."""

    engine: EngineSettings = EngineSettings()
    finetune: FinetuneSettings = FinetuneSettings()
    """``microbatch_tokens`` is the middle one of the three shapes that are measured: half of it and twice it too."""
    budget_s: Annotated[FiniteFloat, Field(ge=MIN_BUDGET_S)] = 600.0
    """Time for measuring; starting the engine comes on top."""
    shares: tuple[str, ...] = ()
    """Splits to measure; all of the menu if empty."""
    seed: int = 0

    @property
    def microbatches(self) -> tuple[int, ...]:
        middle = self.finetune.microbatch_tokens
        return (middle // 2, middle, middle * 2)
