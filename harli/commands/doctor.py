"""``harli doctor``: what this machine can do, and what is refused and why."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table


def doctor() -> None:
    """Show device, versions, the menu of shares, and what is supported.

    Example: harli doctor
    """
    from harli.engine import device
    from harli.engine.support import REFUSED
    from harli.engine.weights import ARCHITECTURES

    about = device.describe()
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    for key, value in about.items():
        table.add_row(key, "none" if value is None else str(value))
    table.add_row("versions", ", ".join(f"{name} {version}" for name, version in device.versions().items()))
    if about["kind"] == "cpu":
        shares = device.menu().shares
        table.add_row("shares", ", ".join(map(str, shares)) + " (cores of decode / finetuning)")
        if len(shares) == 2:
            reason = "one core only" if about["cores"] == 1 else "this OpenMP runtime's threads cannot be pinned"
            table.add_row("", f"time slicing only: {reason}")
    else:
        table.add_row("shares", ", ".join(map(str, device.menu().shares)) + " (SMs of decode / finetuning)")
    table.add_row("models", ", ".join(ARCHITECTURES) + "; bfloat16, float16 or float32")
    for what, why in REFUSED.items():
        table.add_row("refused", f"{what}: {why}")
    Console().print(table)
