"""First measurements on a GPU: do SM splits, graphs per split and stream-ordered windows do what Harli needs?

Not yet run on a GPU. Every part runs in a process of its own and is written down as it goes, so one that
fails or hangs costs no other's numbers:

- contexts: SMs granted to each part, matrix speed on each of them, cost of a switch
- units: a layer's forward and backward on each finetune share, eager and captured, with equal gradients
- window: decode, units on the whole device, decode again, ordered by the streams alone
- decode: vLLM with a set of decode graphs per split, chosen anew before every step under asynchronous
  scheduling; then decode and units on three splits, alone and together

    python benchmarks/cuda_spike.py --out benchmarks/results/cuda_spike.json

takes about ten minutes. The model is shaped like Llama-3-8B, with random weights: nothing is downloaded.
On a machine without a network that has PyTorch 2.11 for CUDA 13, unpack wheels of vLLM 0.26 and of what
it lacks there into a folder SITE, and run from the repository's root with ``PYTHONPATH=$PWD:SITE``.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
MICROBATCH_TOKENS = 1024
BATCHES = (8, 32, 128)
PROMPT_TOKENS = 512
STEPS = 100
TIME_LIMIT_S = {"contexts": 90.0, "units": 150.0, "window": 120.0, "decode": 420.0}


def main(
    out: Annotated[Path, typer.Option(help="JSON file for the numbers")],
    part: Annotated[str, typer.Option(help="run this part only, in this process")] = "",
) -> None:
    if part:
        result: dict[str, Any] = {}
        try:
            for _ in PARTS[part](result):
                write(out, result)
        except BaseException as error:
            result["error"] = "".join(traceback.format_exception(error))
        write(out, result)
        return
    results: dict[str, Any] = {"python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}
    for name, limit_s in TIME_LIMIT_S.items():
        print(f"{name} ...", flush=True)  # noqa: T201
        results[name] = run_part(name, limit_s)
        write(out, results)
        print(results[name].get("error", "done"), flush=True)  # noqa: T201


def write(out: Path, result: dict[str, Any]) -> None:
    """At once, so that a process that is killed leaves a whole file."""
    unfinished = out.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    unfinished.replace(out)


def run_part(name: str, limit_s: float) -> dict[str, Any]:
    """What a part wrote, and how it ended if not by itself."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "part.json")
        command = [sys.executable, __file__, "--part", name, "--out", str(out)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit_s)
            ended, log = f"exit status {done.returncode}", done.stdout + done.stderr
        except subprocess.TimeoutExpired as expired:
            ended, log = f"stopped after {limit_s:.0f} s", (expired.stderr or b"").decode(errors="replace")
        result: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    if ended != "exit status 0":
        result["error"] = ended
    if "error" in result:
        result["log"] = log[-4000:]
    return result | {"seconds": time.monotonic() - began}


def quantiles(values: Any) -> dict[str, float]:
    """Median, P99 and number of some times."""
    if not len(values):
        return {"count": 0}
    return {"median": float(np.median(values)), "p99": float(np.percentile(values, 99)), "count": len(values)}


def timed_ms(stream: Any, work: Callable[[], object], repeats: int = 20) -> list[float]:
    """Times of ``work`` on ``stream``, by events around each run, after three that are not counted."""
    import torch

    times = []
    with torch.cuda.stream(stream):
        for index in range(repeats + 3):
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            work()
            ended.record()
            ended.synchronize()
            if index >= 3:
                times.append(began.elapsed_time(ended))
    return times


def make_partitioner() -> Any:
    import torch

    from harli.compute.cuda import CudaPartitioner

    torch.cuda.init()
    torch.zeros(1, device="cuda")
    return CudaPartitioner()


