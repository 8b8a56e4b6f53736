"""Devices that are a few numbers: a roofline, what a part of the SMs can do, and interference.

A decode step reads the weights and the KV cache once, or computes two operations per parameter and token, whichever
takes longer (Williams, Waterman and Patterson, "Roofline", 2009). A finetune unit likewise, with two operations per
parameter and token forward, and two more each for recomputing and for the gradient of the input backward; the head
counts as both. LoRA's own operations are left out.

H200 with Llama-3-8B: 4.3 TB/s and 790 TFLOP/s measured on the whole device, memory bandwidth saturated from about 48
SMs on, 8% interference; TFLOP/s of a part of the SMs as cuBLAS reaches them in bfloat16 on a Hopper GPU with 132 SMs
(8: 56, 16: 110, 44: 325, 88: 492). Decode alone takes 3.5 ms at batch 1 and 11.5 ms at batch 256 with contexts of 1k,
finetuning alone makes 17,000 tokens/s in micro-batches of 1024.
The times of the embedding (0.05 ms) and of a layer's optimizer (0.05 ms) are assumed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from harli.config import FinetuneSettings
from harli.simulate.device import Device, Noise
from harli.types import Costs, DecodeState, FinetuneState, Menu, Share, UnitTime
from predictor.base import Floats, Forecast, Outlook, Predictor
from predictor.units import units_per_pass


@dataclass(frozen=True)
class Roofline:
    """A device and a model on it; sizes in bytes, rates per second."""

    name: str
    model: str
    menu: Menu
    bandwidth: float
    saturating_units: int
    """Compute units that reach the whole memory bandwidth; fewer reach their fraction of it."""
    flops_by_units: tuple[tuple[int, float], ...]
    """Compute units and operations per second that they reach; linear in between."""
    interference: float
    """How much longer, as a fraction, everything takes while both sides run."""
    layers: int
    layer_parameters: float
    head_parameters: float
    bytes_per_parameter: int
    kv_bytes_per_token: int
    small_unit_ms: float
    """Embedding, and the optimizer's step of a layer."""

    @property
    def parameters(self) -> float:
        """Those that every token passes: the embedding is a look-up."""
        return self.layers * self.layer_parameters + self.head_parameters

    def decode_costs(self, units: int) -> tuple[float, float, float]:
        """Milliseconds to read the weights, to read a token of context, and to compute a token."""
        bandwidth, flops = self._bandwidth(units), self._flops(units)
        read = self.parameters * self.bytes_per_parameter
        return 1e3 * read / bandwidth, 1e3 * self.kv_bytes_per_token / bandwidth, 2e3 * self.parameters / flops

    def unit_ms(self, kind: str, units: int, tokens: int) -> float:
        """Length of a finetune unit over ``tokens`` on ``units`` compute units."""
        if kind in ("embed", "optimizer"):
            return self.small_unit_ms
        parameters = self.head_parameters if kind == "loss" else self.layer_parameters
        passes = {"forward": 1, "backward": 2, "loss": 3}[kind]
        read = passes * parameters * self.bytes_per_parameter / self._bandwidth(units)
        return 1e3 * max(read, passes * 2.0 * parameters * tokens / self._flops(units))

    def _bandwidth(self, units: int) -> float:
        return self.bandwidth * min(1.0, units / self.saturating_units)

    def _flops(self, units: int) -> float:
        known, reached = zip(*self.flops_by_units, strict=True)
        return float(np.interp(units, (0, *known), (0.0, *reached)))


H200_LLAMA_3_8B = Roofline(
    name="h200/llama-3-8b",
    model="meta-llama/Meta-Llama-3-8B",
    menu=Menu((Share(132, 0), Share(112, 20), Share(88, 44), Share(64, 68), Share(40, 92), Share(0, 132))),
    bandwidth=4.3e12,
    saturating_units=48,
    flops_by_units=((8, 56e12), (16, 110e12), (44, 325e12), (88, 492e12), (132, 790e12)),
    interference=0.08,
    layers=32,
    layer_parameters=218.1e6,
    head_parameters=525.3e6,
    bytes_per_parameter=2,
    kv_bytes_per_token=128 << 10,
    small_unit_ms=0.05,
)

