"""How good a profile is: what it covers, how noisy it is, and whether a predictor can be trained on it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from harli.records.columns import Floats, column
from harli.types import Menu
from predictor.disturbance import disturbed
from predictor.drift import REFERENCE, Visit, reference_course

GRID = 4
"""The space of batch and context is covered by so many cells a side, logarithmic in both."""
ENOUGH_POINTS = 60
LARGE_NOISE = 0.12
LARGE_DRIFT = 0.15
MUCH_DISTURBED = 0.01
BATCHES = ((1, 1), (2, 4), (5, 12), (13, 48), (49, 1 << 30))


@dataclass(frozen=True)
class Report:
    """Numbers of a profile.

    Noise is the mean deviation of a step's gap from the median of its operating point, as a fraction: what
    a predictor that knew every point exactly would still miss by. It is taken from the reference, which was
    visited throughout, since within seconds a machine is more like itself than it will be to a predictor.
    """

    points: int
    steps: int
    disturbed: float
    """Part of the steps in which other processes had decode's cores; the other numbers are without them."""
    noise_floor_solo: float | None
    noise_floor_corun: float | None
    drift: float | None
    """90th percentile of how far a reference segment's median is from the median of all of them, as a fraction."""
    drift_course: list[Visit]
    coverage: float
    """Fraction of the cells of batch and context that were measured."""
    slowdowns: dict[tuple[str, str], tuple[float, float]]
    """By split and batch: the median over groups of co-run over solo gap, and the spread (half the distance of the
    quartiles)."""
    finetune_tokens_per_s: dict[str, float]
    """By split, beside decode, over all groups."""
    verdict: list[str]

    def summary(self) -> dict[str, float | None]:
        """The numbers of ``--json``."""
        return {
            "profile/points": float(self.points),
            "profile/steps": float(self.steps),
            "profile/disturbed": self.disturbed,
            "profile/noise_floor_solo": self.noise_floor_solo,
            "profile/noise_floor_corun": self.noise_floor_corun,
            "profile/drift": self.drift,
            "profile/coverage": self.coverage,
        }


def assess(steps: pa.Table, segments: pa.Table, menu: Menu, planned: int, limits: tuple[int, int]) -> Report:
    """The report on a profile's tables.

    Args:
        steps: columns of PROFILE_STEPS.
        segments: columns of SegmentRecord.
        menu: of the device.
        planned: groups of the plan, repeats aside.
        limits: largest batch and longest context that the engine takes.
    """
    step_ms = column(steps, "gap_ms") - column(steps, "window_ms")
    elsewhere = disturbed(column(steps, "decode_cpu_ms"), step_ms, column(steps, "decode_units"))
    measured = steps["segment"].to_numpy() >= 0
    kept = steps.filter(pa.array(measured & ~elsewhere & (steps["exclusive_ms"].to_numpy() == 0.0)))
    point, gap, share = (column(kept, name) for name in ("point", "gap_ms", "finetune_units"))
    clean = np.isfinite(gap) & (column(kept, "admitted") == 0) & (column(kept, "prefill_tokens") == 0)
    medians = _medians(point[clean], gap[clean])
    deviation = np.array([abs(g / medians[p] - 1.0) for p, g in zip(point[clean], gap[clean], strict=True)])
    alone = share[clean] == 0
    again = np.isin(point[clean], _reference_points(segments))
    noise_solo, noise_corun = (_mean(deviation, side, again) for side in (alone, ~alone))
    course = reference_course(steps, segments)
    drift = float(np.percentile([abs(visit.slowness - 1.0) for visit in course], 90)) if len(course) > 2 else None
    groups = len(set(segments["group"].to_pylist()) - {planned})
    report = Report(
        points=len(medians),
        steps=int(measured.sum()),
        disturbed=float(elsewhere[measured].mean()) if measured.any() else 0.0,
        noise_floor_solo=noise_solo,
        noise_floor_corun=noise_corun,
        drift=drift,
        drift_course=course,
        coverage=_coverage(kept, limits),
        slowdowns=_slowdowns(kept, segments, menu),
        finetune_tokens_per_s=_rates(kept, menu),
        verdict=[],
    )
    report.verdict.extend(_verdict(report, groups, planned, menu))
    return report


