"""How finetuning's units fill the time that they are given: what a window holds, what a unit still takes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from harli.types import UnitTime

SMALL = 0.1
"""Units shorter than this part of the longest fit into whatever the others leave."""


class UnitTimes:
    """The units of one finetune shape, as a profile measured them.

    A window starts every unit that is expected to fit and ends when the next one does not, so it takes as long as the
    units in it. One of ``w`` ms holds ``floor(w / t)`` units of a kind that takes ``t``; the windows that a whole pass
    needs, kind by kind, give the mean.
    """

    def __init__(self, times: Sequence[UnitTime], units: int, shape: tuple[int, int]) -> None:
        """What units of ``shape``, tokens of a micro-batch and kept layers, take on a device of ``units``.

        A shape that is not among the ``times`` is scaled from the nearest. Without any times a window holds nothing.
        """
        microbatch_tokens, kept_layers = max(shape[0], 1), shape[1]
        shapes = {(time.microbatch_tokens, time.kept_layers) for time in times}
        nearest = min(
            shapes,
            key=lambda shape: (abs(math.log(shape[0] / microbatch_tokens)), abs(shape[1] - kept_layers), shape),
            default=(1, 0),
        )
        scale = microbatch_tokens / nearest[0]
        self._passes: dict[int, list[tuple[float, float]]] = {}
        for time in times:
            if (time.microbatch_tokens, time.kept_layers) == nearest:
                self._passes.setdefault(time.units, []).append((scale * time.mean_ms, time.per_pass))
        whole = sorted(self._passes.get(units, []))
        pass_ms = sum(length * count for length, count in whole)
        recomputing = [time for time in times if (time.microbatch_tokens, time.kept_layers) == (nearest[0], 0)]
        recomputing_ms = scale * sum(time.mean_ms * time.per_pass for time in recomputing if time.units == units)
        self.speedup = recomputing_ms / pass_ms if pass_ms and recomputing_ms else 1.0
        """How much faster a pass is than one of the same micro-batch that recomputes every layer."""
        self.longest_ms = whole[-1][0] if whole else math.inf
        """The longest unit on the whole device: where windows are all that finetuning has, it needs this."""
        self.most_ms = self.longest_ms
        """A window that holds most units, long ones of small weight apart: beside a split those run there."""
        longer_ms = 0.0
        for length, count in reversed(whole):
            self.most_ms = length
            longer_ms += length * count
            if longer_ms > SMALL * pass_ms:
                break
        self._large = [pair for pair in whole if pair[0] > SMALL * self.longest_ms]
        self._small_ms = pass_ms - sum(length * count for length, count in self._large)

    def in_window_ms(self, window_ms: float, *, split: bool = False) -> float:
        """Mean time of the units that a window of this length holds; the rest of it is not spent.

        ``split``: finetuning has a part of the device after the window, too.
        """
        if window_ms < (self.most_ms if split else self.longest_ms):
            return 0.0
        needed, held_ms = 1e-9, self._small_ms
        for length, count in self._large:
            if length <= window_ms:
                needed += count / (window_ms // length)
                held_ms += length * count
        return min(held_ms / needed, window_ms)

    def in_windows_ms(self, window_ms: NDArray[np.float64], split: NDArray[np.bool_]) -> NDArray[np.float64]:
        """The same for arrays that broadcast."""
        needed, held_ms = np.full(window_ms.shape, 1e-9), np.full(window_ms.shape, self._small_ms)
        for length, count in self._large:
            fits = length <= window_ms
            needed += np.where(fits, count / np.maximum(window_ms // length, 1.0), 0.0)
            held_ms += np.where(fits, length * count, 0.0)
        enough = window_ms >= np.where(split, self.most_ms, self.longest_ms)
        return np.where(enough, np.minimum(held_ms / needed, window_ms), 0.0)

    def rest_ms(self, units: int) -> float:
        """Mean time left, at a random moment, of the unit running on ``units`` compute units; 0 if none is known."""
        own = self._passes.get(units, [])
        total = sum(length * count for length, count in own)
        return sum(length * length * count for length, count in own) / (2.0 * total) if total else 0.0


def units_per_pass(layers: int, kept: int, accumulation: int) -> dict[str, float]:
    """Units of each kind in a micro-batch that keeps the activations of ``kept`` layers.

    The optimizer's are spread over the micro-batches of an update.
    """
    recomputed = float(layers - kept)
    return {
        "embed": 1.0,
        "forward": recomputed,
        "forward_kept": float(kept),
        "loss": 1.0,
        "backward": recomputed,
        "backward_kept": float(kept),
        "optimizer": layers / accumulation,
    }
