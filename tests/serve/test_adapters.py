"""Adapters in vLLM's list and in the engine's memory."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm.v1.engine.exceptions import EngineDeadError

from harli.finetune.checkpoint import WEIGHTS
from harli.serve import adapters as adapters_module
from harli.types import HarliError
from tests.serve.stand_ins import MAX_RANK, LoraEngine, adapters_of, write_adapter


def test_after_a_start_the_newest_are_in_memory_and_what_can_be_read_is_served(tmp_path: Path) -> None:
    folders = {name: write_adapter(tmp_path / name) for name in ("old", "cut", "newer", "newest")}
    folders = {"gone": tmp_path / "gone", "large": write_adapter(tmp_path / "large", 4 * MAX_RANK)} | folders
    weights = folders["cut"] / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    engine = LoraEngine()
    adapters, served = adapters_of(engine)
    asyncio.run(adapters.serve_again(folders))
    assert list(served) == ["old", "newer", "newest"]
    assert engine.loaded == ["newer", "newest"]
    assert served["old"].lora_path == str(folders["old"])
    assert len({request.lora_int_id for request in served.values()}) == 3


def test_an_engine_that_dies_while_it_loads_is_not_waited_for(tmp_path: Path) -> None:
    engine = LoraEngine()
    adapters, served = adapters_of(engine)

    async def never(request: object) -> bool:
        engine.errored = True
        await asyncio.sleep(3600)
        return True

    engine.add_lora = never  # type: ignore[method-assign]
    with pytest.raises(EngineDeadError):
        asyncio.run(adapters.serve_again({"a": write_adapter(tmp_path / "a")}))
    assert not served


def test_an_adapter_leaves_the_engine_after_the_last_request_that_uses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters_module, "UNUSED_POLL_S", 0.01)
    engine = LoraEngine()
    adapters, served = adapters_of(engine)

    async def delete_and_end() -> None:
        await adapters.load("mine", tmp_path)
        await adapters.load("other", tmp_path)
        mine, other = served["mine"], served["other"]
        states = engine.output_processor.request_states
        states |= {str(n): SimpleNamespace(lora_request=request) for n, request in enumerate((mine, None, other))}
        await adapters.unload("mine")
        assert not adapters.serves("mine")
        await asyncio.sleep(0.1)
        assert engine.removed == []
        del states["0"]
        await asyncio.gather(*adapters._leaving)
        assert engine.removed == [mine.lora_int_id]
        with pytest.raises(HarliError, match="cannot be found"):
            await adapters.unload("mine")

    asyncio.run(delete_and_end())
