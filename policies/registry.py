"""Finds policies by name and makes them from parameters given as text."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

from harli.types import HarliError, one_line
from policies.base import Policy, PolicyContext, Range

GROUP = "harli.policies"
"""Entry-point group: ours and third parties' policies, name = "module:Class"."""


class Parameter(NamedTuple):
    """A keyword-only argument of a policy's constructor."""

    name: str
    annotation: Any
    default: Any
    range: Range | None = None
    """Where ``harli compare --tune`` searches; None for a parameter that it leaves alone."""


def names() -> list[str]:
    """Names of the installed policies."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def load_policy(name: str) -> type[Policy]:
    """The class of an installed policy, or of ``path.py:Class``. Raises HarliError if there is none."""
    if ".py:" in name:
        loaded = _from_file(*name.rsplit(":", 1))
    else:
        points = entry_points(group=GROUP, name=name)
        if not points:
            close = difflib.get_close_matches(name, names(), n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(names())}"
            raise HarliError(f"no policy is called {name!r}; {hint}")
        try:
            loaded = next(iter(points)).load()
        except Exception as error:
            raise HarliError(f"policy {name!r} cannot be loaded: {one_line(error)}") from error
    if not (isinstance(loaded, type) and issubclass(loaded, Policy)):
        raise HarliError(f"{name!r} is not a policy: it does not derive from policies.base.Policy")
    return loaded


def parameters(policy: type[Policy]) -> list[Parameter]:
    """What ``--param`` may set, in the order of the constructor. Raises HarliError if a type is not to be found."""
    try:
        hints = get_type_hints(policy.__init__, include_extras=True)
    except Exception as error:  # annotations are the author's own code
        raise HarliError(f"the parameters of {policy.__name__} cannot be read: {one_line(error)}") from error
    signature = inspect.signature(policy.__init__)
    return [
        Parameter(name, hint, argument.default, _range(hint))
        for name, argument in signature.parameters.items()
        if argument.kind is inspect.Parameter.KEYWORD_ONLY
        for hint in (hints.get(name, str),)
    ]


def _range(hint: Any) -> Range | None:
    return next((found for found in getattr(hint, "__metadata__", ()) if isinstance(found, Range)), None)


def make_policy(name: str, params: Mapping[str, Any], context: PolicyContext) -> Policy:
    """A policy with ``params`` converted to the types that its constructor declares. Raises HarliError."""
    policy = load_policy(name)
    known = {parameter.name: parameter for parameter in parameters(policy)}
    values: dict[str, Any] = {}
    for key, text in params.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(known) or 'none'}"
            raise HarliError(f"policy {name!r} has no parameter {key!r}; {hint}")
        try:
            values[key] = TypeAdapter(known[key].annotation).validate_python(text)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].lower()
            raise HarliError(f"parameter {key!r} of policy {name!r} cannot be {text!r}: {reason}") from None
        except PydanticSchemaGenerationError:
            raise HarliError(f"parameter {key!r} of policy {name!r} cannot be given as text") from None
    try:
        return policy(context, **values)
    except HarliError:
        raise
    except Exception as error:
        raise HarliError(f"policy {name!r} cannot start with these parameters: {one_line(error)}") from error


def _from_file(path: str, class_name: str) -> Any:
    file = Path(path).expanduser()
    if not file.is_file():
        raise HarliError(f"no policy file {path}")
    spec = importlib.util.spec_from_file_location(f"harli_policy_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        raise HarliError(f"{path} cannot be loaded: {one_line(error)}") from error
    if not hasattr(module, class_name):
        raise HarliError(f"{path} has no class {class_name!r}")
    return getattr(module, class_name)
