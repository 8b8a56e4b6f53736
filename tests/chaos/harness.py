"""Faults switched on and off, the requests that must not notice, and the jobs that do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai

from harli.finetune.checkpoint import PREFIX, complete
from tests.serve.server_process import KEY, Server, sums
from tests.serve.test_server import MANY, PROMPT, complete_text, create, updates, upload, wait_for

STREAMS = 3
TOKENS = 24


def until(condition: Callable[[], object]) -> None:
    while not condition():
        time.sleep(0.05)


@contextmanager
def fault(server: Server, name: str) -> Iterator[Path]:
    """Inside, there is the fault of this name in ``inject/sitecustomize.py``, or until it removes its file itself."""
    file = server.folder / "faults" / name
    file.touch()
    try:
        yield file
    finally:
        file.unlink(missing_ok=True)


class Load:
    """Keeps ``STREAMS`` streaming requests in flight; a stream ends with the first that fails."""

    def __init__(self, server: Server) -> None:
        self.answers_s: list[float] = []
        """How long each request took that was answered as it is without any fault."""
        self.failures: list[str] = []
        self.wrong: list[str] = []
        """Answers that look complete and are others."""
        self._client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
        self._expected = complete_text(server, "tiny", tokens=TOKENS)
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._keep_asking) for _ in range(STREAMS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    def more(self, answers: int) -> None:
        """Wait for this many more answers, or a stream's end."""
        target = len(self.answers_s) + answers
        until(lambda: len(self.answers_s) >= target or self.failures or self.wrong)

    def _keep_asking(self) -> None:
        while not self._end.is_set():
            began = time.monotonic()
            try:
                text = self._ask()
            except Exception as error:
                self.failures.append(repr(error))
                return
            if text != self._expected:
                self.wrong.append(f"{text!r} instead of {self._expected!r}")
                return
            self.answers_s.append(time.monotonic() - began)

    def _ask(self) -> str:
        stream = self._client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=TOKENS, temperature=0.0, stream=True
        )
        return "".join(part.choices[0].text for part in stream)


@contextmanager
def all_answered(server: Server) -> Iterator[Load]:
    """Requests are in flight before, during and after what happens inside; each is answered, and rightly."""
    with Load(server) as load:
        load.more(2 * STREAMS)
        yield load
        load.more(2 * STREAMS)
    assert (load.failures, load.wrong) == ([], [])


def training_job(server: Server, **more: Any) -> str:
    """A new job that goes on for long and has made updates."""
    job = create(server, upload(server, sums(20)), MANY, **more)
    wait_for(server, job, lambda present: updates(present) > 0)
    return job


def goes_on(server: Server, job: str, count: int = 3) -> None:
    """Wait for ``count`` more updates of a job."""
    before = updates(server.client.fine_tuning.jobs.retrieve(job))
    wait_for(server, job, lambda present: updates(present) >= before + count)


def events(server: Server, job: str) -> list[Any]:
    """The oldest first."""
    newest_first = server.client.fine_tuning.jobs.list_events(job, limit=1000)
    return list(newest_first)[::-1]


def steps(server: Server, job: str) -> list[int]:
    """The updates that a job has made, in the order in which it made them."""
    return [event.data["step"] for event in events(server, job) if event.data and "step" in event.data]


def saved(server: Server, job: str) -> list[int]:
    """The updates of which a job has checkpoints."""
    folder = server.state / "jobs" / job / "checkpoints"
    return [int(path.name.removeprefix(PREFIX)) for path in complete(folder)]
