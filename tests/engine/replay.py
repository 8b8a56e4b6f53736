"""Serves the same requests three times, arrivals fixed to engine steps: twice without finetuning, once with it.

Run as a program in an environment from ``harli.engine.launch.prepare_environment``, since the engine
then lives in this process. Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from harli.config import EngineSettings, FinetuneSettings
from harli.engine.launch import engine_arguments, prepare_environment
from harli.runtime import session
from harli.types import DecodeState

REQUESTS = 18
ARRIVALS_EVERY = 6
OUTPUT_TOKENS = 48


def main(model: str, dtype: str, data: str) -> dict[str, Any]:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    settings = EngineSettings(model=model, role="mixed", dtype=dtype, max_num_seqs=12, max_model_len=512)
    arguments = engine_arguments(settings) | {
        "enable_prefix_caching": False,
        "block_size": 32,
        "num_gpu_blocks_override": 40,  # too few for the batch, so that requests are preempted
    }
    engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
    scheduler = engine.engine_core.engine_core.scheduler
    check = TrackerCheck(scheduler)
    runs = [serve(engine, data if finetuning else None, check) for finetuning in (False, False, True)]
    return {
        "runs": runs,
        "tracker_mismatches": check.mismatches[:5],
        "states_checked": check.checked,
        "preemptions": check.preemptions,
    }


def serve(engine: Any, data: str | None, check: TrackerCheck) -> dict[str, Any]:
    """One pass; tokens and log-probabilities of every request, and the updates done beside."""
    from vllm import SamplingParams

    command = engine.engine_core.engine_core.model_executor.driver_worker.worker.harli
    if data is not None:
        command("finetune", FinetuneSettings(data=Path(data), microbatch_tokens=64).model_dump_json(), None, None)
    began = command("begin", "static" if data else "separate", {}, {"itl_ms": None, "tpot_ms": 50.0}, 0)
    assert "error" not in began, began
    check.install()
    rng = np.random.default_rng(0)
    outputs: dict[str, Any] = {}
    params = SamplingParams(
        max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True, logprobs=0, prompt_logprobs=0, detokenize=False
    )
    step = sent = 0
    while sent < REQUESTS or engine.has_unfinished_requests():
        while sent < REQUESTS and sent * ARRIVALS_EVERY <= step * 2:
            prompt = rng.integers(3, 250, size=int(rng.integers(5, 150))).tolist()
            engine.add_request(f"request-{sent}", {"prompt_token_ids": prompt}, params)
            sent += 1
        for output in engine.step():
            if output.finished:
                outputs[output.request_id] = output
        step += 1
    status = command("status")
    if data is not None:
        trainer = session.current().trainer
        assert trainer is not None
        command("finish")
        trainer.join(30)
    keys = sorted(outputs)
    return {
        "tokens": [list(outputs[key].outputs[0].token_ids) for key in keys],
        "logprobs": [
            [
                entry[token].logprob
                for token, entry in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
            ]
            for output in (outputs[key] for key in keys)
        ],
        "finetune_failure": status["finetune_failure"],
        "finetune_steps": sum(row.finetune_units > 0 for row in session.current().controller.rows),
    }


class TrackerCheck:
    """Compares every ``DecodeState`` with a loop over the scheduler's requests."""

    def __init__(self, scheduler: Any) -> None:
        self.mismatches: list[str] = []
        self.checked = self.preemptions = 0
        self._scheduler = scheduler
        self._first_token_s: dict[str, float] = {}
        preempt = scheduler._preempt_request

        def counted(*args: Any, **kwargs: Any) -> None:
            self.preemptions += 1
            preempt(*args, **kwargs)

        scheduler._preempt_request = counted

    def install(self) -> None:
        """Check what the present run's policy is given."""
        current = session.current()
        decide = current.controller.decide
        self._first_token_s.clear()

        def checked(decode: DecodeState, finetune: Any) -> Any:
            self.compare(decode)
            return decide(decode, finetune)

        current.controller.decide = checked  # type: ignore[method-assign]

    def compare(self, state: DecodeState) -> None:
        running = self._scheduler.running
        now = state.time_s
        expected = {
            "batch": len(running),
            "context_sum": sum(request.num_computed_tokens for request in running),
            "context_max": max(request.num_computed_tokens for request in running),
            "waiting": len(self._scheduler.waiting),
        }
        for name, value in expected.items():
            if getattr(state, name) != value:
                self.mismatches.append(f"step {state.step}: {name} is {getattr(state, name)}, should be {value}")
        slack = min(
            (
                self._first_token_s.setdefault(request.request_id, now) + 0.05 * request.num_output_tokens - now
                for request in running
                if request.num_output_tokens
            ),
            default=None,
        )
        # This loop learns of a first token only at the next step, so it sees a little more slack.
        if slack is not None and not -0.3 < state.slack_ms / 1e3 - slack < 0.001:
            self.mismatches.append(f"step {state.step}: slack is {state.slack_ms}, should be {slack * 1e3}")
        self.checked += 1


if __name__ == "__main__":
    prepare_environment()
    print("RESULT " + json.dumps(main(*sys.argv[1:])))  # noqa: T201
