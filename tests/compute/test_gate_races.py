"""The gate under two threads that do what they like: no unit is shared, no wake-up lost."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from harli.compute.gate import Gate

UNITS = 4
PATIENCE_S = 20.0


@pytest.fixture
def frequent_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.usefixtures("frequent_switches")
def test_random_steps_never_share_a_unit_and_never_hang(seed: int) -> None:
    chance = random.Random(seed)
    gate = Gate(UNITS, lambda: chance.random() < 0.1)
    decode_units = 0
    faults: set[tuple[int, int]] = set()
    ran = threading.Event()

    def finetune() -> None:
        mine = random.Random(seed + 100)
        while units := gate.enter(mine.choice([0.0, 0.1, 5.0])):
            for _ in range(mine.randrange(20)):
                if decode_units + units > UNITS:
                    faults.add((decode_units, units))
            gate.leave()
            ran.set()

    thread = threading.Thread(target=finetune, daemon=True)
    thread.start()
    for _ in range(1500):
        if chance.random() < 0.3:
            assert gate.window(chance.choice([0.01, 0.3, 2.0]), PATIENCE_S)
            assert gate.free == UNITS
        finetune_units = chance.randrange(UNITS)
        gate.allow(finetune_units)
        if not gate.free:
            assert gate.wait_free(PATIENCE_S)
        decode_units = min(UNITS - finetune_units, gate.free)
        if chance.random() < 0.3:
            time.sleep(1e-5)
        decode_units = 0
        if chance.random() < 0.1:
            gate.allow(UNITS)  # idle
            ran.clear()
            assert ran.wait(PATIENCE_S), "a wake-up was lost"
    gate.close()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert not faults
