from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from harli.models import byte_tokenizer, cache_folder, resolve_model
from harli.types import HarliError


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def tiny(cache: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HARLI_CACHE", str(cache))
        folder = resolve_model("tiny")
    assert isinstance(folder, Path)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny)


def test_tiny_is_a_bfloat16_llama_of_the_promised_shape(tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny)
    config = model.config
    assert config.architectures == ["LlamaForCausalLM"]
    assert model.dtype == torch.bfloat16
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (8, 8, 2)
    assert config.rope_parameters["rope_theta"] == 10000.0
    assert config.max_position_embeddings == 4096
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(24e6, rel=0.02)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.layers[3].mlp.up_proj.weight.float().std().item() == pytest.approx(0.02, rel=0.02)


def test_generation_stops_at_the_tokenizers_eos_and_changes_no_sampling(tiny: Path, tokenizer: Any) -> None:
    generation = json.loads((tiny / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.eos_token_id
    assert not {"temperature", "top_p", "top_k", "repetition_penalty", "max_length"} & set(generation)


def test_two_builds_are_equal_and_leave_torchs_generator_alone(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARLI_CACHE", str(tmp_path))
    torch.manual_seed(7)
    before = torch.get_rng_state()
    again = resolve_model("tiny")
    assert torch.equal(torch.get_rng_state(), before)
    first, second = load_file(tiny / "model.safetensors"), load_file(Path(again) / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_model_is_built_once_and_leaves_nothing_else(
    tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARLI_CACHE", str(cache))
    built = (tiny / "model.safetensors").stat().st_mtime_ns
    assert resolve_model("tiny") == tiny == cache / "models" / "tiny-v1"
    assert (tiny / "model.safetensors").stat().st_mtime_ns == built
    assert os.listdir(cache / "models") == ["tiny-v1"]


def test_losing_the_race_to_build_is_fine(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from harli import models

    monkeypatch.setenv("HARLI_CACHE", str(tmp_path))
    target = tmp_path / "models" / "tiny-v1"
    build = models._build

    def overtaken(shape: models.Shape, folder: Path) -> None:
        build(shape, folder)
        target.mkdir()
        (target / "winner").touch()

    monkeypatch.setattr(models, "_build", overtaken)
    assert resolve_model("tiny") == target
    assert os.listdir(target) == ["winner"]
    assert os.listdir(target.parent) == ["tiny-v1"]


def test_a_cache_that_cannot_be_written_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HARLI_CACHE", str(tmp_path / "file"))
    with pytest.raises(HarliError, match="set HARLI_CACHE"):
        resolve_model("tiny")


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("HARLI_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "harli"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "harli"
    monkeypatch.setenv("HARLI_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_any_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_saved_tokenizer_is_fast_and_has_one_token_per_byte(tokenizer: Any) -> None:
    text = " Größe:\r\n\t日本 \U0001f600 , don't\x00  "
    tokens = tokenizer.encode(text)
    assert tokenizer.is_fast
    assert len(tokens) == len(text.encode())
    assert tokenizer.decode(tokens) == text
    assert len(tokenizer) == 260
    assert tokenizer.decode(tokenizer.encode("a<|user|>b"), skip_special_tokens=True) == "ab"


def test_chat_template(tokenizer: Any) -> None:
    messages = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant", "user")]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|system|>s<|user|>u<|assistant|>a<|endoftext|><|user|>u<|assistant|>"


def test_local_folders_are_checked(tmp_path: Path) -> None:
    with pytest.raises(HarliError, match=r"no config\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(HarliError, match="no tokenizer"):
        resolve_model(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(HarliError, match="is a file"):
        resolve_model(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.1-8B", "gpt2"])
def test_other_names_are_hugging_faces(name: str) -> None:
    assert resolve_model(name) == name


@pytest.mark.parametrize("name", ["", "/no/such/folder", "./tiny", "a/b/c", "a b"])
def test_what_cannot_be_a_model_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HarliError, match="no model"):
        resolve_model(name)
