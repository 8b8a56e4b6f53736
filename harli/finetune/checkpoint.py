"""Checkpoints: a PEFT adapter folder that also holds what training needs to go on exactly where it was.

A folder of the final name is always complete: it is written under a hidden name, flushed to disk, and
renamed. Tensors are safetensors, the rest is JSON; nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from harli.types import HarliError

if TYPE_CHECKING:
    from harli.config import FinetuneSettings
    from harli.finetune.packing import BatchStream, MicroBatch
    from harli.finetune.units import LayerwiseUpdate

PREFIX = "update-"
STATE = "trainer.json"
OPTIMIZER = "optimizer.safetensors"
WEIGHTS = "adapter_model.safetensors"
OPTIMIZER_TENSORS = ("step", "exp_avg", "exp_avg_sq")
KEPT = 2
FREE_TO_CHANGE = {"data", "held_out", "updates", "checkpoint_every", "lending", "max_lent"}
"""Settings that may differ when training goes on; the data is compared by content."""


class Job(NamedTuple):
    """Everything of a training job that a checkpoint holds or restores."""

    model: Any
    update: LayerwiseUpdate
    stream: BatchStream
    settings: FinetuneSettings
    held_out: Sequence[MicroBatch] = ()

    @property
    def base_model(self) -> str:
        return str(self.model.get_base_model().config.name_or_path)


def identity(settings: FinetuneSettings, base_model: str) -> dict[str, Any]:
    """What must be the same for training to go on as if it had not stopped."""
    assert settings.data is not None
    return {
        "base_model": base_model,
        "data_sha256": _sha256(settings.data, settings.data.stat().st_mtime_ns),
        **settings.model_dump(mode="json", exclude=FREE_TO_CHANGE),
    }


@lru_cache(maxsize=8)
def _sha256(file: Path, changed_ns: int) -> str:
    """Of the file as it was at ``changed_ns``: read once, not again for every checkpoint."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def save(job: Job, folder: Path, updates: int) -> Path:
    """Write the checkpoint after ``updates`` updates into ``folder`` and drop all but the last ``KEPT``."""
    final = folder / f"{PREFIX}{updates:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        "updates": updates,
        "stream": job.stream.state(),
        "passes": job.update.passes,
        "job": identity(job.settings, job.base_model),
    }

    def write(partial: Path) -> None:
        save_adapter_files(job.model, partial)
        save_file(_optimizer_tensors(job.update), partial / OPTIMIZER)
        (partial / STATE).write_text(json.dumps(state, indent=1) + "\n")

    write_folder(final, write)
    for old in complete(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def restore(job: Job, folder: Path) -> int:
    """Set the job back to the checkpoint in ``folder``; returns its number of updates. Raises HarliError."""
    from peft import set_peft_model_state_dict

    state = check(folder, job.settings, job.base_model)
    try:
        tensors, weights = load_file(folder / OPTIMIZER), load_file(folder / WEIGHTS)
        job.stream.restore(state["stream"])
        job.update.passes = state["passes"]
        set_peft_model_state_dict(job.model, weights)
        for index, optimizer in enumerate(job.update.optimizers):
            for number, parameter in enumerate(optimizer.param_groups[0]["params"]):
                state_of = {name: tensors[f"{index}.{number}.{name}"] for name in OPTIMIZER_TENSORS}
                # The step's number stays on the host.
                optimizer.state[parameter] = {
                    name: tensor if name == "step" else tensor.to(parameter.device) for name, tensor in state_of.items()
                }
        return int(state["updates"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise _cannot_resume(folder, error) from error


def check(folder: Path, settings: FinetuneSettings, base_model: str) -> dict[str, Any]:
    """The state of the checkpoint in ``folder``. Raises HarliError if it is damaged or of another job."""
    try:
        state: dict[str, Any] = json.loads((folder / STATE).read_text())
        saved = dict(state["job"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _cannot_resume(folder, error) from error
    present = identity(settings, base_model)
    for key in sorted(present.keys() | saved.keys()):
        if saved.get(key) != present.get(key):
            raise HarliError(
                f"cannot resume from {folder}: {key} was {saved.get(key)!r} and is {present.get(key)!r} now"
            )
    return state


def _cannot_resume(folder: Path, error: Exception) -> HarliError:
    return HarliError(f"cannot resume from {folder}: {type(error).__name__}: {error}".splitlines()[0])


def latest(folder: Path) -> Path:
    """The last complete checkpoint in a record folder, or ``folder`` itself if it is one. Raises HarliError."""
    if (folder / STATE).is_file():
        return folder
    for candidate in (folder, folder / "checkpoints"):
        if found := complete(candidate):
            return found[-1]
    raise HarliError(f"no checkpoint in {folder}; give a record folder of a run that trained, or a checkpoint")


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints in ``folder``, oldest first."""
    named = (path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal())
    return sorted((path for path in named if (path / STATE).is_file()), key=updates_of)


def updates_of(folder: Path) -> int:
    """How many updates the checkpoint in ``folder`` comes after, by its name."""
    return int(folder.name.removeprefix(PREFIX))


def save_adapter_files(model: Any, folder: Path) -> None:
    """PEFT's own files. Raises ArithmeticError rather than save weights that are not finite."""
    if not all(p.isfinite().all() for p in model.parameters() if p.requires_grad):
        raise ArithmeticError("the LoRA weights are not finite, so they are not saved")
    model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)


def write_folder(final: Path, write: Any) -> None:
    """Let ``write`` fill a hidden sibling of ``final``, flush it, and give it its name."""
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial)
        for path in [*partial.iterdir(), partial]:
            _flush(path)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        _flush(final.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _optimizer_tensors(update: LayerwiseUpdate) -> dict[str, Tensor]:
    return {
        f"{index}.{number}.{name}": optimizer.state[parameter][name]
        for index, optimizer in enumerate(update.optimizers)
        for number, parameter in enumerate(optimizer.param_groups[0]["params"])
        for name in OPTIMIZER_TENSORS
    }
