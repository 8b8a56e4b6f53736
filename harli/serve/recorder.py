"""The server's last steps and updates on disk, as record folders that ``harli train-predictor --from-run`` reads."""

from __future__ import annotations

import logging
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harli.config import RunSettings
from harli.engine import device
from harli.records.schema import RUN_FILE, FinetuneInfo, PredictorInfo, RunInfo
from harli.records.summary import summarise
from harli.records.writer import RecordWriter
from harli.rows import StepRecord, UpdateRecord

LOG = logging.getLogger(__name__)
FOLDER_ROWS = 50_000
"""A folder is closed when it has so many steps and updates; so many of each wait at most to be written."""
FOLDERS = 20
"""The oldest beyond these are removed."""


class Recorder:
    """For one thread. Requests are not recorded: what clients send is theirs."""

    def __init__(self, folder: Path, settings: RunSettings, predictor: PredictorInfo | None) -> None:
        """``folder``: gets a folder per ``FOLDER_ROWS`` rows."""
        self._folder = folder
        self._settings = settings
        self._predictor = predictor
        self._writer: RecordWriter | None = None
        self._info: RunInfo
        self._zero_s = 0.0
        self._updates: deque[UpdateRecord] = deque(maxlen=FOLDER_ROWS)

    def change_settings(self, settings: RunSettings) -> None:
        """What is written from now on was served under others, and goes into a folder of its own."""
        self._settings = settings
        self.close()

    def write(self, steps: Sequence[StepRecord], updates: Iterable[UpdateRecord]) -> None:
        """Add rows to the present folder, which begins with a step: updates wait for one.

        Raises HarliError when the disk refuses; later rows are tried again.
        """
        self._updates.extend(updates)
        if self._writer is None:
            if not steps:
                return
            self._begin(min([steps[0].time_s, *(row.time_s for row in self._updates)]))
        writer, zero = self._writer, self._zero_s
        assert writer is not None
        new_steps = [row._replace(time_s=row.time_s - zero) for row in steps]
        new_updates = [row._replace(time_s=row.time_s - zero) for row in self._updates]
        self._updates.clear()
        writer.add_steps(new_steps)
        writer.add_updates(new_updates)
        ends = [row.time_s + row.latency_ms / 1e3 for row in new_steps[-1:]] + [row.time_s for row in new_updates[-1:]]
        duration_s = max([self._info.duration_s, *ends])
        table = writer.steps
        summary = summarise(table, writer.requests, writer.updates, slo=self._info.slo, duration_s=duration_s)
        self._info = self._info.model_copy(update={"duration_s": duration_s, "summary": summary})
        if len(table) + len(writer.updates) < FOLDER_ROWS:
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
        folder = self._folder / f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}-{name}"
        try:
            self._writer = RecordWriter(folder, self._info)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)  # the next try makes another; a full disk would leave many
            raise
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


class RecordingThread:
    """A recorder in a thread of its own: a disk that hangs is no matter of decode.

    When the disk refuses, the steps at hand are dropped unless a folder has begun; updates wait.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._thread = ThreadPoolExecutor(1, "harli-records")
        self._last: Future[None] | None = None
        self._steps: deque[StepRecord] = deque(maxlen=FOLDER_ROWS)
        self._updates: deque[UpdateRecord] = deque(maxlen=FOLDER_ROWS)

    def add_steps(self, rows: Iterable[StepRecord]) -> None:
        self._steps.extend(rows)

    def add_updates(self, rows: Iterable[UpdateRecord]) -> None:
        self._updates.extend(rows)

    def write(self) -> None:
        """Begin to write what was added; while the disk still takes what was before, it waits for the next call."""
        if self._last is None or self._last.done():
            self._write()

    def change_settings(self, settings: RunSettings) -> None:
        """What is added from now on was served under others."""
        self._write()
        self._submit(self._recorder.change_settings, settings)

    def close(self) -> None:
        """Write the rest, and wait for it."""
        self._write()
        self._submit(self._recorder.close)
        self._thread.shutdown()

    def _write(self) -> None:
        if self._steps or self._updates:
            steps, updates = list(self._steps), list(self._updates)
            self._steps.clear()
            self._updates.clear()
            self._submit(self._recorder.write, steps, updates)

    def _submit(self, write: Callable[..., None], *args: Any) -> None:
        def recorded() -> None:
            try:
                write(*args)
            except Exception as error:
                LOG.warning("steps are not recorded: %s", error)

        self._last = self._thread.submit(recorded)
