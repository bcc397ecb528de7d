"""A private session ties sampling, clipping, noise and ledger together."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from coterie import dp
from coterie.dp.accounting.accountant import Mechanism, epsilon
from coterie.dp.accounting.budget import Budget, PrivacyWarning
from coterie.dp.accounting.lots import Lot
from coterie.dp.clipping import policy
from coterie.dp.session import PrivateSession
from coterie.errors import (
    BudgetError,
    CheckpointError,
    DataError,
    LedgerError,
    NoRuleError,
    PrivacyError,
    ProvenanceError,
)
from coterie.models.zoo.tiny import tiny_model
from helpers.slow_engine import SlowEngine

BUDGET = Budget(6.0, 1e-3)


# `Tiny` has a layer that no record uses, of which every session warns.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*used by no made-up record:coterie.dp.accounting.budget.PrivacyWarning"
)


class Tiny(nn.Module):
    """An embedding, a layer with dropout, and a layer that no record uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(6, 11)
        self.unused = nn.Linear(3, 2)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.drop(self.embed(input_ids)))


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    logits = model(batch["input_ids"])[:, :-1]
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten(), reduction="none")
    return losses.view(logits.shape[:2]).mean(1) * batch["scale"]


def records(count: int = 40) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    return [
        {
            "input_ids": torch.randint(0, 11, (5,), generator=generator),
            "scale": torch.tensor(1.0),
            "user": f"u{i % 9}",
        }
        for i in range(count)
    ]


def collate(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {name: torch.stack([item[name] for item in items]) for name in ("input_ids", "scale")}


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., PrivateSession]:
    def make(model: nn.Module | None = None, **options: Any) -> PrivateSession:
        model = model if model is not None else Tiny()
        optimizer = options.pop("optimizer", None) or torch.optim.AdamW(model.parameters(), 0.05)
        defaults: dict[str, Any] = {
            "dataset": records(), "collate_fn": collate, "loss_fn": loss_fn, "budget": BUDGET, "lot_size": 10,
            "rounds": 6, "physical_batch": 4, "ledger": tmp_path / "ledger",
        }  # fmt: skip
        settings = defaults | options
        return dp.make_private(model, optimizer, **settings)

    return make


def weights(session: PrivateSession) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in session.model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_the_statement_says_how_much_of_the_model_is_trained(start: Callable[..., PrivateSession]) -> None:
    model = Tiny()
    model.embed.requires_grad_(False)  # 66 of 66 + 77 + 8 values
    with start(model) as session:
        assert session.statement().trained == "85 of the model's 151 values; the others stay as they were loaded"
        assert "trained          85 of" in str(session.statement())
    with start(run="whole") as session:
        assert session.statement().trained is None


def test_public_signature_trains_and_counts(start: Callable[..., PrivateSession]) -> None:
    session = start()
    assert session.spent().epsilon == 0
    seen = []
    for lot in session:
        session.step(lot)
        seen.append(session.spent().epsilon)
    assert len(seen) == 6
    assert seen == sorted(seen)
    assert 0 < seen[0] < seen[-1] <= BUDGET.epsilon
    assert seen[-1] == epsilon([(Mechanism(session.noise_multiplier, 0.25), 6)], 1e-3)
    assert session.lifetime() == session.spent()


def test_a_step_gives_its_figures_and_the_session_says_how_many_are_left(
    start: Callable[..., PrivateSession],
) -> None:
    session = start(seed=1)
    drawn, left = [], []
    for lot in session:
        left.append(len(session))
        figures = session.step(lot)
        assert figures is not None
        assert figures.round == session.round
        assert figures.drawn == len(lot.records)
        assert figures.drawn == 0 or 0 < figures.loss < 10
        drawn.append(figures.drawn)
    assert left == [6, 5, 4, 3, 2, 1]
    assert (len(session), bool(session)) == (0, True)
    assert sum(drawn) > 0


