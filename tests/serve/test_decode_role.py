"""A prefill instance and a decode instance: the KV cache of prompts comes through one of vLLM's connectors."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harli.config import EngineSettings
from tests.conftest import EngineHost
from tests.serve.server_process import Server

pytestmark = pytest.mark.slow

PROMPT = "The quick brown fox jumps over the lazy dog. " * 8
TOKENS = 24


def connector(storage: Path, role: str) -> dict[str, Any]:
    """vLLM's connector through files."""
    extra = {"shared_storage_path": str(storage)}
    return {"kv_connector": "ExampleConnector", "kv_role": role, "kv_connector_extra_config": extra}


def prefill(storage: Path) -> None:
    """Compute the prompt on an instance of its own."""
    from vllm import SamplingParams
    from vllm.config import KVTransferConfig

    settings = EngineSettings(model="tiny", role="mixed", dtype="float32", max_model_len=512, kv_cache_gib=0.3)
    host = EngineHost(settings, kv_transfer_config=KVTransferConfig(**connector(storage, "kv_producer")))

    async def first_token() -> None:
        async for _ in host.engine.generate(PROMPT, SamplingParams(max_tokens=1), "prompt"):
            pass

    host.run(first_token())
    host.close()


@pytest.fixture(scope="module")
def decoding(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """``harli serve --role decode``, which has the prompt from an instance that is gone."""
    storage = tmp_path_factory.mktemp("kv")
    prefill(storage)
    server = Server(
        tmp_path_factory.mktemp("decode"),
        *("--role", "decode", "--kv-transfer-config", json.dumps(connector(storage, "kv_consumer"))),
        *("--enable-prompt-tokens-details", "--no-enable-prefix-caching"),
    )
    yield server
    if server.process.poll() is None:
        server.end()


def answer(server: Server) -> Any:
    return server.client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=TOKENS, temperature=0.0, extra_body={"return_token_ids": True}
    )


def test_tokens_are_those_of_one_instance(decoding: Server, server: Server) -> None:
    here, alone = answer(decoding), answer(server)
    assert here.usage.prompt_tokens_details.cached_tokens > len(PROMPT) // 2
    assert len(here.choices[0].token_ids) == TOKENS
    assert here.choices[0].token_ids == alone.choices[0].token_ids


def test_requests_in_flight_are_answered_to_their_end_after_sigterm(decoding: Server) -> None:
    stream = decoding.client.completions.create(
        model="tiny", prompt="hello", max_tokens=200, temperature=0.0, stream=True, extra_body={"ignore_eos": True}
    )
    parts = iter(stream)
    next(parts)
    decoding.process.send_signal(signal.SIGTERM)
    rest = list(parts)
    assert rest[-1].choices[0].finish_reason == "length"
    assert decoding.process.wait() == 0
