"""The contract of a comparison: settings, runs and folder, whatever executes the runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from harli.compare.cell import SEPARATE, Entrant, groups
from harli.compare.plan import PRUNING, PlannedRun, alone_run, planned_s
from harli.compare.results import ComparisonFolder
from harli.compare.settings import COMPARISON_FILE, ComparisonInfo, ComparisonSettings, check_same
from harli.config import RunSettings, SloSettings
from harli.engine.device import versions
from harli.live import Progress as RunProgress
from harli.records.writer import make_folder, replacing
from harli.types import HarliError, Menu, Slo
from harli.workload.base import Workload

TRIAL_SLO_MS = 100.0
"""Policies are tried with it while the SLO still has to be measured."""


class Progress(NamedTuple):
    """What a comparison tells its caller from time to time, and when a run has ended."""

    planned: PlannedRun
    done_s: float
    """Seconds of workload that are over."""
    total_s: float
    live: RunProgress | None
    """None when the run has ended."""


OnProgress = Callable[[Progress], None]


class Comparison(ABC):
    """Making it checks the settings; nothing is written before ``prepare``."""

    workload: Workload
    """The requests of a whole run of the first round."""

    def __init__(self, settings: ComparisonSettings, menu: Menu, resume: Path | None = None) -> None:
        """``resume``: the folder of a comparison to resume; it has to be of the same settings.

        Raises HarliError for whatever the user can mend.
        """
        self.settings = settings
        self.menu = menu
        self.variants = groups(settings.policies, menu, settings.tuned)
        self.before = ComparisonFolder(resume) if resume else None
        """The comparison that is resumed."""
        if self.before is not None:
            check_same(self.before.info, settings, [str(share) for share in menu.shares])

    @abstractmethod
    def device(self) -> dict[str, Any]:
        """What the runs are done on, as their records describe it."""

    @abstractmethod
    def data_sha256(self, entrant: Entrant) -> str:
        """Of the data that an entrant's predictor was trained on; empty without a predictor or data."""

    def check_predictors(self) -> None:
        """Raises HarliError unless each entrant would go on with the predictor that it began with."""
        for planned in self.before.planned() if self.before else ():
            info = self.before.run_info(planned) if self.before else None
            used = info.predictor.data_sha256 if info and info.predictor else ""
            if info and used != self.data_sha256(planned.entrant):
                raise HarliError(
                    f"{planned} ran with another predictor than {self.settings.predictor} is now; "
                    "promote that one again (harli predictors), or begin a new comparison"
                )

    def prepare(self, folder: Path) -> None:
        """Create ``folder`` and describe the comparison in it; one that is resumed may get more rounds."""
        if self.before is None:
            make_folder(folder)
            info = self._info()
        elif self.before.info.settings == self.settings:
            return
        else:
            info = self.before.info.model_copy(update={"settings": self.settings})
        with replacing(folder / COMPARISON_FILE) as path:
            path.write_text(info.model_dump_json(indent=2) + "\n", encoding="utf-8")

    def run_settings(self, planned: PlannedRun) -> RunSettings:
        """The settings of one run."""
        slo = planned.objective.slo if planned.objective else Slo()
        workload = self.settings.run.workload
        changes: dict[str, Any] = {
            "policy": planned.entrant.policy,
            "params": dict(planned.entrant.params),
            "slo": SloSettings(itl_ms=slo.itl_ms, tpot_ms=slo.tpot_ms),
            "workload": workload.model_copy(update={"duration_s": planned_s(self.settings, planned)}),
        }
        return self.settings.run.model_copy(update=changes)

    def requests(self, planned: PlannedRun) -> Workload:
        """The requests of one run. Raises HarliError when the pruning pass is too short to have one."""
        workload = self.round_workload(planned.round)
        requests = workload.requests
        if planned.load == "none":
            requests = ()
        elif planned.load == "half":
            requests = requests[::2]
        elif planned.round == PRUNING:
            pruning_s = self.settings.pruning_s
            requests = tuple(one for one in requests if one.arrival_s < pruning_s)
            if not requests:
                raise HarliError(f"no request is due in the first {pruning_s:g} s; raise --prune-s")
        return replace(workload, requests=requests)

    def round_workload(self, number: int) -> Workload:
        """The requests of round ``number``, of which a run has all, some or none."""
        return self.workload

    def entrants(self) -> list[Entrant]:
        """All that may run, variants included."""
        alone = [alone_run(1, self.menu).entrant] if self.settings.dedicated else []
        return [SEPARATE, *alone, *(entrant for group in self.variants for entrant in group)]

    def trial_slo(self) -> Slo:
        """The SLO, or one of its kind, to try policies with before any run."""
        if self.settings.slo_scales:
            return Slo(**{f"{self.settings.slo_on}_ms": TRIAL_SLO_MS})
        return self.settings.run.slo.objective

    def _info(self) -> ComparisonInfo:
        return ComparisonInfo(
            settings=self.settings,
            menu=[str(share) for share in self.menu.shares],
            device=self.device(),
            versions=versions(),
            started_at=datetime.now(UTC).isoformat(),
        )
