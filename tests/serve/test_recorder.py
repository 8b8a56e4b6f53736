"""The server's rolling records."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from harli.config import RunSettings, SloSettings
from harli.records.reader import read_record
from harli.records.writer import RecordWriter
from harli.rows import StepRecord, UpdateRecord
from harli.serve import recorder as module
from harli.serve.recorder import Recorder, RecordingThread
from harli.types import HarliError
from predictor.sources import read_run
from tests.records.builders import STEP

UPDATE = UpdateRecord(update=0, time_s=0.0, loss=3.0, tokens=100, learning_rate=1e-4)
SETTINGS = RunSettings(policy="static", slo=SloSettings(itl_ms=50.0))


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    return Recorder(tmp_path / "records", SETTINGS, None)


def folders(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "records").iterdir())


def test_what_is_written_is_a_run_to_learn_from(recorder: Recorder, tmp_path: Path) -> None:
    recorder.write([STEP._replace(time_s=100.0 + n) for n in range(3)], [UPDATE._replace(time_s=101.0)])
    recorder.write([STEP._replace(time_s=103.0)], [])
    (folder,) = folders(tmp_path)
    record = read_record(folder)
    assert record.steps["time_s"].to_pylist() == [0.0, 1.0, 2.0, 3.0]
    assert record.updates["time_s"].to_pylist() == [1.0]
    assert (record.info.status, record.info.slo.itl_ms) == ("running", 50.0)
    assert len(read_run(folder).columns["gap_ms"]) == 4


def test_other_settings_have_another_folder(recorder: Recorder, tmp_path: Path) -> None:
    recorder.write([STEP], [])
    recorder.change_settings(SETTINGS.model_copy(update={"slo": SloSettings(tpot_ms=9.0)}))
    recorder.write([STEP], [])
    before, after = map(read_record, folders(tmp_path))
    assert (before.info.status, before.info.slo.tpot_ms) == ("finished", None)
    assert after.info.slo.tpot_ms == 9.0


def test_only_so_much_is_kept(recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FOLDER_ROWS", 2)
    monkeypatch.setattr(module, "FOLDERS", 3)
    for number in range(7):
        recorder.write([STEP._replace(step=number), STEP._replace(step=number)], [])
    kept = [read_record(folder) for folder in folders(tmp_path)]
    assert [record.steps["step"][0].as_py() for record in kept] == [4, 5, 6]
    assert {record.info.status for record in kept} == {"finished"}


def test_a_disk_that_refuses_is_told_and_tried_again(recorder: Recorder, tmp_path: Path) -> None:
    (tmp_path / "records").write_text("in the way")
    with pytest.raises(HarliError, match="cannot create"):
        recorder.write([STEP], [])
    (tmp_path / "records").unlink()
    recorder.write([STEP, STEP], [])
    assert len(read_record(folders(tmp_path)[0]).steps) == 2


def test_nothing_is_written_while_nothing_happens(recorder: Recorder, tmp_path: Path) -> None:
    recorder.write([], [])
    recorder.close()
    assert not (tmp_path / "records").exists()


def test_updates_are_written_while_decode_idles_once_there_was_a_step(recorder: Recorder, tmp_path: Path) -> None:
    recorder.write([], [UPDATE._replace(time_s=10.0)])
    assert not (tmp_path / "records").exists()
    recorder.write([STEP._replace(time_s=100.0)], [])
    recorder.write([], [UPDATE._replace(update=1, time_s=130.0)])
    record = read_record(folders(tmp_path)[0])
    assert record.updates["update"].to_pylist() == [0, 1]
    assert record.updates["time_s"].to_pylist() == [0.0, 120.0]
    assert record.steps["time_s"].to_pylist() == [90.0]
    assert record.info.duration_s == 120.0
    recorder.write([], [])
    recorder.close()
    assert read_record(folders(tmp_path)[0]).info.duration_s == 120.0


def test_updates_fill_a_folder_too(recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FOLDER_ROWS", 3)
    recorder.write([STEP], [])
    recorder.write([], [UPDATE, UPDATE])
    assert read_record(folders(tmp_path)[0]).info.status == "finished"


def test_a_first_write_that_is_refused_leaves_no_folder(
    recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise HarliError("cannot write")

    monkeypatch.setattr(RecordWriter, "write", refuse)
    with pytest.raises(HarliError, match="cannot write"):
        recorder.write([STEP], [])
    assert folders(tmp_path) == []


def test_rows_wait_for_a_disk_that_hangs_and_the_oldest_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FOLDER_ROWS", 3)
    hangs, written = threading.Event(), []

    def write(steps: list[StepRecord], updates: list[UpdateRecord]) -> None:
        hangs.wait(60.0)
        written.append(([row.step for row in steps], [row.update for row in updates]))

    thread = RecordingThread(SimpleNamespace(write=write, close=lambda: None))
    for number in range(6):
        thread.add_steps([STEP._replace(step=number)])
        thread.add_updates([UPDATE._replace(update=number)])
        thread.write()
    hangs.set()
    thread.close()
    assert written == [([0], [0]), ([3, 4, 5], [3, 4, 5])]
