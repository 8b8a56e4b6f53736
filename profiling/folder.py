"""A profile's folder while it is being measured: new, or one that is resumed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa

from harli.records.profile import PROFILE_FILE, PROFILE_STEPS, SEGMENTS, UNITS, Profile, ProfileInfo
from harli.records.writer import Rows, make_folder, replacing
from harli.rows import UnitRecord
from profiling.collect import Visit


class ProfileFolder:
    """Collects rows in memory and writes them as often as asked; a reader never sees half a file."""

    def __init__(self, path: Path, before: Profile | None = None) -> None:
        """``before``: what ``path`` holds, to go on from. Raises HarliError when a new folder is not empty."""
        self.path = path
        if before is None:
            make_folder(path)
        self._steps = Rows(PROFILE_STEPS, before.steps if before else None)
        self._segments = Rows(SEGMENTS, before.segments if before else None)
        self._units = Rows(UNITS, before.units if before else None)

    def add(self, visit: Visit) -> None:
        self._steps.pending.extend(visit.steps)
        self._segments.pending.extend(visit.segments)
        self._units.pending.extend(visit.units)

    def add_units(self, units: Iterable[UnitRecord]) -> None:
        self._units.pending.extend(units)

    @property
    def steps(self) -> pa.Table:
        return self._steps.collect()

    @property
    def segments(self) -> pa.Table:
        return self._segments.collect()

    @property
    def units(self) -> pa.Table:
        return self._units.collect()

    def write(self, info: ProfileInfo) -> None:
        """Write all rows, then ``info``. Raises HarliError when the disk refuses; the files from before stay."""
        for rows in (self._steps, self._segments, self._units):
            rows.write(self.path)
        with replacing(self.path / PROFILE_FILE) as path:
            path.write_text(info.model_dump_json(indent=2) + "\n", encoding="utf-8")
