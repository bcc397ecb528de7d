"""Recorded pushes are what the arithmetic of the attacks supposes that they are."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from push_world import texts
from recorded_runs import LOT, evidence_of, own_records, trained

from coterie.audit import metrics
from coterie.audit.adversaries import Adversary, most_received
from coterie.audit.evidence import Evidence
from coterie.audit.experts import noised as noised_attacks
from coterie.audit.experts import plain
from coterie.audit.experts.attack import attack
from coterie.audit.experts.bag import table_names, table_sums
from coterie.audit.experts.case import Case, Owned, TimeBudget
from coterie.audit.experts.clipped import factors
from coterie.audit.experts.drift import drifted
from coterie.audit.experts.loads import choices, loads
from coterie.audit.experts.membership import RecordScores
from coterie.audit.experts.opened import ExpertSum, Opened
from coterie.audit.experts.plain import without
from coterie.audit.experts.pushes import noised, standard_deviation
from coterie.audit.experts.simulate import rows_of, summed
from coterie.audit.findings import Unit, carried
from coterie.config import FederationConfig, LoraSpec, OptimSpec, dump_yaml, load_yaml
from coterie.errors import AuditError, CheckpointError
from coterie.models.zoo.tiny import VOCAB, tiny_model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("federation"), trunk="shared")


@pytest.fixture
def evidence(run: Path) -> Evidence:
    return evidence_of(run, "shared")


def case_of(evidence: Evidence) -> Case:
    case = Case(evidence, 0)
    case.__dict__["train"] = own_records()
    return case


@pytest.mark.parametrize("round_index", [1, 2])
def test_a_recorded_push_is_the_sum_that_attacks_suppose(evidence: Evidence, round_index: int) -> None:
    case = case_of(evidence)
    reader = case.reader_at(round_index)
    records = [record.ids for record in case.lot(round_index)]
    assert len(records) == LOT
    opened = case.opened(Adversary.ALL_HOSTS, round_index)
    own = summed(rows_of(reader, records), list(opened.experts))
    for key, each in opened.experts.items():
        for found, supposed in (
            (each.first_DG, own.experts[key].first_DG),
            (each.second_FD, own.experts[key].second_FD),
        ):
            assert float((found - supposed).norm()) <= 1e-4 * float(found.norm()) + 1e-7
    names = [name for name in table_names(reader.model) if name in opened.trunk]
    for name in names:
        value = table_sums(reader, records)[name]
        assert float((opened.trunk[name] - value).norm()) <= 1e-4 * float(value.norm())


def test_a_host_opens_its_own_experts_and_all_of_them_together_never_the_owners_third(evidence: Evidence) -> None:
    case = case_of(evidence)
    placement = case.transcript.placement
    host_of = {(layer, e): host for layer, hosts in enumerate(placement) for e, host in enumerate(hosts)}
    alone = case.opened(Adversary.HOST_PUBLIC, 1)
    together = case.opened(Adversary.ALL_HOSTS, 1)
    assert {host_of[key] for key in alone.experts} == {"birch"}
    assert {host_of[key] for key in together.experts} == {"birch", "cedar"}
    assert len(together.experts) == sum(host != "alder" for host in host_of.values())


def test_one_host_is_whoever_received_most_in_whatever_order(evidence: Evidence) -> None:
    sizes = {"birch": 0, "cedar": 0}
    for name, found in evidence.received.items():
        sizes[name] = sum(v.numel() for push in found.pushes() for v in push.sums.values())
    turned = case_of(replace(evidence, received=dict(reversed(evidence.received.items()))))
    alone = turned.opened(Adversary.HOST_PUBLIC, 1).experts
    assert alone.keys() == case_of(evidence).opened(Adversary.HOST_PUBLIC, 1).experts.keys()
    placement = turned.transcript.placement
    most = max(sorted(sizes), key=sizes.__getitem__)
    assert {placement[layer][expert] for layer, expert in alone} == {most}
    assert most_received({"b": 3, "c": 5, "a": 5}) == "a"


def test_small_pushes_are_of_several_documents_and_one_document_carries_no_rate(evidence: Evidence) -> None:
    case = case_of(evidence)
    records = [Owned(row, row // 3, record) for row, record in enumerate(texts(12, 10, VOCAB, 53))]
    for lot in (1, 2, 4):
        pushes = plain.simulated(case, records, lot, [(0, 0)])
        assert [len(some) for some, _ in pushes] == [lot] * (4 // lot)
        assert {record.document for some, _ in pushes for record in some} == {0, 1, 2, 3}
    alike = [Owned(row, 7, record.ids) for row, record in enumerate(case.lot(1))]
    case.__dict__["lot"] = lambda _: alike
    found = plain.next_tokens(case, Adversary.ALL_HOSTS, 1, TimeBudget(60.0), places=8)
    assert carried(found).value is None
    assert "too few documents" in carried(found).reason


def test_the_tokens_of_several_pushes_have_an_interval_and_those_of_one_have_none(evidence: Evidence) -> None:
    case = case_of(evidence)
    f1, presence = plain.bag(case, Adversary.ALL_HOSTS, TimeBudget(60.0))
    assert presence.unit is Unit.PRESENCE
    for each in (f1, presence):
        assert each.value is not None
        assert each.prior is not None
        assert each.value.count == len(case.train) // LOT, "each record is in one push at most"
        assert each.value.low > each.prior.high
        assert each.simulated
        assert "of which all but one are simulated" in each.sentence
    case.__dict__["train"] = case.lot(1)
    of_one = plain.bag(case, Adversary.ALL_HOSTS, TimeBudget(60.0))
    assert all(carried(each).value is None and not each.simulated for each in of_one)


def test_a_host_that_knows_nothing_counts_the_tokens_of_its_experts_by_rank(evidence: Evidence) -> None:
    case = case_of(evidence)
    found = loads(case, 1, TimeBudget(60.0))
    assert (found.adversary, found.unit, found.lot, found.simulated) == (Adversary.HOST, Unit.LOADS, 1, True)
    assert "simulated pushes of 1 record;" in found.sentence
    assert found.value is not None
    assert found.prior is not None
    assert found.value.value > 0.9 > found.prior.value
    record = case.lot(1)[0]
    (rows,) = rows_of(case.reader, [record.ids])
    of, last = rows.layers[0], len(record.ids) - 1  # nothing is predicted from it
    chose = [expert for token, expert in zip(of.token_R.tolist(), of.expert_R.tolist(), strict=True) if token != last]
    assert {key: count for key, count in choices(case, [record]).items() if key[0] == 0} == {
        (0, expert): chose.count(expert) for expert in set(chose)
    }


@pytest.mark.parametrize("wrong", ["layers", "experts", "shapes", "names"])
def test_a_head_that_the_starting_checkpoint_does_not_fit_is_refused(evidence: Evidence, wrong: str) -> None:
    right = evidence.received["birch"]
    right.check_start(tiny_model("olmoe"))
    part = next(each for each in right.parts if each.layer >= 0)
    (name, shape), *rest = part.shapes
    shapes = {"shapes": (name, (*shape[:-1], shape[-1] + 1)), "names": ("of_nothing", shape)}
    other = replace(part, shapes=(shapes.get(wrong, (name, shape)), *rest))
    placement = {"layers": right.placement[:-1], "experts": (right.placement[0][:-1], *right.placement[1:])}
    bent = replace(
        right,
        placement=placement.get(wrong, right.placement),
        parts=tuple(other if each is part else each for each in right.parts),
    )
    with pytest.raises(CheckpointError, match="starting checkpoint") as caught:
        case_of(replace(evidence, received={"birch": bent}))
    assert caught.value.code == "transcript-damaged"


def test_known_records_are_taken_out_of_a_push(evidence: Evidence) -> None:
    case = case_of(evidence)
    records = [record.ids for record in case.lot(1)]
    opened = case.opened(Adversary.ALL_HOSTS, 1)
    left = without(opened, summed(rows_of(case.reader, records[1:]), list(opened.experts)))
    alone = summed(rows_of(case.reader, records[:1]), list(opened.experts))
    for key, each in alone.experts.items():
        scale = float(opened.experts[key].first_DG.norm())
        assert float((left.experts[key].first_DG - each.first_DG).norm()) <= 3e-5 * scale
        assert left.experts[key].first.empty == each.first.empty


def test_noise_is_measured_in_the_sums_themselves() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = ExpertSum(0.7 * torch.randn(60, 80, generator=generator), 0.7 * torch.randn(60, 60, generator=generator))
    opened = Opened({(0, 0): noise})
    assert standard_deviation(opened) == pytest.approx(0.7, rel=0.03)
    assert noised(opened, 0.7).experts[0, 0].noise == noised(opened, 0.7).noise == 0.7


def test_attacks_say_what_they_read_beside_what_could_be_guessed(evidence: Evidence) -> None:
    case = case_of(evidence)
    found = plain.next_tokens(case, Adversary.ALL_HOSTS, 1, TimeBudget(60.0), places=16)
    assert found.unit is Unit.PLACES
    assert found.value is not None
    assert found.prior is not None
    assert found.value.value > found.prior.value + 0.4
    assert found.lot == 1
    (area,) = plain.membership(case, Adversary.ALL_HOSTS, LOT, TimeBudget(60.0))
    assert area.unit is Unit.AUC
    assert area.value is None  # too few of the owner's records were left out of the push
    assert "fewer than 40" in area.reason


def test_members_of_a_small_push_are_told_from_all_other_records(evidence: Evidence) -> None:
    case = case_of(evidence)
    case.__dict__["train"] = [Owned(row, row, record) for row, record in enumerate(texts(60, 10, VOCAB, 51))]
    (area, *_) = plain.membership(case, Adversary.ALL_HOSTS, 4, TimeBudget(60.0))
    assert area.value is not None
    assert area.value.value > 0.95
    assert area.value.count == 60
    assert area.unit is Unit.SIMULATED


def test_a_record_counts_in_the_rounds_whose_lot_it_was_in() -> None:
    members = [Owned(row, 10 + row, (1, 2)) for row in range(3)]
    lots = {1: members[:1], 4: members[1:]}
    case: Any = SimpleNamespace(rounds=lambda: [1, 4], lot=lots.__getitem__)
    seen = [
        RecordScores(
            torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64) * times, torch.zeros(3, dtype=torch.float64)
        )
        for times in (1, 10)
    ]
    assert noised_attacks.in_lots(case, members, seen) == {
        True: ([1.0, 20.0, 30.0], [10, 11, 12]),
        False: ([2.0, 3.0, 10.0], [11, 12, 10]),
    }


def test_a_trunk_drifts_and_experts_stay(evidence: Evidence) -> None:
    reader = case_of(evidence).reader
    moved = drifted(reader, texts(12, 8, VOCAB, 52), OptimSpec(lr=1e-2), 2, 4, 0)
    before = dict(reader.model.named_parameters())
    experts = {id(value) for layer in reader.layers for value in layer.parameters().values()}
    kept = {name for name, value in moved.model.named_parameters() if torch.equal(value, before[name])}
    assert kept == {name for name, value in before.items() if id(value) in experts}


def test_known_records_leave_the_rest_of_a_push_open(evidence: Evidence, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(evidence)
    monkeypatch.setattr(metrics, "FEWEST_DOCUMENTS", 1)  # one record is left, which is read best
    clock = TimeBudget(60.0)
    found = plain.next_tokens(case, Adversary.HOST_DOMAIN, LOT, clock, places=8, known=LOT - 1)
    assert found.value is not None
    assert found.prior is not None
    assert found.value.value > found.prior.value + 0.4
    assert f"{LOT - 1} of the records were known" in found.sentence


def test_a_private_trunk_that_drifted_is_attacked_with_the_drift_learned(tmp_path: Path) -> None:
    folder = trained(tmp_path, trunk="private", optim__lr=1e-3)
    case = case_of(evidence_of(folder, "private"))
    assert case.rounds() == [1, 2]
    found = plain.next_tokens(case, Adversary.ALL_HOSTS, LOT, TimeBudget(60.0), places=8, round_index=2)
    assert found.value is not None
    assert found.prior is not None
    assert found.value.value > found.prior.value + 0.2
    assert "drifted for 1 rounds" in found.sentence


def test_under_a_budget_every_figure_has_the_guess_or_the_allowed_one_beside_it(
    evidence: Evidence, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of(evidence)
    records = [record.ids for record in case.lot(1)]
    visible = list(case.opened(Adversary.ALL_HOSTS, 1).experts)
    scale = factors(case.reader.model, records, 1.0)
    generator = torch.Generator().manual_seed(0)
    opened = summed(rows_of(case.reader, records), visible, scale, 0.7, generator=generator)
    monkeypatch.setattr(noised_attacks, "releases", lambda *_: iter([(case.reader, opened)]))
    monkeypatch.setattr(noised_attacks, "_FEWEST", 2)  # a small lot
    unclaimed = noised_attacks.membership(case, Adversary.ALL_HOSTS, TimeBudget(60.0))
    assert all(each.allowed is None for each in unclaimed), "what was found in the sums is no claim"
    monkeypatch.setattr(type(case), "claimed_noise", lambda *_: 0.7)
    found = noised_attacks.membership(case, Adversary.ALL_HOSTS, TimeBudget(60.0))
    in_lot, over_rounds = (
        next(f for f in found if f.name == n) for n in ("membership in a lot", "membership over rounds")
    )
    # Of one Gaussian of sensitivity 1 and noise 0.7, seen once: Phi(mu / sqrt 2).
    assert in_lot.allowed == pytest.approx(0.5 * (1 + math.erf(1 / 0.7 / 2)), abs=2e-3)
    assert f"allows no test more than {in_lot.allowed:.3f}" in in_lot.sentence
    assert over_rounds.value is None, "held-out text was set aside by a person"
    assert "coins" in over_rounds.reason
    tokens = noised_attacks.tokens(case, Adversary.ALL_HOSTS, TimeBudget(60.0), places=4)
    assert tokens.value is not None
    assert tokens.prior is not None
    assert tokens.value.count == tokens.prior.count == 4


def test_nothing_received_is_said_and_not_measured(evidence: Evidence) -> None:
    with pytest.raises(AuditError) as caught:
        attack(replace(evidence, received={}), seed=0, budget_s=1.0)
    assert caught.value.code == "audit-no-pushes"
    with pytest.raises(AuditError) as caught:
        attack(replace(evidence, public=[]), seed=0, budget_s=1.0)
    assert caught.value.code == "audit-no-pushes"


def test_sums_of_adapters_are_said_not_to_be_read(evidence: Evidence, tmp_path: Path) -> None:
    agreed = load_yaml(evidence.run_folder / "federation.yaml", FederationConfig)
    dump_yaml(tmp_path / "federation.yaml", agreed.model_copy(update={"lora": LoraSpec()}))
    with pytest.raises(AuditError, match="adapters") as caught:
        attack(replace(evidence, run_folder=tmp_path), seed=0, budget_s=1.0)
    assert caught.value.code == "audit-no-pushes"
