"""``harli estimate``: what a production instance would yield, from its log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from harli.commands import flags
from harli.commands.complete import policies
from harli.commands.flags import flag
from harli.commands.simulation_settings import device_of, simulation_settings
from harli.commands.work_bar import WorkBar

if TYPE_CHECKING:
    from harli.simulate.estimate import Estimate, Log

POLICY = "qos"
HOUR_S = 3600.0
SHOWN = {
    "decode/requests_per_s": "{:,.2f}",
    "decode/batch_mean": "{:,.1f}",
    "decode/itl_p50_ms": "{:,.1f}",
    "decode/itl_p99_ms": "{:,.1f}",
    "decode/ttft_p99_ms": "{:,.0f}",
    "decode/queue_wait_p99_ms": "{:,.0f}",
    "slo/itl_attainment": "{:.2%}",
    "slo/tpot_attainment": "{:.2%}",
    "finetune/tokens_per_s": "{:,.0f}",
}


def estimate(
    context: typer.Context,
    log: Annotated[Path, typer.Option(help="Trace of requests, or vLLM's metrics over time as CSV.")],
    slo_itl_ms: flags.SloItlMs = None,
    slo_tpot_ms: flags.SloTpotMs = None,
    device: flags.Device = None,
    policy: Annotated[
        str | None, flag("Which policy, see `harli policies`; or path.py:Class.", POLICY, autocompletion=policies)
    ] = None,
    param: flags.Param = None,
    role: flags.Role = None,
    duration: Annotated[float | None, flag("Seconds of the log, from its beginning.", HOUR_S)] = None,
    seed: Annotated[int | None, flag("Of the requests made from metrics, the policy and the noise.", 0)] = None,
    microbatch_tokens: flags.SimulatedMicrobatchTokens = None,
    max_model_len: flags.SimulatedMaxModelLen = None,
    max_num_seqs: flags.SimulatedMaxNumSeqs = None,
    kv_blocks: flags.KvBlocks = None,
    json_: Annotated[bool, typer.Option("--json", help="Print both simulations' metrics as one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="On stderr only errors.")] = False,
) -> None:
    """Estimate from a log what finetuning beside an instance would yield, and what it would cost its requests.

    Metrics need --kv-blocks of the instance, and the columns timestamp, vllm:num_requests_running,
    vllm:num_requests_waiting, vllm:kv_cache_usage_perc, vllm:generation_tokens_total, vllm:prompt_tokens_total.

    Example: harli estimate --log requests.csv --slo-itl-ms 20
    """
    console = Console(stderr=True, quiet=quiet, soft_wrap=True)
    with console.status("reading the log"):
        from harli.simulate.devices import predictor_folder
        from harli.simulate.estimate import estimate as estimated
        from harli.simulate.estimate import read_log

        given = context.params | {"policy": policy or POLICY, "duration": HOUR_S if duration is None else duration}
        settings, _ = device_of(simulation_settings(given))
        found = read_log(log, settings)
    part = "" if found.duration_s == found.total_s else f", the first {found.duration_s:,.0f} s of {found.total_s:,.0f}"
    console.print(f"{len(found.requests.requests)} requests from {log}{part}", highlight=False)
    with WorkBar(console, "simulating", 2.0 * found.duration_s) as bar:
        result = estimated(settings, predictor_folder(settings.device), found, bar.update)
    if json_:
        typer.echo(
            json.dumps(
                {
                    "simulated": True,
                    "device": settings.device,
                    "policy": settings.policy,
                    "log_running_mean": found.running,
                    "decode_alone_running_mean": result.alone_running,
                    "decode_alone": result.alone.summary,
                    "with_finetuning": result.beside.summary,
                    "gpu_hours_per_day": result.gpu_hours_per_day,
                }
            )
        )
    else:
        Console().print(_table(result, found))


def _table(result: Estimate, log: Log) -> Table:
    beside = result.beside
    title = f"{log.requests.name} on {beside.model}, {log.duration_s:,.0f} s (simulated)"
    table = Table("", "decode alone", beside.policy, title=title, box=None, title_justify="left", pad_edge=False)
    if log.running is not None:
        table.add_row("running, as logged", f"{log.running:,.1f}", "-")
        table.add_row("running, simulated", f"{result.alone_running:,.1f}", "-")
    for name, shown in SHOWN.items():
        values = [info.summary[name] for info in (result.alone, beside)]
        if any(value is not None for value in values):
            table.add_row(name, *("-" if value is None else shown.format(value) for value in values))
    table.add_row("GPU-hours a day", "-", f"{result.gpu_hours_per_day:,.1f}")
    if beside.finetune.reason:
        table.add_row("stopped", "-", beside.finetune.reason)
    return table
