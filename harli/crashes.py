"""Jobs that were running when an engine process died: after two such deaths a job is quarantined.

What kills the process (a segfault, the kernel's OOM killer) cannot be contained in it, so a job that
may be the cause is not run a third time unless its user asks for it by name.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

from harli.config import FinetuneSettings
from harli.models import cache_folder
from harli.types import HarliError

LOG = logging.getLogger(__name__)
DEATHS_ALLOWED = 1


def job_name(model: str, settings: FinetuneSettings) -> str:
    """A name that the same job has in every run: its data file and a hash of what it does."""
    how = {"updates", "checkpoint_every", "lending", "max_lent"}
    what = json.dumps([model, settings.model_dump(mode="json", exclude=how)])
    stem = settings.data.stem if settings.data else "docstrings"
    return f"{stem}-{hashlib.sha256(what.encode()).hexdigest()[:8]}"


def quarantined(name: str) -> bool:
    """Whether the job was running at too many deaths."""
    return _read().get(name, 0) > DEATHS_ALLOWED


def check(name: str) -> None:
    """Raises HarliError if the job is in quarantine."""
    if quarantined(name):
        raise HarliError(
            f"job {name} was running when the engine process died, {_read()[name]} times, and is quarantined; "
            f"to run it all the same: --release-job {name}"
        )


def note(name: str) -> None:
    """The engine died while the job was running."""
    deaths = _read()
    _write({**deaths, name: deaths.get(name, 0) + 1})


def forget(name: str) -> None:
    """The job ran to its end, or its user asked for it by name."""
    deaths = _read()
    if deaths.pop(name, None) is not None:
        _write(deaths)


def _file() -> Path:
    return cache_folder() / "crashes.json"


def _read() -> dict[str, int]:
    try:
        deaths = json.loads(_file().read_text())
    except (OSError, ValueError):
        return {}
    return {str(name): int(count) for name, count in deaths.items()} if isinstance(deaths, dict) else {}


def _write(deaths: dict[str, int]) -> None:
    file = _file()
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(deaths) + "\n")
        os.replace(partial, file)
    except OSError as error:  # decode goes on all the same
        LOG.warning("deaths of jobs are not kept: cannot write %s (%s)", file, error.strerror or error)
