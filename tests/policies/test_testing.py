"""The conformance suite: our policies pass it, and every rule catches what breaks it."""

from __future__ import annotations

import random
import re
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
from typer.testing import CliRunner

from harli.commands.policies import app
from harli.rows import StepRecord
from harli.types import Decision, DecodeState, FinetuneState, HarliError, Share, Slo
from policies.base import Policy, PolicyContext
from policies.linear import Linear
from policies.qos import Qos
from policies.reactive import Reactive
from policies.separate import Separate
from policies.static import Static
from policies.stepwise import Stepwise
from policies.testing import SLOS, check
from policies.timeslice import Timeslice
from policies.trial import MENU, random_states
from policies.unmanaged import Unmanaged
from tests.records.builders import small_run

OURS = (Separate, Static, Unmanaged, Timeslice, Reactive, Stepwise, Linear, Qos)
DOCS = Path(__file__).parents[2] / "docs" / "policies.md"


@pytest.mark.parametrize("policy", OURS)
def test_ours_keep_the_contract(policy: type[Policy]) -> None:
    report = check(policy)
    assert report.failures == []
    assert len(report.results) == 7 + (policy in (Timeslice, Stepwise, Qos))
    assert "us CPU" in report.results[-1].note


class Broken(Policy):
    """Breaks one rule, named by ``how``."""

    keeps_slo: ClassVar[bool] = True
    seen: ClassVar[list[int]] = []
    made: ClassVar[int] = 0

    def __init__(self, context: PolicyContext, *, how: str = "") -> None:
        super().__init__(context)
        self.how, self.count = how, 0
        self.split, self.alone = Decision(context.menu.splits[0]), Decision(context.menu.decode_alone)
        self.last: DecodeState | None = None
        Broken.made += 1
        self.number = Broken.made
        if how == "construct":
            raise HarliError("one line")

    def decide(self, decode: DecodeState, finetune: FinetuneState) -> Decision:
        self.count += 1
        if self.how == "raise" and decode.waiting > 5:
            raise ZeroDivisionError("at a queue")
        if self.how == "foreign" and self.count == 500:
            return Decision(Share(7, 1))
        if self.how == "finetune alone":
            return Decision(self.context.menu.finetune_alone)
        if self.how in ("nan", "-1", "inf"):
            return Decision(self.alone.share, float(self.how))
        if self.how == "greedy":
            return self.split
        if self.how == "window":
            return Decision(self.alone.share, 1.0 if decode.slack_ms < 0.0 else 0.0)
        if self.how == "change":
            decode.waiting = 0
        if self.how == "keep":
            last, self.last = self.last, decode
            return self.split if last is not None and last.batch > 16 and decode.slack_ms > 1e6 else self.alone
        if self.how == "random":
            return Decision(self.alone.share, 0.1 * random.random())
        if self.how == "shared":
            Broken.seen.append(decode.batch)
            return self.split if len(Broken.seen) % 50 == 0 else self.alone
        if self.how == "slow" and self.count % 10 == 0:
            began = time.thread_time()
            while time.thread_time() < began + 0.0012:
                pass
        return self.alone

    def idle(self, finetune: FinetuneState) -> Share:
        if self.how == "no idle":
            return None  # type: ignore[return-value]
        return Share(9, 9) if self.how == "idle" else super().idle(finetune)

    def observe(self, step: StepRecord) -> None:
        if self.how == "observe" or (self.how == "worn out" and self.number > 1 + len(SLOS)):
            raise KeyError(step.step)


