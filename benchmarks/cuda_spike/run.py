"""First measurements on a GPU: do SM splits, graphs per split and stream-ordered windows do what Harli needs?

Not yet run on a GPU. Every part runs in a process of its own and is written down as it goes, so one that
fails or hangs costs no other's numbers:

- contexts: SMs granted to each part, matrix speed on each of them, cost of a switch
- units: a layer's forward and backward on each finetune share, eager and captured, with equal gradients
- window: decode, units on the whole device, decode again, ordered by the streams alone
- decode: vLLM with a set of decode graphs per split, chosen anew before every step under asynchronous
  scheduling; then decode and units on three splits, alone and together

    python benchmarks/cuda_spike/run.py --out benchmarks/results/cuda_spike.json

takes about ten minutes. The model is shaped like Llama-3-8B, with random weights: nothing is downloaded.
On a machine without a network that has PyTorch 2.11 for CUDA 13, unpack wheels of vLLM 0.26 and of what
it lacks there into a folder SITE, and run from the repository's root with ``PYTHONPATH=$PWD:SITE``.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

TIME_LIMIT_S = {"contexts": 90.0, "units": 150.0, "window": 120.0, "decode": 420.0}
"""Of each part, a module of this folder whose `measure` fills a dictionary and yields when there is something new."""


def main(
    out: Annotated[Path, typer.Option(help="JSON file for the numbers")],
    part: Annotated[str, typer.Option(help="run this part only, in this process")] = "",
) -> None:
    if part:
        result: dict[str, Any] = {}
        try:
            for _ in import_module(part).measure(result):
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


if __name__ == "__main__":
    typer.run(main)