def test_session_agrees_with_the_slow_engine(start: Callable[..., PrivateSession]) -> None:
    results, eta = [], 0.0
    for slow in (False, True):
        model = Tiny()
        engine = SlowEngine(model, loss_fn, policy("flat", 1.0), eta) if slow else None
        model.drop.p = 0.0
        session = start(
            model, seed=5, engine=engine, run=f"slow {slow}", optimizer=torch.optim.SGD(model.parameters(), 1.0)
        )
        for lot in session:
            session.step(lot)
        results.append(weights(session))
        eta = session.lot_sums.engine.eta
    for name, value in results[0].items():
        assert torch.allclose(value, results[1][name], rtol=1e-3, atol=2e-5), name


def test_invariant_5_noisy_sum_is_divided_by_the_expected_lot_size(start: Callable[..., PrivateSession]) -> None:
    model = Tiny()
    session = start(model, seed=1, optimizer=torch.optim.SGD(model.parameters(), 1.0), clip_norm=1e-3)
    for _ in range(3):
        before = weights(session)
        lot = session.next_lot()
        session.step(lot)
        std = session.lot_sums.noise(before).std["gradients"]
        moved = torch.cat([(before[n] - w).flatten() for n, w in weights(session).items()])
        assert moved.std() == pytest.approx(std / 10, rel=0.25)


def test_invariant_6_every_trainable_parameter_gets_noise_every_round_unused_ones_too(
    start: Callable[..., PrivateSession],
) -> None:
    session = start()
    for lot in session:
        before = weights(session)
        session.step(lot)
        for name, value in weights(session).items():
            assert (value != before[name]).all(), name


def test_invariant_6_an_empty_lot_skips_the_model_and_sends_ordinary_noise(
    start: Callable[..., PrivateSession],
) -> None:
    model = Tiny()
    session = start(
        model, lot_size=1, rounds=16, optimizer=torch.optim.SGD(model.parameters(), 1.0), budget=Budget(50, 1e-3)
    )
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    empty = 0
    for lot in session:
        if session.round == 0:
            session.step(lot)  # the engine's probes run once
            model.register_forward_pre_hook(count)
            continue
        calls, before = 0, weights(session)
        session.step(lot)
        assert (calls == 0) == (len(lot) == 0)
        if not len(lot):
            empty += 1
            moved = torch.cat([(before[n] - w).flatten() for n, w in weights(session).items()])
            std = session.lot_sums.noise(before).std["gradients"]
            assert moved.std() == pytest.approx(std, rel=0.3)
            assert math.isnan(session.last.loss)
    assert empty > 0


def test_nan_record_contributes_zero(start: Callable[..., PrivateSession]) -> None:
    results = []
    for bad in (True, False):
        data = records(20)
        model = Tiny()
        session = start(
            model, dataset=data, lot_size=20, rounds=2, seed=2, run=f"bad {bad}", digest="fixed", clip_norm=0.5,
            optimizer=torch.optim.SGD(model.parameters(), 0.1),
        )  # fmt: skip
        model.drop.p = 0.0
        if bad:
            data[7]["scale"] = torch.tensor(math.nan)
        else:
            data[7]["scale"] = torch.tensor(0.0)
        for lot in session:
            session.step(lot)
            assert session.last.masked == int(bad)
        results.append(weights(session))
    for name, value in results[0].items():
        assert torch.isfinite(value).all()
        assert torch.allclose(value, results[1][name], atol=1e-5), name


def test_invariant_7_private_runs_differ_whatever_the_seeds_and_leave_them_alone(
    start: Callable[..., PrivateSession],
) -> None:
    results, states = [], []
    for _ in range(2):
        session = start(rounds=2)
        torch.manual_seed(123)
        for lot in session:
            session.step(lot)
        states.append(torch.rand(3))
        results.append(weights(session))
    assert not any(torch.equal(results[0][n], results[1][n]) for n in results[0])
    torch.manual_seed(123)
    assert all(torch.equal(state, states[0]) for state in (*states, torch.rand(3)))


def test_invariant_7_dropout_masks_do_not_follow_the_config_seed(start: Callable[..., PrivateSession]) -> None:
    model, masks = Tiny(), []
    model.drop.register_forward_hook(lambda m, args, out: masks.append((out == 0).flatten()[:300].tolist()))
    for _ in range(2):
        session = start(model, lot_size=40, rounds=1, physical_batch=40, method="book_keeping")
        torch.manual_seed(7)
        lot = session.next_lot()
        masks.clear()
        session.step(lot)
        results = masks[-1]
        if _ == 0:
            first = results
    assert first != results


