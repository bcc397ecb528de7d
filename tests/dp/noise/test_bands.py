"""Noise in bands: what is learnt from, what one unit moves, who joins when, and what that costs."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting import rdp
from torch import Tensor

from coterie import dp
from coterie.dp.accounting.accountant import Mechanism, epsilon, noise_multiplier
from coterie.dp.accounting.groups import group_epsilon
from coterie.dp.accounting.lots import Lot, LotPlan, Units, draw_lot
from coterie.dp.noise.bands import NoiseBands, block_of, run_noise
from coterie.dp.noise.discrete_gaussian import GRID_SIGMA, Slabs, add_noise
from coterie.dp.noise.past_noise import PastNoise
from coterie.dp.noise.pooled import PooledNoise
from coterie.dp.noise.randomness import random_source
from coterie.dp.open_run import OpenRun
from coterie.dp.party_session import Contributor
from coterie.dp.plan import PrivacyPlan
from coterie.dp.session import PrivateSession
from coterie.errors import BudgetError, LedgerError, PrivacyError
from helpers.start_examples import Two, collate, loss_fn, records, start_party

SEED = 5


def bands(count: int, rounds: int = 10, momentum: float = 0.0) -> NoiseBands:
    found = NoiseBands.of(count, rounds, momentum)
    assert found is not None
    return found


def matrix(of: NoiseBands, rounds: int) -> np.ndarray:
    """C, written out."""
    found = np.zeros((rounds, rounds))
    for below, coefficient in enumerate(of.coefficients):
        found += coefficient * np.eye(rounds, k=-below)
    return found


def start(root: Path, run: str = "banded", **options: Any) -> PrivateSession:
    model = Two()
    given: dict[str, Any] = {
        "budget": dp.Budget(8.0, 1e-3), "lot_size": 4, "rounds": 7, "ledger": root, "run": run, "seed": SEED,
        "noise_bands": 3, "self_check": False,
    }  # fmt: skip
    given |= options
    return dp.make_private(model, torch.optim.SGD(model.parameters(), 0.05), records(24), collate, loss_fn, **given)


class Seen:
    """Rounds of a session: which records joined, their sums before noise, and what was learnt from."""

    def __init__(self, session: PrivateSession, monkeypatch: pytest.MonkeyPatch) -> None:
        self.session = session
        self.lots: list[list[int]] = []
        self.sums: list[dict[str, Tensor]] = []
        self.learnt: list[dict[str, Tensor]] = []
        compute, publish, lot_sums = session.lot_sums.compute, OpenRun.publish, session.lot_sums

        def noted(lot: Any, name: str) -> dict[str, Tensor]:
            sums = compute(lot, name)
            step = lot_sums.noise(sums).step
            self.sums.append(
                {key: v.double() * (step(key) if v.dtype == torch.int64 else 1) for key, v in sums.items()}
            )
            self.lots.append(lot.records.tolist())
            return sums

        def published(run: OpenRun, *given: Any, **options: Any) -> Any:
            means, release = publish(run, *given, **options)
            self.learnt.append({key: value.double() * session.privacy_plan.lot_size for key, value in means.items()})
            return means, release

        monkeypatch.setattr(session.lot_sums, "compute", noted)
        monkeypatch.setattr(OpenRun, "publish", published)

    def steps(self, rounds: int) -> None:
        for _ in range(rounds):
            self.session.step(self.session.next_lot())

    def std(self) -> float:
        noise = self.session.lot_sums.noise({name: p.detach() for name, p in self.session.model.named_parameters()})
        return noise.std["gradients"]

    def fresh(self, first: int = 1) -> np.ndarray:
        """[rounds, values] the noise that each round drew anew: what a seeded source gives sums of zero."""
        rows = []
        for number in range(first, first + len(self.sums)):
            zeros = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in self.sums[0].items()}
            rows.append(add_noise(zeros, self.std(), random_source(SEED), f"noise|{number}|0"))
        return stacked(rows)


def stacked(rows: list[dict[str, Tensor]]) -> np.ndarray:
    return np.stack([torch.cat([row[name].double().flatten() for name in sorted(row)]).numpy() for row in rows])


@pytest.mark.parametrize("options", [{}, {"isolation": "exact"}])
def test_what_is_learnt_from_is_the_sums_and_the_inverse_of_the_matrix_times_fresh_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    with start(tmp_path, **options) as session:
        seen = Seen(session, monkeypatch)
        seen.steps(7)
        sums, fresh = stacked(seen.sums), seen.fresh()
        inverse = np.linalg.inv(matrix(bands(3, 7), 7))
        expected = sums + inverse @ fresh
        assert np.abs(stacked(seen.learnt) - expected).max() < 3e-6 * seen.std()
        assert np.abs(sums).max() > 0


def test_a_run_that_goes_on_in_another_process_starts_its_matrix_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with start(tmp_path / "l") as session:
        first = Seen(session, monkeypatch)
        first.steps(4)
        session.save(tmp_path / "saved")
    monkeypatch.undo()
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    with PrivateSession.resume(
        tmp_path / "saved", model, optimizer, records(24), collate, loss_fn, ledger=tmp_path / "l"
    ) as session:
        second = Seen(session, monkeypatch)
        second.steps(3)
        inverse = np.linalg.inv(matrix(bands(3, 7), 3))
        expected = stacked(second.sums) + inverse @ second.fresh(5)
        assert np.abs(stacked(second.learnt) - expected).max() < 3e-6 * second.std()
    blocks = block_of(24, 3)
    for turn, lot in enumerate([*first.lots, *second.lots]):
        assert set(blocks[lot]) <= {turn % 3}
    assert sum(map(len, second.lots)) > 0


def test_a_burned_release_takes_a_turn_of_its_block(tmp_path: Path) -> None:
    """A round that is drawn again comes from the next block: else a record would stand twice in one band."""
    lots: list[Lot] = []
    run = start_party(tmp_path, "burning", seed=SEED, bands=bands(3, 6), lot_size=4)  # each whole block in its turn
    party = Contributor(run, lots.append)
    for round_no, weights in ((1, "a"), (2, "b"), (2, "other"), (3, "c")):
        party.release(round_no, {"weights": weights})
    run.close()
    blocks = block_of(12, 3)
    assert [set(blocks[lot.records]) for lot in lots] == [{0}, {1}, {2}, {0}]
    assert [(r.round, r.draw) for r in run.ledger.releases("burning")] == [(1, 0), (2, 0), (2, 1), (3, 0)]


@pytest.mark.parametrize(("count", "rounds", "momentum"), [(2, 9, 0.0), (4, 11, 0.9), (8, 30, 0.5)])
def test_one_unit_moves_each_of_its_turns_by_one_column_of_norm_at_most_one(
    count: int, rounds: int, momentum: float
) -> None:
    """Turns of one block: columns with no row in common, so a composition of Gaussians of sensitivity one."""
    c = matrix(bands(count, rounds, momentum), rounds)
    for block in range(count):
        columns = c[:, block::count]
        gram = columns.T @ columns
        assert np.abs(gram - np.diag(np.diag(gram))).max() == 0
        assert np.diag(gram).max() <= 1
        assert ((columns != 0).sum(1) <= 1).all()
    assert np.linalg.norm(c[:, 0]) == pytest.approx(1, abs=1e-9)


def test_run_noise_is_that_of_the_matrices_written_out() -> None:
    rounds, momentum = 12, 0.8
    of = bands(4, rounds, momentum)
    course = np.tril(np.ones((rounds, rounds))) @ np.linalg.inv(np.eye(rounds) - momentum * np.eye(rounds, k=-1))
    error = course @ np.linalg.inv(matrix(of, rounds))
    assert of.run_noise(rounds, momentum) == pytest.approx(math.sqrt((error**2).sum() / rounds), rel=1e-9)
    inverse = np.linalg.inv(matrix(of, rounds))
    assert of.step_noise(rounds) == pytest.approx(np.linalg.norm(inverse, axis=1).max(), rel=1e-9)
    assert run_noise((1.0,), rounds) == pytest.approx(math.sqrt((rounds + 1) / 2))


@pytest.mark.parametrize(("momentum", "root"), [(0.0, [1, 1 / 2, 3 / 8, 5 / 16]), (0.9, None)])
def test_coefficients_leave_no_more_noise_than_the_square_root_of_the_course(
    momentum: float, root: list[float] | None
) -> None:
    """Against the banded square root (arXiv:2405.13763), here from the power series of ((1-x)(1-mx))^(-1/2)."""
    series = [1.0, 0.0, 0.0, 0.0]
    for k in range(1, 4):  # f' = f (1/(2(1-x)) + m/(2(1-mx)))
        series[k] = sum(series[k - 1 - j] * (1 + momentum ** (j + 1)) / 2 for j in range(k)) / k
    if root is not None:
        assert series == pytest.approx(root)
    of, column = bands(4, 60, momentum), np.array(series) / np.linalg.norm(series)
    ratio = of.run_noise(60, momentum) / run_noise(tuple(column), 60, momentum)
    assert 0.85 < ratio <= 1 + 1e-9


@pytest.mark.parametrize(("count", "rounds", "momentum"), [(4, 60, 0.9), (8, 60, 0.9), (8, 400, 0.0), (16, 60, 0.9)])
def test_coefficients_do_not_depend_on_how_the_search_went(
    monkeypatch: pytest.MonkeyPatch, count: int, rounds: int, momentum: float
) -> None:
    """Another processor adds up in another order; a run in bands is held to the last bit of its ledger's entry."""
    expected = bands(count, rounds, momentum).coefficients
    root = [math.comb(2 * k, k) / 4**k * (1 + 0.01 * (-1) ** k) for k in range(count)]
    monkeypatch.setattr("coterie.dp.noise.bands._square_root", lambda *_: np.array(root))
    assert bands(count, rounds, momentum + 1e-13).coefficients == expected
    over_first = [1000 * each / expected[0] for each in expected]
    assert over_first == pytest.approx([round(each) for each in over_first], abs=1e-8)


