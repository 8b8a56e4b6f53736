"""Finetuning inside a real engine: the adapter is right, decode is not harmed, times agree."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from harli.config import FinetuneSettings, LoraSettings
from harli.finetune.builtin import write_builtin_dataset
from harli.models import resolve_model
from harli.rows import StepRecord, UpdateRecord
from harli.types import HarliError
from harli.workload.base import Request, Workload
from harli.workload.client import OpenLoopClient

PROMPT = list(b"Write the docstring of Python's `json.dumps`")
CONSERVING = {"work_conserving": "true"}
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "docstrings.jsonl"
    write_builtin_dataset(path, limit=60)
    return path


def begin(host: Any, policy: str, params: dict[str, str] | None = None) -> float:
    """Begin a run; returns the clock's zero."""
    return float(host.command("begin", policy, params or {}, {}, 0)["clock_zero"])


def finetune(host: Any, data: Path, folder: Path | None = None, **settings: Any) -> dict[str, Any]:
    chosen = FinetuneSettings(data=data, microbatch_tokens=256, **settings)
    started: dict[str, Any] = host.command("finetune", chosen.model_dump_json(), str(folder) if folder else None, None)
    return started


def wait_for(host: Any, condition: Callable[[dict[str, Any]], bool], timeout_s: float = 60.0) -> dict[str, Any]:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        status: dict[str, Any] = host.command("status")
        if condition(status):
            return status
        time.sleep(0.1)
    pytest.fail(f"never happened; the last status was {status}")


def serve(host: Any, count: int = 12, output_tokens: int = 40, clock_zero: float | None = None) -> OpenLoopClient:
    """Serve ``count`` requests that arrive 20 ms apart, and check that all are complete."""
    requests = tuple(Request(0.02 * i, 20 + 7 * i, output_tokens) for i in range(count))
    client = OpenLoopClient(host.engine, Workload("test", requests), vocab_size=256, seed=0)
    host.run(client.run(clock_zero))
    assert [record.error for record in client.records] == [""] * count
    return client


def steps_of(host: Any) -> list[StepRecord]:
    return [StepRecord(*row) for row in host.command("drain")["steps"]]