def test_seeded_runs_repeat_and_say_that_they_are_not_private(start: Callable[..., PrivateSession]) -> None:
    sessions = []
    for run in ("a", "b"):
        session = start(seed=9, run=run)
        for lot in session:
            session.step(lot)
        sessions.append(session)
    assert same(weights(sessions[0]), weights(sessions[1]))
    assert sessions[0].spent().epsilon == math.inf
    text = str(sessions[0].statement())
    assert "NOT PRIVATE" in text
    assert "2 seeded run(s)" in text


@pytest.mark.parametrize("stop", [1, 3, 5])
@pytest.mark.parametrize("lost", [0, 1])
def test_seeded_run_continues_identically_after_resume(
    start: Callable[..., PrivateSession], tmp_path: Path, stop: int, lost: int
) -> None:
    whole = start(seed=4, run="whole", adaptive_quantile=0.5, clipping="per_layer")
    for lot in whole:
        whole.step(lot)
    first = start(seed=4, run="parts", adaptive_quantile=0.5, clipping="per_layer")
    for lot in first:
        first.step(lot)
        if first.round == stop:
            first.save(tmp_path / "saved")
        if first.round == min(stop + lost, 6):  # rounds after the checkpoint are replayed from the spool
            break
    first.close()
    model = Tiny()
    with PrivateSession.resume(
        tmp_path / "saved", model, torch.optim.AdamW(model.parameters(), 0.7), records(), collate, loss_fn
    ) as session:
        assert session.round == min(stop + lost, 6)
        for lot in session:
            session.step(lot)
        assert same(weights(session), weights(whole))
        assert len(session.ledger.releases("parts")) == 6


def test_invariant_8_resume_of_a_private_run_spends_nothing_twice_and_stores_nothing_secret(
    start: Callable[..., PrivateSession], tmp_path: Path
) -> None:
    session = start()
    for lot in session:
        session.step(lot)
        if session.round == 2:
            session.save(tmp_path / "saved")
        if session.round == 4:
            break
    after, spent = weights(session), session.spent()
    pending = session.next_lot().records.tolist()
    session.close()
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert names == {"weights.safetensors", "optimizer.safetensors", "session.safetensors", "manifest.json"}
    facts = json.loads((tmp_path / "saved/manifest.json").read_text())["state"]["session"]
    assert facts["settings"]["seed"] is None
    assert set(facts) == {
        "run", "round", "parent", "dataset", "ledger_root", "head", "settings", "plan", "user_cap", "not_covered",
        "options", "private",
    }  # fmt: skip
    model = Tiny()
    again = PrivateSession.resume(
        tmp_path / "saved", model, torch.optim.AdamW(model.parameters()), records(), collate, loss_fn
    )
    assert again.round == 4
    assert same(weights(again), after)
    assert again.spent() == spent
    assert again.next_lot().records.tolist() == pending
    for lot in again:
        again.step(lot)
    assert len(again.ledger.releases(again.run)) == 6


def test_invariant_8_resume_from_an_older_checkpoint_counts_what_was_lost(
    start: Callable[..., PrivateSession], tmp_path: Path
) -> None:
    session = start()
    for lot in session:
        session.step(lot)
        if session.round in (2, 4):
            session.save(tmp_path / str(session.round))
        if session.round == 4:
            break
    session.close()
    model = Tiny()
    old = PrivateSession.resume(
        tmp_path / "2", model, torch.optim.AdamW(model.parameters()), records(), collate, loss_fn
    )
    assert old.round == 2
    taken = []
    for lot in old:
        old.step(lot)
        taken.append(old.round)
    assert taken == [3, 4]  # six releases in all: rounds 1-4, then 3 and 4 with new lots and new noise
    assert len(old.ledger.releases(old.run)) == 6
    with pytest.raises(BudgetError, match="the budget of this run is spent"):
        old.next_lot()


