"""``harli simulate``: what a policy would do on a device, without an engine."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from harli.commands import flags
from harli.commands.flags import WORKLOAD, flag
from harli.commands.simulation_settings import device_of, simulation_settings
from harli.commands.table import run_table
from harli.types import HarliError

if TYPE_CHECKING:
    from harli.records.reader import Record
    from harli.records.schema import RunInfo
    from harli.simulate.like import Compared
    from harli.simulate.run import Simulation, SimulationSettings

FLEET = ("router", "jobs")
"""Flags that only a fleet has."""


def simulate(
    context: typer.Context,
    policy: flags.Policy = None,
    device: flags.Device = None,
    like: Annotated[Path | None, flag("Simulate this record's requests and settings, and print both.")] = None,
    param: flags.Param = None,
    role: flags.Role = None,
    slo_tpot_ms: flags.SloTpotMs = None,
    slo_itl_ms: flags.SloItlMs = None,
    trace: flags.Trace = None,
    rate_scale: flags.RateScale = None,
    length_scale: flags.LengthScale = None,
    requests_per_s: Annotated[
        float | None, flag("Rate of generated requests.", "5.5, or 1 with a predictor; per instance")
    ] = None,
    duration: Annotated[float | None, flag("Seconds of workload to serve.", "600, or 60 with a predictor")] = None,
    seed: Annotated[int | None, flag("Of the workload, the policy and the noise.", WORKLOAD.seed)] = None,
    updates: flags.Updates = None,
    microbatch_tokens: flags.SimulatedMicrobatchTokens = None,
    accumulation: flags.Accumulation = None,
    max_model_len: flags.SimulatedMaxModelLen = None,
    max_num_seqs: flags.SimulatedMaxNumSeqs = None,
    kv_blocks: flags.KvBlocks = None,
    noise: Annotated[float | None, flag("Sigma of the lognormal noise on steps and units.", 0.03)] = None,
    straggler_probability: Annotated[float | None, flag("Probability that a step straggles.", 0.0)] = None,
    straggler_factor: Annotated[float | None, flag("How many times longer such a step takes.", 5.0)] = None,
    drift_per_minute: Annotated[float | None, flag("Fraction by which steps get slower every minute.", 0.0)] = None,
    instances: Annotated[int | None, flag("Simulate a fleet of so many; rates are the fleet's.", min=1)] = None,
    router: Annotated[str | None, flag("round-robin or least-loaded, for a fleet.", "round-robin")] = None,
    jobs: Annotated[int | None, flag("Processes that simulate a fleet.", "one per core", min=1)] = None,
    out: Annotated[Path | None, flag("Record folder to create.", "records/TIME-POLICY-simulated")] = None,
    json_: flags.Json = False,
    quiet: flags.Quiet = False,
) -> None:
    """Simulate a decode instance with finetuning beside it, or a fleet of them, under one policy.

    Example: harli simulate --policy qos --slo-itl-ms 15 --duration 600

    Example: harli simulate --policy qos --slo-itl-ms 15 --instances 100 --router least-loaded
    """
    if instances is not None:
        from harli.commands.fleet import simulate_fleet

        return simulate_fleet(context.params)
    if given := [name for name in FLEET if context.params[name] is not None]:
        raise HarliError(f"--{given[0]} is for a fleet: give --instances, too")
    from harli.records.reader import read_record
    from harli.simulate.like import compare

    record = read_record(like) if like else None
    simulation, settings = _prepare(context.params, record)
    name = settings.policy.rsplit(":", 1)[-1]
    folder = out or Path("records", f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{name}-simulated")
    info = _execute(simulation, settings.workload.duration_s, folder, quiet=quiet)
    compared = compare(record.info, info) if record else []
    if json_:
        both = {"compared": {row.metric: row._asdict() for row in compared}} if record else {}
        typer.echo(json.dumps(info.summary | both))
        return
    Console().print(run_table(info))
    if record:
        Console().print(_comparison(record.info, info, compared))


def _prepare(given: dict[str, Any], record: Record | None) -> tuple[Simulation, SimulationSettings]:
    from harli.simulate.like import check_predictor, recorded_workload
    from harli.simulate.run import Simulation
    from harli.workload.make import make_workload

    settings, device = device_of(simulation_settings(given, record), record)
    if record and given["device"] is None:
        check_predictor(record, device)
    workload = recorded_workload(record) if record else make_workload(settings.workload, settings.engine.max_model_len)
    return Simulation(settings, device, workload), settings


def _execute(simulation: Simulation, duration_s: float, folder: Path, *, quiet: bool) -> RunInfo:
    """Simulate, publish, and say on stderr what is going on."""
    from harli.records.reader import read_record

    console, always = Console(stderr=True, quiet=quiet), Console(stderr=True, soft_wrap=True)
    requests, workload = simulation.workload.requests, simulation.workload.name
    clipped = sum(request.clipped for request in requests)
    console.print(f"{len(requests)} requests from {workload}, {clipped} clipped to the model's limit")
    where = f"record in {folder} (simulated)"
    try:
        with console.status("simulating") as status:
            info = simulation.execute(
                folder, lambda now_s: status.update(f"simulating: {now_s:,.0f} of {duration_s:,.0f} s")
            )
    except KeyboardInterrupt:
        always.print(where, markup=False, highlight=False)
        raise
    always.print(where, markup=False, highlight=False)
    try:
        with console.status("publishing to MLflow"):
            from harli.tracking.publish import publish

            publish(read_record(folder))
    except HarliError as error:
        always.print(f"harli: {error}", markup=False, highlight=False)
    return info


def _comparison(recorded: RunInfo, simulated: RunInfo, rows: list[Compared]) -> Table:
    first = f"{recorded.policy}{' (simulated)' if recorded.simulated else ''}"
    table = Table("", first, f"{simulated.policy} (simulated)", "ratio", box=None, pad_edge=False)
    for row in rows:
        numbers = (row.recorded, row.simulated, row.ratio)
        table.add_row(row.metric, *("-" if number is None else f"{number:,.2f}" for number in numbers))
    return table