class UnitLoop:
    """Two layers of the model with LoRA, run unit by unit as finetuning would; on the calling thread."""

    def __init__(self, partitioner: Any, tokens: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM, LlamaConfig

        from harli.config import LoraSettings
        from harli.finetune.captured import CapturedLayers, cuda_recorder
        from harli.finetune.model import build_model

        self.partitioner = partitioner
        config = LlamaConfig(**{**LLAMA_3_8B, "num_hidden_layers": 2, "vocab_size": 1024})
        with torch.device("cuda"):
            weights = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
        self.model = build_model(config, weights, LoraSettings(rank=16), name="spike", seed=0)
        decoder = self.model.get_base_model().model
        self.layers = list(decoder.layers)
        self.captured = CapturedLayers(self.layers, cuda_recorder())
        self.hidden = torch.randn(1, tokens, config.hidden_size, dtype=torch.bfloat16, device="cuda")
        self.inputs = {
            "attention_mask": torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device="cuda").tril(),
            "position_embeddings": decoder.rotary_emb(self.hidden, torch.arange(tokens, device="cuda")[None]),
        }

    def run_pass(self, units: int) -> dict[str, list[tuple[float, float]]]:
        """Milliseconds of device and of host (submitting alone) of every unit, by kind, on ``units`` SMs."""
        times: dict[str, list[tuple[float, float]]] = {"forward": [], "backward": []}
        self.partitioner.set_finetune(units)
        buffers = self.captured.begin(self.hidden, self.inputs)
        for index in range(len(self.layers)):
            times["forward"].append(self._timed(lambda i=index: self.captured.forward(i, units)))
        buffers.gradient.copy_(self.hidden)
        for index in reversed(range(len(self.layers))):
            times["backward"].append(self._timed(lambda i=index: self.captured.backward(i, units)))
        return times

    def capture(self, units: int) -> None:
        """Let passes on ``units`` SMs, of which there has been one, run from graphs."""
        self.partitioner.set_finetune(units)
        for index in range(len(self.layers)):
            self.captured.capture(index, units)

    def gradients(self) -> list[Any]:
        """A copy of the gradients, which it drops."""
        found = [p.grad.clone() for p in self.model.parameters() if p.grad is not None]
        self.model.zero_grad()
        return found

    def _timed(self, unit: Callable[[], None]) -> tuple[float, float]:
        import torch

        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        submitting = time.perf_counter()
        unit()
        host_ms = (time.perf_counter() - submitting) * 1e3
        ended.record()
        self.partitioner.wait_finetune()
        return began.elapsed_time(ended), host_ms


def measure_contexts(result: dict[str, Any]) -> Iterator[None]:
    import torch

    partitioner = make_partitioner()
    result["device"] = {"name": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    result["shares"] = [str(share) for share in partitioner.menu.shares]
    result["reason"] = partitioner.reason
    left, right = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    torch.cuda.synchronize()
    speeds = result["matrix_tflops"] = {}
    for side, streams in (("decode", partitioner.decode_streams), ("finetune", partitioner.finetune_streams)):
        for units, stream in streams.items():
            times = timed_ms(stream, lambda: left @ right)
            speeds[f"{side} {units}"] = 2 * 8192**3 / float(np.median(times)) / 1e9
            yield
    partitioner.adopt_decode()
    costs = []
    for units in islice(cycle(partitioner.decode_streams), 4000):
        began = time.perf_counter()
        partitioner.set_decode(units)
        costs.append((time.perf_counter() - began) * 1e6)
    torch.cuda.synchronize()
    result["set_decode_us"] = quantiles(costs[100:])


def measure_units(result: dict[str, Any]) -> Iterator[None]:
    partitioner = make_partitioner()
    partitioner.adopt_finetune()
    loop = UnitLoop(partitioner, MICROBATCH_TOKENS)
    for units in partitioner.finetune_streams:
        eager = loop.run_pass(units)  # sets libraries up
        expected = loop.gradients()
        loop.capture(units)
        loop.run_pass(units)
        found = loop.gradients()
        passes = [loop.run_pass(units) for _ in range(10)]
        loop.gradients()
        result[str(units)] = {
            "gradients_differ_by": max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True)),
            "eager_host_ms": {kind: times[-1][1] for kind, times in eager.items()},
            "failure": loop.captured.failure,
        } | {
            f"{kind}_{what}_ms": quantiles([times[side] for one in passes for times in one[kind]])
            for kind in ("forward", "backward")
            for side, what in enumerate(("device", "host"))
        }
        yield


