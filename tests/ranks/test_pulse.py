"""A rank is named silent where it is, and nowhere else."""

from __future__ import annotations

import pytest
from torch.distributed import HashStore

from coterie.errors import RankError
from coterie.ranks import pulse
from coterie.ranks.pulse import Pulse
from helpers.waiting import until


class Unsteady(HashStore):
    """A store that cannot be reached once."""

    missed = 0

    def set(self, key: str, value: str) -> None:  # type: ignore[override]
        self.missed += 1
        if self.missed == 2:
            raise RuntimeError("connection reset by peer")
        super().set(key, value)


def test_a_store_that_cannot_be_reached_once_does_not_end_a_pulse() -> None:
    store = Unsteady()
    own = Pulse(store, 1, 0.05)
    try:
        until(lambda: store.check(["pulse/1"]) and int(store.get("pulse/1")) >= 4)
    finally:
        own.close()


def test_a_process_that_stood_still_itself_accuses_nobody_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """After Ctrl-Z all ranks go on together, and each would find that nobody counted meanwhile."""
    now, store = [100.0], HashStore()
    own = Pulse(store, 0, 15.0)
    own.close()
    store.set("pulse/1", "7")
    monkeypatch.setattr(pulse.time, "monotonic", lambda: now[0])
    for later in (0.0, 600.0, 10.0):
        now[0] += later
        own.check(store, [1], "a step")
    now[0] += 10.0
    with pytest.raises(RankError, match="rank 1 has been silent for 20 s"):
        own.check(store, [1], "a step")
