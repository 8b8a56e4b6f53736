"""Activations kept in the KV cache of a real engine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from harli.config import FinetuneSettings, LoraSettings
from harli.finetune.builtin import write_builtin_dataset
from harli.rows import UnitRecord, UpdateRecord

UPDATES = 10
PATIENCE_S = 120.0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "docstrings.jsonl"
    write_builtin_dataset(path, limit=30)
    return path


def train(host: Any, data: Path, *, lending: bool) -> tuple[list[float], set[str], dict[str, int]]:
    """Losses of a job, kinds of its units, and its use of borrowed memory."""
    settings = FinetuneSettings(
        data=data, microbatch_tokens=64, updates=UPDATES, lending=lending, lora=LoraSettings(dropout=0.1)
    )
    assert "error" not in host.command("finetune", settings.model_dump_json(), None, None)
    host.command("begin", "static", {"work_conserving": "true"}, {}, 0)
    deadline = time.monotonic() + PATIENCE_S
    while not (status := host.command("status"))["complete"]:
        assert time.monotonic() < deadline, status
        time.sleep(0.05)
    losses = [UpdateRecord(*row).loss for row in host.command("drain")["updates"]]
    kinds = {UnitRecord(*row).kind for row in host.command("drain_units")}
    host.command("finish")
    while not host.command("status")["ended"]:
        time.sleep(0.05)
    return losses, kinds, status["memory"]


def test_the_loss_curve_is_that_without_lending(host: Any, data: Path) -> None:
    host.command("drain")
    kept, kinds, memory = train(host, data, lending=True)
    recomputed, plain_kinds, nothing = train(host, data, lending=False)
    assert kept == recomputed
    assert len(kept) == UPDATES
    assert {"forward_kept", "backward_kept"} <= kinds
    assert not {"forward_kept", "backward_kept"} & plain_kinds
    assert memory["kept"] > 0 == memory["used_bytes"] < memory["peak_bytes"]
    assert nothing == {}