def test_the_statement_names_the_neighbours_that_blocks_by_number_protect(tmp_path: Path) -> None:
    with start(tmp_path) as session:
        relation = session.statement().relation
        assert relation == "adding or removing one record, whose number stays empty: all others keep theirs"
    with start(tmp_path, "plain", noise_bands=1) as session:
        assert session.statement().relation == "adding or removing one record"


def test_invariant_9_epsilon_is_that_of_the_blocks_turns_at_the_blocks_rate() -> None:
    """Against dp-accounting's own accountant, fed with the event of BandMF's theorem 4."""
    lots = LotPlan.of(2000, 50, bands=8)
    mechanism = lots.mechanism(0.9)
    own = rdp.RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    own.compose(dp_accounting.PoissonSampledDpEvent(8 * 50 / 2000, dp_accounting.GaussianDpEvent(0.9)), 13)
    assert epsilon([(mechanism, 100)], 1e-5, "rdp") == pytest.approx(own.get_epsilon(1e-5), rel=1e-9)
    assert 0.8 * own.get_epsilon(1e-5) < epsilon([(mechanism, 100)], 1e-5) < own.get_epsilon(1e-5)
    assert epsilon([(mechanism, 97)], 1e-5) == epsilon([(mechanism, 104)], 1e-5)
    assert epsilon([(mechanism, 96)], 1e-5) < epsilon([(mechanism, 97)], 1e-5)


