"""A ``harli serve`` of a benchmark's own: started and ended as a user does, its memory in view."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

LOG_LINES = 20
"""Of a server that did not start, to be shown."""


class ServerProcess:
    """Its log, files, jobs and adapters are in ``folder``."""

    def __init__(self, folder: Path, flags: Sequence[str]) -> None:
        """``flags``: of ``harli serve``; port and key are chosen here."""
        self.key = secrets.token_hex(16)
        self.state = folder / "state"
        self._log = folder / "log"
        self.command = ["harli", "serve", "--state", str(self.state), "--port", "0", "--disable-uvicorn-access-log"]
        self.command += flags
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *self.command],
                env=os.environ | {"VLLM_API_KEY": self.key},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the benchmark alone, which then ends the server
            )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def address(self) -> str:
        """Where it serves (``http://127.0.0.1:40123``), once it does. Exits with its log if it does not start."""
        while self.alive:
            for line in self._log.read_text(errors="replace").splitlines():
                if "serving on " in line:
                    return line.split("serving on ")[1].strip()
            time.sleep(0.5)
        last = self._log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        sys.exit("the server did not start:\n" + "\n".join(last))

    def resident_mib(self) -> float:
        """Resident memory of the process and all its children; pages that they share count in each."""
        total = 0
        with suppress(psutil.NoSuchProcess):
            main = psutil.Process(self._process.pid)
            for process in (main, *main.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    total += process.memory_info().rss
        return total / 2**20

    def end(self) -> int:
        """The exit code."""
        if self.alive:
            self._process.terminate()
        return self._process.wait()


@contextmanager
def serving(folder: Path, flags: Sequence[str]) -> Iterator[ServerProcess]:
    """A server, which is ended with the block, also if the benchmark is told to end by Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    server = ServerProcess(folder, flags)
    try:
        yield server
    finally:
        server.end()
