from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harli.records.reader import read_record
from harli.records.schema import SCHEMA_VERSION, VERSION_KEY
from harli.records.writer import RecordWriter
from harli.types import HarliError
from tests.records.builders import STEP, run_info


@pytest.fixture
def folder(tmp_path):
    writer = RecordWriter(tmp_path / "run", run_info())
    writer.add_steps([STEP._replace(step=step) for step in range(1000)])
    writer.write(run_info())
    return tmp_path / "run"


def message(folder) -> str:
    with pytest.raises(HarliError) as raised:
        read_record(folder)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def edit(folder, **changes) -> None:
    content = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**content, **changes}))


def test_no_record(tmp_path):
    assert "is not a run's record" in message(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    assert "is not a run's record" in message(tmp_path / "file")


def test_a_missing_table(folder):
    (folder / "finetune.parquet").unlink()
    assert "finetune.parquet is missing" in message(folder)


def test_broken_json_is_reported_with_its_line(folder):
    (folder / "run.json").write_text('{\n"name": "x",\n"policy": }')
    assert "run.json is damaged (line 3" in message(folder)
    (folder / "run.json").write_bytes(b"\xff\xfe")
    assert "run.json is damaged (not UTF-8" in message(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null"])
def test_json_that_is_no_record(folder, text):
    (folder / "run.json").write_text(text)
    assert "run.json" in message(folder)


def test_a_wrong_field_is_named(folder):
    edit(folder, finetune={"state": "asleep"})
    assert "run.json is damaged (finetune.state:" in message(folder)
    edit(folder, finetune={"state": "off"}, slo={"itl_ms": -2})
    assert "run.json is damaged (the ITL SLO" in message(folder)


def test_a_newer_record(folder):
    edit(folder, schema_version=SCHEMA_VERSION + 1, field_of_the_future=1)
    newer = f"newer Harli (schema {SCHEMA_VERSION + 1}, this one reads up to {SCHEMA_VERSION}); upgrade"
    assert newer in message(folder)


def test_a_newer_table(folder):
    table = pq.read_table(folder / "steps.parquet")
    pq.write_table(table.replace_schema_metadata({VERSION_KEY: "2"}), folder / "steps.parquet")
    assert "newer Harli (schema 2" in message(folder)


def test_a_parquet_file_of_something_else(folder):
    pq.write_table(pa.table({"a": [1]}), folder / "steps.parquet")
    assert "steps.parquet has no schema version" in message(folder)
    pq.write_table(pa.table({"a": [1]}).replace_schema_metadata({VERSION_KEY: "1"}), folder / "steps.parquet")
    assert "steps.parquet is damaged (its columns" in message(folder)


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "middle"])
def test_a_damaged_table(folder, damage):
    path = folder / "steps.parquet"
    content = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "cut": content[:-20],
            "text": b"step,time_s\n1,2\n" * 20,
            "middle": content[:4] + b"\xff" * 200 + content[204:],
        }[damage]
    )
    assert "steps.parquet is damaged" in message(folder)


def test_a_folder_whose_name_looks_like_a_partition(folder):
    other = folder.parent / "policy=fixed"
    folder.rename(other)
    assert read_record(other).steps.column_names == list(STEP._fields)