ROOFLINES = {roofline.name: roofline for roofline in (H200_LLAMA_3_8B,)}
"""By name, as ``harli simulate --device`` takes them."""


class AnalyticDevice(Device):
    """A device that follows a ``Roofline``."""

    coverage = 0.99

    def __init__(self, roofline: Roofline, finetune: FinetuneSettings, noise: Noise, seed: int) -> None:
        super().__init__(noise, seed)
        self.name, self.model, self.menu = roofline.name, roofline.model, roofline.menu
        self.layers, self.pass_tokens = roofline.layers, finetune.microbatch_tokens
        self._roofline = roofline
        self._costs = {share.decode: roofline.decode_costs(share.decode) for share in self.menu.shares[:-1]}
        self.predictor = AnalyticPredictor(self, roofline, finetune)

    def step_ms(self, decode: DecodeState, finetune: FinetuneState, decode_units: int, finetune_units: int) -> float:
        weights_ms, context_ms, token_ms = self._costs[decode_units]
        tokens = decode.batch + decode.prefill_tokens
        length_ms = max(weights_ms + context_ms * decode.context_sum, token_ms * tokens)
        return length_ms * (1.0 + self._roofline.interference) if finetune_units else length_ms

    def unit_ms(self, kind: str, units: int) -> float:
        return self._roofline.unit_ms(kind, units, self.pass_tokens)

    def slowdown(self, decode: DecodeState, finetune: FinetuneState, decode_units: int, finetune_units: int) -> float:
        return 1.0 + self._roofline.interference


class AnalyticPredictor(Predictor):
    """Knows the mean of an analytic device exactly, and as bound the quantile of its noise, its drift aside."""

    def __init__(self, device: AnalyticDevice, roofline: Roofline, finetune: FinetuneSettings) -> None:
        self.menu = device.menu
        self.costs = Costs()
        parts = sorted({share.finetune for share in self.menu.shares} - {0})
        self.unit_times = tuple(
            UnitTime(kind, part, device.pass_tokens, 0, often, mean_ms)
            for part in parts
            for kind, often in units_per_pass(device.layers, 0, finetune.accumulation).items()
            if often
            for mean_ms in (device.unit_ms(kind, part),)
        )
        rates = {part: 1e3 * device.pass_tokens / device.pass_ms(part, finetune.accumulation) for part in parts}
        self.finetune_alone_tokens_per_s = rates[device.units]
        slower = 1.0 + roofline.interference
        ratio = device.noise.mean
        self._bound = max(1.0, device.noise.quantile(device.coverage) / ratio)
        self._coefficients = np.array(
            [
                np.array(roofline.decode_costs(share.decode)) * ratio * (slower if share.finetune else 1.0)
                for share in self.menu.shares[:-1]
            ]
        )
        self._rows = self._coefficients.tolist()
        rates_beside = [rates[share.finetune] / slower if share.finetune else 0.0 for share in self.menu.shares[:-1]]
        self._rates = np.array(rates_beside)
        self._forecast = Forecast([0.0] * len(self._rows), [0.0] * len(self._rows), rates_beside)
        self._step = (math.nan, -1)

    def forecast(self, decode: DecodeState, finetune: FinetuneState) -> Forecast:
        forecast, step = self._forecast, (decode.time_s, decode.step)
        if step != self._step:
            self._step = step
            context, tokens = decode.context_sum, decode.batch + decode.prefill_tokens
            for index, (weights_ms, context_ms, token_ms) in enumerate(self._rows):
                gap_ms = max(weights_ms + context_ms * context, token_ms * tokens)
                forecast.gap_ms[index] = gap_ms
                forecast.bound_ms[index] = gap_ms * self._bound
        return forecast

    def outlook(self, batch: Floats, context_sum: Floats, finetune: FinetuneState) -> Outlook:
        weights_ms, context_ms, token_ms = self._coefficients.T
        gap_ms = np.maximum(weights_ms + np.multiply.outer(context_sum, context_ms), np.multiply.outer(batch, token_ms))
        rates = np.broadcast_to(self._rates, gap_ms.shape)
        return Outlook(gap_ms, gap_ms * self._bound, rates)