@pytest.mark.parametrize(
    ("how", "failure"),
    [
        ("raise", "decides in every state: ZeroDivisionError: at a queue"),
        ("observe", "decides in every state: KeyError: 1"),
        ("foreign", "shares are on the menu and leave decode some: share 7/1 is not on the menu"),
        ("no idle", "shares are on the menu and leave decode some: AttributeError: 'NoneType' object"),
        ("idle", "shares are on the menu and leave decode some: idle share 9/9 is not on the menu"),
        ("finetune alone", "shares are on the menu .* share 0/4 leaves a decode step nothing to run on"),
        ("nan", "windows are finite: a window of nan ms is not between 0 and 60000 ms"),
        ("-1", "windows are finite: a window of -1.0 ms"),
        ("inf", "windows are finite: a window of inf ms"),
        ("greedy", "keeps the budget when the predictor is exact: share 3/1 and a window of 0.0 ms take"),
        ("window", "keeps the budget when the predictor is exact: share 4/0 and a window of 1.0 ms take"),
        ("change", "leaves states alone and keeps no reference: decide changes the state that it is given"),
        ("keep", "leaves states alone and keeps no reference: another decision when the state object changes"),
        ("random", "the same seed decides the same: step 0 has"),
        ("shared", "instances are independent: "),
        ("slow", r"decides fast: p99 is \d+ us CPU, the limit is 1000 us"),
    ],
)
def test_a_broken_rule_is_found(how: str, failure: str) -> None:
    failures = check(Broken, {"how": how}).failures
    assert any(re.match(failure, line) for line in failures), failures
    assert all("\n" not in line for line in failures)


def test_an_exception_in_a_rule_is_a_problem_of_that_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those after the first pass over the states see fresh instances."""
    monkeypatch.setattr(Broken, "made", 0)
    failures = check(Broken, {"how": "worn out"}).failures
    assert [line.split(": ")[:2] for line in failures] == [
        ["leaves states alone and keeps no reference", "KeyError"],
        ["the same seed decides the same", "KeyError"],
        ["instances are independent", "KeyError"],
        ["decides fast", "KeyError"],
    ]


def test_the_intact_one_passes_and_a_refusal_stays_one_line() -> None:
    assert check(Broken).failures == []
    with pytest.raises(HarliError, match="one line"):
        check(Broken, {"how": "construct"})
    with pytest.raises(HarliError, match="no policy is called"):
        check("nonsense")


def test_states_are_seeded_and_cover_what_happens() -> None:
    states = random_states(3)
    assert states == random_states(3)
    assert states != random_states(4)
    assert all(a.time_s < b.time_s for (a, _), (b, _) in pairwise(states))
    for covered in (
        lambda d, f: d.waiting,
        lambda d, f: d.prefill_tokens,
        lambda d, f: d.slack_ms < 0.0,
        lambda d, f: not f.ready,
        lambda d, f: f.held_units,
        lambda d, f: d.batch == 1,
    ):
        assert any(covered(decode, finetune) for decode, finetune in states)


# The command


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    if isinstance(result.exception, HarliError):
        return 2, result.stdout + str(result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout


def test_the_list_is_still_there() -> None:
    code, shown = run()
    assert code == 0
    assert "separate" in shown


def test_check_prints_a_line_per_rule() -> None:
    code, shown = run("check", "static", "--param", "share=3/1", "--param", "work_conserving=true")
    assert code == 0
    assert shown.count("\n") == shown.count("ok ") == 7


def test_check_fails_with_what_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from harli.types import Decision\nfrom policies.base import Policy\n"
        "class Mine(Policy):\n    def decide(self, decode, finetune):\n"
        "        return Decision(self.context.menu.finetune_alone)\n"
    )
    code, shown = run("check", f"{file}:Mine")
    assert code == 2
    assert "FAILED shares are on the menu and leave decode some: share 0/4" in shown
    assert shown.endswith("breaks 1 of 7 rules; see above")
    assert run("check", f"{file}:Other")[0] == 2
    assert run("check", "static", "--param", "share")[1] == "--param wants key=value, not 'share'"


def test_check_on_a_record(tmp_path: Path) -> None:
    record = small_run(tmp_path / "run")
    code, shown = run("check", "static", "--param", "share=1/1", "--record", str(record.folder))
    assert code == 0
    assert f"{record.steps.num_rows} states, 1 SLOs" in shown
    assert run("check", "static", "--record", str(tmp_path))[0] == 2


# The page


def test_the_policy_on_the_page_runs_and_keeps_the_contract() -> None:
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    source = next(block for block in blocks if "class Half" in block)
    assert source.count("\n") < 30
    names: dict[str, Any] = {}
    exec(source, names)
    half = names["Half"]
    half.keeps_slo = True
    assert check(half).failures == []
    assert check(half, {"limit": 3}, slos=[Slo(itl_ms=200.0)], menu=MENU).failures == []


def test_the_page_names_every_policy_of_ours() -> None:
    page = DOCS.read_text()
    assert all(f"`{policy.__module__.removeprefix('policies.')}`" in page for policy in OURS)
