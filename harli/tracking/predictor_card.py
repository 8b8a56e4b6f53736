"""A trained predictor in words and tables: the rows that are printed, and its model card."""

from __future__ import annotations

import math
from collections.abc import Sequence

from predictor.contest import Verdict
from predictor.scoring import Difference, Errors
from predictor.training import FOLDS, Rival, Trained

HEADINGS = (
    "model",
    "MAPE alone",
    "MAPE beside",
    "P90 beside",
    "P99 beside",
    "too low",
    "within bound (95%)",
    "bound",
    "MAPE beside, difference (95%)",
)
"""Of ``rows``; alone and beside mean decode alone and decode beside finetuning."""

FOOTNOTE = (
    "errors are |predicted / measured - 1|; bound is its median ratio to the prediction; the noise floor knows every "
    "operating point's median; intervals are over groups"
)


def rows(trained: Trained) -> list[tuple[str, ...]]:
    """The table of all models, and the noise floor."""
    table = [_row(rival, first=place == 0) for place, rival in enumerate(trained.rivals)]
    solo, corun = trained.noise
    return [*table, ("noise floor", *_errors(solo, corun), "", "", "", "")]


def judged_on(trained: Trained) -> str:
    """Where the scores come from, in a line."""
    data = trained.winner.judged.data
    states = f"{len(data)} steps of {len({*data.group.tolist()})} groups (a batch and context at all shares)"
    if trained.held_out:
        return f"{states} that were held out of fitting, tuning and calibration"
    return f"{states}, each predicted by a model that had not seen its fold"


def card(trained: Trained, verdict: Verdict, sources: Sequence[str], seed: int) -> str:
    """The model card, in Markdown."""
    artifact = trained.artifact
    identity = artifact.identity
    device = ", ".join(f"{key} {value}" for key, value in identity["device"].items()) or "unknown"
    versions = ", ".join(f"{key} {value}" for key, value in identity["versions"].items()) or "unknown"
    batch, context = map(max, zip(*(corner[:2] for corner in artifact.ranges.largest if corner), strict=True))
    lines = [
        f"# Decode latency of {identity['model']}",
        "",
        "The time between two tokens of a request at every compute share, its upper bound, and the finetuning "
        f"rate beside it. The model is {artifact.model.name}.",
        "",
        "## Measured on",
        "",
        f"- Model and role: {identity['model']}, {identity['role']}",
        f"- Device: {device}",
        f"- Shares (decode / finetune units): {', '.join(identity['menu'])}",
        f"- Versions: {versions}",
        f"- Data: {', '.join(sources)} (SHA-256 {artifact.data_sha256[:16]}), seed {seed}",
        f"- Fitted on {len(trained.seen)} groups; the search tried {len(trained.trials)} settings on "
        f"{FOLDS} folds of them",
        "",
        "## Scores",
        "",
        f"On {judged_on(trained)}.",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|" + "---|" * len(HEADINGS),
        *("| " + " | ".join(row) + " |" for row in rows(trained)),
        "",
        f"{FOOTNOTE[0].upper()}{FOOTNOTE[1:]}.",
        "",
        f"{trained.verdict}. {'Champion' if verdict.champion else 'Challenger'}: {verdict.reason}.",
        "",
        "## Settings",
        "",
        *([f"- {name}: {value:.4g}" for name, value in trained.params.items()] or ["This model has none."]),
        "",
        "## Limits",
        "",
        "- It says nothing about another model, device, menu of shares or version of the engine than those above.",
        f"- It was fitted up to a batch of {batch:.0f} and {context:,.0f} tokens of context. Beyond, its bases go on "
        "linearly and its bounds widen with the distance.",
        f"- Bounds promise {100 * artifact.bounds.coverage:g}% over gaps like those measured, not in every single "
        "state, and not while something else uses the machine: a run corrects them as it goes.",
        "- Exclusive windows are no part of a gap; whoever plans one adds it.",
    ]
    return "\n".join(lines) + "\n"


def _row(rival: Rival, *, first: bool) -> tuple[str, ...]:
    scores = rival.scores
    return (
        rival.name,
        *_errors(scores.solo, scores.corun),
        f"{100 * scores.under_rate:.0f}%",
        f"{100 * scores.coverage:.1f}% ({100 * scores.coverage_low:.1f} to {100 * scores.coverage_high:.1f})",
        f"{scores.width:.2f}",
        "" if first else _difference(rival.corun_difference),
    )


def _errors(solo: Errors, corun: Errors) -> tuple[str, str, str, str]:
    return _percent(solo.mape), _percent(corun.mape), _percent(corun.p90), _percent(corun.p99)


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}%"


def _difference(change: Difference) -> str:
    return f"{100 * change.mean:+.1f} ({100 * change.low:+.1f} to {100 * change.high:+.1f})"
