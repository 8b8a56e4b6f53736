"""Stepwise on the latency model that published prototypes of co-location use."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from harli.types import DecodeState, FinetuneState
from policies.base import PolicyContext
from policies.stepwise import Stepwise

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (128, 512, 2048)
"""Operating points that the model is fitted to: batch sizes, and KV tokens per request."""


class Linear(Stepwise):
    """Stepwise on a linear latency model without a bound: gap = (a context + b batch + c)(1 + k share).

    The four constants are least squares on what the predictor says of a grid of states, once at the start.
    """

    keeps_slo = False

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        batch = np.repeat([float(n) for n in BATCHES if n <= max(context.max_batch, 2)], len(CONTEXTS))
        contexts = batch * np.tile(np.array(CONTEXTS, float), len(batch) // len(CONTEXTS))
        gap = self._predictor.outlook(batch, contexts, FinetuneState()).gap_ms
        terms = np.column_stack([contexts, batch, np.ones_like(batch)])
        self._a, self._b, self._c = np.linalg.lstsq(terms, gap[:, 0])[0].tolist()
        shares = np.array([share.finetune_share for share in context.menu.shares[:-1]])
        excess = gap / gap[:, :1] - 1.0
        k = float((excess * shares).sum() / max(len(batch) * (shares @ shares), 1e-9))
        self._slowdowns = (1.0 + k * shares).tolist()

    def limits(
        self, decode: DecodeState, finetune: FinetuneState
    ) -> tuple[Sequence[float], Sequence[float], Sequence[float]]:
        solo = self._a * decode.context_sum + self._b * decode.batch + self._c
        gaps = [solo * slowdown for slowdown in self._slowdowns]
        return gaps, gaps, self._predictor.forecast(decode, finetune).finetune_tokens_per_s
