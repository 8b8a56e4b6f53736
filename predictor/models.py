"""The candidate and its rivals, in the order of the table that compares them."""

from __future__ import annotations

from predictor.constant import Constant
from predictor.latency_model import LatencyModel
from predictor.linear import LinearPerShare, LinearSlowdown
from predictor.one_stage import OneStage
from predictor.two_stage import TwoStage

MODELS: tuple[type[LatencyModel], ...] = (TwoStage, LinearPerShare, LinearSlowdown, OneStage, Constant)
