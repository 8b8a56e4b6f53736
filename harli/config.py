"""Settings of a run, validated."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, PositiveInt, model_validator

from harli.types import Slo

Name = Annotated[str, Field(min_length=1)]
Positive = Annotated[FiniteFloat, Field(gt=0.0)]


BATCHED_TOKENS = 2048
"""Most tokens of a step, prompts' included; more if there may be more requests."""
CHAMPION = "models:/harli-decode-latency@champion"


class Settings(BaseModel):
    """Base: unknown keys are errors, values cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LoraSettings(Settings):
    """Low-rank adapters (Hu et al., "LoRA", 2021)."""

    rank: Annotated[int, Field(ge=1, le=512)] = 8
    alpha: Positive = 16.0
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    targets: tuple[Name, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class FinetuneSettings(Settings):
    """One finetuning job."""

    data: Path | None = None
    """JSONL file; without one, docstrings of Python's standard library."""
    held_out: Path | None = None
    """JSONL file; when all updates are done, the losses on it with and without the adapter are taken."""
    lora: LoraSettings = LoraSettings()
    learning_rate: Positive = 2e-4
    weight_decay: Annotated[FiniteFloat, Field(ge=0.0)] = 0.0
    warmup_updates: Annotated[int, Field(ge=0)] = 10
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    updates: PositiveInt | None = None
    """Stop after this many; without it, train as long as the run lasts. Decay ends here."""
    microbatch_tokens: Annotated[int, Field(ge=16, le=65536)] = 256
    accumulation: PositiveInt = 1
    """Micro-batches per update."""
    checkpoint_every: PositiveInt = 50
    """Updates between checkpoints."""
    lending: bool = True
    """Borrow KV-cache memory that decode does not need."""
    max_lent: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    """Most of the KV cache that may be lent."""
    seed: int = 0

    @model_validator(mode="after")
    def _decay_needs_an_end(self) -> Self:
        if self.schedule != "constant" and self.updates is None:
            raise ValueError(f"a {self.schedule} schedule needs a number of updates to end at")
        return self


class EngineSettings(Settings):
    """The decode instance."""

    model: Name = "small"
    """``tiny``, ``small``, a folder, or a Hugging Face name."""
    role: Literal["decode", "mixed"] = "decode"
    """``decode``: prompts' KV is already there. ``mixed``: prompts are computed here."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    max_model_len: PositiveInt = 2048
    max_num_seqs: PositiveInt = 32
    kv_cache_gib: Positive = 2.0
    seed: int = 0


class WorkloadSettings(Settings):
    """The requests of a run."""

    trace: Path | None = None
    """A trace file; without one, generated requests."""
    rate_scale: Positive = 1.0
    length_scale: Positive = 1.0
    """Factor on prompt and output lengths, to fit a trace of a large service to a small machine."""
    requests_per_s: Positive = 1.0
    """Mean rate of generated requests."""
    duration_s: Positive = 60.0
    """Requests that arrive later are left out."""
    seed: int = 0


class SloSettings(Settings):
    """Decode's latency objective."""

    itl_ms: Positive | None = None
    tpot_ms: Positive | None = None

    @property
    def objective(self) -> Slo:
        """As policies get it."""
        return Slo(self.itl_ms, self.tpot_ms)


class PolicySettings(Settings):
    """The policy of an engine that begins with one: ``--additional-config '{"harli": {...}}'`` of vLLM."""

    policy: Name
    params: dict[str, bool | int | float | str] = {}
    slo: SloSettings = SloSettings()
    seed: int = 0
    predictor: Path | None = None
    """A predictor's folder."""


class RunSettings(Settings):
    """Everything that ``harli run`` needs."""

    policy: Name
    params: dict[str, bool | int | float | str] = {}
    predictor: Name = CHAMPION
    """A folder, or a version in MLflow's registry."""
    force_predictor: bool = False
    """Use it although it was trained for another model, device or menu."""
    engine: EngineSettings = EngineSettings()
    finetune: FinetuneSettings = FinetuneSettings()
    workload: WorkloadSettings = WorkloadSettings()
    slo: SloSettings = SloSettings()
