"""``harli serve`` as a process of its own, as a user starts it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import openai
import psutil
import pytest

KEY = "a key of the tests"
SETTINGS = """\
policy: static
params: {work_conserving: true}
engine: {model: tiny, dtype: float32, max_model_len: 512, max_num_seqs: 8, kv_cache_gib: 0.3}
finetune: {microbatch_tokens: 64, learning_rate: 0.005, warmup_updates: 0, checkpoint_every: 2}
"""


class Server:
    """``harli serve`` on a port of its own choice. With one place for adapters, mixed steps are put to the test."""

    def __init__(self, folder: Path, *flags: str, environment: Mapping[str, str] | None = None) -> None:
        """``environment``: added to that of the tests."""
        self.folder = folder
        self.flags = flags
        self.environment = environment or {}
        self.state = folder / "state"
        (folder / "serve.yaml").write_text(SETTINGS)
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "harli", "serve", "--config", "serve.yaml", "--state", str(self.state)]
        command += ["--port", "0", "--turn-s", "1", "--max-loras", "1", "--disable-uvicorn-access-log", *self.flags]
        self._log: IO[str] = (self.folder / "log").open("a")
        self.process = subprocess.Popen(
            command,
            cwd=self.folder,
            env={**os.environ, **self.environment, "VLLM_API_KEY": KEY},
            stdout=self._log,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stderr is not None
        lines = []
        for line in self.process.stderr:
            lines.append(line)
            if "serving on " in line:
                self.url = line.split("serving on ")[1].strip()
                break
        else:
            pytest.fail("the server did not start:\n" + "".join(lines[-30:]))
        self._drain = subprocess.Popen(["cat"], stdin=self.process.stderr, stdout=self._log)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=5)

    @property
    def log(self) -> str:
        """What it has said since it first served requests."""
        return (self.folder / "log").read_text(errors="replace")

    @property
    def engine(self) -> psutil.Process:
        """vLLM's engine process."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return max(children, key=lambda child: child.memory_info().rss)

    def end(self, with_signal: signal.Signals = signal.SIGTERM) -> int:
        """The exit code."""
        self.process.send_signal(with_signal)
        return self.wait()

    def wait(self) -> int:
        """The exit code, once it has ended."""
        code = self.process.wait()
        self._drain.wait()
        self._log.close()
        return code


def sums(count: int) -> bytes:
    """Samples that a small model can learn the form of."""
    samples = ({"prompt": f"{n} plus {n}?", "completion": f" It is {2 * n}."} for n in range(count))
    return b"".join(json.dumps(sample).encode() + b"\n" for sample in samples)