def test_turns_are_counted_run_by_run() -> None:
    """Two runs of one round each are two turns of a unit, not one."""
    mechanism = LotPlan.of(1000, 20, bands=4).mechanism(1.0)
    twice = epsilon([(mechanism, 1), (mechanism, 1)], 1e-5)
    assert twice == epsilon([(mechanism, 8)], 1e-5)
    assert twice > epsilon([(mechanism, 2)], 1e-5)


def test_a_budget_is_met_with_the_noise_of_the_turns() -> None:
    budget = dp.Budget(8.0, 1e-3)
    plan = PrivacyPlan(budget, 7, 4, bands=bands(3, 7))
    mechanism = plan.mechanism(plan.lots(24))
    assert mechanism == Mechanism(noise_multiplier(budget, 0.5, 3), 0.5, bands=3)
    assert 7.9 < epsilon([(mechanism, 7)], 1e-3) <= 8.0


def test_groups_may_lie_in_several_blocks_and_get_the_general_bound() -> None:
    """Two units in neighbouring blocks move the same rows; one that joins for both at once is no bound then."""
    banded = LotPlan.of(1000, 20, bands=4).mechanism(2.0)
    alone, pair = (group_epsilon([(banded, 8)], 1e-6, size) for size in (1, 2))
    assert alone == epsilon([(banded, 8)], 1e-6)
    assert pair > group_epsilon([(Mechanism(2.0, 0.08), 2)], 1e-6, 2)
    assert 2 * alone < pair < 3 * alone


