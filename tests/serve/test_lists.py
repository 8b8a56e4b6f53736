"""Lists and single objects as OpenAI's client asks for them: pages, filters, orders, what there is not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from pydantic import BaseModel

from harli.finetune import checkpoint
from harli.serve.models_api import models_router
from harli.serve.store import Store
from tests.serve.routes import Client
from tests.serve.server_process import sums


def ids(page: Any) -> list[str]:
    return [item["id"] for item in page.json()["data"]]


@pytest.fixture
def files(client: Client) -> list[str]:
    """The oldest first."""
    return [client.upload(sums(10)).json()["id"] for _ in range(5)]


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_files_are_deleted_page_by_page(client: Client, files: list[str], order: str) -> None:
    query: dict[str, Any] = {"limit": 2, "order": order}
    deleted = []
    while True:
        page = client("GET", "/v1/files", params=query)
        for id_ in ids(page):
            client("DELETE", f"/v1/files/{id_}")
            deleted.append(id_)
        if not page.json()["has_more"]:
            break
        query["after"] = page.json()["last_id"]
    assert deleted == (files if order == "asc" else files[::-1])


def test_files_are_listed_in_the_order_and_for_the_purpose_asked_for(client: Client, files: list[str]) -> None:
    assert ids(client("GET", "/v1/files")) == files[::-1]
    assert ids(client("GET", "/v1/files", params={"order": "asc", "limit": 2})) == files[:2]
    assert ids(client("GET", "/v1/files", params={"purpose": "fine-tune"})) == files[::-1]
    assert ids(client("GET", "/v1/files", params={"purpose": "batch"})) == []
    assert client("GET", "/v1/files", params={"order": "any"}).status_code == 422


def test_jobs_are_listed_by_their_metadata(client: Client) -> None:
    job = client.create(metadata={"who": "me", "why": "a test"}).json()["id"]
    client.create(metadata={"who": "you"})
    path = "/v1/fine_tuning/jobs"
    assert ids(client("GET", path, params={"metadata[who]": "me"})) == [job]
    assert ids(client("GET", path, params={"metadata[who]": "you", "metadata[why]": "a test"})) == []
    assert len(ids(client("GET", path))) == 2


def test_a_page_after_what_never_was_is_not_found(client: Client) -> None:
    job = f"/v1/fine_tuning/jobs/{client.create().json()['id']}"
    for path, after in (
        ("/v1/files", "file-0"),
        ("/v1/fine_tuning/jobs", "ftjob-0"),
        (f"{job}/events", "ftevent-x"),
        (f"{job}/events", "ftevent-" + "9" * 30),
        (f"{job}/checkpoints", "ftckpt-x"),
    ):
        answer = client("GET", path, params={"after": after})
        assert (answer.status_code, after in answer.json()["detail"]) == (404, True)


def test_checkpoints_are_listed_page_by_page(client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = client.create().json()["id"]
    names = [f"update-{number:06d}" for number in (9, 999_990, 1_000_000)]
    for name in names:
        (tmp_path / "jobs" / job / "checkpoints" / name).mkdir(parents=True)
    monkeypatch.setattr(checkpoint, "complete", lambda folder: [folder / name for name in names])
    query: dict[str, Any] = {"limit": 1}
    found = []
    for _ in names:
        page = client("GET", f"/v1/fine_tuning/jobs/{job}/checkpoints", params=query).json()
        found.append(page["data"][0]["step_number"])
        query["after"] = page["data"][0]["id"]
    assert (found, page["has_more"]) == ([1_000_000, 999_990, 9], False)


def test_a_checkpoint_that_goes_while_they_are_listed_is_left_out(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = client.create().json()["id"]
    (tmp_path / "jobs" / job / "checkpoints" / "update-000002").mkdir(parents=True)
    monkeypatch.setattr(checkpoint, "complete", lambda folder: [folder / f"update-00000{n}" for n in (1, 2)])
    listed = client("GET", f"/v1/fine_tuning/jobs/{job}/checkpoints").json()["data"]
    assert [one["step_number"] for one in listed] == [2]


def test_a_model_is_found_by_its_name(store: Store) -> None:
    class Card(BaseModel):
        id: str
        object: str = "model"

    async def show_available_models() -> SimpleNamespace:
        return SimpleNamespace(data=[Card(id="tiny"), Card(id="ft:tiny:a/b:1")])

    app = FastAPI()
    app.state.openai_serving_models = SimpleNamespace(show_available_models=show_available_models)
    app.include_router(models_router(SimpleNamespace(), store))
    client = Client(app)
    for name in ("tiny", "ft:tiny:a/b:1"):
        assert client("GET", f"/v1/models/{name}").json() == {"id": name, "object": "model"}
    assert client("GET", "/v1/models/ft:tiny::2").status_code == 404
