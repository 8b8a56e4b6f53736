from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harli.finetune.builtin import write_builtin_dataset
from harli.finetune.dataset import read_samples
from harli.models import byte_tokenizer
from harli.types import HarliError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "new" / "docstrings.jsonl"
    assert write_builtin_dataset(path) == len(path.read_text().splitlines())
    return path


def test_some_hundred_distinct_pairs_of_moderate_length(data: Path) -> None:
    pairs = [json.loads(line) for line in data.read_text().splitlines()]
    assert 200 <= len(pairs) <= 400
    assert len({pair["prompt"] for pair in pairs}) == len(pairs)
    lengths = [len((pair["prompt"] + pair["completion"]).encode()) for pair in pairs]
    assert 100 <= sum(lengths) / len(lengths) <= 400
    assert min(len(pair["completion"]) for pair in pairs) >= 40


def test_a_pair_asks_for_a_docstring_and_gives_its_first_paragraph(data: Path) -> None:
    pairs = {pair["prompt"]: pair["completion"] for pair in map(json.loads, data.read_text().splitlines())}
    prompt = "Write the docstring of Python's `calendar.isleap(year)`\n"
    assert pairs[prompt] == "Return True for leap years, False for non-leap years."
    assert not any("  " in completion or "\n" in completion for completion in pairs.values())


def test_the_dataset_can_be_read_for_training(data: Path) -> None:
    samples = read_samples(data, byte_tokenizer(), max_tokens=4096)
    assert (len(samples.items), samples.truncated, samples.dropped) == (400, 0, 0)


def test_another_process_writes_the_same_file(data: Path, tmp_path: Path) -> None:
    code = "import sys, pathlib; from harli.finetune.builtin import write_builtin_dataset as write; "
    code += "write(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "again.jsonl")], check=True)
    assert (tmp_path / "again.jsonl").read_bytes() == data.read_bytes()


def test_the_limit_and_no_leftovers(tmp_path: Path) -> None:
    path = tmp_path / "few.jsonl"
    path.write_text("old")
    assert write_builtin_dataset(path, limit=5) == 5
    assert len(path.read_text().splitlines()) == 5
    assert os.listdir(tmp_path) == ["few.jsonl"]


def test_a_place_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HarliError, match="cannot write the finetuning data"):
        write_builtin_dataset(tmp_path / "file" / "data.jsonl")


def test_a_python_without_docstrings_is_refused(tmp_path: Path) -> None:
    code = "import sys, pathlib; from harli.finetune.builtin import write_builtin_dataset as write; "
    code += "write(pathlib.Path(sys.argv[1]))"
    process = subprocess.run(
        [sys.executable, "-OO", "-c", code, str(tmp_path / "none.jsonl")], capture_output=True, text=True
    )
    assert "run it without -OO" in process.stderr
    assert os.listdir(tmp_path) == []
