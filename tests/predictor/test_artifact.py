from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harli.types import HarliError
from predictor.artifact import FILE, Artifact
from predictor.latency_model import LatencyModel
from predictor.models import MODELS
from tests.predictor.builders import IDENTITY, MENU, UNIT_TIMES, synthetic
from tests.predictor.fitted import artifact

TEST = synthetic(40, 5, seed=9)
SAVED = artifact()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    SAVED.save(tmp_path)
    return tmp_path


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_every_model_comes_back_as_it_was(tmp_path: Path, model: type[LatencyModel]) -> None:
    saved = artifact(model, {})
    saved.save(tmp_path / "predictor")
    loaded = Artifact.load(tmp_path / "predictor")
    assert type(loaded.model) is model
    np.testing.assert_array_equal(loaded.model.predict(TEST), saved.model.predict(TEST))
    assert (loaded.menu, loaded.facts()) == (saved.menu, saved.facts())
    assert loaded.unit_times == UNIT_TIMES


def test_a_file_of_this_format_is_read_and_written_as_it_was(tmp_path: Path) -> None:
    content = {
        "format": 1,
        "model": "constant",
        "identity": IDENTITY,
        "solo_base": [12.0, 0.0, 0.0, 0.0, 0.0],
        "corun_base": [[14.5, 0.0, 0.0, 0.0, 0.0, 0.0], [18.0, 0.0, 0.0, 0.0, 0.0, 0.0]],
        "trees": {},
        "rate": {
            "level": [100.0, 200.0],
            "loss_per_ms": [0.0, 1.5],
            "low_ms": 5.0,
            "high_ms": 50.0,
            "shapes": [[256, 0, 1.0], [512, 2, 1.25]],
        },
        "bounds": {
            "coverage": 0.99,
            "solo_edges": [],
            "solo_factors": [1.25],
            "split_edges": [20.0],
            "split_factors": [1.5, 1.25],
        },
        "ranges": {
            "least_batch": [1.0, 2.0, None],
            "largest": [[32.0, 6e4, 2e3, 0.0, 2.0], [16.0, 3e4, 2e3, 0.0, 2.0], None],
        },
        "context_skew": 1.5,
        "costs": {"switch_ms": 1.0, "window_overhead_ms": 0.5},
        "unit_times": [
            {
                "kind": "forward",
                "units": 4,
                "microbatch_tokens": 256,
                "kept_layers": 0,
                "per_pass": 8.0,
                "mean_ms": 10.0,
            }
        ],
        "finetune_alone_tokens_per_s": 900.0,
        "data_sha256": "0123456789abcdef" * 4,
        "scores": {"corun_mape": 0.03, "noise_solo": None},
    }
    (tmp_path / FILE).write_text(json.dumps(content))
    loaded = Artifact.load(tmp_path)
    assert (loaded.menu, loaded.model.solo_base[0], loaded.rate.level) == (MENU, 12.0, (100.0, 200.0))
    loaded.save(tmp_path)
    assert json.loads((tmp_path / FILE).read_text()) == content


def test_saving_again_leaves_nothing_of_the_old_one(tmp_path: Path) -> None:
    SAVED.save(tmp_path)
    artifact(params={"solo_rounds": 0, "corun_rounds": 0}).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert Artifact.load(tmp_path).model.trees == (None, None)


def test_a_missing_folder_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(HarliError, match="run `harli train-predictor`"):
        Artifact.load(tmp_path / "nothing")


def test_missing_changed_and_surplus_files_are_found(folder: Path) -> None:
    trees = folder / "corun.lightgbm.txt"
    text = trees.read_text()
    trees.write_text(text.replace("leaf_value=", "leaf_value=9", 1))
    with pytest.raises(HarliError, match="it is not the file"):
        Artifact.load(folder)
    trees.write_text(text[: len(text) // 2])
    with pytest.raises(HarliError, match="damaged"):
        Artifact.load(folder)
    trees.unlink()
    with pytest.raises(HarliError, match=r"corun\.lightgbm\.txt is damaged \(missing\)"):
        Artifact.load(folder)
    trees.write_text(text)
    (folder / "third.lightgbm.txt").write_text(text)
    with pytest.raises(HarliError, match="third"):
        Artifact.load(folder)


def changed(path: Path, *keys: str | int, value: Any) -> None:
    """Set one value deep in the JSON."""
    content = json.loads(path.read_text())
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("solo_base", 0), float("nan")),
        (("solo_base", 0), -1.0),
        (("solo_base",), [1.0]),
        (("corun_base",), []),
        (("bounds", "solo_factors"), [0.5]),
        (("bounds", "split_factors"), []),
        (("rate", "level"), [1.0]),
        (("ranges", "largest", 0), [1.0]),
        (("identity", "menu"), ["4/0", "nonsense"]),
        (("identity", "menu"), None),
        (("model",), "another"),
        (("trees", "corun"), "0" * 64),
        (("unknown",), 1),
        (("format",), "x"),
    ],
)
def test_damaged_values_are_one_line(folder: Path, keys: tuple[str | int, ...], value: Any) -> None:
    changed(folder / FILE, *keys, value=value)
    with pytest.raises(HarliError, match="is damaged") as caught:
        Artifact.load(folder)
    assert "\n" not in str(caught.value)


def test_text_that_is_no_json_and_newer_formats(folder: Path) -> None:
    changed(folder / FILE, "format", value=99)
    with pytest.raises(HarliError, match="newer Harli"):
        Artifact.load(folder)
    for content in (b"", b"{", b'{"rate": 1e999}', b"\xff\xfe", b"[" * 100_000, b"[]"):
        (folder / FILE).write_bytes(content)
        with pytest.raises(HarliError, match="is damaged"):
            Artifact.load(folder)


def test_another_device_or_engine_is_named(folder: Path) -> None:
    loaded = Artifact.load(folder)
    assert loaded.check(IDENTITY) == []
    other = {**IDENTITY, "device": {"kind": "cpu", "cores": 8}, "versions": {"vllm": "0.33.0", "torch": "2.13.0"}}
    assert loaded.check(other) == [
        "device (kind cpu, cores 4) is not (kind cpu, cores 8)", "vllm 0.32.0 is not 0.33.0"
    ]  # fmt: skip
