"""Steps on disk: profiles, records of runs, and plain tables of other origin, read into one form.

A plain table is a parquet file with a row per decode step and at least the columns ``point`` (the id
of the operating point), ``batch``, ``context_sum``, ``decode_units``, ``finetune_units`` and ``gap_ms``;
any other column of ``COLUMNS`` may be there too, and ``group``, whose rows are held out together. Its device has the
most units that a row adds up to.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from harli.records.profile import Profile, read_profile
from harli.records.reader import read_record
from harli.types import Costs, HarliError, Menu, Share, UnitTime
from predictor.base import STATE
from predictor.drift import at_usual_speed, reference_course

COLUMNS = (
    "point", *STATE, "decode_units", "finetune_units", "microbatch_tokens", "kept_layers", "window_ms", "gap_ms",
    "finetune_tokens", "decode_cpu_ms",
)  # fmt: skip
NEEDED = ("point", "batch", "context_sum", "decode_units", "finetune_units", "gap_ms")
MAY_LACK = ("gap_ms", "finetune_tokens", "decode_cpu_ms")
"""Columns in which a step may have no number: after idling, after a window, where CPU time cannot be read."""

BLOCK_STEPS = 64
"""Steps that nobody sorted into operating points are cut into blocks of at most this many."""

RUN_GROUP_STEPS = 512
"""Steps of a run that are held out together; only at their ends have they neighbours elsewhere."""

GROUP_IDS = 1 << 63
"""Ids of groups are spread evenly below this."""

Columns = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Source:
    """One profile, run or table; ``columns`` has every name of ``COLUMNS``, all of equal length."""

    path: Path
    columns: Columns
    group: NDArray[np.int64]
    """The id of each row's group, as ``Dataset.group`` has it."""
    repeats: NDArray[np.bool_]
    """Rows of one point have the same state; False where a block of a run's steps stands in for a point."""
    menu: Menu
    identity: dict[str, Any]
    costs: Costs = field(default_factory=Costs)
    unit_times: tuple[UnitTime, ...] = ()
    alone_tokens_per_s: dict[int, float] = field(default_factory=dict)
    """Finetuning with the whole device, by tokens of a micro-batch; 0 stands for a mix of them."""


def read_profiled(path: Path) -> Source:
    """A folder of ``harli profile``, or a plain table. Raises HarliError when it is missing, damaged or newer."""
    if path.is_file():
        return _read_plain(path)
    profile = read_profile(path)
    info = profile.info
    columns = _columns(path, profile.steps, NEEDED)
    time_s = profile.steps["time_s"].to_numpy()
    at_usual_speed(columns, time_s, reference_course(profile.steps, profile.segments))
    menu = _menu(path, info.menu)
    repeats = columns["point"] >= 0
    outside = _blocks(columns["decode_units"], columns["gap_ms"], ~repeats)
    columns["point"] = np.where(repeats, columns["point"], outside + columns["point"].max(initial=-1.0) + 1.0)
    group = _ids(info.profile_id, _groups(profile))
    alone = {}
    for name, rate in info.finetune_alone_tokens_per_s.items():
        share, _, tokens = name.partition(" ")
        if share == str(menu.finetune_alone) and tokens.isdigit():
            alone[int(tokens)] = rate
    identity = _identity(info.model, info.role, info.device, info.versions, menu)
    return Source(path, columns, group, repeats, menu, identity, info.costs, info.unit_times, alone)


