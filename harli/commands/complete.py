"""What the shell completes; cheap, since it runs at every press of the tab key."""

from __future__ import annotations


def policies(incomplete: str) -> list[str]:
    """Names of installed policies."""
    from importlib.metadata import entry_points

    return [point.name for point in entry_points(group="harli.policies") if point.name.startswith(incomplete)]


def models(incomplete: str) -> list[str]:
    """Names of the built-in models."""
    from harli.models import BUILT_IN

    return [name for name in BUILT_IN if name.startswith(incomplete)]
