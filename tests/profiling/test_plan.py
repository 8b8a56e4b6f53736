"""The plan: the same from the same seed, within what the engine can hold, and over the whole space."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harli.types import HarliError, Menu
from profiling.plan import Limits, Plan
from tests.profiling.builders import LIMITS, MENU, make_plan


def test_the_same_seed_gives_the_same_plan_and_another_one_another() -> None:
    one, same, other = make_plan(), make_plan(), make_plan(seed=1)
    assert one.groups == same.groups
    assert one.reference == same.reference
    assert one.groups != other.groups
    assert [one.script(group, 3) for group in one.groups] == [same.script(group, 3) for group in same.groups]


def test_corners_come_first_and_lie_at_the_ends() -> None:
    plan = make_plan()
    corners = plan.groups[: plan.corners]
    assert {group.purpose for group in corners} == {"corner"}
    assert {group.batch for group in corners} == {1, LIMITS.max_batch}
    assert min(min(group.contexts) for group in corners) == 16
    assert max(group.contexts[0] for group in corners if group.batch == 1) > 1800


def test_a_budget_of_ten_minutes_covers_the_space() -> None:
    plan = make_plan(budget_s=600.0)
    assert len(plan.groups) * 2 >= 150
    assert {group.microbatch_tokens for group in plan.groups} == {128, 256, 512}
    batches = [group.batch for group in plan.groups]
    assert sum(batch <= 4 for batch in batches) > len(batches) / 4 < sum(batch > 4 for batch in batches)
    skewed = [group for group in plan.groups if group.batch > 4 and max(group.contexts) > 2 * min(group.contexts)]
    assert len(skewed) > 10


def test_every_share_of_a_group_comes_twice_in_each_script() -> None:
    plan = make_plan()
    for group in plan.groups[:5]:
        shares = [segment.share for segment in plan.script(group, 0)]
        assert sorted(map(str, shares)) == sorted(map(str, group.shares * 2))


def test_a_long_menu_is_sampled_evenly() -> None:
    menu = Menu.parse([f"{16 - n}/{n}" for n in range(0, 17, 2)])
    plan = make_plan(menu=menu, budget_s=600.0)
    counts = {share: sum(share in group.shares for group in plan.groups) for share in menu.shares}
    assert counts[menu.decode_alone] == len(plan.groups)
    assert counts[menu.finetune_alone] == 0
    assert min(counts[split] for split in menu.splits) > len(plan.groups) / 6
    assert {len(group.shares) for group in plan.groups} == {4}


@given(
    max_batch=st.integers(1, 256), max_context=st.integers(256, 8192), kv_tokens=st.integers(9000, 10**6),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_requests_fit_the_engine(max_batch: int, max_context: int, kv_tokens: int, seed: int) -> None:
    plan = make_plan(seed=seed, budget_s=60.0, limits=Limits(max_batch, max_context, max(kv_tokens, 160 * max_batch)))
    for group in (*plan.groups, plan.reference):
        tokens = plan.output_tokens(group, plan.script(group, 0))
        assert 1 <= group.batch <= max_batch
        assert min(group.contexts) >= 16
        assert max(group.contexts) + tokens <= max_context
        assert sum(group.contexts) + tokens * group.batch <= max(kv_tokens, 160 * max_batch)


def test_where_prompts_are_computed_requests_outlive_those_of_the_others() -> None:
    limits = Limits(32, 2048, 116_000)
    plan, prefilled = (make_plan(limits=limits, role=role) for role in ("mixed", "decode"))
    for group in (*plan.groups, plan.reference):
        script = plan.script(group, 0)
        tokens = plan.output_tokens(group, script)
        assert tokens >= prefilled.output_tokens(group, script) + sum(group.contexts) / 2048
        assert max(group.contexts) + tokens <= limits.max_context
        assert sum(group.contexts) + tokens * group.batch <= limits.kv_tokens


def test_points_are_told_apart() -> None:
    plan = make_plan()
    points = [group.point(share, MENU) for group in (*plan.groups, plan.reference) for share in group.shares]
    assert len(points) == len(set(points))


def test_requests_that_are_too_short_are_refused() -> None:
    with pytest.raises(HarliError, match="--max-model-len"):
        make_plan(limits=Limits(8, 100, 10_000))


def test_a_plan_is_described_by_plain_values() -> None:
    described = make_plan().described
    again = Plan(
        seed=described["seed"], budget_s=described["budget_s"], menu=MENU, limits=Limits(**described["limits"]),
        microbatches=described["microbatches"], role=described["role"],
    )  # fmt: skip
    assert again.groups == make_plan().groups
