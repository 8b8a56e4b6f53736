"""The learning rate of an update: linear warm-up, then constant, linear or cosine decay."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harli.config import FinetuneSettings


def learning_rate(settings: FinetuneSettings, update: int) -> float:
    """The rate of update number ``update``, counted from 0. Decay ends at zero after ``settings.updates``."""
    peak, warmup = settings.learning_rate, settings.warmup_updates
    if update < warmup:
        return peak * (update + 1) / warmup
    if settings.updates is None or settings.schedule == "constant":
        return peak
    progress = min(1.0, (update - warmup) / max(1, settings.updates - warmup))
    return peak * (1.0 - progress if settings.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress)))
