"""The settings of comparisons, from the flags of ``harli compare``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harli import settings_file
from harli.commands.flags import override
from harli.commands.simulation_settings import device_of, simulation_settings
from harli.types import HarliError

if TYPE_CHECKING:
    from harli.compare.settings import ComparisonSettings

OWN = ("rounds", "slo_on", "prune_s", "dedicated")
"""Settings that only a comparison has, and flags with the same names."""
SIMULATED = ("device", "kv_blocks", "noise", "jobs")
"""Flags that only a simulated comparison has."""
SETTLED = ("simulate", "device", "kv_blocks", "noise")
"""Flags that say what to run on."""
MEASURED = (
    "model", "predictor", "force_predictor", "finetune_data", "lora_rank", "lending", "dtype", "kv_cache_gib", "config",
)  # fmt: skip
"""Flags that have no meaning for one."""


def comparison_settings(flags: dict[str, Any]) -> list[ComparisonSettings]:
    """What the flags ask for: one comparison, or one per load when it is simulated.

    Raises HarliError for whatever is wrong with them.
    """
    flags = flags | {"policy": "separate", "param": None}  # what has no meaning, since all policies get their turn
    if flags["tune"] is None:
        _refuse(flags, ("trials",), "only with --tune is there")
    if flags["resume"]:
        return [_resumed(_one_load(flags))]
    if flags["simulate"]:
        _refuse(flags, MEASURED, "a simulation has no use for")
        return [_simulated(flags | {"rate_scale": scale}) for scale in flags["rate_scale"] or [None]]
    _refuse(flags, SIMULATED, "only with --simulate is there")
    flags = _one_load(flags)
    return [_made(flags, {}, settings_file.load(flags["config"]) if flags["config"] else {})]


def _simulated(flags: dict[str, Any]) -> ComparisonSettings:
    from harli.compare.settings import SimulatedDevice
    from harli.config import RunSettings

    settings, _ = device_of(simulation_settings(flags))
    own = {"simulation": settings.model_dump(include=set(SimulatedDevice.model_fields))}
    return _made(flags, own, settings.model_dump(include=set(RunSettings.model_fields)))


def _resumed(flags: dict[str, Any]) -> ComparisonSettings:
    """The settings of the comparison that is resumed."""
    from harli.compare.results import ComparisonFolder

    if flags["config"] or flags["out"] or flags["tune"]:
        raise HarliError("a comparison is resumed with its own settings; leave out --config, --out and --tune")
    _refuse(flags, SETTLED, "a comparison that is resumed has its own")
    settings = ComparisonFolder(flags["resume"]).info.settings
    if settings.simulation is None:
        _refuse(flags, SIMULATED, "only a simulated comparison has a use for")
    own = settings.model_dump(mode="json")
    return _made(flags, own, own.pop("run"))


def _made(flags: dict[str, Any], own: dict[str, Any], run: dict[str, Any]) -> ComparisonSettings:
    """A comparison's ``own`` settings and those of its runs, with the flags that were given on top."""
    from harli.compare.settings import ComparisonSettings

    run |= {"policy": "separate", "params": {}}
    override(run, flags)
    own = {"policies": ()} | own | {name: flags[name] for name in OWN if flags[name] is not None}
    if flags["slo_scale"]:
        own["slo_scales"] = flags["slo_scale"]
    if flags["policies"] is not None:
        own["policies"] = [name for name in flags["policies"].replace(" ", "").split(",") if name]
    if flags["tune"] is not None and flags["tune"] not in own["policies"]:
        own["policies"] = [*own["policies"], flags["tune"]]
    if own.get("slo_on", "itl") not in ("itl", "tpot"):
        raise HarliError(f"--slo-on must be itl or tpot, not {own['slo_on']!r}")
    return ComparisonSettings(**own, run=settings_file.validate(run))


def _one_load(flags: dict[str, Any]) -> dict[str, Any]:
    scales = flags["rate_scale"] or [None]
    if len(scales) > 1:
        raise HarliError("only with --simulate is there more than one --rate-scale; give one")
    return flags | {"rate_scale": scales[0]}


def _refuse(flags: dict[str, Any], names: tuple[str, ...], reason: str) -> None:
    for name in names:
        if flags[name] is not None:
            raise HarliError(f"{reason} --{name.replace('_', '-')}; leave it out")
