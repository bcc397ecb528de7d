"""What a private run will spend, and what other lots and budgets would mean, against dp-accounting."""

from __future__ import annotations

import math

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant

from coterie.dp.accounting.budget import Budget
from coterie.dp.plan import PrivacyPlan
from coterie.training.planning import forecast
from coterie.training.planning.forecast import Choice

UNITS, DELTA = 150, 1e-4


def spent(choice: Choice) -> float:
    gaussian = dp_accounting.GaussianDpEvent(choice.noise_multiplier)
    accountant = PLDAccountant()
    accountant.compose(dp_accounting.PoissonSampledDpEvent(choice.lot_size / UNITS, gaussian), choice.rounds)
    return float(accountant.get_epsilon(DELTA))


def test_other_lots_use_the_text_as_often_and_every_choice_stays_in_its_budget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(forecast, "_LOTS", (1, 2, 4))
    monkeypatch.setattr(forecast, "_BUDGETS", (3.0, 6.0))
    found = forecast.choices(PrivacyPlan(Budget(6.0, DELTA), rounds=8, lot_size=40), UNITS)
    chosen = [(each.epsilon, each.lot_size, each.rounds) for each in found]
    assert chosen == [(3.0, 40, 8), (6.0, 40, 8), (6.0, 80, 4)], "no lot is larger than the text"
    monkeypatch.setattr(forecast, "_LOTS", (1, 2))
    monkeypatch.setattr(forecast, "_BUDGETS", ())
    few = forecast.choices(PrivacyPlan(Budget(6.0, DELTA), rounds=1, lot_size=40), UNITS)
    assert [each.lot_size for each in few] == [40], "half a round is none"
    for each in found:
        assert spent(each) == pytest.approx(each.epsilon, rel=0.01)
        assert each.round_noise == each.noise_multiplier / each.lot_size
        assert each.run_noise == pytest.approx(each.round_noise / math.sqrt(each.rounds))
