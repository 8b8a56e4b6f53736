"""What finetuning beside decode is worth."""

from __future__ import annotations

HOURS_PER_DAY = 24.0


def gpu_hours_per_day(tokens_per_s: float, dedicated_tokens_per_s: float) -> float:
    """Hours of dedicated GPUs that a day of finetuning at ``tokens_per_s`` saves.

    ``dedicated_tokens_per_s``: what such a GPU makes when it does nothing but finetune.
    """
    return HOURS_PER_DAY * tokens_per_s / dedicated_tokens_per_s
