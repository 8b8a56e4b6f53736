"""What a forecast costs the thread that asks for it."""

from __future__ import annotations

import time

import numpy as np

from harli.types import DecodeState, FinetuneState
from predictor.base import STATE, Predictor
from predictor.dataset import Dataset

STATES = 5000


def forecast_p99_us(predictor: Predictor, data: Dataset, seed: int) -> float:
    """P99 of the thread CPU time of ``forecast``, in microseconds, over states drawn from the rows of ``data``."""
    beside = data.take(~data.solo)
    finetune = FinetuneState(True, int(np.median(beside.microbatch_tokens)), int(np.median(beside.kept_layers)))
    rows = np.random.default_rng(seed).integers(len(data), size=STATES)
    columns = [getattr(data, name)[rows].astype(int).tolist() for name in STATE]
    decode, clock = DecodeState(), time.thread_time_ns
    took_ns = np.empty(STATES)
    for step, state in enumerate(zip(*columns, strict=True)):
        decode.step, decode.time_s = step, float(step)
        decode.batch, decode.context_sum, decode.context_max, decode.prefill_tokens, decode.admitted = state
        began = clock()
        predictor.forecast(decode, finetune)
        took_ns[step] = clock() - began
    return float(np.percentile(took_ns, 99) / 1e3)
