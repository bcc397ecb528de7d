"""What a statement says where the noise of several parties lies in everything that others see."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
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
from coterie.dp.noise.pooled import CONTRIBUTORS, PooledNoise
from coterie.dp.plan import PrivacyPlan
from coterie.errors import LedgerError, PrivacyError

SIGMA, ROUNDS = 4.0, 3
BUDGET = Budget(20.0, 1e-5)


def statement(folder: Path, contributors: Sequence[str] = (), **facts: object) -> Statement:
    """Of a run whose rounds had these contributors, separated by commas; by default nothing is said of them."""
    ledger = open_ledger("a" * 64, folder)
    mechanism = Mechanism(SIGMA, 1.0)
    ledger.start_run("run", mechanism, ROUNDS, units=100, unit="record", clip_norm=1.0, seeded=False, **facts)
    for round_no in range(1, ROUNDS + 1):
        pins = {CONTRIBUTORS: contributors[round_no - 1]} if contributors else {}
        ledger.record_release("run", round_no, 0, f"{round_no:064x}", pins)
    return make_statement(ledger, "run", BUDGET, 1.0, ())


def reference(*sigmas: float) -> float:
    """Of the Gaussian mechanism in closed form (Balle and Wang 2018, arXiv:1805.06530), all rounds being one."""
    rounds = sigmas if len(sigmas) > 1 else sigmas * ROUNDS
    whole = 1 / math.sqrt(sum(sigma**-2 for sigma in rounds))
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


@pytest.mark.parametrize(("parties", "colluding", "others"), [(4, None, 1), (4, 1, 2), (4, 1, 3), (4, 2, 3)])
def test_rounds_of_fewer_parties_are_counted_with_the_noise_that_they_had(
    tmp_path: Path, parties: int, colluding: int | None, others: int
):
    """Of four one stops after the first round. The promise stays; what more parties could learn, or one, changes."""
    made = statement(tmp_path, ["a,b,c,d", "a,b,c", "a,b,c"], pooled=PooledNoise(parties, colluding).to_json())
    assert made.spent.epsilon == pytest.approx(reference(SIGMA), rel=0.02)

    def unknown(contributing: int) -> float:
        shares = contributing - colluding if colluding is not None else 1
        return SIGMA * math.sqrt(max(contributing - others, 1) / shares)

    expected = reference(unknown(4), unknown(3), unknown(3))
    assert dict(made.against)[others].epsilon == pytest.approx(expected, rel=0.02)
    assert "of 4 contributed 3 in 2 rounds, as the others' budgets were spent" in str(made)
    assert made.to_json()["fewer"] == [[3, 2]]
    (line,) = (entry for entry in open_ledger("a" * 64, tmp_path).entries() if entry.data.get("round") == 3)
    assert line.data["pooled"] == {"parties": 3, "colluding": colluding}
    again = open_ledger("a" * 64, tmp_path)  # another process reads what was written
    assert make_statement(again, "run", BUDGET, 1.0, ()).against == made.against


def test_where_all_contribute_an_entry_says_what_it_always_did(tmp_path: Path):
    made = statement(tmp_path, ["a,b,c"] * ROUNDS, pooled=PooledNoise(3, 1).to_json())
    assert made.fewer == ()
    assert not any(
        "pooled" in entry.data for entry in open_ledger("a" * 64, tmp_path).entries() if entry.kind != "run"
    )


def test_no_noise_is_shared_where_all_others_may_pool_what_they_know():
    with pytest.raises(PrivacyError) as refused:
        PooledNoise(3, 1).among(1)
    assert refused.value.code == "dp-pooled"


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
    infinite = Spent(math.inf, BUDGET.delta)
    made = replace(statement(tmp_path, **facts), lifetime=infinite, copies=((2, math.inf),), fewer=((2, 1),))
    read = Statement.from_json(json.loads(json.dumps(made.to_json(), allow_nan=False)))
    assert read == made
    assert str(read) == str(made)