def test_invariant_8_a_failed_step_uses_the_same_lot_again(start: Callable[..., PrivateSession]) -> None:
    session = start()
    broken = True
    plain = session.lot_sums.batches.data.collate

    def failing(items: list[Any]) -> Any:
        if broken:
            raise RuntimeError("out of memory")
        return plain(items)

    session.lot_sums.batches.data = replace(session.lot_sums.batches.data, collate=failing)
    lot = next(lot for lot in [session.next_lot()] if len(lot))
    before = weights(session)
    with pytest.raises(RuntimeError, match="out of memory"):
        session.step(lot)
    assert same(before, weights(session))
    assert session.spent().epsilon == 0
    broken = False
    assert session.next_lot() is lot
    session.step(lot)
    assert session.round == 1


def test_invariant_8_a_step_after_a_failed_ledger_write_uses_the_same_noised_bytes(
    start: Callable[..., PrivateSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    session, offered = start(), []
    real = session.ledger.record_release

    def failing(run: str, number: int, draw: int, digest: str, pins: Any) -> None:
        offered.append(digest)
        if len(offered) == 1:
            raise LedgerError("the disk is full", code="dp-ledger-write")
        real(run, number, draw, digest, pins)

    monkeypatch.setattr(session.ledger, "record_release", failing)
    lot, before = session.next_lot(), weights(session)
    with pytest.raises(LedgerError, match="the disk is full"):
        session.step(lot)
    assert same(before, weights(session))
    session.step(session.next_lot())
    assert session.round == 1
    assert len(set(offered)) == 1
    assert [r.digest for r in session.ledger.releases(session.run)] == offered[:1]


def test_invariant_8_what_an_interrupted_step_left_is_not_added_to_the_retry(
    start: Callable[..., PrivateSession],
) -> None:
    results = []
    for interrupted in (False, True):
        model = Tiny()
        session = start(
            model, seed=6, lot_size=40, rounds=1, run=f"interrupted {interrupted}",
            optimizer=torch.optim.SGD(model.parameters(), 1.0),
        )  # fmt: skip
        plain, calls = session.lot_sums.batches.data.collate, 0

        def failing(items: list[Any], plain: Any = plain) -> Any:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise KeyboardInterrupt
            return plain(items)

        lot = session.next_lot()
        if interrupted:
            session.lot_sums.batches.data = replace(session.lot_sums.batches.data, collate=failing)
            with pytest.raises(KeyboardInterrupt):
                session.step(lot)
        session.step(lot)
        results.append(weights(session))
    assert same(*results)


def test_lots_are_used_once_and_in_turn(start: Callable[..., PrivateSession]) -> None:
    session = start()
    lot = session.next_lot()
    session.step(lot)
    with pytest.raises(PrivacyError, match="this lot is not the one that is due"):
        session.step(lot)
    with pytest.raises(PrivacyError, match="asked for another lot before"):
        for _ in session:
            pass


def test_users_are_the_unit_and_clipped_once_across_physical_batches(start: Callable[..., PrivateSession]) -> None:
    results = []
    for size in (2, 40):
        model = Tiny()
        model.drop.p = 0.0
        session = start(
            model, user_column="user", records_per_user=4, lot_size=3, physical_batch=size, seed=3, run=f"u{size}",
            optimizer=torch.optim.SGD(model.parameters(), 1.0),
        )  # fmt: skip
        assert session.plan.units == 9
        for lot in session:
            session.step(lot)
        results.append(weights(session))
        assert "one user; neighbouring datasets differ by adding or removing one user" in str(session.statement())
    assert all(torch.allclose(results[0][n], results[1][n], atol=1e-5) for n in results[0])


def test_resume_of_a_user_level_run_needs_the_users_again(
    start: Callable[..., PrivateSession], tmp_path: Path
) -> None:
    users = [f"u{i % 9}" for i in range(40)]
    session = start(users=users, lot_size=3)
    session.step(session.next_lot())
    session.save(tmp_path / "saved")
    session.close()
    model = Tiny()
    arguments = (tmp_path / "saved", model, torch.optim.AdamW(model.parameters()), records(), collate, loss_fn)
    with pytest.raises(PrivacyError, match="nobody says which record is whose"):
        PrivateSession.resume(*arguments)
    with pytest.raises(DataError, match="2 users are named for 40 records"):
        PrivateSession.resume(*arguments, users=users[:2])
    assert PrivateSession.resume(*arguments, users=users).plan.units == 9


@pytest.mark.parametrize("clipping", ["flat", "per_layer", "per_group", "automatic"])
def test_every_clipping_policy_trains_within_the_budget(start: Callable[..., PrivateSession], clipping: str) -> None:
    session = start(clipping=clipping, adaptive_quantile=0.3 if clipping == "per_layer" else None, rounds=2)
    for lot in session:
        session.step(lot)
    assert session.spent().epsilon <= BUDGET.epsilon


def test_adaptive_thresholds_move_towards_their_quantile_inside_the_budget(
    start: Callable[..., PrivateSession],
) -> None:
    session = start(adaptive_quantile=0.5, lot_size=40, rounds=12, clip_norm=30.0, budget=Budget(60.0, 1e-3))
    begin = float(session.lot_sums.engine.thresholds[0])
    for lot in session:
        session.step(lot)
    assert float(session.lot_sums.engine.thresholds[0]) < begin * 0.8
    assert session.spent().epsilon <= 60


def test_truncated_sampling_runs_and_has_no_renyi_figure(start: Callable[..., PrivateSession]) -> None:
    session = start(sampler="truncated_poisson", max_lot=14)
    for lot in session:
        assert len(lot) <= 14
        session.step(lot)
    assert session.statement().renyi_epsilon is None
    assert "lots of at most 14" in str(session.statement())


def test_statement_says_what_is_promised_and_what_is_not(start: Callable[..., PrivateSession]) -> None:
    first = start(rounds=3)
    for lot in first:
        first.step(lot)
    session = start(rounds=3, provenance={"weights": "dp:abc"})
    for lot in session:
        session.step(lot)
    text = str(session.statement())
    for part in (
        "adding or removing one record", "privacy loss distribution", "by Renyi divergences", "poisson sampling",
        "epsilon", "delta", "lifetime", "N = 40 records, which is public", "copies of a record", "several parties",
        "how long rounds take", "ledger abc", "2 copies epsilon",
    ):  # fmt: skip
        assert part in text, part
    assert session.lifetime().epsilon > session.spent().epsilon
    json.dumps(session.statement().to_json(), allow_nan=False)


def test_spool_stays_small_without_a_checkpoint_and_vanishes_on_close(start: Callable[..., PrivateSession]) -> None:
    session = start()
    for lot in session:
        session.step(lot)
        assert session.releases.spool.nbytes() == 0
    folder = session.releases.spool.folder
    session.close()
    assert {path.name for path in folder.iterdir()} <= {"spool.lock"}


def test_two_sessions_cannot_continue_one_run(start: Callable[..., PrivateSession], tmp_path: Path) -> None:
    session = start()
    session.step(session.next_lot())
    session.save(tmp_path / "saved")
    model = Tiny()
    with pytest.raises(LedgerError, match="is in use"):
        PrivateSession.resume(
            tmp_path / "saved", model, torch.optim.AdamW(model.parameters()), records(), collate, loss_fn
        )


def test_resume_with_another_dataset_or_an_older_ledger_is_refused(
    start: Callable[..., PrivateSession], tmp_path: Path
) -> None:
    session = start()
    session.step(session.next_lot())
    backup = (session.ledger.folder / "ledger.jsonl").read_bytes()
    session.step(session.next_lot())
    session.save(tmp_path / "saved")
    session.close()

    def resume(data: list) -> None:
        model = Tiny()
        PrivateSession.resume(
            tmp_path / "saved", model, torch.optim.AdamW(model.parameters()), data, collate, loss_fn
        )

    with pytest.raises(LedgerError, match="is not in this dataset's ledger"):
        resume(records(39))
    (session.ledger.folder / "ledger.jsonl").write_bytes(backup)
    with pytest.raises(LedgerError, match="does not hold entry"):
        resume(records())
    with pytest.raises(CheckpointError, match="holds no saved private session"):
        PrivateSession.resume(tmp_path / "nowhere", Tiny(), torch.optim.SGD(Tiny().parameters()), records())


class Stream:
    def __iter__(self) -> Any:
        return iter(records())


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"budget": None}, BudgetError, "private training needs a budget"),
        ({"lot_size": 41}, BudgetError, "a lot of 41 is larger than the data"),
        ({"lot_size": 0}, BudgetError, "`lot_size` is 0"),
        ({"rounds": 0}, BudgetError, "`rounds` is 0"),
        ({"clip_norm": 0.0}, PrivacyError, "`clip_norm` is"),
        ({"clip_norm": -1.0}, PrivacyError, "`clip_norm` is"),
        ({"clip_norm": math.nan}, PrivacyError, "`clip_norm` is"),
        ({"dataset": Stream()}, DataError, "Stream has no length"),
        ({"dataset": []}, DataError, "the dataset has no records"),
        ({"user_column": "patient"}, DataError, "no column `patient`"),
        ({"provenance": {"weights": "private"}}, ProvenanceError, "made from private records"),
        ({"budget": Budget(1e-7, 1e-12)}, BudgetError, "cannot be reached"),
        ({"clipping": "sideways"}, PrivacyError, "not a way of clipping"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(
    start: Callable[..., PrivateSession], options: dict[str, Any], error: type, sentence: str
) -> None:
    with pytest.raises(error, match=sentence) as caught:
        start(**options)
    assert caught.value.message.count("\n") == 0


class Counting(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(11))

    def forward(self, input_ids: Tensor) -> Tensor:
        self.seen += torch.bincount(input_ids.flatten(), minlength=11)
        return super().forward(input_ids)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"loss_fn": lambda model, batch: loss_fn(model, batch).mean()}, "must return"),
        (
            {"loss_fn": lambda model, batch: loss_fn(model, batch) / loss_fn(model, batch).sum()},
            "changes with the records",
        ),
        ({"model": Counting()}, "The buffer `seen` changes when the model sees data"),
    ],
)
def test_invariant_4_set_up_refuses_what_the_engine_cannot_bound(
    start: Callable[..., PrivateSession], tmp_path: Path, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(PrivacyError, match=sentence):
        start(**options)
    assert not (tmp_path / "ledger").exists()


def test_model_with_nothing_to_train_is_refused(start: Callable[..., PrivateSession]) -> None:
    model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.requires_grad_(False)
    with pytest.raises(PrivacyError, match="nothing to train"):
        start(model, optimizer=optimizer)


def test_parameters_outside_the_mechanism_are_refused(start: Callable[..., PrivateSession]) -> None:
    model = Tiny()
    with pytest.raises(PrivacyError, match="steps 2 parameters that are not the model's"):
        start(model, optimizer=torch.optim.SGD([*model.parameters(), *nn.Linear(2, 2).parameters()], 0.1))
    with pytest.raises(PrivacyError, match=r"`head.weight` is trainable but not in the optimizer \(2 in all\)"):
        start(model, optimizer=torch.optim.SGD([*model.embed.parameters(), *model.unused.parameters()], 0.1))


@pytest.mark.parametrize("kind", ["buffer", "frozen"])
def test_invariant_6_state_that_a_lot_changes_is_refused_and_put_back(
    start: Callable[..., PrivateSession], kind: str
) -> None:
    class Remembers(Tiny):
        """Looks innocent to synthetic records: it only remembers what comes with a scale of one."""

        def __init__(self) -> None:
            super().__init__()
            self.seen = nn.Parameter(torch.zeros(6), requires_grad=False)
            if kind == "buffer":
                del self.seen
                self.register_buffer("seen", torch.zeros(6))

        def forward(self, input_ids: Tensor) -> Tensor:
            if watching:
                with torch.no_grad():
                    self.seen.add_(self.embed.weight[input_ids].detach().sum((0, 1)))
            return super().forward(input_ids)

    watching, model = False, Remembers()
    session = start(model, lot_size=39)
    watching = True
    with pytest.raises(NoRuleError, match="`seen` changes when the model sees data"):
        session.step(session.next_lot())
    assert not model.seen.any()
    assert session.spent().epsilon == 0


def test_invariant_6_parameters_unfrozen_during_a_run_are_refused(start: Callable[..., PrivateSession]) -> None:
    model = Tiny()
    model.embed.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    session = start(model, optimizer=optimizer)
    session.step(session.next_lot())
    before = model.embed.weight.clone()
    model.embed.requires_grad_(True)
    with pytest.raises(PrivacyError, match=r"`embed\.weight` was frozen, unfrozen or replaced"):
        session.step(session.next_lot())
    assert torch.equal(model.embed.weight, before)
    model.embed.requires_grad_(False)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    with pytest.raises(PrivacyError, match="steps other parameters"):
        session.step(session.next_lot())
    assert session.round == 1


def test_invariant_6_only_gradients_of_a_release_are_stepped_with(
    start: Callable[..., PrivateSession],
) -> None:
    model = Tiny()
    model.embed.requires_grad_(False)
    session = start(model, optimizer=torch.optim.SGD(model.parameters(), 1.0))
    before = model.embed.weight.clone()
    model.embed.weight.grad = torch.ones_like(before)
    session.step(session.next_lot())
    assert torch.equal(model.embed.weight, before)


def saved_session(start: Callable[..., PrivateSession], folder: Path, **options: Any) -> PrivateSession:
    session = start(**options)
    session.step(session.next_lot())
    session.save(folder)
    session.close()
    return session


def resumed(folder: Path, model: nn.Module | None = None, **options: Any) -> PrivateSession:
    model = model if model is not None else Tiny()
    return PrivateSession.resume(
        folder, model, torch.optim.AdamW(model.parameters()), records(), collate, loss_fn, **options
    )


def test_invariant_8_resume_with_another_clipping_is_refused(
    start: Callable[..., PrivateSession], tmp_path: Path
) -> None:
    saved_session(start, tmp_path / "saved")
    with pytest.raises(LedgerError, match=r"the clipping of run .* is PerGroup"):
        resumed(tmp_path / "saved", clipping="per_group")
    resumed(tmp_path / "saved").close()


def test_invariant_9_thresholds_of_other_groups_are_refused(
    start: Callable[..., PrivateSession], tmp_path: Path
) -> None:
    session = start()
    for thresholds in (torch.tensor([1.0, 1.0]), torch.tensor([2.0]), torch.tensor([math.nan])):
        with pytest.raises(CheckpointError, match="clip norms"):
            session.lot_sums.released.restore({"thresholds": thresholds.double()})


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("noise_multiplier", 1e-3, "the mechanism of run"),
        ("rounds", 600, "the rounds of run"),
        ("clip_norm", 2.0, "the clip_norm of run"),
        ("seed", 1, "the seeded of run .* is True, the ledger says False"),
        ("adaptive_quantile", 0.5, "the adaptive_quantile of run"),
        ("isolation", "exact", "the isolation of run .* is exact, the ledger says fast"),
    ],
)
def test_invariant_8_a_checkpoint_that_contradicts_the_ledger_is_refused(
    start: Callable[..., PrivateSession], tmp_path: Path, name: str, value: float, sentence: str
) -> None:
    saved_session(start, tmp_path / "saved")
    path = tmp_path / "saved" / "manifest.json"
    content = json.loads(path.read_text())
    content["state"]["session"]["settings"][name] = value
    path.write_text(json.dumps(content))
    with pytest.raises(LedgerError, match=sentence):
        resumed(tmp_path / "saved")


