"""A run's settings as one YAML file, whose structure is that of ``harli.config.RunSettings``."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ValidationError

from harli.config import RunSettings
from harli.types import HarliError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

UP_TO_FLAGS = ("missing", "value_error")
"""Kinds of problems that a flag may still mend: no such setting, or two that do not fit together."""


def load(path: Path) -> dict[str, Any]:
    """The settings in ``path``, as written; paths among them count from the current folder.

    Raises HarliError for a file that is not YAML, an unknown key or an impossible value. What is
    missing is left to ``validate``, since flags may give it.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise HarliError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise HarliError(f"{path} is not UTF-8 text") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise HarliError(f"{path}{line}: not YAML: {problem}") from error
    except ValueError as error:  # such as the date 2026-13-01
        raise HarliError(f"{path}: not YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise HarliError(f"{path}: expected settings such as 'policy: static', found {type(content).__name__}")
    for found in _problems(content):
        if found["type"] not in UP_TO_FLAGS:
            raise HarliError(f"{path}: {_explain(found)}")
    return content


def override(settings: dict[str, Any], path: str, value: Any) -> None:
    """Set ``settings["a"]["b"]`` for the path "a.b"."""
    *parents, last = path.split(".")
    for name in parents:
        inner = settings.get(name)
        if not isinstance(inner, dict):
            inner = settings[name] = {}
        settings = inner
    settings[last] = value


def override_flags(settings: dict[str, Any], paths: Mapping[str, str], flags: Mapping[str, Any]) -> None:
    """Set what flags were given for: ``paths`` has their places. ``seed`` goes to engine, workload and finetuning.

    Raises HarliError for a rate of generated requests where a trace is given, by a flag or before.
    """
    for name, path in paths.items():
        if flags.get(name) is not None:
            override(settings, path, flags[name])
    if flags.get("requests_per_s") is not None and settings["workload"].get("trace") is not None:
        raise HarliError(
            "--requests-per-s is for generated requests, a trace has its own rate: give --rate-scale instead"
        )
    if flags["seed"] is not None:
        for section in ("engine", "workload", "finetune"):
            override(settings, f"{section}.seed", flags["seed"])


def override_params(settings: dict[str, Any], pairs: Iterable[str]) -> None:
    """Set the policy's parameters from ``--param key=value``. Raises HarliError for what is not of that form."""
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise HarliError(f"--param wants key=value, not {pair!r}")
        override(settings, f"params.{key}", value)


def validate(settings: Mapping[str, Any]) -> RunSettings:
    """Raises HarliError for the first thing that is wrong."""
    for problem in _problems(settings):
        raise HarliError(_explain(problem))
    return RunSettings.model_validate(settings)


def dump(settings: Mapping[str, Any]) -> str:
    """YAML text of settings that are plain JSON values."""
    return str(yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True))


def _problems(settings: Mapping[str, Any]) -> list[ErrorDetails]:
    try:
        RunSettings.model_validate(settings)
    except ValidationError as error:
        return error.errors()
    return []


def _explain(problem: ErrorDetails) -> str:
    """One line about a problem, with a suggestion where a key is unknown."""
    where = [str(part) for part in problem["loc"]]
    name = ".".join(where)
    match problem["type"]:
        case "extra_forbidden":
            known = _keys(where[:-1])
            close = difflib.get_close_matches(where[-1], known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
            return f"no setting is called {name!r}; {hint}"
        case "missing":
            return f"setting {name!r} is missing: give it as a flag or in the --config file"
        case "value_error":
            return f"{name}: {problem['msg'].removeprefix('Value error, ')}"
        case "model_type" | "dict_type":
            return f"{name}: expected settings inside it, not {problem['input']!r}"
        case "bool_type" if where[0] == "params":  # the first kind of value that a parameter may have
            return f"params.{where[1]}: expected a number, a text, true or false, not {problem['input']!r}"
        case _:
            return f"{name}: {problem['msg'][:1].lower()}{problem['msg'][1:]}, not {problem['input']!r}"


def _keys(path: list[str]) -> list[str]:
    """The settings of the section at ``path``."""
    section: Any = RunSettings
    for name in path:
        section = section.model_fields[name].annotation
    return list(section.model_fields) if isinstance(section, type) and issubclass(section, BaseModel) else []
