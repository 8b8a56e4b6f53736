"""What Harli uses of vLLM's API server, and where its versions keep it.

Written for vLLM 0.32. In 0.26 the same functions are in ``vllm.entrypoints.openai.api_server`` (which 0.32
still re-exports), ``serve_http`` is in ``vllm.entrypoints.launcher`` and the flags' parser in
``vllm.entrypoints.openai.cli_args``.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from vllm import envs

try:
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.launchers.launcher import serve_http, setup_server
    from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config
except ModuleNotFoundError:  # vLLM 0.26
    from vllm.entrypoints.launcher import serve_http
    from vllm.entrypoints.openai.api_server import (
        build_app,
        build_async_engine_client,
        init_app_state,
        setup_server,
    )
    from vllm.entrypoints.openai.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.server_utils import get_uvicorn_log_config

from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest

__all__ = [
    "LoRARequest",
    "LoadLoRAAdapterRequest",
    "PEFTHelper",
    "UnloadLoRAAdapterRequest",
    "build_app",
    "build_async_engine_client",
    "http_options",
    "init_app_state",
    "make_arg_parser",
    "serve_http",
    "setup_server",
    "validate_parsed_serve_args",
]


def http_options(arguments: Namespace) -> dict[str, Any]:
    """What vLLM's flags about HTTP mean to ``serve_http``."""
    log_config = get_uvicorn_log_config(arguments)
    return {
        "enable_ssl_refresh": arguments.enable_ssl_refresh,
        "host": arguments.host,
        "port": arguments.port,
        "log_level": arguments.uvicorn_log_level,
        "access_log": not arguments.disable_uvicorn_access_log,
        "timeout_keep_alive": envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
        "ssl_keyfile": arguments.ssl_keyfile,
        "ssl_certfile": arguments.ssl_certfile,
        "ssl_ca_certs": arguments.ssl_ca_certs,
        "ssl_cert_reqs": arguments.ssl_cert_reqs,
        "ssl_ciphers": arguments.ssl_ciphers,
        "h11_max_incomplete_event_size": arguments.h11_max_incomplete_event_size,
        "h11_max_header_count": arguments.h11_max_header_count,
    } | ({"log_config": log_config} if log_config else {})
