from __future__ import annotations

import json
import math

import pyarrow.parquet as pq
import pytest

from harli.records import writer as writer_module
from harli.records.reader import read_record
from harli.records.writer import RecordWriter
from harli.rows import UpdateRecord
from harli.types import HarliError
from tests.records.builders import REQUEST, STEP, run_info

UPDATE = UpdateRecord(update=1, time_s=1.5, loss=5.25, tokens=200, learning_rate=1e-4)


def test_a_new_record_says_that_it_is_running(tmp_path):
    folder = tmp_path / "deep" / "run"
    RecordWriter(folder, run_info(status="finished"))
    record = read_record(folder)
    assert record.info.status == "running"
    assert (len(record.steps), len(record.requests), len(record.updates)) == (0, 0, 0)


def test_round_trip(tmp_path):
    info = run_info()
    writer = RecordWriter(tmp_path / "run", info)
    writer.add_steps([STEP, STEP._replace(step=1, gap_ms=math.nan)])
    writer.add_requests([REQUEST, REQUEST._replace(request_id="ü", itl_ms=(20.0, 0.0), error="lost")])
    writer.add_updates([UPDATE])
    writer.write(info)
    record = read_record(tmp_path / "run")
    assert record.info == info
    assert record.steps["step"].to_pylist() == [0, 1]
    assert math.isnan(record.steps["gap_ms"][1].as_py())
    assert record.requests["request_id"].to_pylist() == ["0", "ü"]
    assert record.requests["itl_ms"].to_pylist() == [[], [20.0, 0.0]]
    assert record.updates.to_pylist() == [UPDATE._asdict()]
    assert record.steps.schema.equals(writer.steps.schema, check_metadata=True)


def test_rows_accumulate_over_writes(tmp_path):
    writer = RecordWriter(tmp_path / "run", run_info())
    for number in range(3):
        writer.add_steps(STEP._replace(step=step) for step in (2 * number, 2 * number + 1))
        writer.write(run_info(status="running", duration_s=float(number)))
        record = read_record(tmp_path / "run")
        assert record.steps["step"].to_pylist() == list(range(2 * number + 2))
        assert record.info.duration_s == number


def test_files_are_written_in_an_order_that_ends_with_run_json(tmp_path, monkeypatch):
    writer = RecordWriter(tmp_path / "run", run_info())
    replaced = []
    replace = writer_module.os.replace
    monkeypatch.setattr(writer_module.os, "replace", lambda old, new: (replaced.append(new.name), replace(old, new)))
    writer.write(run_info())
    assert sorted(replaced) == ["finetune.parquet", "requests.parquet", "run.json", "run.yaml", "steps.parquet"]
    assert replaced[-1] == "run.json"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=repr)
def test_an_error_while_writing_leaves_the_old_files(tmp_path, monkeypatch, error):
    folder = tmp_path / "run"
    writer = RecordWriter(folder, run_info())
    writer.add_steps([STEP])
    writer.write(run_info(status="running"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write_table = pq.write_table

    def break_off(table, path, **options):
        write_table(table, path, **options)
        path.write_bytes(path.read_bytes()[:100])
        raise error

    monkeypatch.setattr(pq, "write_table", break_off)
    writer.add_steps([STEP])
    with pytest.raises((KeyboardInterrupt, HarliError)) as raised:
        writer.write(run_info())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    if isinstance(error, OSError):
        assert "steps.parquet: No space left on device" in str(raised.value)

    monkeypatch.undo()
    writer.write(run_info())
    assert len(read_record(folder).steps) == 2


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(HarliError, match="not empty"):
        RecordWriter(tmp_path / "run", run_info())
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HarliError, match="cannot create the folder"):
        RecordWriter(tmp_path / "file" / "run", run_info())
    with pytest.raises(HarliError, match="cannot create the folder"):
        RecordWriter(tmp_path / "file", run_info())


def test_run_json_is_readable_by_eye(tmp_path):
    RecordWriter(tmp_path / "run", run_info(policy_params={}))
    text = (tmp_path / "run" / "run.json").read_text()
    assert json.loads(text)["slo"] == {"itl_ms": 30.0, "tpot_ms": 28.0}
    assert '\n  "policy": "fixed",\n' in text
