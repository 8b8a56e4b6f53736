"""Routes of files and jobs over HTTP, without an engine: sizes, paths, forms, keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from harli.serve import files as files_module
from harli.serve import jobs_api
from harli.serve.authenticate import RequireKey
from harli.serve.files import FileFolder
from harli.serve.jobs import Status
from harli.serve.store import Store
from tests.serve.routes import MAX_BYTES, Client, kept
from tests.serve.server_process import sums


def test_a_file_comes_back_as_it_was_sent_until_it_is_deleted(client: Client, tmp_path: Path) -> None:
    content = sums(20)
    file = client.upload(content).json()
    assert (file["bytes"], file["filename"], file["purpose"]) == (len(content), "data.jsonl", "fine-tune")
    assert client("GET", f"/v1/files/{file['id']}").json() == file
    assert client("GET", "/v1/files").json()["data"] == [file]
    assert client("GET", f"/v1/files/{file['id']}/content").content == content
    assert client("DELETE", f"/v1/files/{file['id']}").json()["deleted"]
    assert client("GET", f"/v1/files/{file['id']}").status_code == 404
    assert kept(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b'{"text": "a"}\nnot json\n', "data.jsonl:2:"),
        (b'{"text": "a"}\n{"txt": "b"}\n', "data.jsonl:2: a line must be"),
        (b'{"text": "\xff"}\n', "data.jsonl:1: not UTF-8"),
    ],
)
def test_what_is_not_finetuning_data_is_refused_with_its_line(
    client: Client, tmp_path: Path, content: bytes, reason: str
) -> None:
    answer = client.upload(content)
    assert answer.status_code == 400
    assert reason in answer.json()["detail"]
    assert str(tmp_path) not in answer.text
    assert kept(tmp_path) == []


def test_a_body_that_is_too_large_is_refused_before_it_is_read_whole(client: Client, tmp_path: Path) -> None:
    sent = 0

    async def endless() -> Any:
        nonlocal sent
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        while True:
            sent += 4096
            yield b"x" * 4096

    answer = client("POST", "/v1/files", content=endless(), headers={"Content-Type": "multipart/form-data; boundary=b"})
    assert answer.status_code == 413
    assert sent <= MAX_BYTES + 8192
    assert kept(tmp_path) == []


def test_a_name_with_a_path_is_kept_as_a_name_only(client: Client, tmp_path: Path) -> None:
    file = client.upload(sums(10), name="../../../outside.jsonl").json()
    assert kept(tmp_path) == [file["id"]]
    for id_ in ("..%2Fjobs.sqlite", "%2Fetc%2Fpasswd", "."):
        assert client("GET", f"/v1/files/{id_}/content").status_code == 404
        assert client("DELETE", f"/v1/files/{id_}").status_code in (404, 405)
    assert (tmp_path / "jobs.sqlite").exists()


def test_other_purposes_and_missing_files_are_refused(client: Client) -> None:
    assert "purpose" in client.upload(sums(10), purpose="batch").json()["detail"]
    answer = client("POST", "/v1/files", data={"purpose": "fine-tune"}, files={"other": ("a", b"b")})
    assert "no file called 'file'" in answer.json()["detail"]


def test_there_is_an_end_to_files_and_jobs(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_api, "MAX_UNFINISHED", 2)
    assert [client.create().status_code for _ in range(3)] == [200, 200, 400]
    monkeypatch.setattr(files_module, "MAX_FILES", 3)
    assert "delete some first" in client.upload(sums(10)).json()["detail"]


def test_a_jobs_way_over_http(client: Client, store: Store) -> None:
    job = client.create(suffix="a-b", metadata={"who": "me"}, harli={"priority": 2, "lora_rank": 4}).json()
    assert (job["status"], job["metadata"], job["harli"]["priority"]) == ("validating_files", {"who": "me"}, 2)
    path = f"/v1/fine_tuning/jobs/{job['id']}"
    assert client("POST", f"{path}/pause").status_code == 400
    store.move(job["id"], Status.QUEUED)
    assert client("POST", f"{path}/pause").json()["status"] == "paused"
    assert client("POST", f"{path}/resume").json()["status"] == "queued"
    assert client("POST", f"{path}/cancel").json()["status"] == "cancelled"
    assert client("POST", f"{path}/resume").status_code == 400
    messages = [event["message"] for event in client("GET", f"{path}/events").json()["data"]]
    assert messages == ["job cancelled", "job queued", "job paused", "job queued", "job created"]
    assert client("GET", f"{path}/checkpoints").json()["data"] == []
    assert client("GET", "/v1/fine_tuning/jobs/ftjob-0").status_code == 404


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"training_file": "file-0"},
        {"validation_file": "file-0"},
        {"harli": {"lora_rank": 17}},
        {"harli": {"lora_rang": 4}},
        {"suffix": "a/b"},
        {"method": {"type": "dpo"}},
        {"hyperparameters": {"n_epochs": 0}},
        {"metadata": {"key": "x" * 513}},
        {"unknown": 1},
    ],
)
def test_an_impossible_job_is_refused(client: Client, store: Store, change: dict[str, Any]) -> None:
    assert client.create(**change).status_code in (400, 422)
    assert store.count_unfinished() == 0


def test_what_openais_client_may_leave_empty_is_accepted(client: Client) -> None:
    job = client.create(seed=None, integrations=[], method={"type": "supervised"}, hyperparameters={"n_epochs": 7})
    assert (job.status_code, job.json()["seed"]) == (200, 0)
    assert job.json()["method"]["supervised"]["hyperparameters"]["n_epochs"] == 7


def test_a_job_that_is_cancelled_before_its_turn_leaves_nothing_on_disk(
    client: Client, store: Store, tmp_path: Path
) -> None:
    job = client.create().json()["id"]
    store.move(job, Status.QUEUED)
    folder = tmp_path / "jobs" / job
    folder.mkdir(parents=True)
    (folder / "training.jsonl").write_bytes(sums(10))
    client("POST", f"/v1/fine_tuning/jobs/{job}/cancel")
    assert not folder.exists()


def test_a_file_that_no_row_knows_is_dropped_at_the_start(client: Client, store: Store, tmp_path: Path) -> None:
    file = client.upload(sums(10)).json()["id"]
    (tmp_path / "files" / "file-unknown").write_bytes(sums(10))
    FileFolder(tmp_path / "files", store)
    assert kept(tmp_path) == [file]


def test_every_route_but_probes_wants_a_key() -> None:
    app = FastAPI()
    app.add_api_route("/health", lambda: "well")
    app.add_api_route("/v1/models", lambda: "models")
    guarded = Client(RequireKey(app, ["first", "second"]))
    assert guarded("GET", "/health").status_code == 200
    for given, status in (("Bearer first", 200), ("bearer second", 200), ("Bearer third", 401), ("first", 401)):
        assert guarded("GET", "/v1/models", headers={"Authorization": given}).status_code == status
    assert guarded("GET", "/v1/models").status_code == 401
    assert guarded("OPTIONS", "/v1/models").status_code == 405  # a browser's preflight, which the app answers
