from __future__ import annotations

import pytest
from mlflow import MlflowClient

from harli.records.reader import read_record
from harli.records.summary import METRICS
from harli.tracking import publish as publish_module
from harli.tracking.publish import EXPERIMENT, publish, publish_run
from harli.types import HarliError
from tests.records.builders import small_run


@pytest.fixture
def runs(sqlite_uri):
    """The visible runs of a record, as a function."""

    def search(record):
        client = MlflowClient(sqlite_uri)
        experiment = client.get_experiment_by_name(EXPERIMENT)
        return client.search_runs([experiment.experiment_id], f"tags.`harli.run_id` = '{record.info.run_id}'")

    return search


def test_a_published_run_has_all_of_the_record(record, runs, sqlite_uri, tmp_path):
    run_id = publish(record)
    (run,) = runs(record)
    assert run.info.run_id == run_id
    assert run.info.run_name == "fixed"
    assert run.info.status == "FINISHED"
    assert run.info.end_time - run.info.start_time == 20_000
    assert run.data.tags["harli.run_id"] == record.info.run_id
    assert run.data.tags["simulated"] == "false"
    assert run.data.params == {
        "policy": "fixed",
        "policy.share": "1/1",
        "policy.limit": "8",
        "policy.patience": "inf",
        "policy.eager": "True",
        "workload.rate_scale": "1.0",
        "model": "some/model-24M",
        "role": "decode",
        "slo.itl_ms": "30.0",
        "slo.tpot_ms": "28.0",
        "menu": "2/0 1/1 0/2",
        "device.kind": "cpu",
        "device.units": "2",
        "finetune.state": "finished",
    }
    assert {name: run.data.metrics.get(name) for name in METRICS} == pytest.approx(record.info.summary)

    client = MlflowClient(sqlite_uri)
    assert len(client.get_metric_history(run_id, "decode/itl_p99_ms")) == 1
    batch = client.get_metric_history(run_id, "series/batch")
    assert 100 <= len(batch) <= 400
    assert all(0 <= point.step < 20_000 for point in batch)
    assert all(point.timestamp - run.info.start_time == point.step for point in batch)
    assert len(client.get_metric_history(run_id, "series/loss")) == 10

    assert {file.path for file in client.list_artifacts(run_id)} == {"record", "timeline.png"}
    copy = read_record(tmp_path / client.download_artifacts(run_id, "record", str(tmp_path)))
    assert copy.info == record.info
    assert copy.requests.equals(record.requests)


def test_publishing_twice_gives_the_same_run(record, runs):
    assert publish(record) == publish(record)
    assert len(runs(record)) == 1


def test_a_run_published_too_early_is_replaced(tmp_path, runs):
    early = small_run(tmp_path / "early", status="running")
    early_id = publish(early)
    late = small_run(tmp_path / "late", status="interrupted", run_id=early.info.run_id)
    assert publish(late) != early_id
    (run,) = runs(late)
    assert run.info.status == "KILLED"


@pytest.mark.parametrize("error", [RuntimeError("bucket is full"), KeyboardInterrupt()], ids=repr)
def test_an_error_leaves_no_half_run(record, runs, monkeypatch, error):
    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifact", fail)
        with pytest.raises((HarliError, KeyboardInterrupt)) as raised:
            publish(record)
    assert runs(record) == []
    if isinstance(error, RuntimeError):
        assert "(bucket is full); the record is kept" in str(raised.value)
    publish(record)
    assert len(runs(record)) == 1


def test_a_half_run_that_could_not_be_deleted_is_replaced(record, runs, monkeypatch):
    def fail(*_):
        raise ConnectionError("server went away")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_tag", fail)
        patch.setattr(MlflowClient, "delete_run", fail)
        with pytest.raises(HarliError, match="server went away"):
            publish(record)
    assert len(runs(record)) == 1
    run_id = publish(record)
    assert [run.info.run_id for run in runs(record)] == [run_id]


def test_many_params_and_points_go_in_batches(tmp_path, runs, monkeypatch):
    monkeypatch.setattr(publish_module, "METRICS_PER_BATCH", 7)
    record = small_run(tmp_path / "run", device={f"cache_{number}": number for number in range(250)})
    publish(record)
    (run,) = runs(record)
    assert sum(name.startswith("device.cache_") for name in run.data.params) == 250
    measured = {name for name, value in record.info.summary.items() if value is not None}
    assert measured <= set(run.data.metrics)


def test_an_unreachable_server_is_one_line_that_says_how_to_publish_later(record, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(HarliError) as raised:
        publish(record)
    message = str(raised.value)
    assert "\n" not in message
    assert message.endswith(f"the record is kept, publish it later with: harli publish '{record.folder}'")
    with pytest.raises(HarliError) as plain:
        publish_run(record)
    assert message.startswith(f"{plain.value}; the record is kept")
    assert read_record(record.folder).info == record.info
