"""``harli run``: serve a workload and finetune beside it, under one policy."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from harli import settings_file
from harli.commands.complete import models, policies
from harli.commands.interrupt import INTERRUPTED, run_interruptibly
from harli.commands.progress import RunProgress
from harli.commands.table import run_table
from harli.config import EngineSettings, FinetuneSettings, LoraSettings, RunSettings, WorkloadSettings
from harli.types import HarliError

if TYPE_CHECKING:
    from harli.records.schema import RunInfo

ENGINE, FINETUNE, LORA, WORKLOAD = EngineSettings(), FinetuneSettings(), LoraSettings(), WorkloadSettings()

SETTINGS = {
    "policy": "policy",
    "predictor": "predictor",
    "force_predictor": "force_predictor",
    "model": "engine.model",
    "role": "engine.role",
    "dtype": "engine.dtype",
    "max_model_len": "engine.max_model_len",
    "max_num_seqs": "engine.max_num_seqs",
    "kv_cache_gib": "engine.kv_cache_gib",
    "slo_tpot_ms": "slo.tpot_ms",
    "slo_itl_ms": "slo.itl_ms",
    "trace": "workload.trace",
    "rate_scale": "workload.rate_scale",
    "length_scale": "workload.length_scale",
    "requests_per_s": "workload.requests_per_s",
    "duration": "workload.duration_s",
    "finetune_data": "finetune.data",
    "lora_rank": "finetune.lora.rank",
    "lora_alpha": "finetune.lora.alpha",
    "lora_dropout": "finetune.lora.dropout",
    "learning_rate": "finetune.learning_rate",
    "weight_decay": "finetune.weight_decay",
    "warmup_updates": "finetune.warmup_updates",
    "schedule": "finetune.schedule",
    "updates": "finetune.updates",
    "microbatch_tokens": "finetune.microbatch_tokens",
    "accumulation": "finetune.accumulation",
    "checkpoint_every": "finetune.checkpoint_every",
    "lending": "finetune.lending",
}
"""Which setting a flag gives; a flag that is not given leaves it to the file and its default."""


def flag(help_: str, default: object = None, **options: Any) -> Any:
    """An option that is None unless given; the help shows the setting's default."""
    return typer.Option(help=help_, show_default=False if default is None else str(default), **options)


def run(
    context: typer.Context,
    policy: Annotated[
        str | None, flag("Which policy, see `harli policies`; or path.py:Class.", autocompletion=policies)
    ] = None,
    model: Annotated[
        str | None, flag("tiny, small, a folder, or a Hugging Face name.", ENGINE.model, autocompletion=models)
    ] = None,
    param: Annotated[list[str] | None, flag("key=value for the policy; may be repeated.")] = None,
    predictor: Annotated[str | None, flag("A folder, or models:/harli-decode-latency/N.", "the champion")] = None,
    force_predictor: Annotated[
        bool | None, typer.Option("--force-predictor", help="Use it though trained for another model or device.")
    ] = None,
    role: Annotated[str | None, flag("decode: prompts' KV is already there. mixed: real prefill.", ENGINE.role)] = None,
    slo_tpot_ms: Annotated[float | None, flag("Objective for a request's mean time per token.")] = None,
    slo_itl_ms: Annotated[float | None, flag("Objective for every gap between tokens.")] = None,
    trace: Annotated[Path | None, flag("Trace of requests; generated ones without it.")] = None,
    rate_scale: Annotated[float | None, flag("Factor on the request rate.", WORKLOAD.rate_scale)] = None,
    length_scale: Annotated[float | None, flag("Factor on prompt and output lengths.", WORKLOAD.length_scale)] = None,
    requests_per_s: Annotated[float | None, flag("Rate of generated requests.", WORKLOAD.requests_per_s)] = None,
    duration: Annotated[float | None, flag("Seconds of workload to serve.", WORKLOAD.duration_s)] = None,
    seed: Annotated[int | None, flag("Of the workload, the policy and finetuning.", WORKLOAD.seed)] = None,
    finetune_data: Annotated[Path | None, flag("JSONL with text, prompt/completion or messages.", "docstrings")] = None,
    lora_rank: Annotated[int | None, flag("", LORA.rank)] = None,
    lora_alpha: Annotated[float | None, flag("", LORA.alpha)] = None,
    lora_dropout: Annotated[float | None, flag("", LORA.dropout)] = None,
    lora_targets: Annotated[str | None, flag("Module names, with commas.", ",".join(LORA.targets))] = None,
    learning_rate: Annotated[float | None, flag("", FINETUNE.learning_rate)] = None,
    weight_decay: Annotated[float | None, flag("", FINETUNE.weight_decay)] = None,
    warmup_updates: Annotated[int | None, flag("", FINETUNE.warmup_updates)] = None,
    schedule: Annotated[str | None, flag("constant, linear or cosine, ending at --updates.", FINETUNE.schedule)] = None,
    updates: Annotated[int | None, flag("Stop training after this many.", "as long as the run")] = None,
    microbatch_tokens: Annotated[int | None, flag("Tokens of a micro-batch.", FINETUNE.microbatch_tokens)] = None,
    accumulation: Annotated[int | None, flag("Micro-batches per update.", FINETUNE.accumulation)] = None,
    checkpoint_every: Annotated[int | None, flag("Updates between checkpoints.", FINETUNE.checkpoint_every)] = None,
    lending: Annotated[
        bool | None, typer.Option("--lending/--no-lending", help="Borrow KV-cache memory that decode does not need.")
    ] = None,
    dtype: Annotated[str | None, flag("auto, bfloat16, float16 or float32.", ENGINE.dtype)] = None,
    max_model_len: Annotated[int | None, flag("Longest request in tokens.", ENGINE.max_model_len)] = None,
    max_num_seqs: Annotated[int | None, flag("Most requests in a step.", ENGINE.max_num_seqs)] = None,
    kv_cache_gib: Annotated[float | None, flag("Size of the KV cache.", ENGINE.kv_cache_gib)] = None,
    config: Annotated[Path | None, flag("YAML file with settings; flags win over it.")] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the settings as YAML and stop.")] = False,
    resume: Annotated[Path | None, flag("Go on with the training job of this record or checkpoint.")] = None,
    release_job: Annotated[str | None, flag("Take the job of this name out of quarantine.")] = None,
    out: Annotated[Path | None, flag("Record folder to create.", "records/TIME-POLICY")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the metrics as one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="On stderr only errors and the record's path.")] = False,
) -> None:
    """Serve a workload on a decode instance and finetune a LoRA adapter beside it.

    Example: harli run --policy static --model small --slo-tpot-ms 80 --duration 60
    """
    settings = _settings(context.params)
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


def _settings(flags: dict[str, Any]) -> RunSettings:
    """The file's settings, if there is a file, with the flags that were given on top."""
    values = settings_file.load(flags["config"]) if flags["config"] else {}
    settings_file.override_flags(values, SETTINGS, flags)
    if flags["lora_targets"] is not None:
        settings_file.override(values, "finetune.lora.targets", flags["lora_targets"].replace(" ", "").split(","))
    settings_file.override_params(values, flags["param"] or [])
    return settings_file.validate(values)


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
