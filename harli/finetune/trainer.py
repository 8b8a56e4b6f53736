"""The finetuning thread: takes units from updates and runs each when the gate lets it."""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterable
from pathlib import Path

from harli.compute.base import Partitioner
from harli.compute.gate import Gate
from harli.finetune import checkpoint
from harli.finetune.checkpoint import Job
from harli.finetune.dataset import Sample
from harli.finetune.evaluation import Evaluation, HeldOutLoss
from harli.finetune.packing import BatchStream
from harli.finetune.schedule import learning_rate
from harli.finetune.units import Unit
from harli.rows import UnitRecord, UpdateRecord
from harli.types import FinetuneState, HarliError, one_line

SMOOTHING = 0.2
UPDATES_KEPT = 1 << 16
UNITS_KEPT = 1 << 13
ADAPTER = "adapter"
CHECKPOINTS = "checkpoints"


class Trainer(threading.Thread):
    """Trains until it is asked to finish, its updates are done, or something fails.

    Whatever fails stays in here: ``failure`` says what it was, and decode goes on.
    """

    def __init__(self, job: Job, gate: Gate, partitioner: Partitioner, folder: Path | None, done: int = 0) -> None:
        """``folder`` gets checkpoints and the adapter. ``done``: updates before this run, when it goes on."""
        super().__init__(name="harli-trainer", daemon=True)
        self.gate = gate
        self.state = FinetuneState(ready=True, microbatch_tokens=job.settings.microbatch_tokens)
        self.updates: deque[UpdateRecord] = deque(maxlen=UPDATES_KEPT)
        """Committed updates that nobody has taken yet; their times, and the units', are ``time.monotonic()``."""
        self.unit_rows: deque[UnitRecord] = deque(maxlen=UNITS_KEPT)
        """The last units run that nobody has taken yet."""
        self.beside_decode = False
        """Decode has requests (told by the session)."""
        self.tokens_done = 0.0
        """Training tokens of the units run so far, uncommitted ones included."""
        self.failure = ""
        """Why training stopped; what was learned until then is kept."""
        self.save_failure = ""
        """Why the last checkpoint or the adapter could not be written."""
        self.saved = False
        """The adapter is in its folder."""
        self.complete = False
        """All updates are done, and the held-out loss is taken if there are held-out samples."""
        self.held_out: HeldOutLoss | None = None
        self._job = job
        self._kept = job.update.kept
        if self._kept is not None:
            self._kept.arena.loan.on_recall = gate.wake
        self._partitioner = partitioner
        self._finetune_shares = [share.finetune for share in partitioner.menu.shares if share.finetune]
        self._folder = folder
        self._done = done
        self._checkpointed = done
        self._expected_ms: defaultdict[tuple[str, int], float] = defaultdict(float)
        self._finish = threading.Event()
        self._next_stream: BatchStream | None = None

    def finish(self) -> None:
        """Stop after the running unit and save checkpoint and adapter; the thread ends when that is done."""
        self._finish.set()
        self.gate.close()

    def reshape(self, microbatch_tokens: int, *, keep: bool = True) -> None:
        """Go on with micro-batches of another length, from the first one; the one that runs is dropped.

        Longer samples are cut. ``keep``: activations in borrowed memory, as far as there is any. Raises
        HarliError when no target is left.
        """
        samples = [
            Sample(sample.tokens[:microbatch_tokens], sample.loss_mask[:microbatch_tokens])
            for sample in self._job.stream.samples
        ]
        try:
            stream = BatchStream(samples, microbatch_tokens, self._job.stream.seed)
        except ValueError as error:
            raise HarliError(
                f"{error} within {microbatch_tokens} tokens; raise --microbatch-tokens, or give other finetuning data"
            ) from None
        if self._kept is not None:
            self._kept.wanted = keep
        self._next_stream = stream

    def memory(self) -> dict[str, int]:
        """Use of borrowed memory; empty where none can be borrowed."""
        return {} if self._kept is None else self._kept.figures()

    def release(self) -> None:
        """Let go of model, optimizer and samples, once the thread has ended; what can be asked for stays."""
        if not self.is_alive():
            self._kept = None
            vars(self).pop("_job", None)

    @property
    def capturing(self) -> bool:
        """Graphs are being made, for which nobody should have to wait."""
        if not self.state.ready or self.gate.allowed < self._partitioner.units:
            return False
        captured = self._job.update.captured
        return captured is not None and captured.incomplete(self._finetune_shares)

    def run(self) -> None:
        settings = self._job.settings
        try:
            self._partitioner.adopt_finetune()
            while settings.updates is None or self._done < settings.updates:
                if self._next_stream is not None:
                    self._job = self._job._replace(stream=self._next_stream)
                    self.state.microbatch_tokens = self._next_stream.microbatch_tokens
                    self._next_stream = None
                if not self._run_update():
                    if self._next_stream is not None:
                        continue
                    break
                if self._done % settings.checkpoint_every == 0:
                    self._save_checkpoint()
            self.complete = self._done == settings.updates and self._evaluate()
        except BaseException as error:  # nothing that happens here may reach decode
            self.failure = one_line(error)
        self.state.ready = False
        self._save_checkpoint()
        self._save_adapter()
        self._finish.wait()  # stays, so that its end says that the job was told to end

    def _run_update(self) -> bool:
        """One update; False, and everything as before it, if it was given up before it could be committed."""
        job = self._job
        rate = learning_rate(job.settings, self._done)
        position, passes = job.stream.state(), job.update.passes
        batches = [next(job.stream) for _ in range(job.settings.accumulation)]
        committed = False
        try:
            committed = self._run_units(job.update.units(batches, rate))
        finally:
            if not committed:
                if self._kept is not None:
                    self._kept.drop()
                for optimizer in job.update.optimizers:
                    optimizer.zero_grad()
                job.stream.restore(position)
                job.update.passes = passes
        if committed:
            tokens = sum(batch.tokens for batch in batches)
            self.updates.append(UpdateRecord(self._done, time.monotonic(), job.update.loss, tokens, rate))
            self._done += 1
        return committed

    def _evaluate(self) -> bool:
        """Take the held-out loss; False if it was given up."""
        if not self._job.held_out:
            return True
        evaluation = Evaluation(self._job.model, self._job.held_out)
        self._run_units(evaluation.units())
        self.held_out = evaluation.loss
        return self.held_out is not None

    def _run_units(self, units: Iterable[Unit]) -> bool:
        for unit in units:
            self._capture()
            granted = self._enter(unit)
            if unit.name != "optimizer":  # half a pass can be dropped, half an optimizer step cannot
                if not granted:
                    return False
                if self._next_stream is not None:
                    self.gate.leave()
                    return False
            try:
                self._run_unit(unit, granted or self._finetune_shares[0])
            finally:
                self.gate.leave()
        return True

    def _capture(self) -> None:
        """Make graphs of units while the whole device is ours and no request is there.

        A capture switches torch's random state over, so decode, which samples with it, must not submit anything
        meanwhile; it waits for whoever holds the whole device. One layer at a time, as short as a unit.
        """
        captured, partitioner = self._job.update.captured, self._partitioner
        if captured is None:
            return
        while not self.beside_decode and (missing := captured.next_capture(self._finetune_shares)) is not None:
            index, units = missing
            granted = self.gate.enter(0.0, self._recalled)
            if not granted:
                return
            try:
                if granted < partitioner.units:
                    return
                partitioner.set_finetune(units)
                if captured.warm(units):
                    captured.capture(index, units)
                else:
                    captured.warm_up(units)
                    partitioner.wait_finetune()
            finally:
                self.gate.leave()

    def _enter(self, unit: Unit) -> int:
        """Wait for the gate; memory that is recalled before the unit may start is vacated at once."""
        while True:
            expected = self._expected_ms[unit.kind, self._partitioner.units]
            granted = self.gate.enter(expected, self._recalled)
            if granted is not None:
                return granted
            assert self._kept is not None
            self._kept.vacate()

    def _recalled(self) -> bool:
        return self._kept is not None and self._kept.recalled

    def _run_unit(self, unit: Unit, units: int) -> None:
        self._partitioner.set_finetune(units)
        kind = unit.kind
        key = (kind, units)
        expected = self._expected_ms[key]
        self.gate.expect(expected)
        self._job.update.compute_units = units
        began = time.monotonic()
        took_ms = self._partitioner.run_finetune(unit.run)
        self._expected_ms[key] = expected + SMOOTHING * (took_ms - expected) if expected else took_ms
        self.tokens_done += unit.tokens
        if self._kept is not None:
            self.state.kept_layers = self._kept.layers
        shape = self.state.microbatch_tokens, self.state.kept_layers
        self.unit_rows.append(UnitRecord(began, kind, units, self.beside_decode, *shape, took_ms, unit.tokens))

    def _save_checkpoint(self) -> None:
        if self._folder is None or self._checkpointed == self._done:
            return
        try:
            checkpoint.save(self._job, self._folder / CHECKPOINTS, self._done)
            self._checkpointed = self._done
            self.save_failure = ""
        except Exception as error:  # training goes on; the next checkpoint may fit
            self.save_failure = f"checkpoint not saved: {one_line(error)}"

    def _save_adapter(self) -> None:
        """Whatever ended training, what has been learned until then is worth keeping."""
        if self._folder is None or not self._done:
            return
        try:
            model = self._job.model
            checkpoint.write_folder(
                self._folder / ADAPTER, lambda partial: checkpoint.save_adapter_files(model, partial)
            )
            self.saved = True
        except ArithmeticError as error:  # no matter of the disk
            self.complete, self.failure = False, self.failure or one_line(error)
        except Exception as error:
            self.save_failure = f"adapter not saved: {one_line(error)}"
