"""The conformance suite: what every policy has to keep to, whoever wrote it.

From pytest::

    from policies.testing import check

    def test_my_policy_keeps_the_contract() -> None:
        assert not check(MyPolicy, {"limit": 8}).failures

and from the command line as ``harli policies check path.py:Class``. Policies that keep the budget as far as the
predictor's bounds are right say so in the class (``keeps_slo: ClassVar[bool] = True``); for them that is checked too,
with a predictor that is exact. ``PolicyContext.background`` is False for everything but the time of a decision.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from harli.rows import StepRecord
from harli.types import Decision, DecodeState, FinetuneState, HarliError, Menu, Share, Slo, one_line
from policies.base import Policy, PolicyContext, share_problem, window_problem
from policies.registry import make_policy
from policies.trial import MAX_BATCH, MENU, ExactPredictor, States, random_states

SLOS = (Slo(itl_ms=60.0), Slo(tpot_ms=50.0), Slo(itl_ms=80.0, tpot_ms=40.0), Slo())
DECISION_LIMIT_US = 1000.0

Make = Callable[[PolicyContext], Policy]
Outcome = Decision | Share


@dataclass(frozen=True, slots=True)
class Result:
    """One check."""

    name: str
    problem: str = ""
    """Empty when it is kept."""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """All checks of one policy."""

    results: tuple[Result, ...]

    @property
    def failures(self) -> list[str]:
        return [f"{result.name}: {result.problem}" for result in self.results if result.problem]


def check(
    policy: str | type[Policy],
    params: Mapping[str, Any] | None = None,
    *,
    menu: Menu = MENU,
    slos: Sequence[Slo] = SLOS,
    states: States = (),
    seed: int = 0,
) -> Report:
    """Every rule of the contract on ``states``, by default on random ones, once per SLO.

    ``policy`` is a class, an installed name or ``path.py:Class``. Raises HarliError when it does not exist or when its
    parameters are not accepted.
    """
    states = states or random_states(seed)
    max_batch = max(MAX_BATCH, *(decode.batch for decode, _ in states))
    contexts = [PolicyContext(menu, slo, seed, ExactPredictor(menu), max_batch, background=False) for slo in slos]
    make = _maker(policy, dict(params or {}))
    kind = type(make(contexts[0]))
    try:
        outcomes = [_play(make(context), states) for context in contexts]
    except Exception as error:
        return Report((Result("decides in every state", one_line(error)),))
    results = [Result("decides in every state", note=f"{len(states)} states, {len(slos)} SLOs")]
    for name, rule in (("shares are on the menu and leave decode some", _share), ("windows are finite", _window)):
        results.append(_kept(name, _first, (rule(outcome, menu) for played in outcomes for outcome in played)))
    if getattr(kind, "keeps_slo", False):
        budgets = _budgets(contexts, states, outcomes)
        results.append(_kept("keeps the budget when the predictor is exact", _first, budgets))
    results.append(_kept("leaves states alone and keeps no reference", _references, make, contexts, states, outcomes))
    results.append(_kept("the same seed decides the same", _again, make, contexts, states, outcomes))
    results.append(_kept("instances are independent", _interleaved, make, contexts[0], states, outcomes[0]))
    results.append(_kept("decides fast", _duration, make, contexts, states))
    return Report(tuple(results))


def _kept(name: str, rule: Callable[..., str | Result], *arguments: Any) -> Result:
    """What ``rule`` says, a problem or a whole result. An exception in it is a problem, too."""
    try:
        found = rule(*arguments)
    except Exception as error:
        return Result(name, one_line(error))
    return found if isinstance(found, Result) else Result(name, found)


def _maker(policy: str | type[Policy], params: Mapping[str, Any]) -> Make:
    if isinstance(policy, str):
        return lambda context: make_policy(policy, params, context)

    def make(context: PolicyContext) -> Policy:
        try:
            return policy(context, **params)
        except Exception as error:
            raise HarliError(f"{policy.__name__} cannot start with these parameters: {one_line(error)}") from error

    return make


def _play(policy: Policy, states: States) -> list[Outcome]:
    """What the policy says of each state, with what then happens on the exact device, and of idling after the last."""
    outcomes: list[Outcome] = []
    for decode, finetune in states:
        decision = policy.decide(replace(decode), replace(finetune))
        outcomes.append(decision)
        policy.observe(_row(policy.context, decode, finetune, decision))
    return [*outcomes, policy.idle(FinetuneState(ready=True)), policy.idle(FinetuneState())]


def _row(context: PolicyContext, decode: DecodeState, finetune: FinetuneState, decision: Decision) -> StepRecord:
    shares = context.menu.shares
    index = shares.index(decision.share) if decision.share in shares[:-1] else 0
    gap_ms = context.need_predictor().forecast(decode, finetune).gap_ms[index]
    window_ms = decision.exclusive_ms
    row = StepRecord.begun(
        decode,
        finetune,
        decision,
        decode_units=decision.share.decode,
        held_units=0,
        predicted_ms=gap_ms,
        bound_ms=gap_ms,
        window_ms=window_ms,
    )
    return row._replace(latency_ms=gap_ms, gap_ms=gap_ms + window_ms)


def _first(problems: Iterator[str]) -> str:
    return next(filter(None, problems), "")


def _share(outcome: Outcome, menu: Menu) -> str:
    if isinstance(outcome, Share):
        problem = share_problem(outcome, menu, of_step=False)
        return problem and f"idle {problem}"
    return share_problem(outcome.share, menu, of_step=True)


def _window(outcome: Outcome, menu: Menu) -> str:
    return "" if isinstance(outcome, Share) else window_problem(outcome.exclusive_ms)


def _budgets(contexts: Sequence[PolicyContext], states: States, outcomes: Sequence[list[Outcome]]) -> Iterator[str]:
    for context, played in zip(contexts, outcomes, strict=True):
        alone = Decision(context.menu.decode_alone)
        predictor = context.need_predictor()
        for (decode, finetune), decision in zip(states, played, strict=False):
            if (
                not isinstance(decision, Decision)
                or decision == alone
                or decision.share not in context.menu.shares[:-1]
            ):
                continue
            bound = predictor.forecast(decode, finetune).bound_ms[context.menu.shares.index(decision.share)]
            window = decision.exclusive_ms and decision.exclusive_ms + predictor.costs.window_overhead_ms
            budget = context.slo.budget_ms(decode.slack_ms)
            if window + bound > budget + 1e-6:
                asked = f"share {decision.share} and a window of {decision.exclusive_ms:.1f} ms"
                yield f"{asked} take {window + bound:.1f} ms, the budget is {budget:.1f} ms ({context.slo}, {decode})"


def _references(
    make: Make, contexts: Sequence[PolicyContext], states: States, outcomes: Sequence[list[Outcome]]
) -> str:
    """The runtime has one object of each kind and updates it in place; here it is spoilt after every call."""
    for context, expected in zip(contexts, outcomes, strict=True):
        policy, decode, finetune = make(context), DecodeState(), FinetuneState()
        for step, (now, training) in enumerate(states):
            _copy(now, decode)
            _copy(training, finetune)
            decision = policy.decide(decode, finetune)
            if decode != now or finetune != training:
                return f"decide changes the state that it is given: {now}"
            if decision != expected[step]:
                return f"another decision when the state object changes after the call: {decision} for {expected[step]}"
            row = _row(context, now, training, decision)
            _copy(DecodeState(time_s=now.time_s, batch=MAX_BATCH, waiting=99, slack_ms=-1e9), decode)
            _copy(FinetuneState(), finetune)
            policy.observe(row)
    return ""


def _copy(source: DecodeState | FinetuneState, target: DecodeState | FinetuneState) -> None:
    for field in fields(source):
        setattr(target, field.name, getattr(source, field.name))


def _again(make: Make, contexts: Sequence[PolicyContext], states: States, outcomes: Sequence[list[Outcome]]) -> str:
    for context, expected in zip(contexts, outcomes, strict=True):
        for step, (first, second) in enumerate(zip(expected, _play(make(context), states), strict=True)):
            if first != second:
                return f"step {step} has {first} at first and {second} the next time"
    return ""


def _interleaved(make: Make, context: PolicyContext, states: States, expected: list[Outcome]) -> str:
    """Another instance sees the states in reverse order in between."""
    policy, other = make(context), make(replace(context, seed=context.seed + 1))
    for step, ((decode, finetune), (last, training)) in enumerate(zip(states, reversed(states), strict=True)):
        decision = policy.decide(replace(decode), replace(finetune))
        if decision != expected[step]:
            return f"step {step} has {expected[step]} alone and {decision} beside another instance"
        then = replace(last, time_s=decode.time_s)
        other.observe(_row(context, then, training, other.decide(replace(then), replace(training))))
        policy.observe(_row(context, decode, finetune, decision))
    return ""


def _duration(make: Make, contexts: Sequence[PolicyContext], states: States) -> Result:
    """CPU time of ``decide`` on the calling thread, forecast included; what may go on in a thread does."""
    taken: list[int] = []
    for context in contexts:
        policy = make(replace(context, background=True))
        for decode, finetune in states:
            now, training = replace(decode), replace(finetune)
            began = time.thread_time_ns()
            decision = policy.decide(now, training)
            taken.append(time.thread_time_ns() - began)
            policy.observe(_row(context, decode, finetune, decision))
    p50, p99 = (float(value) / 1e3 for value in np.percentile(taken, [50.0, 99.0]))
    problem = f"p99 is {p99:.0f} us CPU, the limit is {DECISION_LIMIT_US:.0f} us" if p99 > DECISION_LIMIT_US else ""
    return Result("decides fast", problem, f"p50 {p50:.1f}, p99 {p99:.1f} us CPU")