def test_invariant_8_resume_with_another_grouping_into_users_is_refused(
    start: Callable[..., PrivateSession], tmp_path: Path
) -> None:
    saved_session(start, tmp_path / "saved", users=[i // 8 for i in range(40)], lot_size=2)
    with pytest.raises(LedgerError, match="the users of run"):
        resumed(tmp_path / "saved", users=[i % 5 for i in range(40)])
    resumed(tmp_path / "saved", users=[f"person {i // 8}" for i in range(40)]).close()


def test_invariant_4_resume_checks_the_model_again(start: Callable[..., PrivateSession], tmp_path: Path) -> None:
    class Coupled(Tiny):
        def forward(self, input_ids: Tensor) -> Tensor:
            hidden = self.embed(input_ids)
            return self.head(hidden - hidden.mean(0))

    saved_session(start, tmp_path / "saved")
    with pytest.raises(NoRuleError, match="changes with the records beside it"):
        resumed(tmp_path / "saved", Coupled())
    model = Tiny()
    with pytest.raises(PrivacyError, match="not the model's"):
        PrivateSession.resume(
            tmp_path / "saved", model, torch.optim.SGD([*model.parameters(), nn.Parameter(torch.zeros(1))]),
            records(), collate, loss_fn,
        )  # fmt: skip


def test_statement_says_that_the_self_check_was_left_out(start: Callable[..., PrivateSession]) -> None:
    for checked in (True, False):
        with start(self_check=checked) as session:
            assert ("not compared with one record at a time" in str(session.statement())) is not checked
            assert session.ledger.run(session.run)["self_check"] is checked


def test_invariant_8_runs_of_different_units_add_up_as_groups(start: Callable[..., PrivateSession]) -> None:
    with start() as by_record:
        by_record.step(by_record.next_lot())
        assert by_record.lifetime() == by_record.spent()
    with start(users=[i // 8 for i in range(40)], lot_size=2) as by_user:
        by_user.step(by_user.next_lot())
        statement = by_user.statement()
    assert statement.lifetime.epsilon > statement.spent.epsilon + by_record.spent().epsilon
    assert "counted          1 run for records: counts as a group of 8, the most that a user has" in str(statement)
    with pytest.raises(LedgerError, match="protect different units"):
        by_user.ledger.lifetime(1e-3)


def test_statement_says_what_a_record_is_and_how_it_is_clipped(start: Callable[..., PrivateSession]) -> None:
    with start(clipping="per_group", record={"packing": "chunks", "sequence_length": 5}) as session:
        text = str(session.statement())
    for part in ("one record: packing chunks, sequence_length 5", "(PerGroup(clip_norm=1.0", "exceeded by rounding"):
        assert part in text


def test_delta_of_one_over_n_is_warned_about(start: Callable[..., PrivateSession]) -> None:
    with pytest.warns(PrivacyWarning, match="is not below 1/N"):
        start(budget=Budget(6.0, 1 / 40))


def test_collator_that_packs_records_is_refused(start: Callable[..., PrivateSession]) -> None:
    def packing(items: list[Any]) -> dict[str, Tensor]:
        return {"input_ids": torch.cat([item["input_ids"] for item in items])[None], "scale": torch.ones(1)}

    for self_check in (True, False):
        with pytest.raises(PrivacyError, match="the collator made 1 rows of 3 records"):
            start(collate_fn=packing, lot_size=40, self_check=self_check)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_record_without_tokens_contributes_zero_also_alone_in_its_batch(tmp_path: Path, family: str) -> None:
    """A caller's dataset may hold one; how it is batched must not show in the sum."""

    def padded(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        ids = nn.utils.rnn.pad_sequence([item["input_ids"] for item in items], batch_first=True)
        mask = torch.stack([torch.arange(ids.shape[1]) < len(item["input_ids"]) for item in items]).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    generator = torch.Generator().manual_seed(1)
    dataset = [{"input_ids": torch.randint(3, 64, (size,), generator=generator)} for size in (7, 0, 5, 0)]
    sums = []
    for size in (1, 4):
        model = tiny_model(family, num_hidden_layers=2)
        session = dp.make_private(
            model, torch.optim.SGD(model.parameters(), 0.1), dataset, padded, budget=BUDGET, lot_size=2, rounds=3,
            physical_batch=size, ledger=tmp_path / f"ledger-{size}", seed=3,
        )  # fmt: skip
        sums.append(session.lot_sums.compute(Lot(1, np.arange(4), np.arange(4)), "1|0"))
        assert session.last is not None
        assert session.last.masked == 0
        assert math.isfinite(session.last.loss)
    for name, value in sums[0].items():
        torch.testing.assert_close(value, sums[1][name], rtol=1e-4, atol=1e-6)
