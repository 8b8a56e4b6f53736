"""What clients, files and other processes do to a server that serves and trains."""

from __future__ import annotations

import asyncio
import io
import sqlite3
import subprocess
import sys
import zipfile
from contextlib import closing

import httpx
import openai
import pytest

from harli.finetune.dataset import MAX_LINE_BYTES
from tests.chaos.harness import STREAMS, TOKENS, all_answered, goes_on, training_job, until
from tests.serve.server_process import KEY, Server, sums
from tests.serve.test_server import PROMPT, complete_text, upload

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

STORM = 300
LEAVING = 20
LONG = 480


def total(server: Server, name: str) -> float:
    """A metric of vLLM, summed over its labels."""
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{"))


def test_a_storm_of_requests_is_answered_to_the_last(server: Server) -> None:
    expected = complete_text(server, "tiny", tokens=8)

    async def storm() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
            ask = client.completions.create
            calls = [ask(model="tiny", prompt=PROMPT, max_tokens=8, temperature=0.0) for _ in range(STORM)]
            return [answer.choices[0].text for answer in await asyncio.gather(*calls)]

    with all_answered(server):
        job = training_job(server)
        assert asyncio.run(storm()) == [expected] * STORM
        goes_on(server, job)
    server.client.fine_tuning.jobs.cancel(job)


def test_clients_that_leave_in_the_middle_of_a_stream_cost_nothing_more(server: Server) -> None:
    with all_answered(server) as load:
        job = training_job(server)
        generated, answered = total(server, "vllm:generation_tokens_total"), len(load.answers_s)
        for _ in range(LEAVING):
            stream = server.client.completions.create(
                model="tiny", prompt=PROMPT, max_tokens=LONG, stream=True, extra_body={"ignore_eos": True}
            )
            next(iter(stream))
            stream.close()
        until(lambda: total(server, "vllm:num_requests_running") <= STREAMS)
        others = (len(load.answers_s) - answered + STREAMS) * TOKENS
        assert total(server, "vllm:generation_tokens_total") - generated - others < LEAVING * LONG / 2
        goes_on(server, job)
    server.client.fine_tuning.jobs.cancel(job)


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data.jsonl", sums(20))
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(b'{"text": "' + b"a" * MAX_LINE_BYTES + b'"}', "data.jsonl:1: the line is longer", id="huge line"),
        pytest.param(b'{"text": ' + b"[" * 100_000, "data.jsonl:1:", id="deep"),
        pytest.param(b'{"messages": ' + b'[{"a": ' * 50_000, "data.jsonl:1:", id="deep messages"),
        pytest.param(sums(3) + b'{"text": "\xff\xfe"}', "data.jsonl:4: not UTF-8", id="invalid UTF-8"),
        pytest.param(b'{"text": "\\ud800"}', "data.jsonl:1:", id="half a character"),
        pytest.param(sums(3).decode().encode("utf-16"), "data.jsonl:1: not UTF-8", id="UTF-16"),
        pytest.param(b"\x00" * 4096, "data.jsonl:1:", id="zeros"),
        pytest.param(zipped(), "data.jsonl:1:", id="archive"),
        pytest.param(b"\n" * 4096, "is empty", id="nothing"),
    ],
)
def test_a_hostile_file_is_refused_with_its_line(server: Server, content: bytes, reason: str) -> None:
    with all_answered(server), pytest.raises(openai.BadRequestError) as refused:
        upload(server, content)
    detail = refused.value.response.json()["error"]["message"]
    assert reason in detail
    assert "\n" not in detail
    assert str(server.state) not in detail
    assert kept(server) == known(server)


def kept(server: Server) -> set[str]:
    return {path.name for path in (server.state / "files").iterdir()}


def known(server: Server) -> set[str]:
    return {file.id for file in server.client.files.list()}


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "..", "a\x00b", "\udcff", "x" * 10_000])
def test_a_hostile_name_stays_a_name(server: Server, name: str) -> None:
    with all_answered(server):
        body = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        body += b'--b\r\nContent-Disposition: form-data; name="file"; filename="'
        body += name.encode(errors="surrogateescape") + b'"\r\n\r\n' + sums(10) + b"\r\n--b--\r\n"
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "multipart/form-data; boundary=b"}
        answer = httpx.post(f"{server.url}/v1/files", content=body, headers=headers)
        assert answer.status_code < 500
    assert kept(server) == known(server)


def test_a_hostile_body_of_a_job_is_refused(server: Server) -> None:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    with all_answered(server):
        for body in (b'{"model": ' * 100_000, b"\xff", b'{"model": "tiny", "training_file": "../jobs.sqlite"}'):
            answer = httpx.post(f"{server.url}/v1/fine_tuning/jobs", content=body, headers=headers)
            assert 400 <= answer.status_code < 500


def test_a_second_server_on_the_same_folder_ends_with_a_line_and_the_first_serves_on(server: Server) -> None:
    command = [sys.executable, "-m", "harli", "serve", "--config", "serve.yaml", "--state", str(server.state)]
    command += ["--port", "0"]
    with all_answered(server), closing(sqlite3.connect(server.state / "jobs.sqlite", timeout=0.1)) as other:
        job = training_job(server)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("DELETE FROM jobs")
        second = subprocess.run(command, cwd=server.folder, capture_output=True, text=True, check=False)
        lines = [line for line in second.stderr.splitlines() if line.startswith("harli: ")]
        assert second.returncode == 2, second.stderr
        assert len(lines) == 1
        assert "is another server using it?" in lines[0]
        assert "Traceback" not in second.stderr
        goes_on(server, job)
    server.client.fine_tuning.jobs.cancel(job)
