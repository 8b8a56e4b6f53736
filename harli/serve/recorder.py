"""The server's last steps and updates on disk, as record folders that ``harli train-predictor --from-run`` reads."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from harli.config import RunSettings
from harli.engine import device
from harli.records.schema import RUN_FILE, FinetuneInfo, PredictorInfo, RunInfo
from harli.records.summary import summarise
from harli.records.writer import RecordWriter
from harli.rows import StepRecord, UpdateRecord

FOLDER_STEPS = 50_000
"""A folder is closed when it has this many."""
FOLDERS = 20
"""The oldest beyond these are removed."""


class Recorder:
    """For one thread. Requests are not recorded: what clients send is theirs."""

    def __init__(self, folder: Path, settings: RunSettings, predictor: PredictorInfo | None) -> None:
        """``folder``: gets a folder per ``FOLDER_STEPS`` steps."""
        self._folder = folder
        self._settings = settings
        self._predictor = predictor
        self._writer: RecordWriter | None = None
        self._info: RunInfo
        self._zero_s = 0.0

    def change_settings(self, settings: RunSettings) -> None:
        """What is written from now on was served under others, and goes into a folder of its own."""
        self._settings = settings
        self.close()

    def write(self, steps: Sequence[StepRecord], updates: Sequence[UpdateRecord]) -> None:
        """Add rows to the present folder. Raises HarliError when the disk refuses; later rows are tried again."""
        if not steps:
            return
        if self._writer is None:
            self._begin(steps[0].time_s)
        writer, zero = self._writer, self._zero_s
        assert writer is not None
        writer.add_steps(row._replace(time_s=row.time_s - zero) for row in steps)
        writer.add_updates(row._replace(time_s=row.time_s - zero) for row in updates)
        table, last = writer.steps, steps[-1]
        duration_s = last.time_s - zero + last.latency_ms / 1e3
        summary = summarise(table, writer.requests, writer.updates, slo=self._info.slo, duration_s=duration_s)
        self._info = self._info.model_copy(update={"duration_s": duration_s, "summary": summary})
        if len(table) < FOLDER_STEPS:
            writer.write(self._info)
        else:
            self.close()

    def close(self) -> None:
        """The next rows begin a new folder. Raises HarliError as ``write`` does."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.write(self._info.model_copy(update={"status": "finished"}))

    def _begin(self, zero_s: float) -> None:
        self._zero_s, self._info = zero_s, self._describe()
        name = self._info.name.rsplit(":", 1)[-1]
        self._writer = RecordWriter(self._folder / f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}-{name}", self._info)
        for old in sorted(self._folder.glob(f"*/{RUN_FILE}"))[:-FOLDERS]:
            shutil.rmtree(old.parent, ignore_errors=True)

    def _describe(self) -> RunInfo:
        return RunInfo.begun(
            self._settings,
            menu=[str(share) for share in device.menu().shares],
            device=device.describe(),
            versions=device.versions(),
            finetune=FinetuneInfo(state="off", reason="jobs are kept by the server"),
            predictor=self._predictor,
        )