def test_blocks_follow_from_numbers_alone() -> None:
    blocks = block_of(10_000, 8)
    assert (block_of(123, 8) == blocks[:123]).all()
    counts = np.bincount(blocks, minlength=8)
    assert abs(counts - 1250).max() < 5 * math.sqrt(1250)
    state = 0x9E3779B97F4A7C15  # SplitMix64 of state 0, as published
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
    state = (state ^ state >> 27) * 0x94D049BB133111EB & (1 << 64) - 1
    assert blocks[0] == (state ^ state >> 31) % 8


def test_lots_come_from_the_block_whose_turn_it_is_at_the_blocks_rate() -> None:
    lots, blocks = LotPlan.of(4000, 100, bands=4), block_of(4000, 4)
    assert lots.rate == 0.1
    drawn = [draw_lot(1, lots, Units.of_records(4000), random_source(turn), 0, turn) for turn in range(200)]
    assert all(set(blocks[lot.records]) == {turn % 4} for turn, lot in enumerate(drawn))
    assert sum(map(len, drawn)) == pytest.approx(200 * 100, abs=5 * math.sqrt(200 * 100))


def test_users_lie_in_blocks_whole() -> None:
    users = [f"u{i % 40}" for i in range(400)]
    lots, blocks = LotPlan.of(40, 5, bands=4), block_of(40, 4)
    for turn in range(12):
        lot = draw_lot(1, lots, Units.of_users(users, 16), random_source(turn), 0, turn)
        assert {int(blocks[record % 40]) for record in lot.records} <= {turn % 4}


def test_ranks_that_own_sums_noise_them_as_one_process_does() -> None:
    """Three sums with a slab in common, all at one owner or one each."""
    of, std = bands(3, 5), dict.fromkeys(("a", "b", "c"), 0.5)
    sizes = {"a": (1 << 20) + 7, "b": 1000, "c": 9}
    found = []
    for owners in (1, 3):
        past = [PastNoise(of) for _ in range(owners)]
        learnt = []
        for turn in range(4):
            sums = {n: torch.linspace(-turn, turn, size) for n, size in sizes.items()}
            noised = dict[str, torch.Tensor]()
            for rank, own in enumerate(past):
                names = ["abc"[rank]] if owners == 3 else ["a", "b", "c"]
                slabs = Slabs(sums, std)
                kept = own.mix(slabs, names, turn)
                slabs.add_noise(names, random_source(1), f"{turn}", 2.0 * own.main)
                own.keep(kept, slabs, names, turn, 2.0)
                noised |= {name: slabs.noised[name] for name in names}
            learnt.append(noised)
        found.append(learnt)
    for one, other in zip(*found, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in sizes)


def test_the_noise_pays_for_rounding_in_every_row_that_a_column_reaches(tmp_path: Path) -> None:
    with start(tmp_path) as session:
        values = sum(p.numel() for p in session.model.parameters())
        sums = {name: p.detach() for name, p in session.model.named_parameters()}
        std, sigma = session.lot_sums.noise(sums).std["gradients"], session.noise_multiplier
        bound = session.lot_sums.engine.sensitivity
    assert std == pytest.approx(sigma * (bound + math.sqrt(3 * values) * std / GRID_SIGMA), rel=1e-7, abs=0)
    assert std > sigma * (bound + math.sqrt(2.9 * values) * std / GRID_SIGMA)


