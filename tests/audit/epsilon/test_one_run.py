"""The audit of epsilon, with faults planted into the engine as it runs, and without."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from coterie.audit.epsilon import bounds, one_run, premises
from coterie.audit.epsilon.canaries import Alternating, RandomIds
from coterie.audit.epsilon.findings import ClaimVerdict, OneRun, Premise
from coterie.audit.epsilon.laws import independent
from coterie.audit.epsilon.rehearsal import Rehearsal
from coterie.audit.epsilon.run import audit_epsilon
from coterie.audit.epsilon.subject import Subject
from coterie.dp.session import PrivateSession
from coterie.errors import AuditError
from coterie.training.single import run
from helpers.epsilon_world import alarms
from helpers.epsilon_world import bench as bench
from helpers.epsilon_world import subject as subject


def test_each_record_alone_has_premises_of_its_own(bench: ModuleType, tmp_path: Path) -> None:
    exact = Subject.of_settings(bench.small(tmp_path, isolation="exact", balance="private_load"))
    assert not alarms(premises.measure(exact, seed=1, budget_s=3))
    with bench.FAULTS["noise halved"]():
        assert "noise" in alarms(premises.measure(exact, seed=1, budget_s=3))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"isolation": "exact"},
        {"balance": "private_load"},
        {"clipping": "per_layer"},
        {"clipping": "per_layer", "adaptive_quantile": 0.5},
    ],
)
def test_the_law_written_down_a_second_time_is_the_engines(
    bench: ModuleType, tmp_path: Path, settings: dict[str, object]
) -> None:
    made = Subject.of_settings(bench.small(tmp_path, **settings))
    rehearsal = Rehearsal(made.model, made.data(), replace(made.plan, seed=1), made.options)
    lot = rehearsal.draw(1)
    sums = rehearsal.opened.lot_sums.compute(lot, "1|0")
    law, engine = independent(made.claim, rehearsal), rehearsal.opened.lot_sums.noise(sums)
    for name in sums:
        assert law.std(name) == pytest.approx(engine.std[engine.part_of(name)], rel=1e-6), name


def test_canaries_of_an_honest_run_prove_little(subject: Subject) -> None:
    runs, outside = one_run.audit(subject, canaries=100, seed=0)
    assert outside.verdict is ClaimVerdict.CONSISTENT
    for each in runs:
        assert each.verdict is ClaimVerdict.CONSISTENT
        assert max(each.lower, each.gaussian_lower) <= each.claimed < each.gaussian_ceiling
        # The larger of the scores' bounds is shown: each has its share of the five in a hundred.
        most = bounds.ceilings(100, each.delta, 0.05 / len(runs))
        assert (each.ceiling, each.gaussian_ceiling) == (most.epsilon, most.gaussian(each.delta))


def test_canaries_see_records_that_are_not_clipped(bench: ModuleType, subject: Subject) -> None:
    with bench.FAULTS["clipping off"]():
        runs, outside = one_run.audit(subject, canaries=100, families=(Alternating(),), seed=0)
    assert outside.verdict is ClaimVerdict.CONSISTENT
    assert runs[0].verdict is ClaimVerdict.ALARM
    assert runs[0].alarm_lower > runs[0].claimed


def test_few_canaries_conclude_nothing(subject: Subject) -> None:
    runs, _ = one_run.audit(subject, canaries=8, seed=0)
    assert {each.verdict for each in runs} == {ClaimVerdict.OPEN}


def test_what_changes_the_model_beside_the_release_is_seen(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    step = PrivateSession.step

    def also(self: PrivateSession, lot: object) -> None:
        step(self, lot)  # type: ignore[arg-type]
        with torch.no_grad():
            next(self.model.parameters())[0, 0] += 1e-3

    monkeypatch.setattr(PrivateSession, "step", also)
    before = {name: p.detach().clone() for name, p in subject.model.named_parameters()}
    _, outside = one_run.audit(subject, canaries=8, seed=0)
    assert outside.verdict is ClaimVerdict.ALARM
    assert all(torch.equal(before[name], p) for name, p in subject.model.named_parameters())


def digests(*folders: Path) -> dict[Path, str]:
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for folder in folders
        for path in sorted(folder.rglob("*"))
    }


def test_an_audit_leaves_run_ledger_and_spool_byte_for_byte(bench: ModuleType, tmp_path: Path) -> None:
    config = bench.small(tmp_path, seeded=False)
    run.start(config)
    before = digests(tmp_path)
    found = audit_epsilon(Subject.of_run(config.run_dir), canaries=8, budget_s=3)
    assert digests(tmp_path) == before
    assert any("ledger.jsonl" in path.name for path in before)
    assert "The run's entry in the ledger" in found.premises[0].sentence
    assert found.verdict is not ClaimVerdict.ALARM
    assert found.epsilon_claimed == 8.0
    assert 0.5 < found.auc_allowed < found.auc_by_claim


def test_an_alarm_of_the_canaries_alone_is_one_of_the_audit(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = Premise("noise", 1.0, 1.0, 0.001, 0.5, ClaimVerdict.CONSISTENT, "It is as claimed.")
    canaries = OneRun(200, 2.0, 1e-5, "shares", 0.9, 3.0, 3.6, 4.0, 6.4, 3.5, 2.0, 3.0, ClaimVerdict.ALARM)
    monkeypatch.setattr(premises, "measure", lambda *_, **__: premises.MeasuredPremises((quiet, quiet), 1.0, 1.0))
    monkeypatch.setattr(one_run, "audit", lambda *_, **__: ((canaries,), quiet))
    found = audit_epsilon(subject)
    assert found.verdict is ClaimVerdict.ALARM
    assert found.epsilon_lower is not None
    assert found.epsilon_lower > subject.claim.epsilon, "twice the claimed ratio"


def test_settings_without_a_budget_claim_nothing(bench: ModuleType, tmp_path: Path) -> None:
    plain = bench.small(tmp_path).model_copy(update={"privacy": None})
    with pytest.raises(AuditError) as raised:
        audit_epsilon(plain)
    assert raised.value.code == "audit-no-claim"


def test_canaries_of_a_family_differ(subject: Subject) -> None:
    coins = one_run.toss(subject, 200, (Alternating(), RandomIds()), seed=4)
    assert len({tuple(each) for each in coins.canaries}) == 200
    assert 60 < int(coins.heads_M.sum()) < 140
    again = one_run.toss(subject, 200, (Alternating(), RandomIds()), seed=None)
    assert again.canaries != coins.canaries
