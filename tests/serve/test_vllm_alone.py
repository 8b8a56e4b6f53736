"""vLLM's own server with nothing but flags: the policy is inside."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from harli.compute import openmp
from harli.models import resolve_model

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_policy_runs_inside_vllms_own_server(tmp_path: Path) -> None:
    """It answers a request, and a policy that writes down its decisions was asked for each token."""
    (tmp_path / "noting.py").write_text(
        "from pathlib import Path\n"
        "from harli.types import Decision\n"
        "from policies.base import Policy\n"
        "class Noting(Policy):\n"
        "    def decide(self, decode, finetune):\n"
        f"        with Path({str(tmp_path / 'steps')!r}).open('a') as file:\n"
        "            file.write(f'{decode.batch}\\n')\n"
        "        return Decision(self.context.menu.decode_alone)\n"
    )
    port = free_port()
    policy = {"policy": f"{tmp_path / 'noting.py'}:Noting", "slo": {"itl_ms": 1000.0}}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(resolve_model("tiny"))]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--served-model-name", "tiny"]
    command += ["--max-model-len", "256", "--max-num-seqs", "4", "--kv-cache-memory-bytes", str(64 << 20)]
    command += ["--worker-cls", "harli.engine.worker.HarliWorker"]
    command += ["--scheduler-cls", "harli.engine.scheduler.HarliScheduler"]
    command += ["--additional-config", json.dumps({"harli": policy})]
    environment = os.environ | openmp.environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        while True:
            assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.2)
        body = {"model": "tiny", "prompt": "hello", "max_tokens": 12, "temperature": 0.0, "ignore_eos": True}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=None).json()
        assert answer["usage"]["completion_tokens"] == 12
        assert (tmp_path / "steps").read_text().split() == ["1"] * 12
    finally:
        server.terminate()
        server.wait()
