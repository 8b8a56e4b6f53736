"""The three commands one after the other, as a user gives them: profile, train-predictor, run --policy qos."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harli.cli import main
from harli.records.profile import read_profile
from harli.records.reader import read_record

pytestmark = pytest.mark.slow

ENGINE = ("--model", "tiny", "--max-model-len", "512", "--max-num-seqs", "8", "--kv-cache-gib", "0.25")


def harli(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "harli", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workflow")


@pytest.fixture(scope="module")
def profiled(workplace: Path) -> dict[str, Any]:
    done = harli(workplace, "profile", *ENGINE, "--budget-minutes", "0.4", "--out", "profiles/one", "--json")
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def trained(workplace: Path, profiled: dict[str, Any]) -> dict[str, Any]:
    assert profiled["profile/steps"] > 0
    scores = json.loads(harli(workplace, "train-predictor", "--trials", "2", "--json", "--quiet").stdout)
    harli(workplace, "predictors", "--promote", "1")  # a sketch from a busy machine may be registered as challenger
    return dict(scores)


@pytest.fixture(scope="module")
def ran(workplace: Path, trained: dict[str, Any]) -> dict[str, Any]:
    assert trained["predictor/version"] == 1
    arguments = ("--requests-per-s", "2", "--duration", "12", "--slo-tpot-ms", "400", "--out", "record", "--json")
    return dict(json.loads(harli(workplace, "run", "--policy", "qos", *ENGINE, *arguments).stdout))


def test_a_sketch_is_a_profile_and_says_so(workplace: Path, profiled: dict[str, Any]) -> None:
    profile = read_profile(workplace / "profiles" / "one")
    assert profile.info.status == "finished"
    assert profile.info.summary == profiled
    assert profiled["profile/points"] >= 8
    assert any("only a sketch" in line for line in profile.info.verdict)


def test_training_registers_a_champion(workplace: Path, trained: dict[str, Any]) -> None:
    assert {rival["model"] for rival in trained["rivals"]} >= {"two-stage", "linear", "one-stage", "constant"}
    assert trained["predictor/corun_mape"] > 0
    listed = harli(workplace, "predictors").stdout
    assert "champion" in listed


def test_a_run_uses_the_champion_and_records_its_forecasts(workplace: Path, ran: dict[str, Any]) -> None:
    record = read_record(workplace / "record")
    assert ran["decode/requests_failed"] == 0
    assert ran["finetune/tokens_per_s"] > 0
    assert record.info.predictor is not None
    assert record.info.predictor.source == "models:/harli-decode-latency@champion"
    assert record.info.predictor.correction["steps"] > 0
    predicted, bound = (record.steps[name].to_numpy() for name in ("predicted_ms", "bound_ms"))
    assert np.isfinite(predicted).mean() > 0.99
    assert (bound >= predicted).all()
    assert ran["predictor/bound_coverage"] > 0.9


def test_a_predictor_for_something_else_is_refused_where_it_is_needed(
    workplace: Path, ran: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setattr("sys.argv", ["harli", "run", "--policy", "qos", "--model", "tiny", "--role", "mixed"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "role decode is not mixed" in said
    assert "--force-predictor" in said
