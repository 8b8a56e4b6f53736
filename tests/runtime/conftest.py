"""An engine that tests play, and its clean end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.runtime.stand_ins import PATIENCE_S, Engine


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine()
    yield engine
    engine.session.gate.close()
    engine.units._end.release(1000)
    if engine.units.ident is not None:
        engine.units.join(PATIENCE_S)
        assert not engine.units.is_alive()
