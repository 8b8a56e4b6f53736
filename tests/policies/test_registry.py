"""Finding policies and making them from text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harli.types import HarliError, Menu, Share, Slo
from policies.base import Policy, PolicyContext, Range
from policies.reactive import Reactive
from policies.registry import Parameter, load_policy, make_policy, names, parameters
from policies.separate import Separate
from policies.static import Static

CONTEXT = PolicyContext(Menu((Share(2, 0), Share(1, 1), Share(0, 2))), Slo())

SOURCE = """
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from harli.types import Decision
from policies.base import Policy, PolicyContext, Range


@dataclass
class Plan:
    steps: int = 3


class Tuned(Policy):
    "Has a parameter of each kind."

    def __init__(
        self,
        context: PolicyContext,
        *,
        limit: int = 8,
        ratio: float = 0.5,
        fast: bool = False,
        label: str = "",
        mode: Literal["near", "far"] = "near",
        hook: Plan | None = None,
        untyped="",
    ):
        super().__init__(context)
        if limit < 0:
            raise ValueError(f"limit is {limit},\\nit must not be negative")
        self.values = limit, ratio, fast, label, mode, untyped
        self.plan = {0: Plan()}[limit * 0 if ratio < 9 else 1]

    def decide(self, decode, finetune):
        return Decision(self.context.menu.decode_alone)


class Unfinished(Policy):
    "Has no decide."


class Unrelated:
    pass


def function(context):
    return None
"""

Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path) -> Iterator[Write]:
    """Writes a policy file and returns its path."""
    before = set(sys.modules)

    def write_source(source: str) -> str:
        path = tmp_path / "mine.py"
        path.write_text(source)
        return str(path)

    yield write_source
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.fixture
def tuned(write: Write) -> str:
    return f"{write(SOURCE)}:Tuned"


def refused(name: str, params: dict[str, str] | None = None) -> str:
    """The one line with which a policy is refused."""
    with pytest.raises(HarliError) as caught:
        make_policy(name, params or {}, CONTEXT)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def make(name: str, **params: str) -> Any:
    return make_policy(name, params, CONTEXT)


# Finding


def test_ours_are_installed() -> None:
    assert names() == sorted(names())
    assert {"separate", "static"} <= set(names())
    assert load_policy("separate") is Separate
    assert load_policy("static") is Static


@pytest.mark.parametrize("name", names())
def test_every_installed_policy_says_what_it_does(name: str) -> None:
    policy = load_policy(name)
    assert policy.__doc__
    assert policy.__doc__ != Policy.__doc__
    parameters(policy)


def test_an_unknown_name_gets_a_suggestion_or_the_list() -> None:
    assert refused("statc") == "no policy is called 'statc'; did you mean 'static'?"
    assert refused("zzz") == f"no policy is called 'zzz'; there are {', '.join(names())}"
    assert "there are" in refused("")


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed distribution with three policies, of which one works."""
    info = tmp_path / "others-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[harli.policies]\ntheirs = their_policy:Theirs\ngone = their_policy:Gone\nodd = their_policy:Odd\n"
    )
    (tmp_path / "their_policy.py").write_text(
        "from policies.separate import Separate\nclass Theirs(Separate): 'One of theirs.'\nOdd = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("third_party")
def test_other_distributions_policies() -> None:
    assert {"theirs", "separate"} <= set(names())
    assert isinstance(make("theirs"), Separate)
    assert refused("gone").startswith("policy 'gone' cannot be loaded: AttributeError: ")
    assert refused("odd") == "'odd' is not a policy: it does not derive from policies.base.Policy"


def test_a_class_in_a_file(tuned: str) -> None:
    policy = make(tuned)
    assert isinstance(policy, Policy)
    assert type(policy).__name__ == "Tuned"
    assert policy.context is CONTEXT


def test_a_missing_file_or_class(write: Write, tmp_path: Path) -> None:
    missing = tmp_path / "none.py"
    assert refused(f"{missing}:Tuned") == f"no policy file {missing}"
    path = write(SOURCE)
    assert refused(f"{path}:Tuner") == f"{path} has no class 'Tuner'"
    assert refused(f"{tmp_path}/.py:Tuned") == f"no policy file {tmp_path}/.py"


@pytest.mark.parametrize("name", ["Unrelated", "function", "Plan"])
def test_what_is_no_policy(write: Write, name: str) -> None:
    path = write(SOURCE)
    assert refused(f"{path}:{name}").endswith("is not a policy: it does not derive from policies.base.Policy")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise RuntimeError('first\\nsecond')", "RuntimeError: first"),
        ("import no_such_module_at_all", "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        ("class Broken(:\n", "SyntaxError: invalid syntax (mine.py, line 1)"),
    ],
)
def test_a_file_that_cannot_be_imported(write: Write, source: str, reason: str) -> None:
    path = write(source)
    assert refused(f"{path}:Broken") == f"{path} cannot be loaded: {reason}"


def test_an_unfinished_policy(write: Write) -> None:
    assert "abstract" in refused(f"{write(SOURCE)}:Unfinished")


# Parameters


def test_parameters_come_from_the_constructor() -> None:
    assert parameters(Separate) == []
    assert parameters(Static) == [Parameter("share", str, ""), Parameter("work_conserving", bool, False)]


def test_a_range_to_search_is_declared_beside_the_type() -> None:
    ranges = {parameter.name: parameter.range for parameter in parameters(Reactive)}
    assert ranges["every"] == Range(2, 64, log=True)
    assert all(found is not None for found in ranges.values())
    assert [parameter.range for parameter in parameters(Static)] == [None, None]


@pytest.mark.parametrize("bounds", [(2.0, 1.0), (1.0, 1.0), (0.0, float("inf")), (float("nan"), 1.0)])
def test_a_range_has_two_ends(bounds: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="not a range"):
        Range(*bounds)


def test_a_range_in_the_logarithm_is_above_0() -> None:
    with pytest.raises(ValueError, match="logarithm"):
        Range(0.0, 1.0, log=True)


def test_defaults(tuned: str) -> None:
    assert make(tuned).values == (8, 0.5, False, "", "near", "")


def test_text_becomes_the_declared_type(tuned: str) -> None:
    policy = make(tuned, limit="3", ratio="0.25", fast="true", label="7", mode="far", untyped="8")
    assert policy.values == (3, 0.25, True, "7", "far", "8")
    assert [type(value) for value in policy.values] == [int, float, bool, str, str, str]


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("1", True), ("yes", True), ("False", False), ("0", False), ("off", False)]
)
def test_truth_has_many_names(tuned: str, text: str, value: bool) -> None:
    assert make(tuned, fast=text).values[2] is value


