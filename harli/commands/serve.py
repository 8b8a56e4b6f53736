"""``harli serve``: vLLM's OpenAI server with finetuning jobs inside its decode."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from harli import settings_file
from harli.commands.complete import models, policies
from harli.commands.run import flag
from harli.config import EngineSettings, RunSettings

ENGINE = EngineSettings()
TURN_S = 60.0
MIN_ATTAINMENT = 0.99
UNKNOWN_FLAGS_ARE_VLLMS = {"allow_extra_args": True, "ignore_unknown_options": True}

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
}
"""Which setting a flag gives, as in ``harli run``."""


def serve(
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
    role: Annotated[
        str | None,
        flag("mixed: computes prompts. decode: a prefill instance does, see --kv-transfer-config of vLLM.", "mixed"),
    ] = None,
    slo_tpot_ms: Annotated[float | None, flag("Objective for a request's mean time per token.")] = None,
    slo_itl_ms: Annotated[float | None, flag("Objective for every gap between tokens.")] = None,
    dtype: Annotated[str | None, flag("auto, bfloat16, float16 or float32.", ENGINE.dtype)] = None,
    max_model_len: Annotated[int | None, flag("Longest request in tokens.", ENGINE.max_model_len)] = None,
    max_num_seqs: Annotated[int | None, flag("Most requests in a step.", ENGINE.max_num_seqs)] = None,
    kv_cache_gib: Annotated[float | None, flag("Size of the KV cache.", ENGINE.kv_cache_gib)] = None,
    config: Annotated[
        Path | None, flag("YAML file with settings of a run: `finetune` is what jobs get; flags win.")
    ] = None,
    state: Annotated[Path, typer.Option(help="Folder of files, jobs and adapters.")] = Path("serve"),
    turn_s: Annotated[
        float, typer.Option(min=1.0, help="Seconds that a job trains while others of its priority wait.")
    ] = TURN_S,
    min_attainment: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Finetuning pauses when less of the last minute was within the SLO.")
    ] = MIN_ATTAINMENT,
) -> None:
    """Serve a model through OpenAI's API, and fine-tune it beside decode by jobs of that API.

    Flags that are not listed here are vLLM's: --port, --host, --api-key, --max-loras, --ssl-keyfile and so on.

    Example: harli serve --policy qos --model small --slo-itl-ms 60 --port 8000
    """
    settings = _settings(context.params)
    console = Console(stderr=True, soft_wrap=True)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    with console.status("checking settings"):
        from harli.engine.launch import prepare_environment

        prepare_environment()
        import uvloop

        from harli.forecasting import choose
        from harli.serve.arguments import server_arguments, take_keys
        from harli.serve.server import serve as serve_until_signal

        chosen = choose(settings, settings.slo.objective)
        arguments = server_arguments(settings, chosen.folder, context.args)
        keys = take_keys(arguments)
    if chosen.note:
        say(chosen.note)
    signal.signal(signal.SIGTERM, lambda *_: _interrupt())  # until the server has handlers of its own
    say(f"starting {settings.engine.model}")
    uvloop.run(
        serve_until_signal(
            settings,
            arguments,
            keys,
            state,
            turn_s,
            chosen.info,
            min_attainment,
            on_ready=lambda address: say(f"serving on {address}"),
        )
    )
    say(f"stopped; files, jobs and adapters are in {state}")


def _settings(flags: dict[str, Any]) -> RunSettings:
    """The file's settings, if there is a file, with the flags on top; the role is mixed unless its flag is given."""
    values = settings_file.load(flags["config"]) if flags["config"] else {}
    for name, path in SETTINGS.items():
        if flags[name] is not None:
            settings_file.override(values, path, flags[name])
    settings_file.override_params(values, flags["param"] or [])
    if flags["role"] is None:
        settings_file.override(values, "engine.role", "mixed")
    return settings_file.validate(values)


def _interrupt() -> None:
    raise KeyboardInterrupt
