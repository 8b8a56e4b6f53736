"""An instance's own metrics over time, as Prometheus exports them, and a stream of requests that fits them.

A CSV file with a row per scrape: ``timestamp`` (seconds, or ISO 8601) and the columns of ``GAUGES`` and ``COUNTERS``,
named as vLLM names its metrics, with or without ``{labels}`` behind. Other columns are ignored.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np

from harli.simulate.served import BLOCK_TOKENS
from harli.types import HarliError
from harli.workload.base import Request, Workload
from predictor.base import Floats

TIME = "timestamp"
RUNNING, WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"
KV_USAGE = "vllm:kv_cache_usage_perc"
"""From 0 to 1."""
GENERATED, PROMPTS = "vllm:generation_tokens_total", "vllm:prompt_tokens_total"
GAUGES, COUNTERS = (RUNNING, WAITING, KV_USAGE), (GENERATED, PROMPTS)
COLUMNS = (TIME, *GAUGES, *COUNTERS)


class MetricsLog(NamedTuple):
    """Arrays over scrapes; counters as increases since the scrape before, 0 in the first."""

    time_s: Floats
    """From 0 on."""
    running: Floats
    waiting: Floats
    kv_usage: Floats
    generated: Floats
    prompts: Floats


def is_metrics_log(path: Path) -> bool:
    """Whether the first line of a file names a metric of vLLM's. Raises HarliError when it cannot be read."""
    with _opened(path) as file:
        return any(cell.startswith("vllm:") for cell in next(csv.reader(file), []))


def read_metrics_log(path: Path) -> MetricsLog:
    """The log in ``path``. A counter that falls was reset: its new value is the increase, as Prometheus takes it.

    Raises HarliError for a missing column, a cell that is no number, time that does not go forward, fewer than two
    rows, and a log in which nothing was generated.
    """
    with _opened(path) as file:
        reader = csv.reader(file)
        places = _places(path, next(reader, []))
        rows = [_row(path, reader.line_num, cells, places) for cells in reader if cells]
    if len(rows) < 2:
        raise HarliError(f"the log {path} needs two rows or more; export a longer time")
    time_s, running, waiting, kv_usage, *counters = np.array(rows).T
    backwards = np.flatnonzero(np.diff(time_s) <= 0.0)
    if backwards.size:
        raise HarliError(f"{path}: the timestamp of row {backwards[0] + 2} is not after the one before; sort the rows")
    if kv_usage.max() > 1.0:
        raise HarliError(f"{path}: {KV_USAGE} goes up to {kv_usage.max():g}; it has to be a fraction, from 0 to 1")
    generated, prompts = (_increases(counter) for counter in counters)
    if not generated.any():
        raise HarliError(f"{path}: {GENERATED} never grows, so there is nothing to estimate from")
    return MetricsLog(time_s - time_s[0], running, waiting, kv_usage, generated, prompts)


def reconstruct(log: MetricsLog, name: str, kv_blocks: int, seed: int) -> Workload:
    """Requests that would show these metrics; the same for the same seed.

    Metrics have no lengths, so the mean ones are inferred over the whole log. With ``o`` output and ``p`` prompt tokens
    a request, ``p / o`` is the ratio of prompt to generated tokens. Outputs are taken to be geometric, which a
    look-ahead policy assumes too: then a running request holds ``p + o`` tokens of KV cache on average, and the cache
    in use over the requests running gives ``o``. ``kv_blocks``: of the instance that was logged. A prefix cache that
    shares blocks makes requests seem shorter.

    In every interval as many requests arrive as left, which is generated tokens over ``o``, and as the number of those
    in the instance grew; they are spread over it at random, and those of the first scrape are there at 0 s. Every
    prompt has the mean length.

    Raises HarliError when the log shows no request running, or no KV cache in use.
    """
    held = kv_blocks * BLOCK_TOKENS * log.kv_usage[log.running > 0.0].sum()
    if not held:
        raise HarliError("the log shows no KV cache in use by a running request; nothing can be estimated from it")
    per_output = log.prompts.sum() / log.generated.sum()
    output = max(1.0, held / log.running.sum() / (1.0 + per_output))
    prompt = max(1, round(per_output * output))
    rng = np.random.default_rng(seed)
    inside = log.running + log.waiting
    expected = np.cumsum(log.generated / output + np.diff(inside, prepend=0.0))
    # What an interval lacks of whole requests, or has too few of since more left than came, counts in later ones.
    arrived = np.floor(np.maximum.accumulate(expected) + 0.5).astype(int)
    counts = np.diff(arrived, prepend=0)
    begins_s = np.concatenate(([0.0], log.time_s[:-1]))
    widths_s = log.time_s - begins_s
    arrivals_s = np.repeat(begins_s, counts) + np.repeat(widths_s, counts) * rng.random(counts.sum())
    outputs = rng.geometric(1.0 / output, counts.sum())
    requests = (
        Request(arrival_s, prompt, length)
        for arrival_s, length in zip(sorted(arrivals_s.tolist()), outputs.tolist(), strict=True)
    )
    return Workload(name, tuple(requests))


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield file
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise HarliError(f"cannot read the log {path}: {getattr(error, 'strerror', None) or error}") from None


def _places(path: Path, header: list[str]) -> list[int]:
    """Where each of ``COLUMNS`` is."""
    names = [cell.split("{", 1)[0].strip() for cell in header]
    for column in COLUMNS:
        if names.count(column) != 1:
            problem = f"has {names.count(column)} columns {column}" if column in names else f"has no column {column}"
            raise HarliError(f"the log {path} {problem}; it needs one each of {', '.join(COLUMNS)}")
    return [names.index(column) for column in COLUMNS]


def _row(path: Path, line: int, cells: list[str], places: list[int]) -> list[float]:
    found = [cells[place].strip() if place < len(cells) else "" for place in places]
    try:
        row = [_seconds(found[0]), *map(float, found[1:])]
        if not all(map(math.isfinite, row)) or min(row[1:]) < 0.0:
            raise ValueError
    except ValueError:
        shown = ", ".join(f"{column}={cell!r}" for column, cell in zip(COLUMNS, found, strict=True))
        raise HarliError(
            f"{path}, line {line}: expected a time and numbers from 0 on, found {shown}; correct or remove the line"
        ) from None
    return row


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _increases(counter: Floats) -> Floats:
    change = np.diff(counter, prepend=counter[0])
    return np.where(change < 0.0, counter, change)
