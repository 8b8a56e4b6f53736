"""How long the step that begins now may take, as every policy that plans windows counts it."""

from __future__ import annotations

from harli.types import DecodeState, Slo

NO_SLO_MS = 1000.0
"""Longest gap where nothing else limits one: a window has to end, SLO or not."""


def budget_ms(slo: Slo, decode: DecodeState, reserve_ms: float = 0.0) -> float:
    """Longest gap that the next tokens may have; negative when the tightest request is late already.

    ``reserve_ms`` of a request's slack is left for steps to come.
    """
    return min(slo.budget_ms(decode.slack_ms - reserve_ms), NO_SLO_MS)
