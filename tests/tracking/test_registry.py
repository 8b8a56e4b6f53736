"""The registry: aliases, promotion, rollback, and finding a predictor's files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from harli.tracking.registry import ARTIFACT, EXPERIMENT, MODEL, Registry, load_predictor_folder, open_registry
from harli.tracking.store import open_store
from harli.types import HarliError


@pytest.fixture
def client(sqlite_uri: str) -> MlflowClient:
    """A client of a store in which nothing is registered."""
    client = MlflowClient(sqlite_uri)
    if client.search_registered_models(f"name = '{MODEL}'"):
        client.delete_registered_model(MODEL)
    return client


@pytest.fixture
def registry(client: MlflowClient) -> Registry:
    return Registry(client)


@pytest.fixture
def add(client: MlflowClient, registry: Registry, tmp_path: Path):
    """Register a new version whose only file has this text."""
    _, experiment = open_store(EXPERIMENT)

    def register(text: str, *, champion: bool = True) -> int:
        folder = tmp_path / f"model-{text}" / ARTIFACT
        folder.mkdir(parents=True)
        (folder / "text").write_text(text)
        run = client.create_run(experiment)
        client.log_artifacts(run.info.run_id, str(folder.parent), "model")
        return registry.add(run.info.run_id, f"{run.info.artifact_uri}/model", {"data": text}, champion=champion)

    return register


def failure(call, *arguments) -> str:
    with pytest.raises(HarliError) as raised:
        call(*arguments)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_an_empty_registry_has_no_champion(registry):
    assert registry.versions() == []
    assert registry.champion() is None
    assert "`harli train-predictor`" in failure(load_predictor_folder)
    assert "no predictor is the champion" in failure(registry.rollback)
    assert "registered: none" in failure(registry.promote, 1)


def test_a_store_that_was_never_made_is_not_made_by_looking(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert "no predictor is the champion" in failure(load_predictor_folder)
    assert list(tmp_path.iterdir()) == []


def test_versions_carry_tags_and_aliases(registry, add):
    assert [add("a"), add("b", champion=False), add("c", champion=False)] == [1, 2, 3]
    one, two, three = registry.versions()
    assert (one.aliases, two.aliases, three.aliases) == (("champion",), (), ("challenger",))
    assert two.tags == {"data": "b"}
    assert one.created_at <= two.created_at <= three.created_at
    assert registry.champion() == one


def test_promotion_and_rollback_walk_back_through_the_champions(registry, add):
    for text in "abc":
        add(text)
    assert [registry.rollback().number, registry.rollback().number] == [2, 1]
    assert registry.champion().number == 1
    assert "first champion" in failure(registry.rollback)


def test_promoting_the_champion_again_changes_nothing(registry, add):
    add("a")
    add("b")
    registry.promote(2)
    assert registry.rollback().number == 1


def test_a_promoted_challenger_is_one_no_longer(registry, add):
    add("a")
    add("b", champion=False)
    registry.promote(2)
    assert registry.get(2).aliases == ("champion",)


def test_loading_by_alias_number_and_folder(registry, add, tmp_path):
    add("a")
    add("b", champion=False)
    assert (load_predictor_folder() / "text").read_text() == "a"
    assert (load_predictor_folder(f"models:/{MODEL}@challenger") / "text").read_text() == "b"
    assert (load_predictor_folder(f"models:/{MODEL}/2") / "text").read_text() == "b"
    assert load_predictor_folder(str(tmp_path)) == tmp_path


def test_what_is_not_registered(add):
    add("a")
    assert "no version 7" in failure(load_predictor_folder, f"models:/{MODEL}/7")
    assert "alias 'best'" in failure(load_predictor_folder, f"models:/{MODEL}@best")
    assert "registered: 1" in failure(load_predictor_folder, f"models:/{MODEL}/7")
    for uri in ("models:/other/1", f"models:/{MODEL}/latest", "nowhere", ""):
        assert "no predictor" in failure(load_predictor_folder, uri)


def test_a_version_without_files_is_damaged_and_cannot_be_promoted(registry, add, client):
    add("a")
    add("b", champion=False)
    for number in (1, 2):
        shutil.rmtree(Path(client.get_model_version_download_uri(MODEL, str(number)).removeprefix("file://")))
    assert "version 1 of harli-decode-latency is damaged" in failure(load_predictor_folder)
    assert "damaged" in failure(registry.promote, 2)
    assert registry.champion().number == 1


def test_rolling_back_to_a_deleted_version(registry, add, client):
    add("a")
    add("b")
    client.delete_model_version(MODEL, "1")
    assert "no version 1" in failure(registry.rollback)
    assert registry.champion().number == 2


def test_a_version_that_gets_no_alias_is_not_registered(registry, add, monkeypatch):
    add("a")

    def fail(*_):
        raise ConnectionError("server went away")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", fail)
        for champion in (True, False):
            with pytest.raises(HarliError, match="server went away"):
                add(f"b{champion}", champion=champion)
    assert [version.number for version in registry.versions()] == [1]
    assert registry.champion().number == 1


def test_an_unreachable_server_is_one_line(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    for name in [name for name in os.environ if name.startswith("MLFLOW_HTTP")]:
        monkeypatch.delenv(name)
    assert "cannot be used" in failure(load_predictor_folder)
    assert "cannot be used" in failure(open_registry)