def measure_window(result: dict[str, Any]) -> Iterator[None]:
    """Step, three units, step; the host submits all of it and waits for nothing."""
    import torch

    partitioner = make_partitioner()
    partitioner.adopt_finetune()
    loop = UnitLoop(partitioner, MICROBATCH_TOKENS)
    weights = torch.randn(1 << 30, dtype=torch.bfloat16, device="cuda")  # 2 GiB to read: a step bound by memory
    units = partitioner.units
    decoding = partitioner.decode_streams[units]
    loop.run_pass(units)
    loop.capture(units)
    rows = []
    for _ in range(20):
        torch.cuda.synchronize()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(6)]
        began = time.perf_counter()
        marks[0].record(decoding)
        with torch.cuda.stream(decoding):
            weights.sum()
        marks[1].record(decoding)
        partitioner.set_finetune(units)
        marks[2].record()
        for _ in range(3):
            loop.captured.forward(0, units)
        marks[3].record()
        partitioner.decode_after_finetune()
        marks[4].record(decoding)
        with torch.cuda.stream(decoding):
            weights.sum()
        marks[5].record(decoding)
        submitted_ms = (time.perf_counter() - began) * 1e3
        torch.cuda.synchronize()
        rows.append([submitted_ms, *(a.elapsed_time(b) for a, b in pairwise(marks))])
    names = ("submitting", "step", "to window", "window", "to step", "step after")
    result["ms"] = {name: quantiles(column) for name, column in zip(names, np.array(rows).T, strict=True)}
    result["in order"] = bool((np.array(rows)[:, 1:] >= 0.0).all())
    yield


def measure_decode(result: dict[str, Any]) -> Iterator[None]:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(LLAMA_3_8B))
        engine = LLM(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            worker_cls="cuda_spike_worker.SpikeWorker",
            async_scheduling=True,
            max_model_len=2048,
            max_num_seqs=max(BATCHES),
            gpu_memory_utilization=0.5,
            enable_prefix_caching=False,
            compilation_config={
                "mode": 0,
                "cudagraph_mode": "FULL_DECODE_ONLY",
                "cudagraph_capture_sizes": list(BATCHES),
            },
        )

    def call(method: str, *args: Any) -> Any:
        return engine.collective_rpc(method, args=args)[0]

    def decode(batch: int, shares: list[int]) -> tuple[list[Any], list[Any]]:
        """Rows of the pure decode steps of ``batch`` requests at ``shares`` in turn, and the tokens made."""
        call("spike_shares", shares)
        params = SamplingParams(max_tokens=STEPS, ignore_eos=True, temperature=0.0, detokenize=False)
        prompts = [{"prompt_token_ids": [7 + index] * PROMPT_TOKENS} for index in range(batch)]
        outputs = engine.generate(prompts, params, use_tqdm=False)
        rows = [row for row in call("spike_take") if row[1] == batch]
        return rows, [list(output.outputs[0].token_ids) for output in outputs]

    about = result["engine"] = call("spike_about")
    yield
    alone, splits = about["units"], [tuple(map(int, share.split("/"))) for share in about["splits"]]
    latencies = result["latency_ms"] = {}
    tokens = {}
    for batch in BATCHES:
        for units in (alone, *(share[0] for share in splits)):
            rows, tokens[units] = decode(batch, [units])
            latencies[f"batch {batch}, {units} SMs"] = quantiles([row[2] for row in rows])
        every = [alone, *(share[0] for share in splits)]
        rows, mixed = decode(batch, every)
        for units in every:
            latencies[f"batch {batch}, {units} SMs, another share every step"] = quantiles(
                [row[2] for row in rows if row[0] == units]
            )
        result[f"requests with equal tokens, batch {batch}"] = {
            str(units): float(np.mean([a == b for a, b in zip(tokens[units], tokens[alone], strict=True)]))
            for units in tokens
        } | {"mixed": float(np.mean([a == b for a, b in zip(mixed, tokens[alone], strict=True)]))}
        yield
    together = result["together"] = {}
    for decode_units, finetune_units in splits[:3]:
        call("spike_finetune", finetune_units)
        time.sleep(1.0)
        row = together[f"{decode_units}/{finetune_units}"] = {"unit_ms alone": quantiles(call("spike_units"))}
        for batch in BATCHES:
            rows, _ = decode(batch, [decode_units])
            row[f"latency_ms, batch {batch}"] = quantiles([times[2] for times in rows])
            row[f"unit_ms, batch {batch}"] = quantiles(call("spike_units"))
            yield
        row["failure"] = call("spike_finetune", 0)


PARTS: dict[str, Callable[[dict[str, Any]], Iterator[None]]] = {
    "contexts": measure_contexts,
    "units": measure_units,
    "window": measure_window,
    "decode": measure_decode,
}
"""Each fills a dictionary and yields when there is something new in it."""

if __name__ == "__main__":
    typer.run(main)
