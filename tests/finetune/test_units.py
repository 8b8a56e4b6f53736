"""Layer-wise updates against plain PEFT training of the same model on the same batches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from harli.config import LoraSettings
from harli.finetune.dataset import Sample
from harli.finetune.model import CounterDropout, build_model
from harli.finetune.packing import BatchStream, MicroBatch, attention_mask
from harli.finetune.units import LayerwiseUpdate, NonFiniteLoss

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
CONFIGS = {
    "llama, tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2, untied": Qwen2Config(**SIZES, tie_word_embeddings=False),
}
LEARNING_RATE = 1e-2


def base_weights(config: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    weights = AutoModelForCausalLM.from_config(config, dtype=torch.float32).state_dict()
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    return weights


def batches(count: int) -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(1)
    samples = []
    for _ in range(24):
        length = int(torch.randint(5, 30, (), generator=generator))
        tokens = torch.randint(0, 97, (length,), generator=generator).tolist()
        samples.append(Sample(tokens, [False] * (length // 3) + [True] * (length - length // 3)))
    stream = BatchStream(samples, 64, seed=0)
    return [next(stream) for _ in range(count)]


def plain_loss(model: Any, group: list[MicroBatch]) -> torch.Tensor:
    """Mean loss per target over the group, through the whole model at once."""
    targets = sum(batch.targets for batch in group)
    total = torch.zeros(())
    for batch in group:
        logits = model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=attention_mask(batch)
        ).logits
        total = total + functional.cross_entropy(logits[0], batch.labels[0], ignore_index=-100, reduction="sum")
    return total / targets


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def model(request: pytest.FixtureRequest) -> Any:
    return build_model(request.param, base_weights(request.param), LoraSettings(rank=4), name="test", seed=0)


def trainable(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_base_weights_are_used_in_place() -> None:
    config = CONFIGS["llama, tied"]
    weights = base_weights(config)
    model = build_model(config, weights, LoraSettings(), name="test", seed=0)
    used = {p.data_ptr() for p in model.parameters() if not p.requires_grad}
    assert used == {tensor.data_ptr() for tensor in weights.values()}


def test_a_missing_weight_is_named() -> None:
    config = CONFIGS["llama, tied"]
    weights = base_weights(config)
    del weights["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(KeyError, match=r"layers\.1\.mlp\.up_proj"):
        build_model(config, weights, LoraSettings(), name="test", seed=0)


def test_lora_is_float32_on_a_bfloat16_base() -> None:
    config = CONFIGS["llama, tied"]
    weights = {name: tensor.bfloat16() for name, tensor in base_weights(config).items()}
    model = build_model(config, weights, LoraSettings(), name="test", seed=0)
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}


def test_gradients_equal_a_plain_pass(model: Any) -> None:
    for name, parameter in trainable(model).items():
        if "lora_B" in name:  # zero at first, which would leave half of the gradients zero
            torch.nn.init.normal_(parameter, std=0.1)
    plain = copy.deepcopy(model)
    group = batches(2)
    plain_loss(plain, group).backward()
    update = LayerwiseUpdate(model, learning_rate=LEARNING_RATE, weight_decay=0.0, seed=0)
    for unit in update.units(group, LEARNING_RATE):
        if unit.kind == "optimizer":
            break
        unit.run()
    for (name, ours), theirs in zip(trainable(model).items(), trainable(plain).values(), strict=True):
        assert ours.grad is not None, name
        assert theirs.grad is not None, name
        assert theirs.grad.abs().max() > 0, name
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_twenty_updates_equal_plain_training(model: Any, accumulation: int) -> None:
    plain = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(trainable(plain).values(), lr=LEARNING_RATE, weight_decay=0.1)
    update = LayerwiseUpdate(model, learning_rate=LEARNING_RATE, weight_decay=0.1, seed=0)
    everything = batches(20 * accumulation)
    ours, theirs = [], []
    for number in range(20):
        group = everything[number * accumulation : (number + 1) * accumulation]
        rate = LEARNING_RATE * (1 - number / 40)
        optimizer.param_groups[0]["lr"] = rate
        loss = plain_loss(plain, group)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        theirs.append(loss.item())
        for unit in update.units(group, rate):
            unit.run()
        ours.append(update.loss)
    assert theirs[-1] < theirs[0]
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_units_stand_for_the_tokens_of_their_batches(model: Any) -> None:
    group = batches(3)
    update = LayerwiseUpdate(model, learning_rate=LEARNING_RATE, weight_decay=0.0, seed=0)
    assert sum(unit.tokens for unit in update.units(group, 0.0)) == pytest.approx(sum(b.tokens for b in group))


def test_a_loss_that_is_not_finite_stops_before_the_optimizer(model: Any) -> None:
    poisoned = next(p for name, p in trainable(model).items() if "lora_B" in name)
    poisoned.data.fill_(float("nan"))
    before = {name: p.clone() for name, p in trainable(model).items()}
    update = LayerwiseUpdate(model, learning_rate=LEARNING_RATE, weight_decay=0.0, seed=0)

    def run() -> None:
        for unit in update.units(batches(1), LEARNING_RATE):
            unit.run()

    with pytest.raises(NonFiniteLoss, match="nan"):
        run()
    for name, parameter in trainable(model).items():
        torch.testing.assert_close(parameter, before[name], equal_nan=True)


def test_dropout_draws_the_same_mask_when_recomputed() -> None:
    config = CONFIGS["llama, tied"]
    dropped = build_model(config, base_weights(config), LoraSettings(dropout=0.3), name="test", seed=0)
    modules = [module for module in dropped.modules() if isinstance(module, CounterDropout)]
    assert len(modules) == 7 * SIZES["num_hidden_layers"]
    x = torch.ones(1, 8, 64)
    modules[0].draw = modules[1].draw = (0, 5)
    state = torch.random.get_rng_state()
    first = modules[0](x)
    torch.testing.assert_close(modules[0](x), first)
    assert not torch.equal(modules[1](x), first)
    modules[0].draw = (0, 6)
    assert not torch.equal(modules[0](x), first)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.unique().tolist() == pytest.approx([0.0, 1 / 0.7])


def test_training_with_dropout_updates_every_layer() -> None:
    config = CONFIGS["llama, tied"]
    model = build_model(config, base_weights(config), LoraSettings(dropout=0.1), name="test", seed=0)
    update = LayerwiseUpdate(model, learning_rate=LEARNING_RATE, weight_decay=0.0, seed=0)
    before = {name: p.clone() for name, p in trainable(model).items() if "lora_B" in name}
    for unit in update.units(batches(2), LEARNING_RATE):
        unit.run()
    assert all(not torch.equal(before[name], p) for name, p in trainable(model).items() if name in before)