# ---- what is said and what is refused ----


def test_ledger_and_statement_name_the_law(tmp_path: Path) -> None:
    with start(tmp_path, seed=None) as session:
        entry = session.ledger.run("banded")
        for lot in session:
            session.step(lot)
        statement = session.statement()
    assert entry["mechanism"]["bands"] == 3
    assert entry["mechanism"]["sampling_rate"] == 0.5
    assert entry["bands"] == list(bands(3, 7).coefficients)
    assert (statement.bands, statement.rounds) == (3, 7)
    assert "in every 3th round" in str(statement)
    assert "noise in bands" in str(statement)
    turns = epsilon([(Mechanism(session.noise_multiplier, 0.5), 3)], 1e-3)
    assert statement.spent.epsilon == turns == session.spent().epsilon <= 8.0
    assert json.loads(json.dumps(statement.to_json()))["bands"] == 3


def test_an_entry_without_bands_does_not_speak_of_them(tmp_path: Path) -> None:
    with start(tmp_path, noise_bands=1) as session:
        entry, statement = session.ledger.run("banded"), session.statement()
    assert "bands" not in entry
    assert "bands" not in entry["mechanism"]
    assert "in bands" not in str(statement)


def test_a_run_does_not_go_on_with_other_coefficients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with start(tmp_path / "l") as session:
        session.save(tmp_path / "saved")
    other = NoiseBands((0.8, 0.3, 0.1))
    monkeypatch.setattr(NoiseBands, "from_json", lambda values: other)  # a checkpoint that somebody edited
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    with pytest.raises(LedgerError, match="the bands of run banded"):
        PrivateSession.resume(
            tmp_path / "saved", model, optimizer, records(24), collate, loss_fn, ledger=tmp_path / "l"
        )


def test_a_run_does_not_go_on_with_records_at_other_numbers(tmp_path: Path) -> None:
    """The dataset has the same name in any order; a record that changes its block could stand twice in one band."""
    with start(tmp_path / "l") as session:
        session.save(tmp_path / "saved")
    for given, goes_on in ((records(24)[::-1], False), (records(24), True)):
        model = Two()
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        with nullcontext() if goes_on else pytest.raises(LedgerError, match="the order of run banded"):
            PrivateSession.resume(
                tmp_path / "saved", model, optimizer, given, collate, loss_fn, ledger=tmp_path / "l"
            ).close()


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"sampler": "truncated_poisson"}, PrivacyError, "truncated_poisson"),
        ({"adaptive_quantile": 0.5}, PrivacyError, "adaptive_quantile"),
        ({"noise_bands": 7}, BudgetError, "larger than one of 7 blocks"),
        ({"noise_bands": 0}, BudgetError, "noise_bands"),
        ({"noise_bands": 65}, BudgetError, "noise_bands"),
        ({"noise_bands": True}, BudgetError, "noise_bands"),
    ],
)
def test_what_breaks_the_bands_is_refused(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        start(tmp_path, **options)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, torch.optim.RMSprop])
def test_optimizers_that_divide_by_single_steps_are_refused(
    tmp_path: Path, kind: type[torch.optim.Optimizer]
) -> None:
    model, budget = Two(), dp.Budget(8.0, 1e-3)
    with pytest.raises(PrivacyError, match=kind.__name__) as refused:
        dp.make_private(
            model, kind(model.parameters()), records(24), collate, loss_fn, budget, lot_size=4, rounds=6,
            noise_bands=3, ledger=tmp_path, self_check=False,
        )  # fmt: skip
    assert refused.value.code == "dp-bands-optimizer"


def test_masked_sums_and_columns_that_are_too_long_are_refused() -> None:
    with pytest.raises(PrivacyError, match="masked"):
        PrivacyPlan(dp.Budget(8.0, 1e-3), 7, 4, pooled=PooledNoise(3), bands=bands(3))
    with pytest.raises(PrivacyError, match="squared norm"):
        NoiseBands((0.9, 0.9))
