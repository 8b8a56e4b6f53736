"""``harli train-predictor`` and ``harli predictors``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from mlflow import MlflowClient
from typer.testing import CliRunner

from harli.commands.predictors import predictors
from harli.commands.train_predictor import train_predictor
from harli.tracking.registry import EXPERIMENT, MODEL, load_predictor_folder, open_registry
from harli.types import HarliError
from predictor.artifact import Artifact
from predictor.two_stage import TwoStage
from tests.predictor.builders import synthetic, write_plain

app = typer.Typer()
app.command("train-predictor")(train_predictor)
app.command("predictors")(predictors)

DATA = synthetic(120, 10)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this file's MLflow and search live: making one takes seconds."""
    return tmp_path_factory.mktemp("train")


@pytest.fixture
def here(store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with data in ``steps.parquet``, in which nothing is registered."""
    monkeypatch.chdir(store)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}/mlruns/mlflow.db")
    (store / "mlruns").mkdir(exist_ok=True)
    client = MlflowClient()
    if client.search_registered_models(f"name = '{MODEL}'"):
        client.delete_registered_model(MODEL)
    write_plain(store / "steps.parquet", DATA)
    return store


def harli(*arguments: str) -> str:
    """The command's standard output; its HarliError is raised."""
    result = CliRunner().invoke(app, list(arguments))
    if isinstance(result.exception, HarliError | KeyboardInterrupt):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def train(*arguments: str, trials: int = 1) -> dict[str, Any]:
    command = ("train-predictor", "steps.parquet", "--trials", str(trials), "--json", "--quiet", *arguments)
    return dict(json.loads(harli(*command)))


def failure(call: Callable[..., Any], *arguments: str) -> str:
    with pytest.raises(HarliError) as raised:
        call(*arguments)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def runs() -> list[Any]:
    client = MlflowClient()
    experiment = client.get_experiment_by_name(EXPERIMENT)
    return list(client.search_runs([experiment.experiment_id])) if experiment else []


def test_a_first_training_is_champion_and_complete(here: Path) -> None:
    result = train(trials=2)
    assert {f"predictor/{name}" for name in (
        "solo_mape", "corun_mape", "corun_p99_error", "bound_coverage", "bound_width", "predict_p99_us", "version",
    )} < set(result)  # fmt: skip
    assert [rival["model"] for rival in result["rivals"]][:2] == ["two-stage", "linear"]
    assert result["rivals"][0]["corun"]["mape"] == result["predictor/corun_mape"] < 0.05
    assert result["predictor/version"] == 1
    assert 0.0 < result["predictor/predict_p99_us"] < 1000.0

    champion = open_registry().champion()
    assert champion is not None
    assert champion.number == 1
    assert champion.tags["data"] == "steps.parquet"
    assert champion.tags["menu"] == "4/0 3/1 2/2 0/4"
    artifact = Artifact.load(load_predictor_folder())
    assert artifact.scores["corun_mape"] == result["predictor/corun_mape"]

    client = MlflowClient()
    parent = client.get_run(champion.run_id)
    assert parent.data.metrics["predictor/corun_mape"] == pytest.approx(result["predictor/corun_mape"])
    assert parent.data.params["seed"] == "0"
    children = [run for run in runs() if run.data.tags.get("mlflow.parentRunId") == champion.run_id]
    assert len(children) == 2
    assert all("corun_rounds" in run.data.params and "mape" in run.data.metrics for run in children)
    files = {
        file.path for folder in ("", "figures", "model") for file in client.list_artifacts(champion.run_id, folder)
    }
    assert {"card.md", "rivals.json", "figures/parity.png", "model/MLmodel", "model/artifact"} <= files
    folder = Path(client.download_artifacts(champion.run_id, "model"))
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {"", ".json", ".txt"}


def test_the_same_again_gives_the_same_scores_and_a_challenger(here: Path) -> None:
    first, second = train(), train()
    for result in (first, second):
        del result["predictor/version"], result["predictor/predict_p99_us"]
    assert first == second
    _, challenger = open_registry().versions()
    assert challenger.aliases == ("challenger",)
    assert "no better than the champion" in challenger.tags["reason"]


def test_what_is_printed_for_people(here: Path) -> None:
    shown = harli("train-predictor", "steps.parquet", "--trials", "1").splitlines()
    assert "held out" in shown[0]
    assert [line.split()[0] for line in shown[2:8]] == [
        "two-stage", "linear", "linear-slowdown", "one-stage", "constant", "noise",
    ]  # fmt: skip
    assert any(line.startswith("two-stage is registered") for line in shown)
    assert shown[-1] == f"version 1 of {MODEL} is the champion: the first champion"


def test_whose_place_a_predictor_for_something_else_takes_is_printed(here: Path) -> None:
    train()
    write_plain(here / "others.parquet", DATA)
    shown = harli("train-predictor", "others.parquet", "--trials", "1").splitlines()
    assert shown[-1] == (
        f"version 2 of {MODEL} is the champion: in place of version 1, without a contest, since that is for something "
        "else: model steps is not others"
    )


def test_listing_promoting_and_rolling_back(here: Path) -> None:
    assert "run `harli train-predictor`" in failure(harli, "predictors")
    train()
    train()
    listed = harli("predictors").splitlines()
    assert [line.split()[:2] for line in listed[1:]] == [["1", "champion"], ["2", "challenger"]]
    assert harli("predictors", "--promote", "2") == "version 2 is the champion\n"
    assert harli("predictors").splitlines()[2].split()[:2] == ["2", "champion"]
    assert harli("predictors", "--rollback") == "version 1 is the champion again\n"
    assert "no version 9" in failure(harli, "predictors", "--promote", "9")
    assert "give one" in failure(harli, "predictors", "--promote", "1", "--rollback")


def test_a_damaged_champion_is_told_before_the_search(here: Path) -> None:
    train()
    (load_predictor_folder() / "predictor.json").write_text("{}")
    assert "version 1 of harli-decode-latency, cannot be read" in failure(train)
    shutil.rmtree(load_predictor_folder().parent)
    assert "version 1 of harli-decode-latency is damaged" in failure(train)
    assert len(open_registry().versions()) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.take(data.point < 0), "no rows"),
        (lambda data: replace(data, gap_ms=np.full(len(data), 20.0)), "every gap is 20 ms"),
        (lambda data: replace(data, gap_ms=np.full(len(data), np.nan)), "NaN everywhere"),
        (lambda data: data.take(data.solo), "are needed|needs decode alone and one split"),
        (lambda data: data.take(data.point < 6), "10 are needed"),
        (lambda data: data.take((data.point < 30) & (~data.solo | (data.point < 6))), "5 are needed"),
    ],
    ids=["empty", "constant", "nan", "one share", "few points", "few points alone"],
)
def test_data_that_nothing_can_be_learnt_from(here: Path, change: Callable[..., Any], message: str) -> None:
    write_plain(here / "steps.parquet", change(DATA))
    before = len(runs())
    with pytest.raises(HarliError, match=message):
        train()
    assert len(runs()) == before
    assert open_registry().versions() == []


