"""Trains in processes that are killed at random moments, each going on from the last one's checkpoint.

Run as a module: it forks, which a process with threads of its own should not do. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from harli.compute.cpu import CpuPartitioner
from harli.compute.gate import Gate
from harli.finetune import checkpoint
from harli.finetune.trainer import Trainer
from harli.records.reader import read_record
from harli.records.schema import FinetuneInfo, RunInfo
from harli.records.writer import RecordWriter
from harli.types import HarliError, Slo
from tests.finetune.builders import make_job

KILLS = 20
UPDATES = 90
MOST_UPDATES = 4
EXTRA_S = 0.1


def train(data: Path, folder: Path, losses: Path, record: Path) -> None:
    """Go on from the last checkpoint, writing losses and a record as they come."""
    torch.set_num_threads(1)
    job = make_job(data, updates=UPDATES, checkpoint_every=2)
    done = 0
    if checkpoint.complete(folder / "checkpoints"):
        done = checkpoint.restore(job, checkpoint.latest(folder))
    gate = Gate(1)
    trainer = Trainer(job, gate, CpuPartitioner((0,)), folder, done)
    info = RunInfo(
        name="test",
        policy="test",
        settings={},
        model="test",
        role="mixed",
        slo=Slo(),
        menu=["1/0", "0/1"],
        device={},
        versions={},
        started_at="2026-01-01T00:00:00+00:00",
        status="running",
        finetune=FinetuneInfo(state="running"),
    )
    writer = RecordWriter(record, info)
    trainer.start()
    gate.allow(1)
    with losses.open("a") as file:
        while trainer.state.ready or trainer.updates:
            rows = [trainer.updates.popleft() for _ in range(len(trainer.updates))]
            for row in rows:
                file.write(f"{row.update} {row.loss!r}\n")
            file.flush()
            writer.add_updates(rows)
            writer.write(info)
            time.sleep(0.005)
    trainer.finish()
    trainer.join()
    assert not trainer.failure, trainer.failure
    assert not trainer.save_failure, trainer.save_failure


def in_child(work: Callable[[], None], wait_to_kill: Callable[[int], None] | None = None) -> int:
    """Run ``work`` in a forked process, which is killed when ``wait_to_kill`` returns; returns its status."""
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201
            os._exit(1)
    if wait_to_kill is not None:
        wait_to_kill(child)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def updates_seen(losses: Path) -> int:
    return losses.read_bytes().count(b"\n") if losses.exists() else 0


def has_ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def random_moment(rng: random.Random, losses: Path) -> Callable[[int], None]:
    """Waits for a few more updates and then a little longer: moments of the job, whatever the machine's speed."""
    wanted = updates_seen(losses) + rng.randint(0, MOST_UPDATES)
    extra_s = rng.uniform(0.0, EXTRA_S)

    def wait(child: int) -> None:
        while updates_seen(losses) < wanted and not has_ended(child):
            time.sleep(0.002)
        time.sleep(extra_s)

    return wait


def main(folder: Path) -> dict[str, object]:
    data = folder / "data.jsonl"
    straight = in_child(lambda: train(data, folder / "straight", folder / "straight.txt", folder / "straight-record"))
    rng = random.Random(0)
    unreadable, killed, resumed_from = [], 0, []
    interrupted = folder / "interrupted"
    for number in range(KILLS):
        record = folder / f"record-{number}"
        losses = folder / "losses.txt"
        job = partial(train, data, interrupted, losses, record)
        status = in_child(job, random_moment(rng, losses))
        killed += status == -signal.SIGKILL
        if (record / "run.json").exists():
            try:
                read_record(record)
            except HarliError as error:
                unreadable.append(str(error))
        if complete := checkpoint.complete(interrupted / "checkpoints"):
            resumed_from.append(complete[-1].name)
    last = in_child(lambda: train(data, interrupted, folder / "losses.txt", folder / "record-last"))
    return {
        "straight": straight,
        "last": last,
        "killed": killed,
        "unreadable": unreadable,
        "resumed_from": resumed_from,
    }


if __name__ == "__main__":
    print("RESULT " + json.dumps(main(Path(sys.argv[1]))))  # noqa: T201
