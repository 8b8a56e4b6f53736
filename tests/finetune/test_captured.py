"""Layer units over static buffers: gradients equal a plain pass, and every share has records of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from harli.config import LoraSettings
from harli.finetune.activations import KeptActivations
from harli.finetune.captured import CapturedLayers, Work
from harli.finetune.model import build_model
from harli.memory.arena import Arena
from harli.memory.loan import Loan
from tests.finetune.builders import CONFIG, make_job

TOKENS = 12
UNITS = 2 * CONFIG.num_hidden_layers
BLOCKS, PAGE = 40, 4096


class Recorder:
    """Records a function by keeping it; ``runs`` counts what runs from a record."""

    def __init__(self, refuse: str = "") -> None:
        self.recorded = 0
        self.runs = 0
        self._refuse = refuse

    def __call__(self, work: Work) -> Work:
        if self._refuse:
            raise RuntimeError(self._refuse)
        self.recorded += 1

        def run() -> None:
            self.runs += 1
            work()

        return run


@pytest.fixture
def model() -> Any:
    return make_model(dropout=0.0)


def make_model(dropout: float) -> Any:
    torch.manual_seed(0)
    weights = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32).state_dict()
    del weights["lm_head.weight"]
    model = build_model(CONFIG, weights, LoraSettings(rank=2, dropout=dropout), name="base", seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def decoder(model: Any) -> Any:
    return model.get_base_model().model


def micro_batch(model: Any, seed: int, tokens: int = TOKENS) -> tuple[Tensor, dict[str, Any], Tensor]:
    """What embedding and loss would make: the first layer's input, every layer's keywords, the output's gradient."""
    generator = torch.Generator().manual_seed(seed)
    hidden, gradient = torch.randn(2, 1, tokens, CONFIG.hidden_size, generator=generator)
    positions = torch.arange(tokens)[None]
    inputs = {
        "attention_mask": torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril(),
        "position_embeddings": decoder(model).rotary_emb(hidden, positions),
    }
    return hidden, inputs, gradient


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def plain(model: Any, batches: list[Any]) -> dict[str, Tensor]:
    model.zero_grad()
    for hidden, inputs, gradient in batches:
        output = hidden
        for layer in decoder(model).layers:
            output = layer(output, **inputs)
        output.backward(gradient)
    return gradients(model)


def run(layers: CapturedLayers, batch: Any, units: int) -> Tensor:
    """A micro-batch's forward and backward; the last layer's output."""
    hidden, inputs, gradient = batch
    buffers = layers.begin(hidden, inputs)
    count = len(buffers.hidden) - 1
    for index in range(count):
        layers.forward(index, units)
    buffers.gradient.copy_(gradient)
    for index in reversed(range(count)):
        layers.backward(index, units)
    return buffers.hidden[-1]


def capture(layers: CapturedLayers, units: int) -> None:
    if not layers.warm(units):
        layers.warm_up(units)
    for index in range(CONFIG.num_hidden_layers):
        layers.capture(index, units)


def test_gradients_equal_a_plain_pass_whatever_the_optimizer_does_to_them(model: Any) -> None:
    recorder = Recorder()
    layers = CapturedLayers(decoder(model).layers, recorder)
    for update, (dropped, units) in enumerate([(True, 20), (True, 20), (False, 44), (True, 20), (True, 44)]):
        batches = [micro_batch(model, 10 * update + i) for i in range(2)]
        expected = plain(model, batches)
        model.zero_grad(set_to_none=dropped)
        for batch in batches:
            run(layers, batch, units)
        found = gradients(model)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient)
        capture(layers, units)
    assert recorder.runs == 3 * 2 * UNITS


def test_the_output_is_that_of_the_layers(model: Any) -> None:
    layers = CapturedLayers(decoder(model).layers, Recorder())
    for seed in range(3):
        hidden, inputs, gradient = micro_batch(model, seed)
        expected = hidden
        with torch.no_grad():
            for layer in decoder(model).layers:
                expected = layer(expected, **inputs)
        torch.testing.assert_close(run(layers, (hidden, inputs, gradient), 20), expected)
        capture(layers, 20)


def test_gradients_are_added_up_where_the_records_know_them(model: Any) -> None:
    """A graph writes to fixed addresses."""
    layers = CapturedLayers(decoder(model).layers, Recorder())
    parameter = next(p for p in model.parameters() if p.requires_grad)
    found = []
    for seed in range(3):
        model.zero_grad()
        run(layers, micro_batch(model, seed), 20)
        found.append(parameter.grad)
    assert all(gradient is found[0] for gradient in found)


def test_every_share_has_records_of_its_own(model: Any) -> None:
    recorder = Recorder()
    layers = CapturedLayers(decoder(model).layers, recorder)
    for shares, units in enumerate((20, 44)):
        run(layers, micro_batch(model, 0), units)
        assert recorder.runs == shares * UNITS
        for _ in range(2):
            capture(layers, units)
            assert recorder.recorded == (shares + 1) * UNITS
        run(layers, micro_batch(model, 1), units)
        assert recorder.runs == (shares + 1) * UNITS


