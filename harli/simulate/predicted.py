"""A device that behaves as a trained predictor says, with noise around it."""

from __future__ import annotations

from statistics import fmean

from harli.config import FinetuneSettings
from harli.simulate.device import Device, Noise
from harli.types import DecodeState, FinetuneState, HarliError
from predictor.base import Predictor
from predictor.units import units_per_pass


class PredictedDevice(Device):
    """What a profile measured, played back: steps from the predictor, units from the times that it keeps.

    Beside decode, units take as many times longer as the predictor's rate at the share is below what they yield
    alone. With lending, as many layers are kept as the profile has seen: memory is taken to be there.
    """

    def __init__(
        self,
        predictor: Predictor,
        finetune: FinetuneSettings,
        noise: Noise,
        seed: int,
        *,
        name: str,
        model: str,
        coverage: float,
        data_sha256: str,
    ) -> None:
        """Raises HarliError when the profile has no units of these micro-batches."""
        super().__init__(noise, seed)
        self.name, self.model, self.menu = name, model, predictor.menu
        self.predictor, self.coverage, self.data_sha256 = predictor, coverage, data_sha256
        times = [time for time in predictor.unit_times if time.microbatch_tokens == finetune.microbatch_tokens]
        recomputed = [time for time in times if not time.kept_layers]
        self.layers = round(max((time.per_pass for time in recomputed if time.kind == "forward"), default=1.0))
        parts = {share.finetune for share in self.menu.shares} - {0}
        most = max((time.kept_layers for time in times), default=0) if finetune.lending else 0
        chosen = [*recomputed, *(time for time in times if time.kept_layers == most)]
        self._unit_ms = {(time.kind, time.units): time.mean_ms for time in chosen}
        kinds = {kind for kept in (0, most) for kind, often in units_per_pass(self.layers, kept, 1).items() if often}
        if not all(self._complete(kinds, part) for part in parts):
            known = sorted({time.microbatch_tokens for time in predictor.unit_times} - {finetune.microbatch_tokens})
            raise HarliError(
                f"{name} was not profiled with finetune units of {finetune.microbatch_tokens} tokens on every share "
                f"(others: {', '.join(map(str, known)) or 'none'}); choose --microbatch-tokens, or profile anew"
            )
        recomputed_s = self.pass_ms(self.units, finetune.accumulation) / 1e3
        self.pass_tokens = round(predictor.finetune_alone_tokens_per_s * recomputed_s)
        self.kept_layers = most
        pass_s = {part: self.pass_ms(part, finetune.accumulation) / 1e3 for part in parts}
        self._alone = {part: self.pass_tokens / length_s for part, length_s in pass_s.items()}
        self._index = {share.decode: index for index, share in enumerate(self.menu.shares[:-1])}

    def step_ms(self, decode: DecodeState, finetune: FinetuneState, decode_units: int, finetune_units: int) -> float:
        return self.predictor.forecast(decode, finetune).gap_ms[self._index[decode_units]]

    def unit_ms(self, kind: str, units: int) -> float:
        return self._unit_ms[kind, units]

    def slowdown(self, decode: DecodeState, finetune: FinetuneState, decode_units: int, finetune_units: int) -> float:
        rate = self.predictor.forecast(decode, finetune).finetune_tokens_per_s[self._index[decode_units]]
        return self._alone[finetune_units] / rate if rate > 0.0 else 1.0

    def _complete(self, kinds: set[str], part: int) -> bool:
        """Scale kinds that were not seen on ``part`` compute units from the whole device as those that were seen."""
        whole = {kind: self._unit_ms[kind, self.units] for kind in kinds if (kind, self.units) in self._unit_ms}
        ratios = [self._unit_ms[kind, part] / whole[kind] for kind in whole if (kind, part) in self._unit_ms]
        if len(whole) < len(kinds) or not ratios:
            return False
        for kind in kinds:
            self._unit_ms.setdefault((kind, part), whole[kind] * fmean(ratios))
        return True
