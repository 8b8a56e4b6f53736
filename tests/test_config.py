"""Settings refuse what cannot be meant."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from harli.config import EngineSettings, FinetuneSettings, LoraSettings, RunSettings, SloSettings, WorkloadSettings
from profiling.settings import ProfileSettings


@pytest.mark.parametrize(
    ("settings", "values"),
    [
        (LoraSettings, {"rank": 0}),
        (LoraSettings, {"rank": 1000}),
        (LoraSettings, {"dropout": 1.0}),
        (LoraSettings, {"targets": [""]}),
        (FinetuneSettings, {"learning_rate": 0.0}),
        (FinetuneSettings, {"schedule": "step"}),
        (FinetuneSettings, {"updates": 0}),
        (FinetuneSettings, {"microbatch_tokens": 8}),
        (FinetuneSettings, {"accumulation": 0}),
        (FinetuneSettings, {"lora": {"ranks": 8}}),
        (EngineSettings, {"model": ""}),
        (EngineSettings, {"model": "tiny", "role": "prefill"}),
        (EngineSettings, {"model": "tiny", "max_num_seqs": 0}),
        (WorkloadSettings, {"rate_scale": -1.0}),
        (WorkloadSettings, {"duration_s": 0}),
        (SloSettings, {"itl_ms": 0.0}),
        *(
            (WorkloadSettings, {name: math.inf})
            for name in ("duration_s", "rate_scale", "length_scale", "requests_per_s")
        ),
        *((FinetuneSettings, {name: math.inf}) for name in ("learning_rate", "weight_decay")),
        (LoraSettings, {"alpha": math.inf}),
        (EngineSettings, {"kv_cache_gib": math.inf}),
        (SloSettings, {"itl_ms": math.inf}),
        (SloSettings, {"tpot_ms": math.inf}),
        (ProfileSettings, {"budget_s": math.inf}),
        (RunSettings, {"policy": "static", "engine": {"model": "tiny"}, "seeds": 1}),
    ],
)
def test_refused(settings: type[BaseModel], values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        settings(**values)


def test_settings_survive_the_way_to_the_engine() -> None:
    settings = RunSettings(
        policy="static",
        params={"share": "1/1"},
        engine=EngineSettings(model="tiny"),
        finetune=FinetuneSettings(lora=LoraSettings(rank=4, targets=("q_proj",)), updates=3),
        slo=SloSettings(tpot_ms=80.0),
    )
    assert RunSettings.model_validate_json(settings.model_dump_json()) == settings


def test_a_parameter_of_a_policy_may_be_infinite() -> None:
    assert RunSettings(policy="qos", params={"slowdown": math.inf}).params["slowdown"] == math.inf


def test_settings_do_not_change() -> None:
    settings = SloSettings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.itl_ms = 3.0
