"""The experiment on a GPU, from a model's config file alone: one command, resumed by giving it again.

Not yet run on a GPU. The weights are random, which changes no time. Every step is a public command in a
process of its own, with --out as its working directory; what it found is in STEP.json there, with hardware and
versions. A step that fails leaves the others; one that runs out of time is resumed the next time:

- profile: decode alone over batch and context, finetuning alone, and both together (`harli profile`)
- predictor: the models' held-out errors (`harli train-predictor`)
- compare-...: policies side by side, per rate and kind of SLO (`harli compare`)
- correctness: log-probabilities, gradients and shared bytes (`gpu_correctness.py`)
- lending: what borrowed KV blocks gain finetuning (`lending_gain.py`)

    python benchmarks/h200.py --config benchmarks/configs/llama-3-8b.json --out h200/llama-3-8b --minutes 9
    python benchmarks/h200.py --smoke --out /some/folder

The second tries all of it on the built-in model `tiny`, on any machine, in a few minutes; its numbers mean nothing.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console

HERE = Path(__file__).resolve().parent
HARLI = [sys.executable, "-m", "harli"]
POLICIES = "qos,stepwise,timeslice,reactive,static"
PATIENCE_S = 60.0
"""For a step that is told to stop to write down what it has."""
LEAST_S = 60.0
"""No step is begun with less time than this."""


class Plan(NamedTuple):
    """Sizes of the experiment."""

    profile_minutes: float
    search: tuple[str, ...]
    """How long to search the predictor's settings."""
    policies: str
    slos: dict[str, list[str]]
    """By name, flags of `harli compare`."""
    rates: tuple[float, ...]
    """Requests per second."""
    duration_s: int
    rounds: int
    engine: dict[str, str]
    """Flags of the engine and of finetuning, by the commands' names for them."""
    lending: tuple[str, ...]


FULL = Plan(
    profile_minutes=15.0,
    search=("--trials", "40"),
    policies=POLICIES,
    slos={
        "scales": ["--slo-scale", "1.25", "--slo-scale", "1.5", "--slo-scale", "2"],
        "40ms": ["--slo-itl-ms", "40"],
    },
    rates=(4.0, 12.0),
    duration_s=60,
    rounds=3,
    engine={
        "--max-num-seqs": "256",
        "--max-model-len": "4096",
        "--kv-cache-gib": "80",
        "--microbatch-tokens": "1024",
    },
    lending=("--batch", "8"),
)
SMOKE = Plan(
    profile_minutes=0.5,
    search=("--trials", "2"),
    policies="qos,static",
    slos={"scales": ["--slo-scale", "2"]},
    rates=(1.0,),
    duration_s=6,
    rounds=1,
    engine={"--max-num-seqs": "4", "--max-model-len": "512", "--kv-cache-gib": "0.25", "--microbatch-tokens": "128"},
    lending=("--rounds", "1", "--turn-s", "3"),
)


class Step(NamedTuple):
    """One process."""

    name: str
    command: list[str]
    resumed: list[str] | None = None
    """The command that goes on with what an earlier one left; None if it begins anew."""
    needs: str = ""
    """A step that has to be done before."""


def steps(plan: Plan, model: str, trace: Path | None) -> list[Step]:
    """All of the experiment; commands whose folder is there already go on with it.

    ``trace``: its requests, at the rates of the plan; generated ones without it.
    """
    engine = ["--model", model, *(part for pair in plan.engine.items() for part in pair)]
    profile = [*HARLI, "profile", "--quiet", "--json"]
    compare = [*HARLI, "compare", "--quiet", "--json"]
    found = [
        Step(
            "profile",
            [*profile, *engine, "--budget-minutes", str(plan.profile_minutes), "--out", "profile"],
            [*profile, "--resume", "profile"],
        ),
        Step("predictor", [*HARLI, "train-predictor", "profile", "--quiet", "--json", *plan.search], None, "profile"),
        Step("correctness", [sys.executable, str(HERE / "gpu_correctness.py"), "--model", model]),
    ]
    for rate in plan.rates:
        for name, slo in plan.slos.items():
            step = f"compare-{rate:g}-per-s-{name}"
            workload = [*_requests(trace, rate), "--duration", str(plan.duration_s), "--rounds", str(plan.rounds)]
            new = [*compare, "--policies", plan.policies, *engine, *slo, *workload, "--out", step]
            found.append(Step(step, new, [*compare, "--resume", step], "predictor"))
    lending = [sys.executable, str(HERE / "lending_gain.py"), "--model", model, *plan.lending]
    found.append(Step("lending", lending))
    return found


