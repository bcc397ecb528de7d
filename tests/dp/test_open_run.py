"""What was written by the first version stays what it is: run entries of ledgers, and checkpoints that go on."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from coterie import dp
from coterie.config import PartyPrivacy, PrivacyRules, PrivacySpec
from coterie.dp import checkpoint
from coterie.dp.accounting.lots import LotPlan
from coterie.dp.plan import ComputeOptions, PrivacyPlan
from coterie.dp.saved_plan import plan_from_json, plan_to_json
from coterie.dp.session import PrivateSession
from coterie.errors import BudgetError, LedgerError, PrivacyError, ProvenanceError
from coterie.hf import PrivacyArguments
from coterie.revision import software
from helpers.start_examples import (
    EXPERTS,
    FOLDER,
    PARTIES,
    ROUNDS,
    SETTINGS,
    Two,
    collate,
    entry_of,
    loss_fn,
    records,
    seeded,
)
from helpers.start_examples import starts as all_starts

KEPT: dict[str, str] = json.loads((FOLDER / "starts.json").read_text("utf-8"))


def apart(entry: str) -> tuple[str, float]:
    """An entry without its noise multiplier, and that: accountants of two machines differ in its last digits.

    Without the version and commit that made it, too; the first version did not name them.
    """
    data = json.loads(entry)
    sigma = data["mechanism"].pop("noise_multiplier")
    for name in software():
        data.pop(name, None)
    return json.dumps(data), sigma


@pytest.mark.parametrize("name", [*SETTINGS, *EXPERTS, *PARTIES])
def test_run_entries_are_byte_for_byte_those_of_the_first_version(tmp_path: Path, name: str) -> None:
    entry = entry_of(all_starts()[name](tmp_path))
    (now, sigma), (kept, before) = apart(entry), apart(KEPT[name])
    assert now == kept
    assert software().items() <= json.loads(entry).items()
    assert sigma == pytest.approx(before, rel=1e-3)


def first_version(folder: Path) -> dict[str, Any]:
    """Copies of the first version's ledger and checkpoint, as arguments of `PrivateSession.resume`."""
    shutil.copytree(FOLDER / "ledger", folder / "ledger")
    shutil.copytree(FOLDER / "saved", folder / "saved")
    model = Two()
    return {
        "path": folder / "saved", "model": model, "optimizer": torch.optim.AdamW(model.parameters(), 0.1),
        "dataset": records(), "collate_fn": collate, "loss_fn": loss_fn, "ledger": folder / "ledger",
    }  # fmt: skip


def test_a_run_of_the_first_version_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    with seeded(tmp_path / "whole") as whole:
        for lot in whole:
            whole.step(lot)
    with PrivateSession.resume(**first_version(tmp_path)) as session:
        assert session.round == 2
        for lot in session:
            session.step(lot)
        assert session.round == ROUNDS
        session.save(tmp_path / "again")
    for name, value in whole.model.state_dict().items():
        assert torch.allclose(session.model.state_dict()[name], value, rtol=1e-4, atol=1e-6), name
    keys = [checkpoint.read(folder).facts for folder in (FOLDER / "saved", tmp_path / "again")]
    for part in ("settings", "plan", "options"):
        assert keys[0][part].keys() == keys[1][part].keys(), "an earlier version would not find what it looks for"


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [
        ("settings", "clip_norm", 2.0),
        ("settings", "noise_multiplier", 0.1),
        ("settings", "rounds", 50),
        ("settings", "seed", None),
        ("settings", "isolation", "exact"),
        ("settings", "adaptive_quantile", 0.5),
        ("plan", "expected_size", 1),
        ("options", "clipping", "per_group"),
    ],
)
def test_an_edited_checkpoint_does_not_pass_the_ledger(tmp_path: Path, place: str, name: str, value: Any) -> None:
    arguments = first_version(tmp_path)
    path = tmp_path / "saved" / "session.json"
    content = json.loads(path.read_text("utf-8"))
    content["facts"][place][name] = value
    path.write_text(json.dumps(content), "utf-8")
    with pytest.raises(LedgerError, match="the ledger says"):
        PrivateSession.resume(**arguments)


