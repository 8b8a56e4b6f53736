"""The flags of vLLM's server beside Harli's settings."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest

from harli.config import EngineSettings, FinetuneSettings, LoraSettings, RunSettings, SloSettings
from harli.serve.arguments import KEPT_ADAPTERS, server_arguments, take_keys
from harli.types import HarliError

SETTINGS = RunSettings(
    policy="static",
    params={"work_conserving": True},
    slo=SloSettings(itl_ms=50.0),
    engine=EngineSettings(model="tiny", role="mixed", kv_cache_gib=0.3, max_num_seqs=8),
)


def parse(*flags: str) -> Namespace:
    return server_arguments(SETTINGS, None, flags)


def test_settings_are_defaults_and_flags_win() -> None:
    arguments = parse("--port", "8123", "--max-num-batched-tokens", "512", "--additional-config", '{"other": 1}')
    assert (arguments.host, arguments.port, arguments.max_num_batched_tokens) == ("127.0.0.1", 8123, 512)
    assert (arguments.max_num_seqs, arguments.served_model_name, arguments.enable_lora) == (8, ["tiny"], True)
    assert arguments.additional_config["other"] == 1
    assert arguments.additional_config["harli"]["policy"] == "static"
    assert arguments.additional_config["harli"]["slo"] == {"itl_ms": 50.0, "tpot_ms": None}


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--slo-itl", "60"], "--slo-itl"),
        (["--port", "many"], "--port"),
        (["small"], "'small'; the model is given with --model"),
        (["--tensor-parallel-size", "2"], "--tensor-parallel-size"),
        (["--worker-cls", "other.Worker"], "--worker-cls"),
        (["--no-enable-lora"], "--enable-lora"),
        (["--kv-cache-dtype", "fp8"], "--kv-cache-dtype"),
        (["--api-server-count", "2"], "--api-server-count"),
        (["--enable-auto-tool-choice"], "--enable-auto-tool-choice"),
    ],
)
def test_what_does_not_work_is_named_in_one_line(flags: list[str], named: str) -> None:
    with pytest.raises(HarliError, match=named) as refused:
        parse(*flags)
    assert "\n" not in str(refused.value)


def test_a_default_rank_that_is_not_served_is_refused_before_anything_is_trained() -> None:
    lora = LoraSettings(rank=32)
    settings = SETTINGS.model_copy(update={"finetune": FinetuneSettings(lora=lora)})
    with pytest.raises(HarliError, match="rank 32 by default, and --max-lora-rank 16"):
        server_arguments(settings, None, [])
    assert server_arguments(settings, None, ["--max-lora-rank", "32"]).max_lora_rank == 32


def test_more_adapters_are_kept_in_memory_than_fit_a_step() -> None:
    assert parse().max_cpu_loras == KEPT_ADAPTERS
    assert parse("--max-loras", "100").max_cpu_loras == 100
    assert parse("--max-cpu-loras", "5").max_cpu_loras == 5


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "example.org"])
def test_other_machines_need_a_key(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(HarliError, match=r"--api-key, or set VLLM_API_KEY"):
        take_keys(parse("--host", host))
    monkeypatch.setenv("VLLM_API_KEY", "from the environment")
    assert take_keys(parse("--host", host)) == ["from the environment"]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_this_machine_needs_none(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert take_keys(parse("--host", host)) == []


def test_keys_are_not_left_where_vllm_would_log_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    arguments: Any = parse("--host", "0.0.0.0", "--api-key", "one", "two")
    assert take_keys(arguments) == ["one", "two"]
    assert arguments.api_key is None
