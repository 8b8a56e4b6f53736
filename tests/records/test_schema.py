from __future__ import annotations

import math

import pyarrow as pa
import pytest
from pydantic import ValidationError

from harli.records.schema import REQUESTS, SCHEMA_VERSION, STEPS, UPDATES, VERSION_KEY, RunInfo
from harli.rows import RequestRecord, StepRecord, UpdateRecord
from harli.types import HarliError
from tests.records.builders import REQUEST, STEP, run_info


@pytest.mark.parametrize(
    ("spec", "row"),
    [(STEPS, StepRecord), (REQUESTS, RequestRecord), (UPDATES, UpdateRecord)],
    ids=lambda x: str(x)[:20],
)
def test_columns_are_those_of_the_named_tuples(spec, row):
    assert tuple(spec.schema.names) == row._fields
    assert spec.schema.metadata[VERSION_KEY] == str(SCHEMA_VERSION).encode()


def test_column_types():
    assert STEPS.schema.field("batch").type == pa.int64()
    assert STEPS.schema.field("slack_ms").type == pa.float64()
    assert REQUESTS.schema.field("clipped").type == pa.bool_()
    assert REQUESTS.schema.field("error").type == pa.string()
    assert REQUESTS.schema.field("itl_ms").type == pa.list_(pa.float64())


def test_rows_become_a_table():
    table = REQUESTS.table([REQUEST, REQUEST._replace(itl_ms=(1.0, 2.0))])
    assert table["itl_ms"].to_pylist() == [[], [1.0, 2.0]]
    assert math.isinf(STEPS.table([STEP])["slack_ms"][0].as_py())
    assert STEPS.table([]).num_rows == 0


def test_run_info_survives_json():
    info = run_info()
    assert RunInfo.model_validate_json(info.model_dump_json()) == info
    assert info.policy_params["patience"] == math.inf
    assert info.policy_params["eager"] is True


@pytest.mark.parametrize(
    "changes",
    [
        {"colour": "red"},
        {"status": "done"},
        {"started_at": "yesterday"},
        {"started_at": "2026-01-31T12:00:00"},
        {"duration_s": -1.0},
        {"summary": {"decode/itl_p50_ms": math.nan}},
        {"run_id": "7"},
    ],
    ids=str,
)
def test_run_info_refuses(changes):
    with pytest.raises(ValidationError):
        run_info(**changes)


def test_run_info_refuses_an_impossible_slo():
    with pytest.raises(HarliError, match="ITL SLO"):
        run_info(slo={"itl_ms": -1.0})