@pytest.mark.parametrize(
    ("key", "text"), [("limit", "2.5"), ("limit", "many"), ("ratio", ""), ("fast", "perhaps"), ("mode", "there")]
)
def test_a_value_that_does_not_parse(tuned: str, key: str, text: str) -> None:
    message = refused(tuned, {key: text})
    assert message.startswith(f"parameter {key!r} of policy {tuned!r} cannot be {text!r}: ")


def test_an_unknown_parameter_gets_a_suggestion_or_the_list(tuned: str) -> None:
    assert refused(tuned, {"limt": "3"}) == f"policy {tuned!r} has no parameter 'limt'; did you mean 'limit'?"
    assert refused(tuned, {"context": "3"}).endswith("it has limit, ratio, fast, label, mode, hook, untyped")
    assert refused("separate", {"share": "1/1"}) == "policy 'separate' has no parameter 'share'; it has none"


def test_a_value_that_the_policy_refuses(tuned: str) -> None:
    message = f"policy {tuned!r} cannot start with these parameters: ValueError: limit is -1,"
    assert refused(tuned, {"limit": "-1"}) == message


def test_a_policy_that_fails_at_its_start(tuned: str) -> None:
    assert refused(tuned, {"ratio": "10"}).endswith("cannot start with these parameters: KeyError: 1")


def test_a_policys_own_one_line_stays_as_it_is() -> None:
    assert refused("static", {"share": "5/5"}) == "no share '5/5' on this device; it has 2/0, 1/1, 0/2"


def test_a_type_that_text_cannot_give(write: Write) -> None:
    path = write(SOURCE.replace("Plan | None", "Unrelated | None"))
    assert make(f"{path}:Tuned")
    message = refused(f"{path}:Tuned", {"hook": "x"})
    assert message == f"parameter 'hook' of policy '{path}:Tuned' cannot be given as text"


def test_a_type_that_is_not_to_be_found(write: Write) -> None:
    path = write(SOURCE.replace("hook: Plan", "hook: Plann"))
    assert "name 'Plann' is not defined" in refused(f"{path}:Tuned")