def test_nothing_to_train_on(here: Path) -> None:
    assert "no profile under profiles/" in failure(harli, "train-predictor")
    assert "nowhere" in failure(harli, "train-predictor", "nowhere")
    assert "nowhere" in failure(harli, "train-predictor", "steps.parquet", "--from-run", "nowhere")


def test_an_unreachable_server_is_told_before_the_search(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert "MLflow at http://127.0.0.1:9 cannot be used" in failure(train)


def test_ctrl_c_registers_nothing_and_keeps_the_search(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import optuna

    fit, calls = TwoStage.fit.__func__, []  # type: ignore[attr-defined]

    def interrupted(cls: type[TwoStage], *arguments: Any) -> TwoStage:
        calls.append(None)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return fit(cls, *arguments)  # type: ignore[no-any-return]

    before = len(runs())
    with monkeypatch.context() as patch:
        patch.setattr(TwoStage, "fit", classmethod(interrupted))
        result = CliRunner().invoke(app, ["train-predictor", "steps.parquet", "--seed", "11", "--trials", "3"])
    assert result.exit_code == 130 or isinstance(result.exception, KeyboardInterrupt)
    assert "nothing is registered" in result.stderr
    assert len(runs()) == before
    assert open_registry().versions() == []
    studies = optuna.get_all_study_summaries(f"sqlite:///{here}/mlruns/optuna.db")
    assert any("seed 11" in study.study_name and study.n_trials == 2 for study in studies)


def test_a_failure_while_publishing_leaves_neither_runs_nor_version(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("server went away")

    before = len(runs())
    for method in ("log_artifacts", "create_model_version", "set_registered_model_alias"):
        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, method, fail)
            assert "server went away" in failure(train)
        assert len(runs()) == before
        assert open_registry().versions() == []
