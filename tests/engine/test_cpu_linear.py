"""Linear layers on CPU: plain weights stay, and the first run of a shape is by the whole team."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from harli.compute import openmp
from harli.engine.cpu_linear import padded_rows, patched_linears, warm_up

platforms = pytest.importorskip("vllm.platforms")
if not platforms.current_platform.is_cpu():
    pytest.skip("for vLLM on CPU", allow_module_level=True)

TEAM = 3
MAX_BATCH, MAX_ROWS = 20, 200


class Layer(nn.Module):
    """The parts of vLLM's linear layers that its CPU dispatch uses."""

    def __init__(self, outputs: int, inputs: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(outputs)
        self.weight = nn.Parameter(torch.randn(outputs, inputs).to(dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(outputs).to(dtype), requires_grad=False) if bias else None
        self.cpu_linear: Callable[..., Tensor]


Runs = list[tuple[int, int]]
"""Rows of the input and size of the calling thread's team, of each run of vLLM's own kernel."""


@pytest.fixture
def utils() -> Any:
    platforms.current_platform.import_kernels()
    from vllm.model_executor.layers import utils

    return utils


@pytest.fixture
def runs(utils: Any, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Watches vLLM's kernels, which run as they are."""
    seen: Runs = []
    dispatch = utils.dispatch_cpu_unquantized_gemm

    def watched_dispatch(layer: Layer, remove_weight: bool) -> None:
        dispatch(layer, remove_weight=remove_weight)
        kernel = layer.cpu_linear

        def watched(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            seen.append((x.shape[0], torch.get_num_threads()))
            return kernel(x, weight, bias)

        layer.cpu_linear = watched

    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", watched_dispatch)
    return seen


@pytest.fixture(autouse=True)
def team() -> Iterator[None]:
    before = torch.get_num_threads()
    openmp.set_team_size(TEAM)
    yield
    openmp.set_team_size(before)


def load(utils: Any, *layers: Layer) -> list[Any]:
    """Load ``layers`` as vLLM does."""
    with patched_linears(MAX_BATCH, MAX_ROWS) as linears:
        for layer in layers:
            utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    return linears


def layer(outputs: int = 96, inputs: int = 128, bias: bool = False, dtype: torch.dtype = torch.bfloat16) -> Layer:
    return Layer(outputs, inputs, bias, dtype)


def run(layer: Layer, rows: int) -> Tensor:
    x = torch.linspace(-1.0, 1.0, rows * layer.weight.shape[1]).reshape(rows, -1).to(layer.weight.dtype)
    return layer.cpu_linear(x, layer.weight, layer.bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
def test_the_plain_weight_stays_and_results_are_right(utils: Any, dtype: torch.dtype, bias: bool) -> None:
    subject = layer(bias=bias, dtype=dtype)
    pointer, weight = subject.weight.data_ptr(), subject.weight.clone()
    constant = None if subject.bias is None else subject.bias.clone()
    view = subject.weight[:10]
    assert load(utils, subject) == [subject]
    assert subject.weight.data_ptr() == view.data_ptr() == pointer
    assert torch.equal(subject.weight, weight)
    for rows in (1, 2, 7, 64, 7):
        x = torch.randn(rows, 128).to(dtype)
        expected = linear(x.float(), weight.float(), None if constant is None else constant.float())
        found = subject.cpu_linear(x, subject.weight, subject.bias)
        assert found.dtype == dtype
        tolerance = 0.02 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=5 * tolerance)


def test_a_shapes_first_run_is_by_the_whole_team_and_the_team_is_restored(utils: Any, runs: Runs) -> None:
    subject = layer()
    load(utils, subject)
    openmp.set_team_size(1)
    for rows in (5, 5, 6):
        run(subject, rows)
        assert torch.get_num_threads() == 1
    openmp.set_team_size(2)
    run(subject, 6)
    assert runs == [(5, TEAM), (5, 1), (6, TEAM), (6, 2)]


def test_batches_run_as_they_are_and_prompts_with_one_of_few_row_counts(utils: Any, runs: Runs) -> None:
    subject = layer(dtype=torch.float32)
    load(utils, subject)
    for rows in (1, MAX_BATCH, MAX_BATCH + 1, 33, 47, 48, 150):
        x = torch.randn(rows, 128)
        found = subject.cpu_linear(x, subject.weight, subject.bias)
        torch.testing.assert_close(found, linear(x, subject.weight, subject.bias), rtol=1e-5, atol=5e-5)
    assert [rows for rows, _ in runs] == [1, 20, 32, 48, 48, 48, 160]


def test_padding_is_small() -> None:
    counts = [padded_rows(rows, MAX_BATCH) for rows in range(1, 8193)]
    assert counts[:MAX_BATCH] == list(range(1, MAX_BATCH + 1))
    assert all(0 <= padded - rows < max(16, rows / 16) for rows, padded in enumerate(counts, start=1))
    assert len(set(counts)) < 120
    assert [padded_rows(rows, 1) for rows in (1, 2, 16, 17)] == [1, 16, 16, 32]
    assert all(padded_rows(padded, MAX_BATCH) == padded for padded in counts)


def test_layers_of_one_shape_share_what_they_have_seen(utils: Any, runs: Runs) -> None:
    first, second, other, with_bias = layer(), layer(), layer(outputs=64), layer(bias=True)
    load(utils, first, second, other, with_bias)
    openmp.set_team_size(1)
    for subject in (first, second, other, with_bias):
        run(subject, 5)
    assert runs == [(5, TEAM), (5, 1), (5, TEAM), (5, TEAM)]


def test_the_team_is_restored_when_a_first_run_fails(utils: Any, runs: Runs) -> None:
    subject = layer(dtype=torch.float32)
    load(utils, subject)
    openmp.set_team_size(1)
    with pytest.raises(RuntimeError):
        subject.cpu_linear(torch.zeros(3, 5), subject.weight, None)
    assert runs == [(3, TEAM)]
    assert torch.get_num_threads() == 1


def test_after_warming_up_no_row_count_is_new(utils: Any, runs: Runs) -> None:
    linears = load(utils, layer(), layer(), layer(bias=True))
    warm_up(linears, 6)
    assert sorted(runs) == sorted((rows, TEAM) for rows in range(1, 7) for _ in range(2))
    openmp.set_team_size(1)
    runs.clear()
    for subject in linears:
        for rows in range(1, 7):
            run(subject, rows)
    assert {team for _, team in runs} == {1}


def test_primitives_of_all_row_counts_are_kept(utils: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import _custom_ops as ops

    kept = []
    create = ops.create_onednn_mm

    def watched(weight: Tensor, primitive_cache_size: int = 128) -> Any:
        kept.append(primitive_cache_size)
        return create(weight, primitive_cache_size)

    monkeypatch.setattr(ops, "create_onednn_mm", watched)
    with patched_linears(60, MAX_ROWS):
        utils.dispatch_cpu_unquantized_gemm(layer(dtype=torch.float32), remove_weight=True)
    assert kept == [60 + len(range(64, MAX_ROWS + 16, 16))]


def test_vllm_is_as_before_after_loading(utils: Any) -> None:
    from vllm import _custom_ops as ops

    before = utils.dispatch_cpu_unquantized_gemm, ops.create_onednn_mm

    def fails() -> None:
        with patched_linears(MAX_BATCH, MAX_ROWS):
            assert utils.dispatch_cpu_unquantized_gemm is not before[0]
            raise RuntimeError("no such weight")

    with pytest.raises(RuntimeError, match="no such weight"):
        fails()
    assert (utils.dispatch_cpu_unquantized_gemm, ops.create_onednn_mm) == before
    load(utils, layer())
    assert (utils.dispatch_cpu_unquantized_gemm, ops.create_onednn_mm) == before


def test_what_is_no_matrix_is_left_alone(utils: Any) -> None:
    subject = layer()
    subject.weight = nn.Parameter(torch.zeros(4, 3, 2, dtype=torch.bfloat16), requires_grad=False)
    assert load(utils, subject) == []