def read_run(folder: Path) -> Source:
    """A run's record folder. Raises HarliError as ``read_record`` does, and for a simulated run."""
    record = read_record(folder)
    info = record.info
    if info.simulated:
        raise HarliError(f"{folder} is a simulated run: a predictor learns from real ones only")
    columns = _columns(folder, record.steps, NEEDED[1:])
    everything = np.ones(len(columns["gap_ms"]), dtype=bool)
    columns["point"] = _blocks(columns["decode_units"], columns["gap_ms"], everything)
    group = _ids(info.run_id, np.arange(len(everything)) // RUN_GROUP_STEPS)
    menu = _menu(folder, info.menu)
    time_s, latency_ms = (record.steps[name].to_numpy() for name in ("time_s", "latency_ms"))
    idle = np.flatnonzero(np.isnan(columns["gap_ms"][1:]))  # the row before an idle time
    seconds = np.sum(np.diff(time_s)[idle] - latency_ms[idle] / 1e3)
    tokens = np.nansum(columns["finetune_tokens"][1:][idle])
    alone = {0: float(tokens / seconds)} if seconds > 1.0 and tokens > 0.0 else {}
    identity = _identity(info.model, info.role, info.device, info.versions, menu)
    return Source(folder, columns, group, ~everything, menu, identity, alone_tokens_per_s=alone)


def _read_plain(path: Path) -> Source:
    table = _read_table(path)
    columns = _columns(path, table, NEEDED)
    if not len(columns["gap_ms"]):
        raise HarliError(f"{path} has no rows: there is nothing to train on")
    decode = columns["decode_units"].astype(int)
    units = int((columns["decode_units"] + columns["finetune_units"]).max())
    if units < 1:
        raise HarliError(f"{path} has no step with compute units: decode_units and finetune_units are all 0")
    splits = sorted({int(n) for n in decode if 0 < n < units}, reverse=True)
    menu = Menu(tuple(Share(n, units - n) for n in (units, *splits, 0)))
    places = _numbers(path, table, "group") if "group" in table.column_names else _alike(columns)
    identity = _identity(path.stem, "unknown", {}, {}, menu)
    return Source(path, columns, _ids(path.stem, places), np.ones(len(decode), dtype=bool), menu, identity)


def _columns(path: Path, table: pa.Table, needed: tuple[str, ...]) -> Columns:
    """The columns as float64. Absent ones: no prefill, no window, contexts all equal, tokens unknown."""
    if missing := [name for name in needed if name not in table.column_names]:
        raise HarliError(f"{path} lacks the column {missing[0]}; a step needs {', '.join(needed)}")
    found = {name: _numbers(path, table, name) for name in COLUMNS if name in table.column_names}
    zeros = np.zeros(table.num_rows)
    defaults = {
        "context_max": found["context_sum"] / np.maximum(found["batch"], 1.0),
        "finetune_tokens": zeros + np.nan,
        "decode_cpu_ms": zeros + np.nan,
    }
    return {name: found.get(name, defaults.get(name, zeros)) for name in COLUMNS}


def _numbers(path: Path, table: pa.Table, name: str) -> NDArray[np.float64]:
    try:
        found = np.asarray(table[name].cast(pa.float64()).to_numpy(zero_copy_only=False), dtype=np.float64)
    except pa.ArrowException as error:
        raise HarliError(f"{path} has a column that is not made of numbers: {_line(error)}") from error
    if name not in MAY_LACK and not np.isfinite(found).all():
        raise HarliError(f"{path} is damaged: {name} of a step is missing or infinite; every step needs a number")
    return found


def _ids(source: str, places: NDArray[Any]) -> NDArray[np.int64]:
    """Ids of groups from their places in a source, [rows] or [rows, numbers]: the same whatever else there is."""
    found, index = np.unique(places, axis=0, return_inverse=True)
    digests = (blake2b(f"{source} {place.tolist()}".encode(), digest_size=8).digest() for place in found)
    ids = [int.from_bytes(digest) % GROUP_IDS for digest in digests]
    return np.array(ids, dtype=np.int64)[index]


def _alike(columns: Columns) -> NDArray[np.float64]:
    """For each row the least state of its group, [rows, STATE].

    A group has whole points, and all points that share a state: the same batch and contexts at another share.
    """
    states, state = np.unique(np.column_stack([columns[name] for name in STATE]), axis=0, return_inverse=True)
    points, point = np.unique(columns["point"], return_inverse=True)
    nodes = len(states) + len(points)
    links = coo_array((np.ones(len(state)), (state, len(states) + point)), shape=(nodes, nodes))
    part = connected_components(links, directed=False)[1]
    least = np.unique(part[: len(states)], return_index=True)[1]  # states are in order, so a part's first is its least
    found: NDArray[np.float64] = states[least[part[state]]]
    return found


def _groups(profile: Profile) -> NDArray[np.float64]:
    """For each step the group that was being visited: a visit begins after idling, and its segments have the group."""
    segment = profile.steps["segment"].to_numpy()
    visit = np.cumsum(np.isnan(profile.steps["gap_ms"].to_numpy()))
    group_of = dict(zip(*(profile.segments[name].to_pylist() for name in ("segment", "group")), strict=True))
    pairs = zip(visit.tolist(), segment.tolist(), strict=True)
    group_of_visit = {at: group_of.get(of, of) for at, of in pairs if of >= 0}
    return np.array([group_of_visit.get(at, 0) for at in visit.tolist()], dtype=np.float64)


def _blocks(decode_units: NDArray[np.float64], gap_ms: NDArray[np.float64], where: NDArray[np.bool_]) -> NDArray[Any]:
    """Ids from 0 of blocks of consecutive steps ``where``: one share, no idle time between, ``BLOCK_STEPS`` at most."""
    if not len(where):
        return np.zeros(0)
    fresh = np.ones(len(where), dtype=bool)
    fresh[1:] = (decode_units[1:] != decode_units[:-1]) | (where[1:] != where[:-1]) | np.isnan(gap_ms[1:])
    starts = np.flatnonzero(fresh)
    since = np.arange(len(where)) - starts[np.cumsum(fresh) - 1]
    return np.cumsum((since % BLOCK_STEPS == 0) & where).astype(np.float64) - 1.0


def _identity(model: str, role: str, device: dict[str, Any], versions: dict[str, str], menu: Menu) -> dict[str, Any]:
    return {
        "model": model, "role": role, "menu": [str(share) for share in menu.shares], "device": device,
        "versions": versions,
    }  # fmt: skip


def _menu(path: Path, names: list[str]) -> Menu:
    try:
        return Menu.parse(names)
    except ValueError:
        raise HarliError(f"{path} is damaged: {', '.join(names)} is not a menu of shares; copy it again") from None


def _read_table(path: Path) -> pa.Table:
    try:
        with pq.ParquetFile(path) as file:
            return file.read()
    except (OSError, pa.ArrowException) as error:  # pyarrow reports a corrupt page as a plain OSError
        raise HarliError(f"cannot read {path} ({_line(error)}): give a profile, or a parquet file") from error


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
