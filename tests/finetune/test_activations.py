"""Kept activations change neither losses nor gradients, whatever is recalled and when."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, Qwen2Config

from harli.compute.cpu import CpuPartitioner
from harli.compute.gate import Gate
from harli.finetune import activations
from harli.finetune.activations import KeptActivations
from harli.finetune.checkpoint import Job
from harli.finetune.trainer import Trainer
from harli.finetune.units import Unit
from harli.memory.arena import Arena
from harli.memory.loan import Loan
from tests.finetune.builders import make_job

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "initializer_range": 0.2,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
}
LAYERS, UPDATES, TOKENS = SIZES["num_hidden_layers"], 20, 32
BLOCKS, PAGE, REGIONS = 40, 4096, 4
CANARY = 0x55
"""Two of them are a finite bfloat16."""
PATIENCE_S = 60.0

Losses = list[float]


class Borrowed:
    """A job with an arena over a cache full of canaries; ``recall`` plays the lender."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.loan = Loan(BLOCKS)
        self._regions = [torch.full((BLOCKS * PAGE,), CANARY, dtype=torch.uint8) for _ in range(REGIONS)]
        self._lowest_line = BLOCKS
        self.kept = KeptActivations(Arena(self._regions, self.loan), [*job.model.parameters(), *job.model.buffers()])
        job.update.kept = self.kept

    def lend_from(self, line: int) -> None:
        self.loan.move(line)
        self._lowest_line = min(self._lowest_line, line)

    def check(self) -> None:
        """Blocks that never were lent are untouched, those that are free hold finite numbers."""
        for region in self._regions:
            assert (region[: self._lowest_line * PAGE] == CANARY).all()
            assert region[: self.loan.held * PAGE].view(torch.bfloat16).isfinite().all()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are faster so, most of all beside other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> Any:
    return CONFIGS[request.param]


@pytest.fixture
def job(config: Any, tmp_path: Path) -> Callable[..., Job]:
    """Makes the same job with every call, its LoRA weights far from zero."""

    def make(dtype: torch.dtype = torch.float32) -> Job:
        made = make_job(tmp_path / "data.jsonl", config=config, dtype=dtype, warmup_updates=0)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in made.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=generator)
        return made

    return make


def units(job: Job, updates: int) -> Iterator[Unit]:
    for _ in range(updates):
        yield from job.update.units([next(job.stream)], 1e-2)


def train(job: Job, between: Callable[[], None] = lambda: None, updates: int = UPDATES) -> Losses:
    """The losses of ``updates`` updates, with ``between`` called between units."""
    losses = []
    for unit in units(job, updates):
        unit.run()
        if unit.name == "loss":
            losses.append(job.update.loss)
        between()
    return losses


