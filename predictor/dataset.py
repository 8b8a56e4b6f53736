"""The data that a predictor is trained on: one row per decode step, grouped into operating points."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from harli.types import Costs, HarliError, Menu, UnitTime
from predictor.base import Floats
from predictor.disturbance import disturbed
from predictor.sources import Source, read_profiled, read_run

MIN_POINTS = 10
"""Operating points that training needs at the least: some to fit, some to calibrate, some to score."""

STALL_MS = 5_000.0
"""A wait this long is a stalled unit, not a window."""

SAME = ("model", "role", "menu", "device")
SAME_VERSIONS = ("vllm", "torch")
"""What must agree for two identities to mean the same latency."""


@dataclass(frozen=True)
class Dataset:
    """Rows as arrays of equal length [rows], and what they were measured on."""

    point: NDArray[np.int64]
    """Operating point, from 0."""
    group: NDArray[np.int64]
    """What is held out as a whole: neighbouring steps leak, and so do a state's steps at another share. An id from
    0 to ``GROUP_IDS``, the same whenever these data are read."""
    batch: Floats
    context_sum: Floats
    context_max: Floats
    prefill_tokens: Floats
    admitted: Floats
    decode_units: Floats
    finetune_units: Floats
    microbatch_tokens: Floats
    kept_layers: Floats
    gap_ms: Floats
    """Without the exclusive window."""
    finetune_tokens: Floats
    """Training tokens done in the step; NaN where unknown, as after a window."""
    weight: Floats
    repeats: NDArray[np.bool_]
    """The row's point has one state, so its median is a noise floor; False for blocks of a run's steps."""
    menu: Menu
    identity: dict[str, Any]
    sha256: str = ""
    costs: Costs = field(default_factory=Costs)
    unit_times: tuple[UnitTime, ...] = ()
    finetune_alone_tokens_per_s: float = 0.0
    disturbed: int = 0
    """Steps left out because other processes had decode's cores."""

    def __len__(self) -> int:
        return len(self.point)

    def take(self, index: ArrayLike) -> Self:
        """The rows of ``index``, a mask or positions."""
        rows = np.asarray(index)
        return replace(self, **{name: getattr(self, name)[rows] for name in ROW_FIELDS})

    @cached_property
    def share(self) -> NDArray[np.int64]:
        """Each row's place in ``menu.shares``, found by its decode units."""
        order = np.array([share.decode for share in self.menu.shares])
        return np.asarray(np.argmax(self.decode_units[:, None] == order, axis=1), dtype=np.int64)

    @property
    def solo(self) -> NDArray[np.bool_]:
        """Rows of decode alone."""
        return np.asarray(self.share == 0)


ROW_FIELDS = tuple(item.name for item in fields(Dataset))[:15]


def states(menu: Menu, share: ArrayLike, batch: ArrayLike, context_sum: ArrayLike, **others: ArrayLike) -> Dataset:
    """Rows to predict: states at shares (places in ``menu.shares``), broadcast against each other.

    ``others`` are further columns of Dataset; by default contexts are equal, and there is neither prefill nor
    finetuning of any shape.
    """
    given = {"batch": batch, "context_sum": context_sum, **others}
    arrays = np.broadcast_arrays(np.atleast_1d(share), *given.values())
    columns = {name: array.astype(np.float64) for name, array in zip(given, arrays[1:], strict=True)}
    zeros = np.zeros(arrays[0].shape)
    columns.setdefault("context_max", columns["context_sum"] / np.maximum(columns["batch"], 1.0))
    shares = np.array([(share.decode, share.finetune) for share in menu.shares], dtype=np.float64)[arrays[0]]
    columns |= {"decode_units": shares[..., 0], "finetune_units": shares[..., 1], "weight": zeros + 1.0}
    columns |= {"gap_ms": zeros + np.nan, "finetune_tokens": zeros + np.nan}
    rows: dict[str, Any] = {name: columns.get(name, zeros) for name in ROW_FIELDS[2:-1]}
    none = zeros.astype(np.int64)
    return Dataset(point=none, group=none, repeats=none.astype(bool), menu=menu, identity={}, **rows)


