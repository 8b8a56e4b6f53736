"""What is compared: an entrant is a policy with its parameters, an objective the SLO that it is held to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from harli.types import HarliError, Menu, Slo
from policies.registry import load_policy

Value = bool | int | float | str

FEW_SPLITS = 2
"""Up to so many splits, `static` is compared at every one of them."""
THRESHOLDS = ((0.4, 0.7), (0.5, 0.8), (0.6, 0.9), (0.7, 0.95))
"""``low`` and ``high`` of `reactive`, from cautious to bold."""

PRICES = (0.0, 0.5, 0.85, 1.0, 1.05, 1.2, 1.5)
"""``price`` of `oracle`, from filling every step to caution."""


@dataclass(frozen=True, slots=True)
class Objective:
    """An SLO, and the multiple of decode alone's P99 that it is, if it was given so."""

    slo: Slo
    scale: float | None = None

    def __str__(self) -> str:
        limits = (("ITL", self.slo.itl_ms), ("TPOT", self.slo.tpot_ms))
        text = ", ".join(f"{name} {limit:.4g} ms" for name, limit in limits if limit is not None)
        return text if self.scale is None else f"{text} ({self.scale:g} times decode alone's P99)"

    @property
    def label(self) -> str:
        """Short, for names of folders."""
        if self.scale is not None:
            return f"{self.scale:g}x"
        limits = (("itl", self.slo.itl_ms), ("tpot", self.slo.tpot_ms))
        return "-".join(f"{name}-{limit:g}ms" for name, limit in limits if limit is not None)


@dataclass(frozen=True, slots=True)
class Entrant:
    """A policy with its parameters."""

    policy: str
    params: tuple[tuple[str, Value], ...] = ()
    slo_aware: bool = True
    """It decides by the SLO. If not, one run is scored against every SLO."""

    def __str__(self) -> str:
        values = ((name, str(value).lower() if isinstance(value, bool) else value) for name, value in self.params)
        return " ".join([self.policy.rsplit(":", 1)[-1], *(f"{name}={value}" for name, value in values)])

    @property
    def label(self) -> str:
        """For names of folders."""
        return re.sub(r"[^\w.=]+", "-", str(self))


SEPARATE = Entrant("separate", slo_aware=False)
"""Decode alone: always there, what all others are measured against."""
ORACLE = "oracle"
"""The policy that is an upper limit: what others are measured against, and nobody's rival."""
Group = tuple[Entrant, ...]
"""Variants of a policy, of which the best one takes part in the rounds."""


def groups(
    policies: Sequence[str], menu: Menu, tuned: Mapping[str, Mapping[str, Value]] | None = None
) -> tuple[Group, ...]:
    """The entrants beside `separate`, as groups of variants; most groups have one.

    `static` has every split, fixed and work-conserving; `reactive` has several thresholds, `oracle` several
    prices, careful or not. ``tuned``: by policy, parameters with which it takes part once more.

    Raises HarliError for an unknown policy, one named twice, and when nothing but `separate` is named.
    """
    found: list[Group] = []
    for name in dict.fromkeys(policies):
        aware = bool(getattr(load_policy(name), "slo_aware", True))
        if name == SEPARATE.policy:
            continue
        variants = [tuple(Entrant(name, params, aware) for params in group) for group in _variants(name, menu)]
        if any(str(variants[0][0]) == str(group[0]) for group in found):
            raise HarliError(f"two of the policies are called {variants[0][0]}; rename one")
        found += variants
        if tuned and name in tuned:
            found.append((Entrant(name, tuple(tuned[name].items()), aware),))
    if not found:
        raise HarliError("nothing to compare with decode alone: add a policy to --policies")
    return tuple(found)


def _variants(name: str, menu: Menu) -> list[list[tuple[tuple[str, Value], ...]]]:
    if name == "reactive":
        return [[(("low", low), ("high", high)) for low, high in THRESHOLDS]]
    if name == ORACLE:
        return [[(("price", price), ("careful", careful)) for careful in (True, False) for price in PRICES]]
    if name == "static" and menu.splits:
        kinds: list[list[tuple[tuple[str, Value], ...]]] = [
            [(("share", str(split)), ("work_conserving", conserving)) for split in menu.splits]
            for conserving in (False, True)
        ]
        return kinds if len(menu.splits) > FEW_SPLITS else [[variant] for kind in kinds for variant in kind]
    return [[()]]
