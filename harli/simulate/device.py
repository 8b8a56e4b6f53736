"""The contract of a simulated device: how long decode steps and finetune units take on it, and how much that varies."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from harli.types import DecodeState, FinetuneState, HarliError, Menu
from predictor.base import Floats, Predictor
from predictor.units import units_per_pass

BLOCK = 4096
"""Ratios drawn at a time: one call of numpy per number would take longer than a step's simulation."""


@dataclass(frozen=True, slots=True)
class Noise:
    """What makes one step differ from the mean of its kind."""

    sigma: float = 0.03
    """Of the lognormal ratio of a step, or a unit, to its mean; that ratio's own mean is 1."""
    straggler_probability: float = 0.0
    straggler_factor: float = 5.0
    """A straggling step takes this many times longer."""
    drift_per_minute: float = 0.0
    """Steps take ``1 + drift_per_minute * minutes`` times longer; units keep their times."""

    def __post_init__(self) -> None:
        if not (0.0 <= self.sigma < math.inf):
            raise HarliError(f"the noise must be a number from 0 on, not {self.sigma}")
        if not 0.0 <= self.straggler_probability <= 1.0:
            raise HarliError(f"the probability of a straggler must be from 0 to 1, not {self.straggler_probability}")
        if not (1.0 <= self.straggler_factor < math.inf):
            raise HarliError(f"a straggler must take 1 or more times longer, not {self.straggler_factor}")
        if not (0.0 <= self.drift_per_minute < math.inf):
            raise HarliError(f"the drift per minute must be a number from 0 on, not {self.drift_per_minute}")

    def steps(self, rng: np.random.Generator) -> Iterator[float]:
        """Ratios of steps to their mean, without the drift, for ever."""
        while True:
            ratios = self.lognormal(rng, BLOCK)
            straggling = rng.random(BLOCK) < self.straggler_probability
            yield from np.where(straggling, self.straggler_factor * ratios, ratios).tolist()

    def lognormal(self, rng: np.random.Generator, size: int) -> Floats:
        """Lognormal ratios with a mean of 1."""
        ratios: Floats = np.exp(self.sigma * rng.standard_normal(size) - self.sigma**2 / 2.0)
        return ratios

    @property
    def mean(self) -> float:
        """Mean ratio of steps, stragglers included."""
        return 1.0 + self.straggler_probability * (self.straggler_factor - 1.0)

    def quantile(self, level: float) -> float:
        """Quantile of the ratios of steps, stragglers included and taken to be slower than all other steps."""
        usual = 1.0 - self.straggler_probability
        if level < usual:
            return self.unit_quantile(level / usual)
        return self.straggler_factor * self.unit_quantile((level - usual) / self.straggler_probability)

    def unit_quantile(self, level: float) -> float:
        """Likewise of units, of which none straggles."""
        deviations = NormalDist().inv_cdf(min(max(level, 1e-6), 1.0 - 1e-6))
        return math.exp(self.sigma * deviations - self.sigma**2 / 2.0)

    def drift(self, time_s: float) -> float:
        """How many times longer than at first steps take at ``time_s``."""
        return 1.0 + self.drift_per_minute * time_s / 60.0


class Device(ABC):
    """One device with one model on it, and the chance that makes its steps vary.

    A step's length is the gap that a predictor speaks of: scheduling and admissions belong to it. Windows, units that
    still run and what they make decode wait for are the simulator's business.
    """

    name: str
    model: str
    menu: Menu
    layers: int
    """Of the model: a micro-batch has as many forward and as many backward units, an update as many optimizer units."""
    kept_layers: int = 0
    """Layers whose activations are in lent memory, so that backward does not recompute them."""
    pass_tokens: int
    """Training tokens of a micro-batch, padding aside."""
    predictor: Predictor
    """Knows the means; policies are given it with the correction of ``predictor.correction``."""
    coverage: float
    """Of the predictor's bounds."""
    data_sha256: str = ""
    """Of the data that the predictor was trained on; empty without any."""

    def __init__(self, noise: Noise, seed: int) -> None:
        self.noise = noise
        self._ratios = [noise.steps(generator) for generator in np.random.default_rng(seed).spawn(2)]
        self._coming = [next(ratios) for ratios in self._ratios]
        """Of the next step, decode alone and beside finetuning."""

    def dedicated_tokens_per_s(self, microbatch_tokens: int) -> float:
        """What a device that only finetunes makes: it keeps as many layers as this one lends memory for."""
        shape = FinetuneState(True, microbatch_tokens=microbatch_tokens, kept_layers=self.kept_layers)
        return self.predictor.alone_tokens_per_s(shape)

    def draw_step_ms(
        self, decode: DecodeState, finetune: FinetuneState, decode_units: int, finetune_units: int
    ) -> float:
        """How long the step takes this time."""
        took_ms = self.coming_step_ms(decode, finetune, decode_units, finetune_units)
        corun = finetune_units > 0
        self._coming[corun] = next(self._ratios[corun])
        return took_ms

    def coming_step_ms(
        self, decode: DecodeState, finetune: FinetuneState, decode_units: int, finetune_units: int
    ) -> float:
        """What ``draw_step_ms`` would return, without drawing: for those who may know the future."""
        ratio = self._coming[finetune_units > 0] * self.noise.drift(decode.time_s)
        return self.step_ms(decode, finetune, decode_units, finetune_units) * ratio

    @abstractmethod
    def step_ms(self, decode: DecodeState, finetune: FinetuneState, decode_units: int, finetune_units: int) -> float:
        """Mean length of a step on ``decode_units``; finetuning runs beside it if ``finetune_units`` is not 0."""

    @abstractmethod
    def unit_ms(self, kind: str, units: int) -> float:
        """Mean length of a finetune unit on ``units`` compute units, decode idle or waiting.

        Raises HarliError when the device does not know such units.
        """

    @abstractmethod
    def slowdown(self, decode: DecodeState, finetune: FinetuneState, decode_units: int, finetune_units: int) -> float:
        """How many times longer than ``unit_ms`` units take beside the step; ``finetune_units`` is not 0."""

    def pass_ms(self, units: int, accumulation: int) -> float:
        """Mean length of a micro-batch on ``units`` compute units, with its part of the optimizer's units."""
        per_pass = units_per_pass(self.layers, self.kept_layers, accumulation)
        return sum(often * self.unit_ms(kind, units) for kind, often in per_pass.items() if often)

    @property
    def units(self) -> int:
        """Compute units of the whole device."""
        return self.menu.decode_alone.decode
