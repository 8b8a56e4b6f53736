"""The simulated engine: nothing is lost, time only goes forward, and the runtime's rules hold."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harli.simulate.device import Noise
from harli.types import Decision, DecodeState, FinetuneState, Share, Slo
from harli.workload.base import Request
from policies.base import Policy, PolicyContext
from tests.simulate.builders import FINETUNE, QUIET, SMALL, Outcome, device, policy, simulated

ALONE, LITTLE, HALF, WHOLE = SMALL.menu.shares
NOISY = Noise(sigma=0.2, straggler_probability=0.05, drift_per_minute=1.0)


class Fixed(Policy):
    """One decision for every step, and one share while idle."""

    def __init__(self, decision: Decision, idle: Share = WHOLE) -> None:
        super().__init__(PolicyContext(SMALL.menu, Slo()))
        self.decision, self.idle_share = decision, idle

    def decide(self, decode: DecodeState, finetune: FinetuneState) -> Decision:
        return self.decision

    def idle(self, finetune: FinetuneState) -> Share:
        return self.idle_share


class Mixture(Policy):
    """Every share and window of the menu in turn."""

    def decide(self, decode: DecodeState, finetune: FinetuneState) -> Decision:
        share = self.context.menu.shares[decode.step % 3]
        return Decision(share, 3.0 * (decode.step % 4) if not decode.prefill_tokens else 0.0)


def mixture() -> Policy:
    return Mixture(PolicyContext(SMALL.menu, Slo()))


def sparse(count: int, gap_s: float = 0.2) -> list[Request]:
    return [Request(gap_s * (index + 1), 40, 5) for index in range(count)]


def check_accounts(requests: list[Request], outcome: Outcome) -> None:
    """What holds of every simulation, whatever the load and the policy."""
    steps, done, scheduler = outcome.steps, outcome.requests, outcome.scheduler
    assert len(done) == len(requests)
    assert sum(len(record.itl_ms) + 1 for record in done) == sum(request.output_tokens for request in requests)
    assert scheduler.free == scheduler.state.kv_blocks_total - 1
    assert all(record.ttft_ms > record.queue_wait_ms >= 0.0 for record in done)
    assert all(gap_ms > 0.0 for record in done for gap_ms in record.itl_ms)
    ends_s = [row.time_s + (row.window_ms + row.latency_ms) / 1e3 for row in steps]
    for end_s, row in zip(ends_s, steps[1:], strict=False):
        assert row.time_s >= end_s - 1e-9
        if not math.isnan(row.gap_ms):
            assert row.gap_ms == pytest.approx(row.window_ms + row.latency_ms)
    assert all(row.window_ms >= 0.0 and row.latency_ms > 0.0 and row.kv_blocks_free >= 0 for row in steps)
    assert all(row.decode_units + row.finetune_units <= 4 and row.decode_units > 0 for row in steps)
    committed, done_tokens = sum(row.tokens for row in outcome.updates), outcome.finetune.tokens_done
    assert -1e-6 <= done_tokens - committed <= FINETUNE.microbatch_tokens * FINETUNE.accumulation + 1e-6
    assert sum(row.finetune_tokens for row in steps) <= done_tokens + 1e-6
    assert all(earlier.time_s < later.time_s for earlier, later in pairwise(outcome.updates))
    if not scheduler.preemptions:  # Little's law, exactly: request-seconds by steps and by requests
        by_steps = sum(row.batch * (row.window_ms + row.latency_ms) for row in steps)
        by_requests = sum(1e3 * (one.finished_s - one.arrival_s) - one.queue_wait_ms for one in done)
        assert by_steps == pytest.approx(by_requests)


workloads = st.lists(st.tuples(st.floats(0.0, 0.3), st.integers(1, 100), st.integers(1, 30)), min_size=1, max_size=25)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    workload=workloads,
    role=st.sampled_from(["decode", "mixed"]),
    kv_blocks=st.integers(10, 40),
    noise=st.sampled_from([QUIET, NOISY]),
)
def test_work_is_conserved(workload: list[tuple[float, int, int]], role: str, kv_blocks: int, noise: Noise) -> None:
    now_s, requests = 0.0, []
    for gap_s, prompt, output in workload:
        now_s += gap_s
        requests.append(Request(now_s, prompt, output))
    outcome = simulated(requests, mixture(), role=role, kv_blocks=kv_blocks, noise=noise)
    assert not outcome.controller.failure
    check_accounts(requests, outcome)
    if role == "decode" and not outcome.scheduler.preemptions:
        assert sum(row.batch for row in outcome.steps) == sum(request.output_tokens for request in requests)


def test_the_same_seed_gives_the_same_rows() -> None:
    def rows(seed: int) -> str:
        outcome = simulated(sparse(20), mixture(), noise=NOISY, seed=seed)
        return repr((outcome.steps, outcome.requests, outcome.updates))

    assert rows(0) == rows(0) != rows(1)


def test_without_finetuning_it_is_decode_alone() -> None:
    outcome = simulated([Request(0.0, 100, 11)], policy("separate"))
    (record,), on = outcome.requests, device()
    expected = [on.step_ms(DecodeState(batch=1, context_sum=100 + n), FinetuneState(), 4, 0) for n in range(11)]
    assert record.ttft_ms == pytest.approx(expected[0])
    assert record.itl_ms == pytest.approx(expected[1:])
    assert outcome.finetune.tokens_done == 0.0
    assert all(row.finetune_units == row.window_ms == 0 for row in outcome.steps)
    stopped = simulated([Request(0.0, 100, 11)], Fixed(Decision(ALONE), ALONE))
    assert stopped.requests == outcome.requests


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("qos", {}),
        ("stepwise", {}),
        ("timeslice", {}),
        ("reactive", {}),
        ("static", {"work_conserving": True}),
    ],
)
def test_with_nothing_to_train_every_policy_is_decode_alone_step_by_step(name: str, params: dict[str, bool]) -> None:
    requests = [Request(0.11 * index, 60, 1 + 7 * index % 40) for index in range(30)]
    alone = simulated(requests, policy("separate"), noise=NOISY, trains=False)
    other = simulated(requests, policy(name, **params), noise=NOISY, trains=False)
    assert not other.controller.failure
    assert repr(other.steps) == repr(alone.steps)  # NaN equals itself there
    assert other.requests == alone.requests
    assert other.finetune.tokens_done == 0.0


def test_a_split_costs_and_yields_what_the_predictor_says() -> None:
    outcome = simulated([Request(0.0, 40, 2000)], policy("static", share="2/2"))
    predictor, last = device().predictor, outcome.steps[-1]
    decode = DecodeState(step=1, batch=last.batch, context_sum=last.context_sum)
    forecast = predictor.forecast(decode, FinetuneState(ready=True))
    assert last.latency_ms == pytest.approx(forecast.gap_ms[2])
    took_s = outcome.requests[0].finished_s
    assert outcome.finetune.tokens_done / took_s == pytest.approx(forecast.finetune_tokens_per_s[2], rel=0.01)


def test_an_arrival_waits_for_the_running_unit_at_most() -> None:
    outcome = simulated(sparse(30, gap_s=0.2137), Fixed(Decision(ALONE)))
    longest_ms = max(device().unit_ms(kind, 4) for kind in ("forward", "loss", "backward"))
    waits = [row.window_ms for row in outcome.steps if math.isnan(row.gap_ms)]
    assert len(waits) == 30
    assert 0.0 < max(waits) <= longest_ms
    assert all(row.window_ms == 0.0 for row in outcome.steps if not math.isnan(row.gap_ms))
    assert len(outcome.updates) > 10


def test_decode_has_what_a_running_unit_leaves() -> None:
    class Back(Policy):
        """A split, then decode alone, while the unit of the split still runs."""

        def decide(self, decode: DecodeState, finetune: FinetuneState) -> Decision:
            return Decision(HALF if decode.step == 1 else ALONE)

    outcome = simulated([Request(0.0, 40, 400)], Back(PolicyContext(SMALL.menu, Slo())))
    held = [row for row in outcome.steps[1:] if row.finetune_units]
    assert outcome.steps[0].decode_units == 2
    assert held
    assert all((row.decode_units, row.finetune_units, row.wanted_finetune) == (2, 2, 0) for row in held)
    assert outcome.steps[-1].decode_units == 4


def test_a_window_is_time_for_finetuning_alone() -> None:
    outcome = simulated([Request(0.0, 40, 200)], Fixed(Decision(ALONE, 30.0)))
    assert all(row.finetune_units == 0 and row.decode_units == 4 for row in outcome.steps)
    windows_s = sum(row.window_ms for row in outcome.steps) / 1e3
    rate = device().predictor.finetune_alone_tokens_per_s
    assert sum(row.finetune_tokens for row in outcome.steps) == pytest.approx(windows_s * rate, rel=0.05)
    assert max(row.window_ms for row in outcome.steps) <= 30.0 + 1e-6


def test_more_requests_than_the_batch_holds_wait_their_turn() -> None:
    requests = [Request(0.0, 16, 10) for _ in range(20)]
    outcome = simulated(requests, policy("separate"), max_num_seqs=4)
    assert max(row.batch for row in outcome.steps) == 4
    assert outcome.steps[0].waiting == 16
    assert [record.request_id for record in outcome.requests] == [f"simulated-{index}" for index in range(20)]
    check_accounts(requests, outcome)


def test_a_policy_that_fails_leaves_decode_alone() -> None:
    class Broken(Policy):
        def decide(self, decode: DecodeState, finetune: FinetuneState) -> Decision:
            if decode.step == 3:
                raise ZeroDivisionError("oops")
            return Decision(HALF)

    requests = sparse(5)
    outcome = simulated(requests, Broken(PolicyContext(SMALL.menu, Slo())))
    assert "ZeroDivisionError: oops" in outcome.controller.failure
    assert all(row.wanted_finetune == 0 for row in outcome.steps[2:])
    check_accounts(requests, outcome)


def test_stragglers_and_drift_lengthen_steps() -> None:
    slow = Noise(sigma=0.0, straggler_probability=0.2, straggler_factor=7.0)
    rows, on = simulated(sparse(40), policy("separate"), noise=slow).steps, device()
    states = [DecodeState(batch=row.batch, context_sum=row.context_sum) for row in rows]
    usual = [on.step_ms(state, FinetuneState(), 4, 0) for state in states]
    ratios = [row.latency_ms / length_ms for row, length_ms in zip(rows, usual, strict=True)]
    assert {round(ratio, 9) for ratio in ratios} == {1.0, 7.0}
    drifting = simulated(sparse(40), policy("separate"), noise=Noise(sigma=0.0, drift_per_minute=6.0))
    for row in drifting.steps:
        state = DecodeState(batch=row.batch, context_sum=row.context_sum)
        alone_ms = on.step_ms(state, FinetuneState(), 4, 0)
        assert row.latency_ms == pytest.approx(alone_ms * (1.0 + row.time_s / 10.0))
