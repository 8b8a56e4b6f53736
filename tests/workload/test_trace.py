"""Reading the known trace formats, and refusing everything else in one clear line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from harli.types import HarliError
from harli.workload.base import Request
from harli.workload.trace import FORMATS, read_trace

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURSTGPT = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
SHARED_DATA = Path(__file__).parents[3] / "shared" / "data"

Write = Callable[[str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_trace(content: str | bytes) -> Path:
        path = tmp_path / "some_trace.csv"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_trace


def test_azure_without_a_final_newline(write: Write) -> None:
    path = write(AZURE + "2023-11-16 23:59:59.9799600,374,44\n2023-11-17 00:00:01.4799600,396,109")
    workload = read_trace(path)
    assert workload.name == "some_trace"
    first, second = workload.requests
    assert first == Request(0.0, 374, 44)
    assert second == Request(pytest.approx(1.5, abs=1e-5), 396, 109)


def test_azure_time_zones_and_byte_order_mark(write: Write) -> None:
    rows = "2024-05-10 00:00:00.009930+00:00,2162,5\r\n2024-05-10 01:00:03.009930+01:00,2399,6\r\n"
    workload = read_trace(write(b"\xef\xbb\xbf" + (AZURE + rows).encode()))
    assert [request.arrival_s for request in workload.requests] == pytest.approx([0.0, 3.0], abs=1e-5)


def test_burstgpt_leaves_failed_requests_out(write: Write) -> None:
    rows = "5,ChatGPT,472,18,490,Conversation log\n45,GPT-4,1087,0,1087,API log\n118.5,ChatGPT,417,276,693,API log\n"
    assert read_trace(write(BURSTGPT + rows)).requests == (Request(0.0, 472, 18), Request(113.5, 417, 276))


def test_mooncake_is_in_milliseconds(write: Write) -> None:
    rows = (
        '{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}\n\n'
        '{"timestamp": 30535, "input_length": 6472, "output_length": 26, "hash_ids": [46]}'
    )
    first, second = read_trace(write(rows)).requests
    assert first == Request(0.0, 6955, 52)
    assert second == Request(pytest.approx(3.053), 6472, 26)


def test_rows_out_of_order_are_sorted(write: Write) -> None:
    rows = "7,m,1,10,11,x\n3,m,2,20,22,x\n7,m,0,30,30,x\n"
    assert read_trace(write(BURSTGPT + rows)).requests == (
        Request(0.0, 2, 20),
        Request(4.0, 1, 10),
        Request(4.0, 0, 30),
    )


@pytest.mark.parametrize(
    ("rows", "line", "found"),
    [
        pytest.param("2023-11-16 18:15:46,many,44\n", 2, "'many'", id="not a number"),
        pytest.param("2023-11-16 18:15:46,1.5,44\n", 2, "'1.5'", id="fraction of a token"),
        pytest.param("2023-11-16 18:15:46,374,44\n2023-11-16 18:15:47,374,-1\n", 3, "'-1'", id="negative"),
        pytest.param("2023-11-16 18:15:46,nan,44\n", 2, "'nan'", id="not finite"),
        pytest.param("yesterday,374,44\n", 2, "'yesterday'", id="not a time"),
        pytest.param("2023-11-16 18:15:46,374\n", 2, "GeneratedTokens=None", id="cell missing"),
        pytest.param("2023-11-16 18:15:46,374,44,9\n", 2, "surplus", id="cell too many"),
    ],
)
def test_a_malformed_csv_row_is_named(write: Write, rows: str, line: int, found: str) -> None:
    with pytest.raises(HarliError, match=rf"some_trace\.csv, line {line}: ") as error:
        read_trace(write(AZURE + rows))
    assert found in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("time", ["inf", "nan", "-1"])
def test_impossible_seconds_are_refused(write: Write, time: str) -> None:
    with pytest.raises(HarliError, match="line 2"):
        read_trace(write(BURSTGPT + f"{time},m,1,10,11,x\n"))


@pytest.mark.parametrize(
    "row",
    [
        '{"timestamp": NaN, "input_length": 1, "output_length": 1}',
        '{"timestamp": 1, "input_length": 1.5, "output_length": 1}',
        '{"timestamp": 1, "input_length": true, "output_length": 1}',
        '{"timestamp": 1, "input_length": 1}',
        '{"timestamp": 1, "input_len',
        "[1, 2, 3]",
    ],
)
def test_a_malformed_json_line_is_named(write: Write, row: str) -> None:
    good = '{"timestamp": 0, "input_length": 1, "output_length": 1}'
    with pytest.raises(HarliError, match=r"some_trace\.csv, line 2: ") as error:
        read_trace(write(f"{good}\n{row}\n"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["time,tokens\n1,2\n", "time,tokens\n", '{"time": 1}\n'])
def test_an_unknown_header_says_which_are_known(write: Write, content: str) -> None:
    with pytest.raises(HarliError, match="time") as error:
        read_trace(write(content))
    assert all(column in str(error.value) for known in FORMATS for column in known.columns)


@pytest.mark.parametrize("content", ["", AZURE, BURSTGPT + "45,GPT-4,1087,0,1087,API log\n"])
def test_a_trace_without_requests_is_refused(write: Write, content: str) -> None:
    with pytest.raises(HarliError, match="no requests"):
        read_trace(write(content))


def test_a_file_that_cannot_be_read_is_refused(write: Write, tmp_path: Path) -> None:
    with pytest.raises(HarliError, match=r"nowhere\.csv: No such file"):
        read_trace(tmp_path / "nowhere.csv")
    with pytest.raises(HarliError, match="Is a directory"):
        read_trace(tmp_path)
    with pytest.raises(HarliError, match="not a trace"):
        read_trace(write(b"\x89PNG\xff\xfe\x00"))


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the Azure traces are not here")
@pytest.mark.parametrize(
    ("name", "rows", "minutes"), [("azure_llm_2023_conv", 19366, 58.4), ("azure_llm_2023_code", 8819, 57.3)]
)
def test_the_azure_traces(name: str, rows: int, minutes: float) -> None:
    requests = read_trace(SHARED_DATA / f"{name}.csv").requests
    assert len(requests) == rows
    assert requests[0].arrival_s == 0.0
    assert requests[-1].arrival_s / 60 == pytest.approx(minutes, abs=0.06)
