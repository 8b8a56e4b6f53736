"""``harli policies``: what there is to choose from."""

from __future__ import annotations

import inspect

from rich.console import Console
from rich.table import Table


def policies() -> None:
    """List the installed policies with their parameters.

    A policy of your own is used as `--policy path.py:Class`.

    Example: harli policies
    """
    from policies.registry import load_policy, names, parameters

    table = Table("policy", "parameters (default)", "what it does", box=None, pad_edge=False)
    for name in names():
        policy = load_policy(name)
        settings = ", ".join(f"{p.name} ({p.default!r})" for p in parameters(policy)) or "-"
        table.add_row(name, settings, (inspect.getdoc(policy) or "").split("\n", 1)[0])
    Console().print(table)