def _verdict(report: Report, groups: int, planned: int, menu: Menu) -> list[str]:
    lines = []
    if groups < planned:
        lines.append(f"only {groups} of {planned} planned groups were measured: resume it, or give it more minutes")
    if report.points < ENOUGH_POINTS:
        lines.append(f"only a sketch: {report.points} operating points, {ENOUGH_POINTS} or more are good to train on")
    if report.disturbed > MUCH_DISTURBED:
        lines.append(f"other processes had decode's cores in {report.disturbed:.0%} of the steps, which are left out")
    for name, noise in (("solo", report.noise_floor_solo), ("co-run", report.noise_floor_corun)):
        if noise is not None and noise > LARGE_NOISE:
            lines.append(f"noisy: a step {name} is {noise:.0%} off its point's median; is something else running here?")
    if report.drift is not None and report.drift > LARGE_DRIFT:
        lines.append(f"the machine's speed drifted: the same point differed by {report.drift:.0%} over time")
    idle = [str(split) for split in menu.splits if not report.finetune_tokens_per_s.get(str(split))]
    if idle:
        lines.append(f"finetuning made no progress at {', '.join(idle)}")
    return lines


def _medians(keys: Floats, values: Floats) -> dict[float, float]:
    return {key: float(np.median(values[keys == key])) for key in np.unique(keys)}


def _reference_points(segments: pa.Table) -> list[int]:
    return [row["point"] for row in segments.to_pylist() if row["purpose"] == REFERENCE]


def _mean(values: Floats, side: NDArray[np.bool_], preferred: NDArray[np.bool_]) -> float | None:
    """Of the preferred values of a side, or of all of them where none is preferred; None of nothing."""
    chosen = side & preferred if (side & preferred).any() else side
    return float(values[chosen].mean()) if chosen.any() else None


def _coverage(kept: pa.Table, limits: tuple[int, int]) -> float:
    """Cells that cannot be reached because the KV cache is too small count as not covered."""
    batch, context = column(kept, "batch"), column(kept, "context_sum") / np.maximum(column(kept, "batch"), 1)
    places = [
        np.minimum((GRID * np.log(np.maximum(values, 1)) / math.log(max(most, 2))).astype(int), GRID - 1)
        for values, most in ((batch, limits[0]), (context, limits[1]))
    ]
    return len(set(zip(*(place.tolist() for place in places), strict=True))) / GRID**2


def _slowdowns(kept: pa.Table, segments: pa.Table, menu: Menu) -> dict[tuple[str, str], tuple[float, float]]:
    group_of = dict(zip(segments["segment"].to_pylist(), segments["group"].to_pylist(), strict=True))
    group = np.array([group_of[segment] for segment in kept["segment"].to_pylist()])
    gap, batch, decode = (column(kept, name) for name in ("gap_ms", "batch", "decode_units"))
    finetune = column(kept, "finetune_units")
    clean = np.isfinite(gap) & (column(kept, "admitted") == 0)
    ratios: dict[tuple[str, str], list[float]] = {}
    for number in np.unique(group):
        mine = clean & (group == number)
        solo = mine & (finetune == 0) & (decode == menu.decode_alone.decode)
        if not solo.any():
            continue
        size = int(np.median(batch[solo]))
        for split in menu.splits:
            beside = mine & (decode == split.decode) & (finetune > 0)
            if beside.any():
                ratio = float(np.median(gap[beside]) / np.median(gap[solo]))
                ratios.setdefault((str(split), _bucket(size)), []).append(ratio)
    return {
        key: (float(np.median(values)), float(np.subtract(*np.percentile(values, [75, 25]))) / 2.0)
        for key, values in sorted(ratios.items(), key=lambda item: (item[0][0], int(re.split("[-+]", item[0][1])[0])))
    }


def _bucket(batch: int) -> str:
    low, high = next(pair for pair in BATCHES if pair[0] <= batch <= pair[1])
    return str(low) if low == high else f"{low}-{high}" if high < 1 << 30 else f"{low}+"


def _rates(kept: pa.Table, menu: Menu) -> dict[str, float]:
    gap, tokens = column(kept, "gap_ms"), column(kept, "finetune_tokens")
    decode, finetune = column(kept, "decode_units"), column(kept, "finetune_units")
    rates = {}
    for split in menu.splits:
        mine = np.isfinite(gap) & (decode == split.decode) & (finetune > 0)
        if mine.any():
            rates[str(split)] = float(1e3 * tokens[mine].sum() / gap[mine].sum())
    return rates
