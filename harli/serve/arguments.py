"""The flags of vLLM's server: Harli's settings as their defaults, the user's own on top, checked together."""

from __future__ import annotations

import ipaddress
import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from harli.config import PolicySettings, RunSettings
from harli.engine.launch import engine_arguments
from harli.serve.vllm_server import make_arg_parser, validate_parsed_serve_args
from harli.types import HarliError

POLICY = "harli"
"""Key of ``--additional-config`` that holds the policy for the engine process, a ``PolicySettings``."""
SERVED_ADAPTERS = 4
"""Most adapters in one step, unless ``--max-loras`` says otherwise."""
KEPT_ADAPTERS = 64
"""Most adapters in memory, unless ``--max-cpu-loras`` says otherwise: a step that needs another reads it from disk."""
DRAIN_S = 30
"""How long requests may run on after SIGTERM, unless ``--shutdown-timeout`` says otherwise."""
OURS = ("worker_cls", "scheduler_cls", "enable_lora")
"""Arguments of vLLM that Harli has to set."""
NOT_SERVED = {
    "headless": False,
    "grpc": False,
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "data_parallel_size": 1,
    "quantization": None,
    "kv_cache_dtype": "auto",
    "speculative_config": None,
    "disable_log_stats": False,
}
"""The only values that Harli can do with, see ``harli doctor`` for why."""


def server_arguments(settings: RunSettings, predictor: Path | None, flags: Sequence[str]) -> Namespace:
    """What vLLM's server is started with.

    Args:
        settings: model, engine and policy.
        predictor: folder of the policy's predictor.
        flags: of vLLM, as they stand on the command line; they win where both say something.

    Raises HarliError for what vLLM does not know, or Harli cannot do with.
    """
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser(add_help=False))
    parser.error = _refuse
    engine = engine_arguments(settings.engine.model_copy(update={"role": "mixed"}))  # no stand-in for a prefill
    ours = engine | {
        "host": "127.0.0.1",
        "served_model_name": [settings.engine.model],
        "enable_lora": True,
        "max_loras": SERVED_ADAPTERS,
        "shutdown_timeout": DRAIN_S,
    }
    parser.set_defaults(**ours)
    try:
        arguments: Namespace = parser.parse_args(list(flags))
        validate_parsed_serve_args(arguments)
    except (TypeError, ValueError) as error:
        raise HarliError(f"vLLM's server: {str(error).splitlines()[0]}") from error
    if arguments.model_tag is not None:
        raise HarliError(f"unexpected argument {arguments.model_tag!r}; the model is given with --model")
    for name, needed in NOT_SERVED.items() | {name: ours[name] for name in OURS}.items():
        if getattr(arguments, name) != needed:
            raise HarliError(f"harli serve does not work with {flag(name)}: see `harli doctor` for what is refused")
    if arguments.max_cpu_loras is None:
        arguments.max_cpu_loras = max(arguments.max_loras, KEPT_ADAPTERS)
    if settings.finetune.lora.rank > arguments.max_lora_rank:
        raise HarliError(
            f"jobs train LoRA of rank {settings.finetune.lora.rank} by default, and --max-lora-rank "
            f"{arguments.max_lora_rank} serves none above that: give a higher one"
        )
    if settings.engine.role == "decode" and arguments.kv_transfer_config is None:
        raise HarliError("--role decode needs --kv-transfer-config: which connector brings the prompts' KV cache?")
    if (arguments.api_server_count or 1) > 1:
        raise HarliError("harli serve does not work with --api-server-count: jobs are kept by one process")
    policy = PolicySettings(
        policy=settings.policy,
        params=settings.params,
        slo=settings.slo,
        seed=settings.engine.seed,
        predictor=predictor,
    )
    arguments.additional_config = {**(arguments.additional_config or {}), POLICY: policy.model_dump(mode="json")}
    return arguments


def take_keys(arguments: Namespace) -> list[str]:
    """The API keys, from ``--api-key`` or ``VLLM_API_KEY``; they are no longer among the arguments.

    Raises HarliError where the server would be open to other machines without one.
    """
    keys = [key for key in (arguments.api_key or [os.environ.get("VLLM_API_KEY", "")]) if key]
    arguments.api_key = None
    if not keys and not arguments.uds and not is_loopback(arguments.host):
        raise HarliError(
            f"--host {arguments.host} opens the server to other machines: give --api-key, or set VLLM_API_KEY"
        )
    return keys


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def flag(name: str) -> str:
    """How an argument is written on the command line."""
    return "--" + name.replace("_", "-")


def _refuse(message: str) -> NoReturn:
    raise HarliError(f"vLLM's server: {message}; `python -m vllm.entrypoints.openai.api_server --help` lists its flags")
