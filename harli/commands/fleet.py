"""``harli simulate --instances``: the settings of a fleet, its progress and its table."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table

from harli.commands.simulation_settings import simulation_settings
from harli.commands.work_bar import WorkBar
from harli.types import HarliError

if TYPE_CHECKING:
    from harli.simulate.fleet import FleetInfo
    from harli.simulate.run import SimulationSettings


def simulate_fleet(flags: dict[str, Any]) -> None:
    """Simulate the fleet that the flags of ``harli simulate`` describe. Raises HarliError when they do not."""
    if flags["like"]:
        raise HarliError("--like simulates the one instance of a record: leave out --instances")
    console, always = Console(stderr=True, quiet=flags["quiet"]), Console(stderr=True, soft_wrap=True)
    with console.status("routing requests"):
        from harli.simulate.devices import predictor_folder
        from harli.simulate.fleet import Fleet, FleetSettings
        from harli.simulate.routing import ROUTERS
        from harli.workload.make import make_workload

        wanted = flags["router"] or ROUTERS[0]
        router = next((known for known in ROUTERS if known == wanted), None)
        if router is None:
            raise HarliError(f"--router must be {' or '.join(ROUTERS)}, not {wanted!r}")
        one = _instance(flags)
        settings = FleetSettings(instances=flags["instances"], router=router, instance=one)
        fleet = Fleet(settings, predictor_folder(one.device), make_workload(one.workload, one.engine.max_model_len))
    console.print(
        f"{len(fleet.workload.requests)} requests from {fleet.workload.name} for {settings.instances} instances"
    )
    name = one.policy.rsplit(":", 1)[-1]
    folder = flags["out"] or Path("records", f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{name}-fleet-simulated")
    with WorkBar(console, "simulating", settings.instances) as bar:
        info = fleet.execute(folder, flags["jobs"], bar.update)
    always.print(f"fleet in {folder} (simulated)", markup=False, highlight=False)
    if flags["json_"]:
        typer.echo(json.dumps(info.summary))
    else:
        Console().print(_table(info))


def _instance(flags: dict[str, Any]) -> SimulationSettings:
    """Of an instance; generated requests come at the usual rate for each, unless a rate is given for all."""
    one = simulation_settings(flags)
    if flags["requests_per_s"] is None:
        workload = one.workload
        rate = flags["instances"] * workload.requests_per_s
        one = one.model_copy(update={"workload": workload.model_copy(update={"requests_per_s": rate})})
    return one


def _table(info: FleetInfo) -> Table:
    settings, metrics = info.settings, info.summary
    title = (
        f"{settings.instances:,} instances of {info.model}, {settings.instance.policy}, {settings.router} (simulated)"
    )
    table = Table(title=title, box=None, show_header=False, title_justify="left", title_style="bold", pad_edge=False)
    table.add_column(style="dim")
    table.add_column()

    def number(name: str, shown: str = "{:,.1f}") -> str:
        value = metrics[name]
        return "-" if value is None else shown.format(value)

    completed = number("decode/requests_completed", "{:,.0f}")
    table.add_row("requests", f"{completed} completed, {number('decode/requests_per_s')}/s")
    table.add_row("batch", f"{number('decode/batch_mean')} mean")
    slo = settings.instance.slo
    for kind, limit_ms in (("itl", slo.itl_ms), ("tpot", slo.tpot_ms)):
        if limit_ms is not None:
            attained, worst = (number(f"slo/{kind}_attainment{end}", "{:.2%}") for end in ("", "_worst"))
            table.add_row(kind.upper(), f"{attained} within {limit_ms:g} ms; the worst instance {worst}")
    table.add_row("queue wait p99", f"{number('decode/queue_wait_p99_worst_ms')} ms at the worst instance")
    dedicated = number("finetune/tokens_per_s_dedicated")
    table.add_row("finetune", f"{number('finetune/tokens_per_s')} tokens/s")
    table.add_row(
        "GPU-hours a day", f"{number('finetune/gpu_hours_per_day')} of GPUs that make {dedicated} tokens/s each"
    )
    if info.failed:
        table.add_row("stopped", f"finetuning of {info.failed} instances")
    return table
