"""The devices that ``harli simulate`` knows: by name those of a roofline, by folder those that were profiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harli.config import FinetuneSettings
from harli.simulate.analytic import ROOFLINES, AnalyticDevice
from harli.simulate.device import Device, Noise
from harli.simulate.predicted import PredictedDevice

USUAL: dict[str, Any] = {
    "kv_blocks": 47_000,
    "engine": {"max_model_len": 8192, "max_num_seqs": 256},
    "finetune": {"microbatch_tokens": 1024},
    "workload": {"requests_per_s": 5.5, "duration_s": 600.0},
}
"""Settings of an instance on a large GPU, where the defaults of ``harli.config`` are those of a small CPU one.

The KV cache has the 98.6 of 141 GB that weights, activations and finetuning leave, in blocks of 2 MiB.
"""


def predictor_folder(name: str) -> Path | None:
    """Where the predictor of the device called ``name`` is: a folder, or a version in MLflow's registry.

    None for one of ``ROOFLINES``. Raises HarliError when there is no such device.
    """
    if name in ROOFLINES:
        return None
    from harli.tracking.registry import load_predictor_folder

    return load_predictor_folder(name)


def make_device(name: str, folder: Path | None, finetune: FinetuneSettings, noise: Noise, seed: int) -> Device:
    """The device called ``name``; ``folder`` is what ``predictor_folder`` has found."""
    if folder is None:
        return roofline_device(name, finetune, noise, seed)
    return trained_device(folder, name, finetune, noise, seed)


def roofline_device(name: str, finetune: FinetuneSettings, noise: Noise, seed: int) -> Device:
    """The analytic device called ``name``, one of ``ROOFLINES``."""
    return AnalyticDevice(ROOFLINES[name], finetune, noise, seed)


def trained_device(folder: Path, name: str, finetune: FinetuneSettings, noise: Noise, seed: int) -> Device:
    """The device that the predictor in ``folder`` was trained on. Raises HarliError when it cannot be loaded."""
    from predictor.artifact import Artifact
    from predictor.table import TablePredictor

    artifact = Artifact.load(folder)
    return PredictedDevice(
        TablePredictor(artifact),
        finetune,
        noise,
        seed,
        name=name,
        model=str(artifact.identity.get("model", "unknown")),
        coverage=artifact.bounds.coverage,
        data_sha256=artifact.data_sha256,
    )
