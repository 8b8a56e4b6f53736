"""vLLM's real scheduler over a small KV cache, without a model: the tests say which tokens are sampled."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

from harli.memory.lender import Lender
from harli.memory.loan import Loan
from harli.models import resolve_model

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.scheduler import Scheduler

BLOCK = 16
"""Tokens of a block."""


@cache
def _config(max_requests: int, max_tokens: int) -> VllmConfig:
    from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig

    length = 512
    return VllmConfig(
        model_config=ModelConfig(model=str(resolve_model("tiny")), dtype="float32", max_model_len=length),
        scheduler_config=SchedulerConfig(
            max_model_len=length,
            is_encoder_decoder=False,
            max_num_seqs=max_requests,
            max_num_batched_tokens=max_tokens,
            enable_chunked_prefill=True,
        ),
        cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=True),
        device_config=DeviceConfig("cpu"),
    )


def scheduler(blocks: int, *, max_requests: int = 8, max_tokens: int = 128) -> Scheduler:
    """A scheduler with prefix caching over ``blocks`` KV blocks."""
    import torch
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    config = _config(max_requests, max_tokens)
    config.cache_config.num_gpu_blocks = blocks
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
    return Scheduler(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["0"], spec)]),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
    )


def request(name: str, prompt: Iterable[int], output_tokens: int) -> Any:
    """A request for exactly ``output_tokens``."""
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    init_none_hash(sha256)
    params = SamplingParams(max_tokens=output_tokens, ignore_eos=True)
    return Request(
        request_id=name,
        prompt_token_ids=list(prompt),
        sampling_params=params,
        pooling_params=None,
        block_hasher=get_request_block_hasher(BLOCK, sha256),
    )


def step(engine: Scheduler, lender: Lender | None = None, *, wanted: bool = True) -> Any:
    """One step as Harli's hook runs it; every request that is due a token gets token 7. Returns what was scheduled."""
    from vllm.v1.outputs import ModelRunnerOutput

    if lender is not None and lender.loan is not None:
        lender.before_step(wanted)
    scheduled = engine.schedule()
    names = list(scheduled.num_scheduled_tokens)
    sampled = [
        [7] if engine.requests[name].num_computed_tokens >= engine.requests[name].num_tokens else [] for name in names
    ]
    engine.update_from_output(
        scheduled,
        ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=sampled,
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
        ),
    )
    return scheduled


class Borrower:
    """Finetuning's side of the protocol: claims from the top end, lets go when it is told to run ``between_units``."""

    def __init__(self, loan: Loan) -> None:
        self._loan = loan
        self.lowest = loan.total

    def claim(self, blocks: int) -> bool:
        """Use the topmost ``blocks``."""
        lowest = self._loan.total - blocks
        if not self._loan.claim(lowest):
            return False
        self.lowest = min(self.lowest, lowest)
        return True

    def between_units(self) -> None:
        """Let go of what was recalled."""
        if not self._loan.vacated:
            self.lowest = max(self.lowest, self._loan.line)
            self._loan.settle(self.lowest)


def check(engine: Scheduler, lender: Lender, borrower: Borrower | None = None) -> None:
    """vLLM's invariants hold: no block has two owners, none is lost, and the prefix cache knows no lent block."""
    pool = engine.kv_cache_manager.block_pool
    free = pool.free_block_queue.get_all_free_blocks()
    assert len(free) == pool.get_num_free_blocks()
    uses = [0] * pool.num_gpu_blocks
    for manager in engine.kv_cache_manager.coordinator.single_type_managers:
        for blocks in manager.req_to_blocks.values():
            for block in blocks:
                uses[block.block_id] += 1
    owned = {block.block_id for block in pool.blocks if block.ref_cnt > uses[block.block_id] and not block.is_null}
    assert len(owned) == lender.owned
    assert all(uses[block_id] == 0 for block_id in owned)
    for block in pool.blocks[1:]:
        assert block.ref_cnt == uses[block.block_id] + (block.block_id in owned)
    assert {block.block_id for block in free} == {block.block_id for block in pool.blocks[1:] if not block.ref_cnt}
    assert 1 + len(free) + len(owned) + sum(count > 0 for count in uses) == pool.num_gpu_blocks
    assert all(pool.blocks[block_id].block_hash is None for block_id in owned)
    for block in pool.blocks:
        if block.block_hash is not None:
            assert pool.cached_block_hash_to_block.contain(block.block_hash, block.block_id)
    if lender.loan is not None:
        assert lender.loan.line <= lender.loan.total
        begin = lender.loan.line if borrower is None else min(lender.loan.line, borrower.lowest)
        assert owned.issuperset(range(begin, pool.num_gpu_blocks))