def read_datasets(profiles: Sequence[Path], runs: Sequence[Path] = (), *, run_weight: float = 1.0) -> Dataset:
    """Profiles (folders, or plain tables as ``predictor.sources`` describes) and records of runs, as one dataset.

    Left out are first steps after idling, stalls, times in which other processes had decode's cores, and steps
    whose share is neither alone nor beside finetuning (there was nothing to finetune). ``run_weight`` is the
    weight of a run's row; a profile's has 1. Raises HarliError when a source is missing or damaged, when sources
    do not fit together, or when what they hold cannot be trained on.
    """
    sources = [*map(read_profiled, profiles), *map(read_run, runs)]
    if not sources:
        raise HarliError("nothing to train on: give a profile, or a run's record with --from-run")
    first = sources[0]
    for other in sources[1:]:
        if reasons := differences(first.identity, other.identity):
            raise HarliError(f"{first.path} and {other.path} do not belong together: {reasons[0]}")
    parts, next_point = [], 0
    for number, source in enumerate(sources):
        part = _usable(source, 1.0 if number < len(profiles) else run_weight)
        parts.append(replace(part, point=part.point + next_point))
        next_point += int(part.point.max(initial=-1)) + 1
    rows = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ROW_FIELDS}
    measured = next((source for source in sources if source.unit_times), first)
    data = replace(
        parts[0],
        **rows,
        costs=measured.costs,
        unit_times=measured.unit_times,
        sha256=_digest(rows, first.menu),
        disturbed=sum(part.disturbed for part in parts),
    )
    check_trainable(data)
    return replace(data, finetune_alone_tokens_per_s=_alone(data, sources))


def check_trainable(data: Dataset) -> None:
    """Raises HarliError when nothing can be learnt from ``data``."""
    if not len(data):
        raise HarliError("no step has a usable gap (empty, or NaN everywhere): profile again")
    if np.ptp(data.gap_ms) == 0.0:
        raise HarliError(f"every gap is {data.gap_ms[0]:g} ms: these are not measured latencies, profile again")
    if data.solo.all() or not data.solo.any():
        name = data.menu.shares[data.share[0]]
        raise HarliError(
            f"every step ran at the share {name}: slowdown needs decode alone and one split, profile again"
        )
    if (points := len(np.unique(data.point))) < MIN_POINTS:
        raise HarliError(f"{points} operating points are too few to train and calibrate: {MIN_POINTS} are needed")


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Why data or a predictor of identity ``one`` says nothing about ``other``; empty when it does."""
    pairs = [(key, one.get(key), other.get(key)) for key in SAME]
    versions = one.get("versions") or {}, other.get("versions") or {}
    pairs += [(key, versions[0].get(key), versions[1].get(key)) for key in SAME_VERSIONS]
    return [f"{key} {_said(here)} is not {_said(there)}" for key, here, there in pairs if here != there]


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {item}" for key, item in value.items()) + ")"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _usable(source: Source, weight: float) -> Dataset:
    columns, menu = dict(source.columns), source.menu
    window = columns.pop("window_ms")
    columns["gap_ms"] = columns["gap_ms"] - window
    columns["finetune_tokens"] = np.where(window > 0.0, np.nan, columns["finetune_tokens"])
    alone = columns["decode_units"] == menu.decode_alone.decode
    beside = np.isin(columns["decode_units"], [share.decode for share in menu.splits]) & (columns["finetune_units"] > 0)
    usable = np.isfinite(columns["gap_ms"]) & (columns["gap_ms"] > 0.0) & (window < STALL_MS) & (alone | beside)
    elsewhere = disturbed(columns.pop("decode_cpu_ms"), columns["gap_ms"], columns["decode_units"])
    keep = usable & ~elsewhere
    columns["weight"] = np.full(len(window), weight)
    point = columns.pop("point")[keep].astype(np.int64)
    rows = {name: column[keep] for name, column in columns.items()}
    return Dataset(
        point=point,
        group=source.group[keep],
        repeats=source.repeats[keep],
        menu=menu,
        identity=source.identity,
        disturbed=int((usable & elsewhere).sum()),
        **rows,
    )


def _alone(data: Dataset, sources: list[Source]) -> float:
    """Finetune tokens/s on the whole device, for the micro-batch that the data has most of.

    Where no source measured it: the best split's, in proportion to the units.
    """
    sizes, counts = np.unique(data.microbatch_tokens[~data.solo], return_counts=True)
    usual = int(sizes[np.argmax(counts)])
    for source in sources:
        if known := source.alone_tokens_per_s:
            return known[min(known, key=lambda tokens: abs(tokens - usual))]
    beside = data.take(~data.solo & np.isfinite(data.finetune_tokens))
    if not len(beside):
        return 0.0
    per_unit = beside.finetune_tokens.sum() / (beside.gap_ms * beside.finetune_units).sum() * 1e3
    return float(per_unit * data.menu.finetune_alone.finetune)


def _digest(rows: dict[str, NDArray[Any]], menu: Menu) -> str:
    digest = hashlib.sha256(" ".join(map(str, menu.shares)).encode())
    for name in ROW_FIELDS:
        digest.update(name.encode() + np.ascontiguousarray(rows[name]).tobytes())
    return digest.hexdigest()