def test_a_pass_that_ran_in_part_leaves_nothing_out(model: Any) -> None:
    """Kept layers and changes of the share leave some layers eager on a share, and forwards without backwards."""
    recorder = Recorder()
    layers = CapturedLayers(decoder(model).layers, recorder)
    layers.begin(*micro_batch(model, 0)[:2])
    layers.forward(0, 20)
    layers.warm_up(20)
    layers.capture(0, 20)
    while (missing := layers.next_capture([20])) is not None:
        layers.capture(*missing)
    assert recorder.recorded == UNITS


def test_another_shape_begins_anew(model: Any) -> None:
    recorder = Recorder()
    layers = CapturedLayers(decoder(model).layers, recorder)
    run(layers, micro_batch(model, 0), 20)
    capture(layers, 20)
    longer = micro_batch(model, 0, tokens=TOKENS + 1)
    expected = plain(model, [longer])
    model.zero_grad()
    run(layers, longer, 20)
    assert recorder.runs == 0
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name])


def test_what_cannot_be_captured_stays_eager_and_says_why(model: Any) -> None:
    layers = CapturedLayers(decoder(model).layers, Recorder(refuse="operation not permitted"))
    batch = micro_batch(model, 0)
    expected = plain(model, [batch])
    for _ in range(2):
        model.zero_grad()
        run(layers, batch, 20)
        capture(layers, 20)
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, expected[name])
    assert "operation not permitted" in layers.failure


def test_layers_with_dropout_are_never_captured() -> None:
    """Their masks are drawn on the host, anew for every pass."""
    model = make_model(dropout=0.5)
    recorder = Recorder()
    layers = CapturedLayers(decoder(model).layers, recorder)
    run(layers, micro_batch(model, 0), 20)
    capture(layers, 20)
    assert recorder.recorded == 0
    assert layers.failure == ""


def test_updates_run_from_graphs_as_they_run_eagerly(tmp_path: Path) -> None:
    without, with_graphs = (make_job(tmp_path / "data.jsonl", lora=LoraSettings(rank=2)) for _ in range(2))
    recorder = Recorder()
    with_graphs.update.use_graphs(recorder)
    captured = with_graphs.update.captured
    assert captured is not None
    for number in range(3):
        for job in (without, with_graphs):
            for unit in job.update.units([next(job.stream) for _ in range(2)], 1e-2):
                unit.run()
        while number == 1 and (missing := captured.next_capture([0])) is not None:
            captured.capture(*missing)
    assert recorder.runs == 2 * UNITS
    for (name, expected), (_, found) in zip(
        without.model.named_parameters(), with_graphs.model.named_parameters(), strict=True
    ):
        torch.testing.assert_close(found, expected, msg=name)


def test_gradients_of_kept_layers_stay_when_graphs_go_on(tmp_path: Path) -> None:
    without, mixed = (make_job(tmp_path / "data.jsonl", lora=LoraSettings(rank=2)) for _ in range(2))
    mixed.update.use_graphs(Recorder())
    loan = Loan(BLOCKS)
    regions = [torch.zeros(BLOCKS * PAGE, dtype=torch.uint8) for _ in range(4)]
    kept = KeptActivations(Arena(regions, loan), [*mixed.model.parameters(), *mixed.model.buffers()])
    mixed.update.kept = kept
    for job in (without, mixed):
        loan.move(1)
        for number, unit in enumerate(job.update.units([next(job.stream) for _ in range(2)], 1e-2), start=1):
            if unit.name == "optimizer":
                break
            unit.run()
            if number == UNITS + 2:  # the second micro-batch has no room to keep anything
                loan.move(BLOCKS)
    assert kept.figures()["kept"] == CONFIG.num_hidden_layers
    expected = gradients(without.model)
    assert all(torch.allclose(gradient, expected[name]) for name, gradient in gradients(mixed.model).items())


def test_warming_up_a_share_changes_nothing(model: Any) -> None:
    layers = CapturedLayers(decoder(model).layers, Recorder())
    batch = micro_batch(model, 0)
    output = run(layers, batch, 20).clone()
    before = gradients(model)
    assert not layers.warm(44)
    layers.warm_up(44)
    assert layers.warm(44)
    assert layers.next_capture([44]) == (0, 44)
    assert all(torch.equal(gradient, before[name]) for name, gradient in gradients(model).items())
    assert torch.equal(run(layers, batch, 20), output)


def test_what_cannot_even_run_stays_eager(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = CapturedLayers(decoder(model).layers, Recorder())
    run(layers, micro_batch(model, 0), 20)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(decoder(model).layers[0], "forward", fail)
    assert layers.incomplete([44])
    layers.warm_up(44)
    assert not layers.incomplete([44])
    assert "out of memory" in layers.failure
