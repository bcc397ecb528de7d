"""What a statement says where the noise of several parties lies in everything that others see."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace

import pytest

from coterie.dp.accounting.accountant import Mechanism
from coterie.dp.accounting.budget import Budget, Spent
from coterie.dp.accounting.ledger import open_ledger
from coterie.dp.accounting.lots import Units
from coterie.dp.accounting.run_entry import RunStart
from coterie.dp.accounting.statement import Statement, make_statement
from coterie.dp.clipping import Flat
from coterie.dp.noise.pooled import PooledNoise
from coterie.dp.plan import PrivacyPlan
from coterie.errors import LedgerError

SIGMA, ROUNDS = 4.0, 3
BUDGET = Budget(20.0, 1e-5)


def statement(folder: Path, **facts: object) -> Statement:
    ledger = open_ledger("a" * 64, folder)
    mechanism = Mechanism(SIGMA, 1.0)
    ledger.start_run("run", mechanism, ROUNDS, units=100, unit="record", clip_norm=1.0, seeded=False, **facts)
    for round_no in range(1, ROUNDS + 1):
        ledger.record_release("run", round_no, 0, f"{round_no:064x}", {})
    return make_statement(ledger, "run", BUDGET, 1.0, ())


def reference(sigma: float) -> float:
    """Of the Gaussian mechanism in closed form (Balle and Wang 2018, arXiv:1805.06530), all rounds being one."""
    whole = sigma / math.sqrt(ROUNDS)
    below = NormalDist().cdf

    def delta(eps: float) -> float:
        return below(0.5 / whole - eps * whole) - math.exp(eps) * below(-0.5 / whole - eps * whole)

    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if delta(middle) > BUDGET.delta else (low, middle)
    return high


@pytest.mark.parametrize(("parties", "colluding"), [(3, 1), (6, 1), (6, 2), (4, 3)])
def test_shares_and_what_is_unknown_add_up_to_the_promised_noise(parties: int, colluding: int):
    shared = PooledNoise(parties, colluding)
    variances = [shared.share**2] * parties
    for others in range(parties):
        assert shared.unknown(others) ** 2 == pytest.approx(sum(variances[others:]))
    assert shared.unknown(colluding) == pytest.approx(1.0)
    assert PooledNoise(parties).share == 1.0
    assert PooledNoise(parties).unknown(parties - 1) == pytest.approx(1.0)


def test_with_whole_noise_the_statement_speaks_of_one_other_party_too(tmp_path: Path):
    made = statement(tmp_path, pooled=PooledNoise(3).to_json())
    ((others, spent),) = made.against
    assert others == 1
    assert spent.epsilon == pytest.approx(reference(SIGMA * math.sqrt(2)), rel=0.02)
    assert made.spent.epsilon == pytest.approx(reference(SIGMA), rel=0.02)
    shown = str(made)
    assert "holds the noise of 2 parties that it does not know" in shown
    assert "Against all others together, or parties whose noise is known to others, the line above holds" in shown
    assert made.to_json()["against"] == [[1, {"epsilon": spent.epsilon, "delta": BUDGET.delta}]]


def test_with_shared_noise_the_statement_says_what_holds_against_t_and_against_more(tmp_path: Path):
    made = statement(tmp_path, pooled=PooledNoise(4, 1).to_json())
    assert made.spent.epsilon == pytest.approx(reference(SIGMA), rel=0.02)
    assert [others for others, _ in made.against] == [2, 3]
    for others, spent in made.against:
        assert spent.epsilon == pytest.approx(reference(SIGMA * math.sqrt((4 - others) / 3)), rel=0.02)
    shown = str(made)
    assert "holds against    any 1 of the 3 other parties together" in shown
    assert f"{made.against[0][1]}, if any 2 of them pool what they know" in shown
    assert f"{made.against[1][1]}, if all others pool what they know" in shown
    alone = "with noise shared by 4 parties: against any 1 of the 3 others together, not against all"
    assert made.counted == (f"1 run {alone}",)  # every statement that counts this run says so


@pytest.mark.parametrize("facts", [{}, {"pooled": None}])
def test_where_others_see_one_partys_noise_alone_there_is_no_further_line(tmp_path: Path, facts: dict):
    """Runs of earlier versions too, whose entries say nothing of it."""
    made = statement(tmp_path, **facts)
    assert made.against == ()
    assert "one other party" not in str(made)
    assert "collude" not in str(made)


@pytest.mark.parametrize("written", [{}, {"pooled": None}, {"pooled": PooledNoise(3, 2).to_json()}])
def test_a_run_does_not_go_on_with_another_share_of_the_noise_than_its_entry_says(tmp_path: Path, written: dict):
    """What an entry does not speak of is whole noise: the statement takes it for that."""
    engine = SimpleNamespace(clipping=Flat(1.0), groups=(), eta=0.0)
    plan = PrivacyPlan(BUDGET, lot_size=10, rounds=ROUNDS, noise_multiplier=SIGMA)
    start = RunStart(plan, plan.mechanism(plan.lots(100)), Units(100, 100), engine)  # type: ignore[arg-type]
    ledger = open_ledger("a" * 64, tmp_path)
    ledger.start_run("run", start.mechanism, ROUNDS, **start.facts(), **written)
    shared = start._replace(plan=replace(plan, pooled=PooledNoise(3, 1)))
    with pytest.raises(LedgerError, match="the pooled of run"):
        shared.check(ledger, "run")
    as_written = PooledNoise.from_json(written.get("pooled"))
    start._replace(plan=replace(plan, pooled=as_written)).check(ledger, "run")
    if as_written is not None:
        with pytest.raises(LedgerError, match="the pooled of run"):
            start.check(ledger, "run")


@pytest.mark.parametrize("facts", [{}, {"pooled": PooledNoise(4, 2).to_json()}, {"pooled": PooledNoise(3).to_json()}])
def test_a_statement_is_the_same_after_json(tmp_path: Path, facts: dict):
    made = replace(statement(tmp_path, **facts), lifetime=Spent(math.inf, BUDGET.delta), copies=((2, math.inf),))
    read = Statement.from_json(json.loads(json.dumps(made.to_json(), allow_nan=False)))
    assert read == made
    assert str(read) == str(made)
