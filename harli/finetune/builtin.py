"""A small real finetuning set that needs no network: docstrings of Python's own standard library."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import ModuleType

from harli.types import HarliError

MIN_CHARACTERS = 40
MODULES = (
    "argparse",
    "ast",
    "base64",
    "calendar",
    "collections",
    "configparser",
    "contextlib",
    "copy",
    "csv",
    "dataclasses",
    "difflib",
    "enum",
    "filecmp",
    "fileinput",
    "fnmatch",
    "fractions",
    "functools",
    "glob",
    "graphlib",
    "gzip",
    "hashlib",
    "heapq",
    "html",
    "ipaddress",
    "json",
    "logging",
    "os",
    "pathlib",
    "pkgutil",
    "plistlib",
    "pprint",
    "queue",
    "random",
    "secrets",
    "shelve",
    "shlex",
    "shutil",
    "socket",
    "socketserver",
    "statistics",
    "string",
    "subprocess",
    "tarfile",
    "tempfile",
    "textwrap",
    "threading",
    "timeit",
    "traceback",
    "urllib.parse",
    "uuid",
    "warnings",
    "xml.etree.ElementTree",
    "zipfile",
)


def write_builtin_dataset(path: Path, limit: int = 400) -> int:
    """Writes at most ``limit`` lines of ``{"prompt", "completion"}``; returns how many it wrote.

    A prompt asks for the docstring of a public function or class, given its signature; the
    completion is the docstring's first paragraph. The same Python writes the same file.

    Raises:
        HarliError: the file cannot be written, or this Python runs without docstrings.
    """
    if sys.flags.optimize >= 2:
        raise HarliError("this Python has no docstrings; run it without -OO")
    pairs = list(islice(_pairs(), limit))
    text = "".join(json.dumps({"prompt": prompt, "completion": completion}) + "\n" for prompt, completion in pairs)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as temporary:
            written = Path(temporary) / path.name
            written.write_text(text, encoding="utf-8")
            os.replace(written, path)
    except OSError as error:
        raise HarliError(f"cannot write the finetuning data {path}: {error.strerror}") from None
    return len(pairs)


@contextmanager
def given_or_builtin(data: Path | None) -> Iterator[Path]:
    """The file itself, or if there is none the built-in set in a temporary one. Raises HarliError as writing does."""
    if data is not None:
        yield data
        return
    with tempfile.TemporaryDirectory(prefix="harli-") as temporary:
        written = Path(temporary) / "docstrings.jsonl"
        write_builtin_dataset(written)
        yield written


def _pairs() -> Iterator[tuple[str, str]]:
    for module in map(importlib.import_module, MODULES):
        for name, value in _public(module):
            paragraph = " ".join(inspect.cleandoc(value.__doc__ or "").split("\n\n")[0].split())
            # One that begins with the name is a generated signature, and ">>>" begins a doctest: neither is prose.
            if len(paragraph) >= MIN_CHARACTERS and not paragraph.startswith((f"{name}(", ">>>")):
                yield f"Write the docstring of Python's `{module.__name__}.{name}{_signature(value)}`\n", paragraph


def _public(module: ModuleType) -> Iterator[tuple[str, type]]:
    """The public functions and classes that the module itself defines, by name."""
    for name, value in sorted(vars(module).items()):
        is_code = inspect.isfunction(value) or inspect.isclass(value)
        if is_code and not name.startswith("_") and value.__module__ == module.__name__:
            yield name, value


def _signature(value: type) -> str:
    try:
        signature = str(inspect.signature(value))
    except (NameError, TypeError, ValueError):
        return "(...)"
    # "<object object at 0x...>" differs from run to run.
    return "(...)" if "<" in signature else signature
