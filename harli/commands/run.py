"""``harli run``: serve a workload and finetune beside it, under one policy."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from harli import settings_file
from harli.commands import flags
from harli.commands.flags import FINETUNE, LORA, WORKLOAD, flag, run_settings
from harli.commands.interrupt import INTERRUPTED, run_interruptibly
from harli.commands.progress import RunProgress
from harli.commands.table import run_table
from harli.config import RunSettings
from harli.types import HarliError

if TYPE_CHECKING:
    from harli.records.schema import RunInfo


def run(
    context: typer.Context,
    policy: flags.Policy = None,
    model: flags.Model = None,
    param: flags.Param = None,
    predictor: flags.Predictor = None,
    force_predictor: flags.ForcePredictor = None,
    role: flags.Role = None,
    slo_tpot_ms: flags.SloTpotMs = None,
    slo_itl_ms: flags.SloItlMs = None,
    trace: flags.Trace = None,
    rate_scale: flags.RateScale = None,
    length_scale: flags.LengthScale = None,
    requests_per_s: flags.RequestsPerS = None,
    duration: Annotated[float | None, flag("Seconds of workload to serve.", WORKLOAD.duration_s)] = None,
    seed: Annotated[int | None, flag("Of the workload, the policy and finetuning.", WORKLOAD.seed)] = None,
    finetune_data: flags.FinetuneData = None,
    lora_rank: flags.LoraRank = None,
    lora_alpha: Annotated[float | None, flag("", LORA.alpha)] = None,
    lora_dropout: Annotated[float | None, flag("", LORA.dropout)] = None,
    lora_targets: Annotated[str | None, flag("Module names, with commas.", ",".join(LORA.targets))] = None,
    learning_rate: Annotated[float | None, flag("", FINETUNE.learning_rate)] = None,
    weight_decay: Annotated[float | None, flag("", FINETUNE.weight_decay)] = None,
    warmup_updates: Annotated[int | None, flag("", FINETUNE.warmup_updates)] = None,
    schedule: Annotated[str | None, flag("constant, linear or cosine, ending at --updates.", FINETUNE.schedule)] = None,
    updates: flags.Updates = None,
    microbatch_tokens: flags.MicrobatchTokens = None,
    accumulation: flags.Accumulation = None,
    checkpoint_every: Annotated[int | None, flag("Updates between checkpoints.", FINETUNE.checkpoint_every)] = None,
    lending: flags.Lending = None,
    dtype: flags.Dtype = None,
    max_model_len: flags.MaxModelLen = None,
    max_num_seqs: flags.MaxNumSeqs = None,
    kv_cache_gib: flags.KvCacheGib = None,
    config: Annotated[Path | None, flag("YAML file with settings; flags win over it.")] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the settings as YAML and stop.")] = False,
    resume: Annotated[Path | None, flag("Go on with the training job of this record or checkpoint.")] = None,
    release_job: Annotated[str | None, flag("Take the job of this name out of quarantine.")] = None,
    out: Annotated[Path | None, flag("Record folder to create.", "records/TIME-POLICY")] = None,
    json_: flags.Json = False,
    quiet: flags.Quiet = False,
) -> None:
    """Serve a workload on a decode instance and finetune a LoRA adapter beside it.

    Example: harli run --policy static --model small --slo-tpot-ms 80 --duration 60
    """
    settings = run_settings(context.params)
    if print_config:
        typer.echo(settings_file.dump(settings.model_dump(mode="json")), nl=False)
        return
    name = settings.policy.rsplit(":", 1)[-1]
    folder = out or Path("records", f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{name}")
    info = _execute(settings, folder, resume, release_job, quiet=quiet)
    if json_:
        typer.echo(json.dumps(info.summary))
    else:
        Console().print(run_table(info))
    if info.status == "interrupted":
        raise typer.Exit(INTERRUPTED)


def _execute(
    settings: RunSettings, folder: Path, resume: Path | None, release_job: str | None, *, quiet: bool
) -> RunInfo:
    """Run, publish, and say on stderr what is going on."""
    own_stderr = os.fdopen(os.dup(2), "w")  # stays ours while the engine's output goes to its log
    console, always = Console(file=own_stderr, quiet=quiet), Console(file=own_stderr, soft_wrap=True)
    with console.status("checking settings"):
        from harli.experiment import Experiment
        from harli.records.reader import read_record

        experiment = Experiment(settings, resume, release_job)
    requests, workload = experiment.workload.requests, experiment.workload.name
    clipped = sum(request.clipped for request in requests)
    console.print(f"{len(requests)} requests from {workload}, {clipped} clipped to the model's limit")
    if experiment.predictor.note:
        console.print(experiment.predictor.note, markup=False, highlight=False, soft_wrap=True)
    duration_s = settings.workload.duration_s
    with RunProgress(console, duration_s, len(requests), experiment.slo) as progress:
        run_interruptibly(experiment.execute(folder, progress.started, progress.update))
    record = read_record(folder)
    try:
        with console.status("publishing to MLflow"):
            from harli.tracking.publish import publish

            publish(record)
    except HarliError as error:
        always.print(f"harli: {error}", markup=False, highlight=False)
    adapter = f", adapter in {folder / record.info.finetune.adapter}" if record.info.finetune.adapter else ""
    always.print(f"record in {folder}{adapter}", markup=False, highlight=False)
    return record.info
