"""vLLM's metrics over time: what is refused, and requests that fit them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from harli.simulate.metrics_log import COLUMNS, COUNTERS, MetricsLog, is_metrics_log, read_metrics_log, reconstruct
from harli.types import HarliError

HEADER = ",".join(COLUMNS)
ROWS = ("0,0,0,0.0,100,1000", "15,4,1,0.25,400,2500", "30,2,0,0.125,900,5000")


def write(folder: Path, *rows: str, header: str = HEADER) -> Path:
    path = folder / "metrics.csv"
    path.write_text("\n".join((header, *rows)) + "\n")
    return path


def test_counters_become_increases_and_time_begins_at_0(tmp_path: Path) -> None:
    log = read_metrics_log(write(tmp_path, *ROWS))
    assert log.time_s.tolist() == [0.0, 15.0, 30.0]
    assert log.generated.tolist() == [0.0, 300.0, 500.0]
    assert log.prompts.tolist() == [0.0, 1500.0, 2500.0]
    assert log.running.tolist() == [0.0, 4.0, 2.0]


def test_labels_other_columns_and_time_stamps_are_as_prometheus_gives_them(tmp_path: Path) -> None:
    plain = read_metrics_log(write(tmp_path, *ROWS))
    begun = datetime(2026, 1, 31, 23, 59, 50, tzinfo=UTC)
    header = ["job", *(f'"{name}{{engine=""0""}}"' if name != "timestamp" else name for name in COLUMNS)]
    rows = []
    for row in ROWS:
        seconds, rest = row.split(",", 1)
        rows.append(f"decode,{(begun + timedelta(seconds=float(seconds))).isoformat()},{rest}")
    labelled = read_metrics_log(write(tmp_path, *rows, header=",".join(header)))
    assert all(np.array_equal(one, other) for one, other in zip(plain, labelled, strict=True))


def test_a_counter_that_falls_began_again(tmp_path: Path) -> None:
    log = read_metrics_log(write(tmp_path, *ROWS, "45,2,0,0.1,70,300"))
    assert (log.generated[-1], log.prompts[-1]) == (70.0, 300.0)


def test_a_trace_of_requests_is_no_metrics_log(tmp_path: Path) -> None:
    assert is_metrics_log(write(tmp_path, *ROWS))
    assert not is_metrics_log(write(tmp_path, header="TIMESTAMP,ContextTokens,GeneratedTokens"))
    with pytest.raises(HarliError, match="nowhere"):
        is_metrics_log(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("rows", "header", "named"),
    [
        (ROWS, HEADER.replace(COUNTERS[0], "tokens"), "has no column vllm:generation_tokens_total"),
        (ROWS, f"{HEADER},{COUNTERS[0]}", "has 2 columns vllm:generation_tokens_total"),
        (ROWS[:1], HEADER, "two rows"),
        ((*ROWS, "45,?,0,0.1,1000,6000"), HEADER, "line 5"),
        ((*ROWS, "45,1,0,nan,1000,6000"), HEADER, "line 5"),
        ((*ROWS, "45,1,0,0.1"), HEADER, "line 5"),
        ((*ROWS, "45,-1,0,0.1,1000,6000"), HEADER, "line 5"),
        ((*ROWS, "noon,1,0,0.1,1000,6000"), HEADER, "line 5"),
        ((*ROWS, "30,1,0,0.1,1000,6000"), HEADER, "sort the rows"),
        ((*ROWS, "45,1,0,12.5,1000,6000"), HEADER, "fraction"),
        (("0,0,0,0,5,5", "15,0,0,0,5,5"), HEADER, "never grows"),
    ],
)
def test_a_bad_log_is_one_line(tmp_path: Path, rows: tuple[str, ...], header: str, named: str) -> None:
    with pytest.raises(HarliError) as refused:
        read_metrics_log(write(tmp_path, *rows, header=header))
    assert named in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, *ROWS * 5000)
    path.write_bytes(path.read_bytes() + b"\xff\xfe")
    assert is_metrics_log(path)
    with pytest.raises(HarliError, match="cannot read the log"):
        read_metrics_log(path)


def test_a_cache_that_is_never_used_is_refused(tmp_path: Path) -> None:
    log = read_metrics_log(write(tmp_path, "0,1,0,0,5,5", "15,1,0,0,50,50"))
    with pytest.raises(HarliError, match="no KV cache"):
        reconstruct(log, "empty", 100, 0)


@pytest.mark.parametrize(("prompt", "output", "per_s"), [(300, 100, 4.0), (1200, 200, 2.0), (40, 400, 1.0)])
def test_requests_fit_the_metrics_that_others_left(prompt: int, output: int, per_s: float) -> None:
    """A memoryless stream served at 20 ms a token, looked at every 15 s."""
    step_s, until_s, kv_blocks = 0.02, 3600.0, 10_000
    rng = np.random.default_rng(1)
    begins_s = np.sort(rng.uniform(0.0, until_s, round(per_s * until_s)))
    lengths = rng.geometric(1.0 / output, len(begins_s))
    looks_s = np.arange(0.0, until_s + 1.0, 15.0)
    made = np.clip((looks_s[:, None] - begins_s) / step_s, 0.0, lengths)
    running = (looks_s[:, None] >= begins_s) & (made < lengths)
    log = MetricsLog(
        time_s=looks_s,
        running=running.sum(1).astype(float),
        waiting=np.zeros(len(looks_s)),
        kv_usage=((prompt + made) * running).sum(1) / 16.0 / kv_blocks,
        generated=np.diff(made.sum(1), prepend=0.0),
        prompts=np.diff(prompt * (looks_s[:, None] >= begins_s).sum(1).astype(float), prepend=0.0),
    )
    workload = reconstruct(log, "made", kv_blocks, 7)
    assert workload == reconstruct(log, "made", kv_blocks, 7) != reconstruct(log, "made", kv_blocks, 8)
    requests = workload.requests
    assert len(requests) == pytest.approx(len(begins_s), rel=0.1)
    assert sum(request.output_tokens for request in requests) == pytest.approx(lengths.sum(), rel=0.1)
    assert requests[0].prompt_tokens == pytest.approx(prompt, rel=0.1)
    assert requests[-1].arrival_s <= until_s


def test_what_is_there_at_first_arrives_at_first(tmp_path: Path) -> None:
    rows = ("0,3,2,0.5,0,0", "15,3,2,0.5,600,1200", "30,3,2,0.5,1200,2400")
    requests = reconstruct(read_metrics_log(write(tmp_path, *rows)), "busy", 1000, 0).requests
    assert [request.arrival_s for request in requests[:6]].count(0.0) == 5