def _requests(trace: Path | None, rate: float) -> list[str]:
    """Flags for ``rate`` requests per second on average."""
    if trace is None:
        return ["--requests-per-s", str(rate)]
    from harli.workload.trace import read_trace

    requests = read_trace(trace).requests
    usual = len(requests) / requests[-1].arrival_s
    return ["--trace", str(trace.absolute()), "--rate-scale", f"{rate / usual:.4g}"]


def make_model(config: Path, folder: Path) -> None:
    """Random weights of the shape that ``config`` (a Hugging Face config.json) gives, unless they are there."""
    import torch
    from transformers import AutoConfig

    from harli.models import write_random_model

    if folder.exists():
        return
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)
    values = json.loads(config.read_text())
    made = AutoConfig.for_model(**values)
    write_random_model(made, unfinished, "cuda" if torch.cuda.is_available() else "cpu")
    torch.cuda.empty_cache()  # the steps' engines want nearly all of it
    unfinished.replace(folder)


def run_step(step: Step, out: Path, limit_s: float) -> dict[str, Any]:
    """Run a step for at most ``limit_s``; how it ended, and what it printed: one JSON value."""
    folder = out / step.name
    if status_of(step.name, out) == "failed":
        shutil.rmtree(folder, ignore_errors=True)
    command = step.resumed if step.resumed and folder.exists() else step.command
    began = time.monotonic()
    with (out / f"{step.name}.log").open("a") as log:
        process = subprocess.Popen(command, cwd=out, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            printed, _ = process.communicate(timeout=limit_s)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.send_signal(signal.SIGINT)
            try:
                printed, _ = process.communicate(timeout=PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                printed, _ = process.communicate()
    status = {0: "done", 130: "unfinished"}.get(process.returncode, "failed")
    if status == "failed" and time.monotonic() - began >= limit_s:
        status = "unfinished"
    return {
        "step": step.name,
        "status": status,
        "exit": process.returncode,
        "seconds": time.monotonic() - began,
        "command": [*command[:1], *(part.replace(str(HERE), "benchmarks") for part in command[1:])],
        "result": _value(printed),
    }


def _value(printed: str) -> Any:
    try:
        return json.loads(printed)
    except ValueError:
        return printed[-2000:]


def status_of(step: str, out: Path) -> str:
    """Of an earlier run; empty without one."""
    file = out / f"{step}.json"
    return str(json.loads(file.read_text())["status"]) if file.exists() else ""


def main(
    out: Annotated[Path, typer.Option(help="Folder for everything; the same one goes on.")],
    config: Annotated[Path, typer.Option(help="Shape of the model.")] = HERE / "configs" / "llama-3-8b.json",
    trace: Annotated[
        Path | None, typer.Option(help="Requests, such as azure_llm_2023_conv.csv.", show_default="generated ones")
    ] = None,
    minutes: Annotated[float, typer.Option(help="Stop after this long; the same command goes on.")] = 600.0,
    only: Annotated[str, typer.Option(help="This step alone.")] = "",
    smoke: Annotated[bool, typer.Option("--smoke", help="Small, on `tiny`, to see that it runs.")] = False,
) -> None:
    """Run what is not done yet, as far as the time goes."""
    from harli.engine.launch import prepare_environment

    end = time.monotonic() + 60 * minutes
    console = Console(stderr=True)
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    model = "tiny" if smoke else str(out / "model")
    if not smoke:
        make_model(config, out / "model")
    prepare_environment()
    from common import hardware

    for step in steps(SMOKE if smoke else FULL, model, trace):
        if (only and step.name != only) or status_of(step.name, out) == "done":
            continue
        if step.needs and status_of(step.needs, out) != "done":
            console.print(f"{step.name}: needs {step.needs}")
            continue
        left_s = end - time.monotonic() - PATIENCE_S
        if left_s < LEAST_S:
            console.print("no time left; the same command goes on")
            return
        result = run_step(step, out, left_s) | {"hardware": hardware()}
        (out / f"{step.name}.json").write_text(json.dumps(result, indent=1) + "\n")
        console.print(f"{step.name}: {result['status']} after {result['seconds']:.0f} s")


if __name__ == "__main__":
    typer.run(main)
