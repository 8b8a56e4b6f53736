"""The rival that knows nothing but the share."""

from __future__ import annotations

from typing import ClassVar, Self

import numpy as np

from predictor.dataset import Dataset
from predictor.features import CORUN_TERMS, SOLO_TERMS
from predictor.latency_model import LatencyModel, Params


class Constant(LatencyModel):
    """Every share's median gap; a share without a row has the largest of the others."""

    name: ClassVar[str] = "constant"

    @classmethod
    def fit(cls, data: Dataset, params: Params, seed: int) -> Self:
        shares = range(len(data.menu.shares) - 1)
        seen = {share: float(np.median(data.gap_ms[data.share == share])) for share in shares if share in data.share}
        medians = np.array([seen.get(share, max(seen.values())) for share in shares])
        alone, beside = np.zeros(len(SOLO_TERMS)), np.zeros((len(shares) - 1, len(CORUN_TERMS)))
        alone[SOLO_TERMS.index("one")] = medians[0]
        beside[:, CORUN_TERMS.index("one")] = medians[1:]
        return cls(alone, beside)