async def prompt_logprobs(engine: Any, tokens: list[int], lora: Any) -> list[float]:
    """Log-probability of each token after the first, teacher-forced."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    async for output in engine.generate({"prompt_token_ids": tokens}, params, "logprobs", lora_request=lora):
        final = output
    return [entry[token].logprob for token, entry in zip(tokens[1:], final.prompt_logprobs[1:], strict=True)]


def test_the_adapter_means_the_same_in_vllm_and_peft(host: Any, data: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from vllm.lora.request import LoRARequest

    started = finetune(
        host, data, tmp_path, updates=12, learning_rate=5e-3, warmup_updates=0, lora=LoraSettings(rank=8)
    )
    assert started["shared_bytes"] == started["base_bytes"] > 0
    begin(host, "static", CONSERVING)
    wait_for(host, lambda status: not status["training"])
    host.command("finish")
    status = wait_for(host, lambda status: status["ended"])
    assert (status["finetune_failure"], status["saved"]) == ("", True)
    assert len(host.command("drain")["updates"]) == 12
    folder = tmp_path / "adapter"

    base = AutoModelForCausalLM.from_pretrained(resolve_model("tiny"), dtype=torch.float32)
    tokens = torch.tensor([PROMPT])

    def reference(model: Any) -> torch.Tensor:
        with torch.no_grad():
            logprobs = torch.log_softmax(model(tokens).logits[0], dim=-1)
        return logprobs[:-1].gather(1, tokens[0, 1:, None])[:, 0]

    without = reference(base)
    with_adapter = reference(PeftModel.from_pretrained(base, folder))
    assert (with_adapter - without).abs().max() > 0.1
    served = host.run(prompt_logprobs(host.engine, PROMPT, LoRARequest("adapter", 1, str(folder))))
    torch.testing.assert_close(torch.tensor(served), with_adapter, rtol=1e-3, atol=1e-3)


def test_finetuning_runs_beside_requests_and_while_idle(host: Any, data: Path) -> None:
    finetune(host, data)
    zero = begin(host, "static", CONSERVING)
    serve(host, count=16, output_tokens=60, clock_zero=zero)
    served_until = time.monotonic() - zero
    time.sleep(2.0)
    rows = host.command("drain")
    host.command("finish")
    wait_for(host, lambda status: status["ended"])
    steps = [StepRecord(*row) for row in rows["steps"]]
    updates = [UpdateRecord(*row) for row in rows["updates"]]
    assert max(step.batch for step in steps) > 1
    assert sum(step.finetune_tokens for step in steps) > 0
    assert updates[-1].time_s > served_until
    assert all(update.loss > 0 and update.tokens > 0 for update in updates)
    assert {(step.decode_units, step.finetune_units) for step in steps if step.finetune_units} == {(1, 1)}


def test_client_and_engine_agree_on_the_time_between_tokens(host: Any, record_property: Any) -> None:
    zero = begin(host, "separate")
    client = serve(host, count=8, output_tokens=120, clock_zero=zero)
    gaps = [step.gap_ms for step in steps_of(host) if step.batch == 8 and not step.admitted]
    seen = [gap for record in client.records for gap in record.itl_ms[-len(gaps) :]]
    ratio = median(seen) / median(gaps)
    record_property("client ITL over engine gap, medians", round(ratio, 4))
    print(f"median ITL at the client is {ratio:.3f} times the engine's gap")  # noqa: T201
    assert len(gaps) > 50
    assert ratio == pytest.approx(1.0, abs=0.1)


def test_no_hook_runs_while_hooks_are_off(host: Any) -> None:
    begin(host, "separate")
    host.command("set_hooks", False)
    serve(host, count=2)
    assert steps_of(host) == []
    host.command("set_hooks", True)
    serve(host, count=2)
    assert len(steps_of(host)) >= 40


# Faults: each stops finetuning with one line, and every request completes.


def raising(worker: Any) -> None:
    def run_unit(unit: Any, units: int) -> None:
        raise RuntimeError("injected\nfault")

    worker._session.trainer._run_unit = run_unit


def not_finite(worker: Any) -> None:
    for name, parameter in worker._session.trainer._job.model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(float("nan"))


def ending_the_thread(worker: Any) -> None:
    def run_unit(unit: Any, units: int) -> None:
        raise SystemExit

    worker._session.trainer._run_unit = run_unit


def stalling(worker: Any) -> None:
    worker.stall = threading.Event()

    def run_unit(unit: Any, units: int) -> None:
        worker.stall.wait()

    worker._session.trainer._run_unit = run_unit


def end_of_job(worker: Any) -> bool:
    """Let the unit end if it stalls; what it has borrowed comes back only then."""
    if hasattr(worker, "stall"):
        worker.stall.set()
    worker._session.trainer.join(PATIENCE_S)
    return bool(worker._session.loan.vacated)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (raising, "RuntimeError: injected"),
        (not_finite, "NonFiniteLoss: the loss became nan"),
        (ending_the_thread, "SystemExit"),
        (stalling, "has been running for more than"),
    ],
)
def test_a_fault_in_finetuning_harms_no_request(
    host: Any, data: Path, fault: Callable[[Any], None], reason: str
) -> None:
    finetune(host, data)
    begin(host, "static", CONSERVING)
    host.call_worker(fault)
    serve(host, count=6, output_tokens=30)
    status = wait_for(host, lambda status: bool(status["finetune_failure"]))
    assert reason in status["finetune_failure"]
    assert "\n" not in status["finetune_failure"]
    assert not status["training"]
    host.command("finish")
    serve(host, count=6, output_tokens=30)
    assert steps_of(host)[-1].decode_units == 2  # decode has the whole device again
    assert host.call_worker(end_of_job)


def test_a_failing_policy_is_switched_off(host: Any, data: Path, tmp_path: Path) -> None:
    source = tmp_path / "broken.py"
    source.write_text(
        "from harli.types import Decision, Share\n"
        "from policies.base import Policy\n"
        "class Broken(Policy):\n"
        "    def decide(self, decode, finetune):\n"
        "        return Decision(Share(7, 7))\n"
    )
    finetune(host, data)
    begin(host, f"{source}:Broken")
    serve(host, count=4)
    status = host.command("status")
    assert "Broken" in status["policy_failure"]
    assert "7/7" in status["policy_failure"]
    host.command("finish")
    wait_for(host, lambda status: bool(status["ended"]))


def test_an_unknown_policy_is_refused_and_the_engine_goes_on(host: Any) -> None:
    with pytest.raises(HarliError, match="no policy is called 'statik'; did you mean 'static'"):
        begin(host, "statik")
    serve(host, count=2)


def test_the_engine_process_is_out_of_reach_of_the_terminals_interrupt(host: Any) -> None:
    def group(worker: Any) -> int:
        return os.getpgid(0)

    assert host.call_worker(group) != os.getpgid(0)