def test_plans_come_back_from_checkpoints_with_the_noise_they_were_calibrated_to() -> None:
    plan = PrivacyPlan(
        dp.Budget(3.0, 1e-4), 7, 5, 0.5, "per_layer", 0.4, 0.2, "truncated_poisson", 9, 3, dp.Balance("bias", 0.1),
        "exact", True, 11,
    )  # fmt: skip
    options = ComputeOptions("ghost", 3, self_check=False)
    given = [getattr(plan, field.name) for field in fields(plan)]
    defaults = PrivacyPlan(dp.Budget(1.0, 1e-5), 1, 1)
    assert all(
        value != getattr(defaults, f.name) or value is None for value, f in zip(given, fields(plan), strict=True)
    )
    saved = json.loads(json.dumps(plan_to_json(plan, options, plan.lots(40), 1.25)))
    assert plan_from_json(saved) == (replace(plan, noise_multiplier=1.25), options)
    own = plan_to_json(replace(plan, clipping=dp.Flat(0.5)), options, plan.lots(40), 1.25)
    with pytest.raises(PrivacyError, match="clipping policy of its own"):
        plan_from_json(own)
    assert plan_from_json(own, dp.Flat(0.5))[0].clipping == dp.Flat(0.5)


def test_settings_files_parties_and_trainer_make_the_same_plan() -> None:
    rules = {
        "epsilon": 3.0, "delta": 1e-4, "clip_norm": 0.5, "clipping": "per_layer", "isolation": "exact", "lot_size": 5,
        "sampler": "truncated_poisson", "max_lot": 9, "balance": "private_load", "balance_coefficient": 0.1,
        "load_share": 0.2, "load_smoothing": 0.3,
    }  # fmt: skip
    local = {"method": "ghost", "physical_batch": 3, "records_per_user": 4}
    spec = PrivacySpec(**rules, **local, adaptive_quantile=0.4)
    of_file = PrivacyPlan.of_settings(spec, Two(), 7, seed=2)
    balance = dp.Balance("private_load", 0.1, 0.2, 0.3)
    of_trainer = PrivacyArguments(
        3.0, 1e-4, 5, 0.5, "per_layer", "ghost", "exact", 0.4, "truncated_poisson", 9, records_per_user=4,
        balance=balance, seed=2,
    ).plan(Two(), 7, half_precision=False)  # fmt: skip
    assert of_file == of_trainer
    assert ComputeOptions.of_settings(spec) == ComputeOptions("ghost", 3)
    party = PrivacySpec(**PrivacyRules(**rules).model_dump() | PartyPrivacy(**local).model_dump(exclude_none=True))
    assert PrivacyPlan.of_settings(party, Two(), 7, seed=2) == replace(of_file, adaptive_quantile=None)


def test_isolation_is_exact_against_hosts_and_in_half_precision_unless_the_file_says_otherwise() -> None:
    spec, half = PrivacySpec(epsilon=1.0), Two().bfloat16()
    made = [PrivacyPlan.of_settings(spec, Two(), 1), PrivacyPlan.of_settings(spec, Two(), 1, against_hosts=True)]
    made += [PrivacyPlan.of_settings(spec, half, 1)]
    assert [(plan.isolation, plan.half_precision) for plan in made] == [
        ("fast", False), ("exact", False), ("exact", True),
    ]  # fmt: skip
    fast = PrivacySpec(epsilon=1.0, isolation="fast")
    assert PrivacyPlan.of_settings(fast, half, 1, against_hosts=True).isolation == "fast"


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        (PrivacyPlan, {"sampler": "Poisson"}),
        (PrivacyPlan, {"isolation": "Exact"}),
        (ComputeOptions, {"method": "gost"}),
    ],
)
def test_words_that_mean_nothing_are_refused(kind: type, option: dict[str, str]) -> None:
    """They meant the default before: sampler and isolation of another run than the one that was asked for."""
    given = {"budget": dp.Budget(1.0, 1e-5), "rounds": 1, "lot_size": 1} if kind is PrivacyPlan else {}
    with pytest.raises(PrivacyError, match=f"`{next(iter(option))}` is"):
        kind(**given, **option)


def test_noise_of_ones_own_is_for_seeded_runs(tmp_path: Path) -> None:
    begin = all_starts()["party in a test"]
    with pytest.raises(BudgetError, match="seeded tests"):
        begin(tmp_path, seed=None)  # type: ignore[call-arg]
    assert not list(tmp_path.iterdir())


def test_a_start_from_private_records_is_refused_before_the_ledger_knows_the_run(tmp_path: Path) -> None:
    with pytest.raises(ProvenanceError):
        all_starts()["declared"](tmp_path, provenance={"weights": "private"})  # type: ignore[call-arg]
    assert not list(tmp_path.iterdir())


def test_lots_keep_the_name_of_the_setting() -> None:
    lots = PrivacyPlan(dp.Budget(1.0, 1e-5), 1, lot_size=5, sampler="truncated_poisson", max_lot=9).lots(40)
    assert lots == LotPlan(40, lot_size=5, sampler="truncated_poisson", max_lot=9)
