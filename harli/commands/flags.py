"""Flags that several commands have, which settings they give, and the settings of a run that follow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from harli import settings_file
from harli.commands.complete import models, policies
from harli.config import CHAMPION, EngineSettings, FinetuneSettings, LoraSettings, RunSettings, WorkloadSettings

ENGINE, FINETUNE, LORA, WORKLOAD = EngineSettings(), FinetuneSettings(), LoraSettings(), WorkloadSettings()
DEVICE = "h200/llama-3-8b"
"""What is simulated unless a flag says otherwise."""

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


Policy = Annotated[str | None, flag("Which policy, see `harli policies`; or path.py:Class.", autocompletion=policies)]
Param = Annotated[list[str] | None, flag("key=value for the policy; may be repeated.")]
Predictor = Annotated[str | None, flag("A folder, or models:/harli-decode-latency/N.", "the champion")]
ForcePredictor = Annotated[
    bool | None, typer.Option("--force-predictor", help="Use it though trained for another model or device.")
]
SloTpotMs = Annotated[float | None, flag("Objective for a request's mean time per token.")]
SloItlMs = Annotated[float | None, flag("Objective for every gap between tokens.")]

Model = Annotated[
    str | None, flag("tiny, small, a folder, or a Hugging Face name.", ENGINE.model, autocompletion=models)
]
Role = Annotated[str | None, flag("decode: prompts' KV is already there. mixed: real prefill.", ENGINE.role)]
Dtype = Annotated[str | None, flag("auto, bfloat16, float16 or float32.", ENGINE.dtype)]
MaxModelLen = Annotated[int | None, flag("Longest request in tokens.", ENGINE.max_model_len)]
MaxNumSeqs = Annotated[int | None, flag("Most requests in a step.", ENGINE.max_num_seqs)]
KvCacheGib = Annotated[float | None, flag("Size of the KV cache.", ENGINE.kv_cache_gib)]

Trace = Annotated[Path | None, flag("Trace of requests; generated ones without it.")]
RateScale = Annotated[float | None, flag("Factor on the request rate.", WORKLOAD.rate_scale)]
LengthScale = Annotated[float | None, flag("Factor on prompt and output lengths.", WORKLOAD.length_scale)]
RequestsPerS = Annotated[float | None, flag("Rate of generated requests.", WORKLOAD.requests_per_s)]

FinetuneData = Annotated[Path | None, flag("JSONL with text, prompt/completion or messages.", "docstrings")]
LoraRank = Annotated[int | None, flag("", LORA.rank)]
MicrobatchTokens = Annotated[int | None, flag("Tokens of a micro-batch.", FINETUNE.microbatch_tokens)]
Accumulation = Annotated[int | None, flag("Micro-batches per update.", FINETUNE.accumulation)]
Updates = Annotated[int | None, flag("Stop training after this many.", "as long as the run")]
Lending = Annotated[
    bool | None, typer.Option("--lending/--no-lending", help="Borrow KV-cache memory that decode does not need.")
]

Device = Annotated[str | None, flag(f"Simulated: h200/llama-3-8b, or a predictor: a folder or {CHAMPION}.", DEVICE)]
KvBlocks = Annotated[int | None, flag("Simulated KV blocks of 16 tokens.", "47000; enough with a predictor", min=2)]
SimulatedMaxModelLen = Annotated[int | None, flag("Longest request in tokens.", "8192, or 2048 with a predictor")]
SimulatedMaxNumSeqs = Annotated[int | None, flag("Most requests in a step.", "256, or 32 with a predictor")]
SimulatedMicrobatchTokens = Annotated[int | None, flag("Tokens of a micro-batch.", "1024, or 256 with a predictor")]

Json = Annotated[bool, typer.Option("--json", help="Print the metrics as one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="On stderr only errors and the record's path.")]


def override(settings: dict[str, Any], flags: Mapping[str, Any]) -> None:
    """Set in ``settings`` what ``flags`` were given for. Raises HarliError for flags that make no sense."""
    settings_file.override_flags(settings, SETTINGS, {"seed": None, **flags})
    if flags.get("lora_targets") is not None:
        settings_file.override(settings, "finetune.lora.targets", flags["lora_targets"].replace(" ", "").split(","))
    settings_file.override_params(settings, flags.get("param") or [])


def run_settings(flags: Mapping[str, Any]) -> RunSettings:
    """The ``--config`` file's settings, if there is a file, with the flags that were given on top.

    Raises HarliError for the first thing that is wrong.
    """
    settings = settings_file.load(flags["config"]) if flags["config"] else {}
    override(settings, flags)
    return settings_file.validate(settings)
