"""What the models see of a step: columns by name.

``one`` is the constant, ``solo_ms`` the first stage's prediction, ``finetune_share`` the fraction of the
device that finetuning has. A finetune shape means nothing to decode alone, so there it is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from predictor.base import Floats

if TYPE_CHECKING:
    from predictor.dataset import Dataset

SHAPE = ("finetune_share", "microbatch_tokens", "kept_layers")

SOLO_TERMS = ("one", "batch", "context_sum", "prefill_tokens", "admitted")
"""Terms of decode alone's linear base, in ms each."""
CORUN_TERMS = ("one", "solo_ms", "batch", "context_sum", "prefill_tokens", "admitted")
"""Terms of a split's linear base; ``solo_ms`` is its slowdown."""


def matrix(data: Dataset, names: Sequence[str], solo_ms: Floats | None = None, *, alone: bool = False) -> Floats:
    """The columns ``names`` of every row, [rows, names]. ``alone``: as if every row were one of decode alone."""
    beside = np.zeros(len(data)) if alone else (~data.solo).astype(np.float64)
    columns = np.empty((len(data), len(names)))
    for place, name in enumerate(names):
        if name == "one":
            columns[:, place] = 1.0
        elif name == "solo_ms":
            assert solo_ms is not None
            columns[:, place] = solo_ms
        elif name == "finetune_share":
            columns[:, place] = beside * np.array([share.finetune_share for share in data.menu.shares])[data.share]
        else:
            columns[:, place] = getattr(data, name) * (beside if name in SHAPE else 1.0)
    return columns