def gradients(job: Job) -> list[Tensor]:
    for unit in units(job, 1):
        if unit.name == "optimizer":
            break
        unit.run()
    found = [p.grad for p in job.model.parameters() if p.requires_grad]
    assert all(gradient is not None and gradient.any() for gradient in found)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_recomputed_layers(job: Callable[..., Job], dtype: torch.dtype) -> None:
    expected = gradients(job(dtype))
    borrowed = Borrowed(job(dtype))
    borrowed.lend_from(1)
    for ours, theirs in zip(gradients(borrowed.job), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert borrowed.kept.layers == LAYERS


def test_a_layer_that_ran_on_another_stream_is_recomputed(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = gradients(job())
    borrowed = Borrowed(job())
    borrowed.lend_from(1)
    streams = count()
    monkeypatch.setattr(activations, "_stream", lambda _: next(streams))
    for ours, theirs in zip(gradients(borrowed.job), expected, strict=True):
        assert torch.equal(ours, theirs)
    figures = borrowed.kept.figures()
    assert (figures["kept"], figures["used_bytes"]) == (LAYERS, 0)


def test_twenty_updates_give_the_same_losses(job: Callable[..., Job]) -> None:
    borrowed = Borrowed(job())
    borrowed.lend_from(1)
    losses = train(borrowed.job, borrowed.check)
    assert losses == train(job())
    assert len(set(losses)) == UPDATES
    figures = borrowed.kept.figures()
    assert (figures["kept"], figures["revoked"]) == (LAYERS * UPDATES, 0)
    assert figures["used_bytes"] == 0 < figures["peak_bytes"]
    assert borrowed.loan.held == BLOCKS


def test_with_room_for_some_layers_the_last_ones_are_kept(job: Callable[..., Job]) -> None:
    borrowed = Borrowed(job())
    borrowed.lend_from(1)
    train(borrowed.job, updates=1)
    per_layer = borrowed.kept.figures()["peak_bytes"] / LAYERS
    borrowed.lend_from(BLOCKS - round(2.7 * per_layer / (PAGE * REGIONS)))
    assert 2 * per_layer < borrowed.kept.arena.free_bytes < 3 * per_layer
    ran = []
    for unit in units(borrowed.job, 1):
        ran.append(unit.kind)
        unit.run()
        assert borrowed.loan.vacated
    passes = [kind for kind in ran if kind.startswith(("forward", "backward"))]
    assert passes == ["forward"] * 2 + ["forward_kept"] * 2 + ["backward_kept"] * 2 + ["backward"] * 2
    assert borrowed.kept.layers == 2


def test_recalls_at_random_moments_give_the_same_losses(job: Callable[..., Job]) -> None:
    borrowed = Borrowed(job())
    rng = random.Random(0)
    waited = 0

    def recall_or_lend() -> None:
        nonlocal waited
        if rng.random() < 0.5:
            borrowed.loan.move(rng.choice([1, 1, BLOCKS - 20, BLOCKS - 10, BLOCKS]))
        waited += not borrowed.loan.vacated
        borrowed.kept.vacate()
        assert borrowed.loan.vacated
        borrowed.check()

    borrowed.lend_from(1)
    assert train(borrowed.job, recall_or_lend) == train(job())
    figures = borrowed.kept.figures()
    assert waited > UPDATES / 2
    assert figures["revoked"] > UPDATES
    assert figures["kept"] > figures["revoked"]


def test_weights_masks_and_layer_inputs_are_not_copied(job: Callable[..., Job]) -> None:
    borrowed = Borrowed(job(torch.bfloat16))
    borrowed.lend_from(1)
    train(borrowed.job, updates=1)
    hidden, inner = SIZES["hidden_size"], SIZES["intermediate_size"]
    activations = 2 * TOKENS * (8 * hidden + 4 * inner)
    """Bytes: both norms' outputs, the sum before the second, q, k, v, attention's output, and four of the MLP."""
    small = 4 * TOKENS * (SIZES["num_attention_heads"] + 7 * 2) + 2 * TOKENS * hidden
    """Attention's sums, and what lies between LoRA's A and B."""
    assert borrowed.kept.figures()["peak_bytes"] / LAYERS <= activations + small + 20 * 64


def test_a_job_that_is_given_up_leaves_nothing_behind(job: Callable[..., Job]) -> None:
    borrowed = Borrowed(job())
    borrowed.lend_from(1)
    for unit in islice(units(borrowed.job, 1), 2 + LAYERS):
        unit.run()
    assert borrowed.loan.held < BLOCKS
    borrowed.kept.drop()
    assert borrowed.loan.held == BLOCKS
    borrowed.check()


# With the finetuning thread


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "never happened"
        time.sleep(0.002)


def test_a_trainer_that_waits_at_the_gate_vacates_what_is_recalled(job: Callable[..., Job]) -> None:
    borrowed = Borrowed(job())
    borrowed.lend_from(1)
    gate = Gate(1)
    trainer = Trainer(borrowed.job, gate, CpuPartitioner((0,)), None)
    trainer.start()
    recalls = 0
    try:
        while recalls < 5:
            gate.allow(1)
            wait_until(lambda: borrowed.loan.held < BLOCKS)
            gate.allow(0)
            wait_until(lambda: gate.free == 1)
            if not borrowed.loan.move(BLOCKS):
                recalls += 1
                assert borrowed.loan.wait_vacated(PATIENCE_S)
                borrowed.check()
            borrowed.loan.move(1)
        done = len(trainer.updates)
        gate.allow(1)
        wait_until(lambda: len(trainer.updates) >= done + 2)
        assert trainer.state.kept_layers == LAYERS
    finally:
        trainer.finish()
        trainer.join(PATIENCE_S)
    assert not trainer.failure
    assert borrowed.loan.held == BLOCKS
    kinds = {row.kind for row in trainer.unit_rows}
    assert {"forward_kept", "backward_kept", "backward"} <= kinds
    assert [update.loss for update in trainer.updates] == train(job(), updates=len(trainer.updates))


def test_a_fault_in_a_unit_gives_the_memory_back(job: Callable[..., Job]) -> None:
    borrowed = Borrowed(job())
    borrowed.lend_from(1)
    borrowed.job.update._layers[-1].mlp.forward = None
    gate = Gate(1)
    trainer = Trainer(borrowed.job, gate, CpuPartitioner((0,)), None)
    gate.allow(1)
    trainer.start()
    wait_until(lambda: not trainer.state.ready)
    assert trainer.failure.startswith("TypeError")
    assert borrowed.loan.held == BLOCKS
    borrowed.check()
    trainer.finish()
    trainer.join(PATIENCE_S)
