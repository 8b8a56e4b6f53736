from __future__ import annotations

import sys

import numpy as np
import pytest

from harli.records.reader import Record
from harli.records.schema import REQUESTS, STEPS, UPDATES
from harli.tracking.figures import timeline
from tests.records.builders import run_info, small_run


def slo_lines(figure) -> set[str]:
    return {line.get_label() for axes in figure.axes for line in axes.lines if "SLO" in str(line.get_label())}


def test_panels_share_time_and_are_labelled(record):
    figure = timeline(record)
    labels = [axes.get_ylabel().replace("\n", " ") for axes in figure.axes]
    assert labels == [
        "batch (requests)",
        "ITL (ms)",
        "KV cache (decoding)",
        "finetune share while decoding",
        "finetune (tokens/s)",
        "loss",
    ]
    assert figure.axes[-1].get_xlabel() == "time (s)"
    assert all(axes.get_xlim() == pytest.approx((0.0, 20.0)) for axes in figure.axes)
    assert (figure.get_size_inches() * figure.dpi).tolist() == [1080, 960]


def test_title_and_slo(tmp_path, record):
    assert timeline(record).get_suptitle() == "fixed on model-24M"
    assert slo_lines(timeline(record)) == {"ITL SLO, 30 ms", "TPOT SLO, 28 ms"}
    other = small_run(tmp_path / "other", simulated=True, slo={"itl_ms": None}, model="/models/tiny/")
    assert timeline(other).get_suptitle() == "fixed on tiny (simulated)"
    assert slo_lines(timeline(other)) == set()


def test_the_panels_show_the_run(record):
    batch, itl, cache, _, rate, loss = timeline(record).axes
    time_s, requests = batch.lines[0].get_data()
    assert set(requests[(time_s > 8.2) & (time_s < 11.8)]) == {0.0}
    assert np.nanmin(requests[time_s < 7.8]) > 0.0
    p99, median = (line.get_ydata() for line in itl.lines[:2])
    assert (p99[np.isfinite(p99)] >= median[np.isfinite(p99)]).all()
    assert rate.lines[0].get_ydata().mean() == pytest.approx(record.info.summary["finetune/tokens_per_s"])
    assert loss.lines[0].get_ydata()[[0, -1]] == pytest.approx([5.0, 4.1])
    used, lent = (area.get_paths()[0].vertices for area in cache.collections)
    assert (used[:, 1].max(), lent[:, 1].max()) == pytest.approx((0.5, 0.7))  # stacked: the second is the sum


def test_an_empty_record_can_be_drawn(tmp_path):
    record = Record(tmp_path, run_info(duration_s=0.0), STEPS.table([]), REQUESTS.table([]), UPDATES.table([]))
    timeline(record).savefig(tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")


def test_pyplot_stays_out_of_it(record):
    if "matplotlib.pyplot" in sys.modules:
        pytest.skip("something else has imported pyplot")
    timeline(record)
    assert "matplotlib.pyplot" not in sys.modules
