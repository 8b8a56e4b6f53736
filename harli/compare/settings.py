"""Settings of a comparison, and what its folder says of it."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from harli.compare.cell import Objective, Value
from harli.config import Name, RunSettings, Settings
from harli.records.schema import SCHEMA_VERSION, Info
from harli.simulate.device import Noise
from harli.types import HarliError, Slo
from predictor.dataset import differences

COMPARISON_FILE = "comparison.json"

BASE_METRICS = {"itl": "decode/itl_p99_ms", "tpot": "decode/tpot_p99_ms"}
"""What an SLO scale is a multiple of, as decode alone shows it."""


PRUNE_S = 20.0


class SimulatedDevice(Settings):
    """What a simulation has beside the settings of a run, as in ``harli.simulate.run.SimulationSettings``."""

    device: Name
    kv_blocks: PositiveInt | None = None
    noise: Noise = Noise()


class ComparisonSettings(Settings):
    """Everything that ``harli compare`` needs. Impossible values raise HarliError."""

    policies: tuple[Name, ...]
    rounds: int = 3
    slo_scales: tuple[float, ...] = ()
    slo_on: Literal["itl", "tpot"] = "itl"
    """Which latency the scales are about."""
    prune_s: float | None = None
    """Seconds of the workload in the pass that chooses among a policy's variants; without it, ``PRUNE_S`` or, where
    nobody has to wait for them, all."""
    dedicated: bool = False
    """Half of the requests and finetuning alone, too."""
    run: RunSettings
    """What all runs have in common; its policy does not matter."""
    tuned: dict[Name, dict[str, Value]] = Field(default_factory=dict)
    """By policy, parameters with which it takes part once more."""
    simulation: SimulatedDevice | None = None
    """What the runs are simulated on; None for an engine."""

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if not self.policies:
            raise HarliError("nothing to compare: give --policies, such as --policies qos,static")
        if self.rounds < 1:
            raise HarliError(f"--rounds must be 1 or more, not {self.rounds}")
        if self.prune_s is not None and not self.prune_s > 0.0:
            raise HarliError(f"--prune-s must be a positive number of seconds, not {self.prune_s:g}")
        given = self.run.slo.itl_ms is not None or self.run.slo.tpot_ms is not None
        if not given and not self.slo_scales:
            raise HarliError("a comparison needs an SLO: give --slo-scale, --slo-itl-ms or --slo-tpot-ms")
        if given and self.slo_scales:
            raise HarliError("the SLO is given twice: leave out --slo-scale, or --slo-itl-ms and --slo-tpot-ms")
        if any(not 0.0 < scale < float("inf") for scale in self.slo_scales):
            raise HarliError("--slo-scale must be a positive number")
        if any(one == other for one, other in pairwise(sorted(self.slo_scales))):
            raise HarliError("--slo-scale has the same number twice; leave one out")
        return self

    @property
    def predictor(self) -> str:
        """The name of the predictor that is used."""
        return self.simulation.device if self.simulation else self.run.predictor

    @property
    def pruning_s(self) -> float:
        """How long the runs of that pass are."""
        duration_s = self.run.workload.duration_s
        return min(self.prune_s or (duration_s if self.simulation else PRUNE_S), duration_s)

    def objectives(self, alone: dict[str, float | None]) -> tuple[Objective, ...]:
        """The SLOs to compare at; ``alone`` has the metrics of decode alone on the same requests.

        Raises HarliError when there is nothing to scale.
        """
        if not self.slo_scales:
            return (Objective(self.run.slo.objective),)
        base_ms = alone[BASE_METRICS[self.slo_on]]
        if base_ms is None:
            raise HarliError("no request has two output tokens, so there is no latency to scale; choose another trace")
        return tuple(Objective(Slo(**{f"{self.slo_on}_ms": scale * base_ms}), scale) for scale in self.slo_scales)


class ComparisonInfo(Info):
    """``comparison.json``: what was compared; the results are in the records beside it."""

    @classmethod
    def described(cls) -> str:
        return "a comparison"

    schema_version: int = SCHEMA_VERSION
    comparison_id: str = Field(default_factory=lambda: uuid.uuid4().hex)
    kind: Literal["comparison"] = "comparison"
    settings: ComparisonSettings
    menu: list[str]
    device: dict[str, Any]
    versions: dict[str, str]
    started_at: str
    """ISO 8601, UTC."""


def check_same(recorded: ComparisonInfo, settings: ComparisonSettings, menu: Sequence[str]) -> None:
    """Raises HarliError unless a comparison can be resumed under these settings, on a device with this menu.

    There may be more rounds than before.
    """
    before, now = recorded.settings.model_dump(mode="json"), settings.model_dump(mode="json")
    before["rounds"] = max(before["rounds"], now["rounds"])
    if different := [name for name in now if before[name] != now[name]]:
        raise HarliError(
            f"the comparison was begun with other settings ({', '.join(different)}); leave the flags out to resume it"
        )
    if recorded.menu != list(menu):
        raise HarliError(
            f"the comparison was begun on a device with the shares {', '.join(recorded.menu)}, this one has "
            f"{', '.join(menu)}; begin a new one"
        )


def check_identity(recorded: ComparisonInfo, device: Mapping[str, Any], versions: Mapping[str, str]) -> None:
    """Raises HarliError unless what is measured here goes with what was measured before."""
    before = {"device": recorded.device, "versions": recorded.versions}
    if reasons := differences(before, {"device": dict(device), "versions": dict(versions)}):
        raise HarliError(f"the comparison was begun with another device or version: {reasons[0]}; begin a new one")
