"""The settings of a simulation, from flags: what ``harli simulate`` and ``harli estimate`` have in common."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

from harli import settings_file
from harli.commands.flags import DEVICE, override
from harli.config import CHAMPION
from harli.types import HarliError

if TYPE_CHECKING:
    from harli.records.reader import Record
    from harli.simulate.device import Device
    from harli.simulate.run import SimulationSettings

ONLY_HERE = ("device", "kv_blocks", "noise")
"""Settings that a simulation has beside those of a run."""
RECORDED = ("trace", "rate_scale", "length_scale", "requests_per_s", "duration")
"""Flags that a record of requests leaves no room for."""
NOISE = {
    "sigma": "noise",
    "straggler_probability": "straggler_probability",
    "straggler_factor": "straggler_factor",
    "drift_per_minute": "drift_per_minute",
}
"""Fields of the noise, and the flags that give them."""


def simulation_settings(flags: dict[str, Any], record: Record | None = None) -> SimulationSettings:
    """What ``record`` was run with, or the device's usual settings, with the flags that were given on top.

    Raises HarliError for whatever is wrong with them.
    """
    from harli.simulate.run import SimulationSettings

    values, own = _usual(flags, record)
    own |= {name: flags[name] for name in ("device", "kv_blocks") if flags[name] is not None}
    own["noise"] = own.get("noise", {}) | {
        name: flags[given] for name, given in NOISE.items() if flags.get(given) is not None
    }
    own["predictor"] = own["device"]
    if flags["policy"] is not None and flags["policy"] != values.get("policy"):
        values["params"] = {}
    override(values, flags)
    return SimulationSettings.model_validate(settings_file.validate(values).model_dump() | own)


def device_of(settings: SimulationSettings, record: Record | None = None) -> tuple[SimulationSettings, Device]:
    """The device, and the settings with its model, unless a record has named one.

    Raises HarliError when there is no such device.
    """
    from harli.simulate.devices import make_device, predictor_folder

    folder = predictor_folder(settings.device)
    device = make_device(settings.device, folder, settings.finetune, settings.noise, settings.workload.seed)
    if record is None:
        engine = settings.engine.model_copy(update={"model": device.model})
        settings = settings.model_copy(update={"engine": engine})
    return settings, device


def _usual(flags: dict[str, Any], record: Record | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of a run, and those that only a simulation has, before any flag."""
    from harli.simulate.analytic import ROOFLINES
    from harli.simulate.devices import USUAL
    from harli.simulate.like import kv_blocks

    own: dict[str, Any]
    if record:
        if ignored := [name for name in RECORDED if flags[name] is not None]:
            raise HarliError(f"--like takes the requests of the record: leave out --{ignored[0].replace('_', '-')}")
        values = deepcopy(record.info.settings)
        own = {"device": values.get("predictor", CHAMPION), "kv_blocks": kv_blocks(record)}
    else:
        values = deepcopy(USUAL) if (flags["device"] or DEVICE) in ROOFLINES else {}
        own = {"device": DEVICE, "kv_blocks": None}
    return values, own | {name: values.pop(name) for name in ONLY_HERE if values.get(name) is not None}
