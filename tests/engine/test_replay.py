"""Decode's outputs with and without finetuning, when the batches are the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from harli.compute import openmp
from harli.finetune.builtin import write_builtin_dataset
from harli.models import resolve_model


def qwen2(folder: Path) -> Path:
    """A small Qwen2 with biases and an output layer of its own, and the byte tokenizer."""
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=260,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.1,
        tie_word_embeddings=False,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve_model("tiny")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["qwen2 float32", "tiny bfloat16"])
def replayed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("replay")
    data = folder / "data.jsonl"
    write_builtin_dataset(data, limit=40)
    name, dtype = request.param.split()
    model = str(qwen2(folder / "qwen2")) if name == "qwen2" else name
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("replay.py")), model, dtype, str(data)],
        env=os.environ | openmp.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert done.returncode == 0, done.stderr[-3000:]
    assert lines, done.stderr[-3000:]
    return {"dtype": dtype, **json.loads(lines[-1].removeprefix("RESULT "))}


def test_outputs_do_not_depend_on_finetuning(replayed: dict[str, Any]) -> None:
    first, again, beside = replayed["runs"]
    assert beside["finetune_failure"] == ""
    assert beside["finetune_steps"] > 10
    if replayed["dtype"] == "float32":
        assert beside["tokens"] == first["tokens"]
    noise, change = largest_difference(first, again), largest_difference(first, beside)
    print(f"largest difference of a log-probability: {noise} between runs without, {change} with")  # noqa: T201
    assert change <= max(noise, 1e-5 if replayed["dtype"] == "float32" else 0.0)


def largest_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Of the prompts' teacher-forced log-probabilities."""
    pairs = zip(chain(*one["logprobs"]), chain(*other["logprobs"]), strict=True)
    return max(abs(a - b) for a, b in pairs)


def test_the_decode_state_equals_a_loop_over_vllms_requests(replayed: dict[str, Any]) -> None:
    assert replayed["preemptions"] > 0
    assert replayed["states_checked"] > 100
    assert replayed["tracker_mismatches"] == []
