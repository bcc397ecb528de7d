"""A private session tells AdamW without the noise's share how much noise there is."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from coterie import dp
from coterie.config import OptimSpec
from coterie.training.optim import CorrectedAdamW
from helpers.start_examples import Two, collate, loss_fn, records


def test_a_session_tells_the_optimizer_how_much_noise_is_in_a_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Two()
    told: dict[Tensor, float] = {}
    monkeypatch.setattr(CorrectedAdamW, "expect_noise", lambda self, std: told.update(std))
    optimizer = CorrectedAdamW(model.parameters(), OptimSpec(kind="adamw_corrected"))
    with dp.make_private(
        model, optimizer, records(24), collate, loss_fn, dp.Budget(8.0, 1e-3), lot_size=4, rounds=7, seed=5,
        ledger=tmp_path, self_check=False,
    ) as session:  # fmt: skip
        session.step(session.next_lot())
        expected = session.noise_multiplier * session.lot_sums.engine.sensitivity / 4
    assert set(told) == set(model.parameters())
    assert all(std == pytest.approx(expected, rel=1e-5) for std in told.values())
