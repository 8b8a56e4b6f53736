"""A trained predictor on disk: ``predictor.json`` and LightGBM's own text for each ensemble.

Nothing in it is executed on loading. The JSON names every other file and its hash, so that a damaged
file is found before LightGBM reads it.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, InstanceOf, ValidationError

from harli.types import Costs, HarliError, Menu, UnitTime
from predictor.base import STATE, Floats
from predictor.bounds import Bounds
from predictor.dataset import Dataset, differences
from predictor.features import CORUN_TERMS, SHAPE, SOLO_TERMS
from predictor.latency_model import LatencyModel
from predictor.models import MODELS
from predictor.ranges import Ranges
from predictor.rate import Rate
from predictor.trees import Trees

FORMAT = 1
FILE = "predictor.json"
SUFFIX = ".lightgbm.txt"

Positive = Annotated[FiniteFloat, Field(ge=0.0)]


class Facts(BaseModel):
    """What is known of a trained predictor beside its model, in memory as on disk."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    identity: dict[str, Any]
    """What it was trained on, of a Dataset's form."""
    rate: Rate
    bounds: Bounds
    ranges: Ranges
    context_skew: Positive
    """How much longer the longest context usually is than the mean one."""
    costs: Costs
    unit_times: tuple[UnitTime, ...]
    finetune_alone_tokens_per_s: Positive
    data_sha256: str
    scores: dict[str, Any]
    """What training says about it; plain JSON values."""

    def facts(self) -> dict[str, Any]:
        """The fields above by name, to make another object of."""
        return {name: getattr(self, name) for name in Facts.model_fields}


class _Document(Facts):
    """``predictor.json``."""

    format: int
    model: str
    solo_base: list[Positive]
    corun_base: list[list[Positive]]
    trees: dict[str, str]
    """Ensembles by stage, ``solo`` and ``corun``: the SHA-256 of each file."""


class Artifact(Facts):
    """Everything about a trained predictor."""

    model: InstanceOf[LatencyModel]
    menu: Menu

    @classmethod
    def of(cls, model: LatencyModel, bounds: Bounds, data: Dataset, scores: dict[str, Any]) -> Self:
        """An artifact of ``model`` and ``bounds``; the rest follows from ``data``."""
        skew = np.median(data.context_max * data.batch / np.maximum(data.context_sum, 1.0))
        return cls(
            model=model,
            menu=data.menu,
            identity=data.identity,
            rate=Rate.fit(data, model.predict_solo(data)),
            bounds=bounds,
            ranges=Ranges.fit(data),
            context_skew=float(max(1.0, skew)),
            costs=data.costs,
            unit_times=data.unit_times,
            finetune_alone_tokens_per_s=data.finetune_alone_tokens_per_s,
            data_sha256=data.sha256,
            scores=scores,
        )

    def bound(self, data: Dataset, predicted_ms: Floats, solo_ms: Floats) -> Floats:
        """The upper bound of every row in ms, from its predicted gap and predicted solo gap."""
        return np.asarray(predicted_ms * self.bounds.factor(solo_ms, ~data.solo) * self.ranges.growth(data))

    def check(self, identity: dict[str, Any]) -> list[str]:
        """Why this predictor says nothing about ``identity`` (of a Dataset's form); empty when it does."""
        return differences(self.identity, identity)

    def save(self, folder: Path) -> None:
        """Write the folder, which is made; files of an earlier predictor in it are replaced."""
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(f"*{SUFFIX}"):
            old.unlink()
        hashes = {}
        for stage, trees in zip(("solo", "corun"), self.model.trees, strict=True):
            if isinstance(trees, Trees):
                (folder / (stage + SUFFIX)).write_text(trees.text, encoding="utf-8")
                hashes[stage] = _sha256(trees.text)
        document = _Document(
            format=FORMAT,
            model=self.model.name,
            solo_base=self.model.solo_base.tolist(),
            corun_base=self.model.corun_base.tolist(),
            trees=hashes,
            **self.facts(),
        )
        text = json.dumps(document.model_dump(mode="json"), indent=1, allow_nan=False)
        (folder / FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The predictor in ``folder``. Raises HarliError when a file is missing, damaged, surplus or newer."""
        document = _read(folder / FILE)
        try:
            menu = Menu.parse(document.identity["menu"])
        except (KeyError, TypeError, ValueError, AttributeError):
            raise _damaged(folder / FILE, "its menu is not one") from None
        trees = {stage: _read_trees(folder / (stage + SUFFIX), sha256) for stage, sha256 in document.trees.items()}
        if surplus := {path.name for path in folder.glob(f"*{SUFFIX}")} - {stage + SUFFIX for stage in trees}:
            raise _damaged(folder / min(surplus), f"{FILE} does not name it")
        kind = next((model for model in MODELS if model.name == document.model), None)
        if kind is None:
            raise _damaged(folder / FILE, f"there is no model {document.model!r}")
        _check_sizes(folder / FILE, document, menu)
        model = kind(
            np.array(document.solo_base),
            np.array(document.corun_base).reshape(len(menu.splits), len(CORUN_TERMS)),
            trees.get("solo"),
            trees.get("corun"),
        )
        return cls(model=model, menu=menu, **document.facts())


def _read(path: Path) -> _Document:
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_finite, parse_float=_finite)
    except (FileNotFoundError, NotADirectoryError):
        raise HarliError(
            f"no predictor in {path.parent}: {path.name} is missing; run `harli train-predictor`"
        ) from None
    except OSError as error:
        raise HarliError(f"cannot read {path}: {error.strerror}; check its permissions") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error).splitlines()[0]) from error
    number = content.get("format") if isinstance(content, dict) else None
    if isinstance(number, int) and number > FORMAT:
        raise HarliError(f"{path} was written by a newer Harli (format {number}, not {FORMAT}); upgrade Harli")
    try:
        return _Document.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise _damaged(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def _read_trees(path: Path, sha256: str) -> Trees:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise _damaged(path, "missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(path, str(error).splitlines()[0]) from error
    if _sha256(text) != sha256:
        raise _damaged(path, f"it is not the file that {FILE} names")
    try:
        trees = Trees.from_text(text)
    except HarliError as error:
        raise _damaged(path, str(error)) from error
    if unknown := set(trees.features) - {"solo_ms", *STATE, *SHAPE}:
        raise _damaged(path, f"there is no feature {min(unknown)!r}")
    return trees


def _check_sizes(path: Path, document: _Document, menu: Menu) -> None:
    splits, bounds = len(menu.splits), document.bounds
    right = (
        document.format == FORMAT,
        set(document.trees) <= {"solo", "corun"},
        len(document.solo_base) == len(SOLO_TERMS),
        len(document.corun_base) == splits,
        all(len(line) == len(CORUN_TERMS) for line in document.corun_base),
        len(document.rate.level) == len(document.rate.loss_per_ms) == splits,
        len(document.ranges.least_batch) == len(document.ranges.largest) == splits + 1,
        all(corner is None or len(corner) == len(STATE) for corner in document.ranges.largest),
        len(bounds.solo_factors) == len(bounds.solo_edges) + 1,
        len(bounds.split_factors) == len(bounds.split_edges) + 1,
        all(factor >= 1.0 for factor in (*bounds.solo_factors, *bounds.split_factors)),
    )
    if not all(right):
        raise _damaged(path, "its parts do not fit together")


def _damaged(path: Path, reason: str) -> HarliError:
    return HarliError(f"{path} is damaged ({reason}); fetch the predictor again, or train it again")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
