"""``harli serve``: vLLM's OpenAI server with finetuning jobs inside its decode."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from harli.commands import flags
from harli.commands.flags import flag, run_settings

TURN_S = 60.0
MIN_ATTAINMENT = 0.99
UNKNOWN_FLAGS_ARE_VLLMS = {"allow_extra_args": True, "ignore_unknown_options": True}


def serve(
    context: typer.Context,
    policy: flags.Policy = None,
    model: flags.Model = None,
    param: flags.Param = None,
    predictor: flags.Predictor = None,
    force_predictor: flags.ForcePredictor = None,
    role: Annotated[
        str | None,
        flag("mixed: computes prompts. decode: a prefill instance does, see --kv-transfer-config of vLLM.", "mixed"),
    ] = None,
    slo_tpot_ms: flags.SloTpotMs = None,
    slo_itl_ms: flags.SloItlMs = None,
    dtype: flags.Dtype = None,
    max_model_len: flags.MaxModelLen = None,
    max_num_seqs: flags.MaxNumSeqs = None,
    kv_cache_gib: flags.KvCacheGib = None,
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
    # whatever the file says, which may be that of a run: a server computes prompts unless the flag says otherwise
    settings = run_settings(context.params | {"role": "mixed" if role is None else role})
    console = Console(stderr=True, soft_wrap=True)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    with console.status("checking settings"):
        from harli.engine.launch import prepare_environment

        prepare_environment()
        import uvloop

        from harli.predictor_choice import choose
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


def _interrupt() -> None:
    raise KeyboardInterrupt
