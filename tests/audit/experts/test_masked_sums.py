"""Where pushes were masked, adversaries open what they could: sums over everybody who is not among them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from push_world import texts
from recorded_runs import LOT, evidence_of, own_records, trained

from coterie.audit.adversaries import Adversary
from coterie.audit.answers import Answers
from coterie.audit.evidence import Evidence, LedgerClaim
from coterie.audit.experts import plain
from coterie.audit.experts.attack import attack
from coterie.audit.experts.bag import table_names, table_sums
from coterie.audit.experts.case import Case, Owned, TimeBudget
from coterie.audit.experts.masked import open_together
from coterie.audit.experts.opened import Opened
from coterie.audit.experts.pushes import standard_deviation
from coterie.audit.experts.simulate import rows_of, summed
from coterie.audit.findings import Channel, Finding, Unit
from coterie.audit.metrics import Estimate
from coterie.audit.transcript import MaskedPart, ReceivedPush, Transcript
from coterie.config import dump_yaml
from coterie.dp import plan
from coterie.dp.checks import self_check
from coterie.errors import CheckpointError
from coterie.federation.experts.host import ExpertsHost
from coterie.federation.experts.masking.board import MaskAgreement
from coterie.federation.experts.masking.grid import signed, widen
from coterie.federation.experts.masking.session import Held, MaskSession, Scope
from coterie.training.party.in_process import run_in_process
from helpers.federations import PARTIES, full_models, make_parts
from helpers.private_settings import CLIP, private_settings, with_privacy

SIGMA = 40.0
RATE = Estimate(0.5, 0.4, 0.6, 100)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(
        tmp_path_factory.mktemp("masked"), trunk="shared", aggregation="masked", deadline_s=60.0, push_limit=100.0
    )


@pytest.fixture
def case(run: Path) -> Case:
    return case_of(evidence_of(run, "shared"))


def case_of(evidence: Evidence) -> Case:
    found = Case(replace(evidence, masked=True), 0)
    found.__dict__["train"] = own_records()
    return found


def lots(run: Path, round_index: int, parties: Sequence[str]) -> list[tuple[int, ...]]:
    """What went into a sum, by the keys of those who pushed to it."""
    records: list[tuple[int, ...]] = []
    for party in parties:
        key = Answers.read(run / party)
        records += [each.ids for each in key._lots[round_index, 1]]  # noqa: SLF001
    return records


@pytest.mark.parametrize(
    ("adversary", "honest"), [(Adversary.HOST_PUBLIC, ("alder", "cedar")), (Adversary.ALL_HOSTS, ("alder",))]
)
@pytest.mark.parametrize("round_index", [1, 2])
def test_what_is_opened_is_the_gradient_of_all_who_are_not_among_the_adversaries(
    run: Path, case: Case, adversary: Adversary, honest: tuple[str, ...], round_index: int
) -> None:
    opened, reader = case.opened(adversary, round_index), case.reader_at(round_index)
    records = lots(run, round_index, honest)
    assert len(records) == LOT * len(honest) == case.records_in(adversary, round_index)
    supposed = summed(rows_of(reader, records), list(opened.experts))
    assert {case.transcript.placement[layer][e] for layer, e in opened.experts} <= {"birch", "cedar"}
    for key, each in opened.experts.items():
        for found, own in (
            (each.first_DG, supposed.experts[key].first_DG),
            (each.second_FD, supposed.experts[key].second_FD),
        ):
            assert float((found - own).norm()) <= 1e-4 * float(found.norm()) + 1e-7
    for name in set(table_names(reader.model)) & opened.trunk.keys():
        value = table_sums(reader, records)[name]
        assert float((opened.trunk[name] - value).norm()) <= 1e-4 * float(value.norm())


def test_without_its_own_masks_a_host_reads_random_numbers(run: Path) -> None:
    found = Transcript.read(run / "birch", "alder")
    blobs = [each.masked for each in found.masked_parts() if each.peer == "alder"]
    assert blobs
    for blob in blobs:
        share = torch.bincount(blob.long(), minlength=256).double() / blob.numel()
        # Of 256 equally likely bytes the squares of the shares add up to 1/256 and what chance adds.
        assert float(share.square().sum()) == pytest.approx(1 / 256 + 1 / blob.numel(), rel=0.25)


def test_a_party_records_of_its_own_push_its_masks_alone(run: Path) -> None:
    """Random as a push is, and nothing of its sums: for all parts, also those that others host."""
    found = Transcript.read(run / "birch")
    own = [each for each in found.masked_parts() if each.peer == "birch"]
    trained_parts = {part.number for part in found.parts if part.trained}
    assert {(each.round, each.part.number) for each in own} == {(n, part) for n in (1, 2) for part in trained_parts}
    for each in own:
        share = torch.bincount(each.masked.long(), minlength=256).double() / each.masked.numel()
        assert float(share.square().sum()) == pytest.approx(1 / 256 + 1 / each.masked.numel(), rel=0.25)
    assert {message.peer for message in Transcript.read(run / "birch", "alder")} == {"alder"}


@pytest.fixture
def tried(case: Case, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Adversary, int]]:
    """Which adversary was played on sums of how many records; attacks themselves have tests of their own."""
    found: list[tuple[Adversary, int]] = []

    def told(_: Case, who: Adversary, lot: int, *__: object, **___: object) -> Finding:
        found.append((who, lot))
        return Finding(
            name="next", adversary=who, channel=Channel.PUSHES, unit=Unit.PLACES, value=RATE, sentence="Read."
        )

    monkeypatch.setattr(plain, "next_tokens", told)
    monkeypatch.setattr(plain, "membership", lambda *_: [])
    monkeypatch.setattr(plain, "bag", lambda *_: [])
    monkeypatch.setattr("coterie.audit.experts.attack.loads", lambda _, lot, clock: told(_, Adversary.HOST, lot))
    monkeypatch.setattr("coterie.audit.experts.attack.Case", lambda evidence, seed: case_of(evidence))
    return found


def test_every_adversary_is_played_on_sums_of_its_size_and_the_finding_says_whose_records_are_in_it(
    case: Case, tried: list[tuple[Adversary, int]]
) -> None:
    found = attack(case.evidence, seed=0, budget_s=100.0)
    one, all_of_them = Adversary.HOST_PUBLIC, Adversary.ALL_HOSTS
    assert tried == [
        (one, 2 * LOT),
        (one, 2),
        (all_of_them, LOT),
        (all_of_them, 1),
        (all_of_them, 4),
        (Adversary.HOST, 1),
        (Adversary.HOST_DOMAIN, 2 * LOT),
    ]
    told = {each.adversary: each.sentence for each in found}
    assert "is the sum over 2 parties, of which one is attacked" in told[one]
    assert told[all_of_them] == "Read."


def test_all_hosts_together_are_not_played_where_one_recording_is_missing(
    run: Path, tried: list[tuple[Adversary, int]]
) -> None:
    evidence = evidence_of(run, "shared")
    birch = replace(evidence, received={"birch": evidence.received["birch"]}, masked=True)
    found = [each for each in attack(birch, seed=0, budget_s=100.0) if each.adversary is Adversary.ALL_HOSTS]
    assert found
    assert all(each.value is None and "recordings are not here" in each.reason for each in found)
    assert Adversary.ALL_HOSTS not in {who for who, _ in tried}


def test_all_hosts_read_a_masked_push_as_a_plain_one(case: Case) -> None:
    right = plain.next_tokens(case, Adversary.ALL_HOSTS, LOT, TimeBudget(60.0), places=16)
    assert right.value is not None
    assert right.prior is not None
    assert right.value.value > right.prior.value + 0.4


def test_the_owners_records_in_a_sum_of_two_parties_are_still_read(case: Case) -> None:
    case.__dict__["train"] = [Owned(row, row, record) for row, record in enumerate(texts(60, 10, 80, 51))]
    found = plain.next_tokens(case, Adversary.HOST_PUBLIC, 2 * LOT, TimeBudget(60.0), places=16)
    assert found.lot == 2 * LOT
    assert found.value is not None
    (area, *_) = plain.membership(case, Adversary.HOST_PUBLIC, 2 * LOT, TimeBudget(60.0))
    assert area.value is not None
    assert area.value.value > 0.9


def test_of_an_attempt_that_was_given_up_nothing_is_opened_and_of_the_retry_the_same_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks of two attempts never mix: a sum over both would be random."""
    check, calls = ExpertsHost.check_masked, []

    def failing(host: ExpertsHost, said: dict[str, str]) -> None:
        check(host, said)
        if host.me == "birch" and not calls:
            calls.append(1)
            raise CheckpointError("made to fail", code="made-up")

    monkeypatch.setattr(ExpertsHost, "check_masked", failing)
    folder = trained(tmp_path, rounds=1, trunk="shared", aggregation="masked", deadline_s=60.0, push_limit=100.0)
    case = case_of(evidence_of(folder, "shared"))
    attempts = {(each.round, each.attempt) for each in opened(folder)}
    assert attempts == {(1, 1), (1, 2)}
    records = [each.ids for each in Answers.read(folder / "alder")._lots[1, 2]]  # noqa: SLF001
    found: Opened = case.opened(Adversary.ALL_HOSTS, 1)
    supposed = summed(rows_of(case.reader, records), list(found.experts))
    for key, each in found.experts.items():
        assert float((each.first_DG - supposed.experts[key].first_DG).norm()) <= 1e-4 * float(each.first_DG.norm())


def test_a_round_to_which_a_party_contributed_no_more_is_read_and_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its masks are of a grid of fewer parties, and what is in a sum is another thing."""
    agree = MaskAgreement.agree

    def stopping(agreement: MaskAgreement, scope: Scope, grid: str, held: Held, *rest: Any) -> MaskSession | None:
        stops = (agreement._me, scope.attempt.round) == ("cedar", 2)  # noqa: SLF001
        return agree(agreement, scope, grid, Held(can_draw=False) if stops else held, *rest)

    monkeypatch.setattr(MaskAgreement, "agree", stopping)
    folder = trained(tmp_path, trunk="shared", aggregation="masked", deadline_s=60.0, push_limit=100.0)
    kept = {name: {each.round for each in read_masks(folder, name)} for name in PARTIES}
    assert kept == {"alder": {1, 2}, "birch": {1, 2}, "cedar": {1}}
    assert {each.round for each in opened(folder)} == {1}


def read_masks(folder: Path, name: str) -> list[MaskedPart]:
    """What a party kept of its masks; all that it recorded fits."""
    found = Transcript.read(folder / name)
    found.check()
    return [each for each in found.masked_parts() if each.grid is not None]


def test_masks_of_another_number_of_parties_than_pushed_are_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = Transcript.masked_parts

    def changed(transcript: Transcript) -> Iterator[MaskedPart]:
        for each in parts(transcript):
            yield each if each.grid is None else replace(each, grid=replace(each.grid, parties=2))

    monkeypatch.setattr(Transcript, "masked_parts", changed)
    with pytest.raises(CheckpointError, match="or one of other parties"):
        list(opened(run))


def opened(folder: Path) -> Iterator[ReceivedPush]:
    return open_together([Transcript.read(folder / name, "alder") for name in ("birch", "cedar")], "alder")


BENT = {
    "more parties": {"parties": 4},
    "one party": {"parties": 1},
    "no parties": {"parties": 1e400},
    "a step beyond numbers": {"scales": [["", "0x1p+5000", 10]]},
    "a step beyond float32": {"scales": [["", "0x1p+1000", 10]]},
    "no step": {"scales": [["", "0x0p+0", 10]]},
    "endless": {"scales": [["", "0x1p-20", 1e400]]},
    "a name that is none": {"scales": [["", "0x1p-20", 10], [3, "0x1p-20", 10]]},
    "nothing for the rest": {"scales": [["lm_head.weight", "0x1p-20", 10]]},
    "size": {},
    "of another": {},
    "twice": {},
}


@pytest.mark.parametrize("bent", BENT)
def test_masks_that_do_not_fit_are_refused(run: Path, bent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Transcript._logged  # noqa: SLF001

    def changed(transcript: Transcript) -> Iterator[object]:
        for logged in read(transcript):
            message = logged.frame.message
            if message.kind == "own-masks":
                if bent == "twice":
                    yield logged
                tensors = (message.tensors[0][:-1],) if bent == "size" else message.tensors
                body = {"grid": {**message.body["grid"], **BENT[bent]}}
                message = replace(message, body=body, tensors=tensors)
                name = "cedar" if bent == "of another" else logged.name
                logged = replace(logged, name=name, frame=replace(logged.frame, message=message))
            yield logged

    monkeypatch.setattr(Transcript, "_logged", changed)
    with pytest.raises(CheckpointError) as caught:
        Transcript.read(run / "birch").check()
    assert caught.value.code == "transcript-damaged"


def test_masks_that_are_not_those_of_the_push_are_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the right ones a sum is random numbers, in which nothing would be read."""
    parts = Transcript.masked_parts

    def changed(transcript: Transcript) -> Iterator[object]:
        for each in parts(transcript):
            yield replace(each, masked=each.masked.flip(0)) if each.grid is not None else each

    monkeypatch.setattr(Transcript, "masked_parts", changed)
    with pytest.raises(CheckpointError, match="larger than what parties may push") as caught:
        list(opened(run))
    assert caught.value.code == "transcript-damaged"


def test_a_party_whose_recording_is_there_is_opened_to_its_hosts_too(run: Path) -> None:
    """As the threat model says of recordings that are collected: its own masks with one host's recording suffice."""
    host = Transcript.read(run / "cedar", "birch")
    own = {(m.round, m.attempt, m.part.number): m for m in Transcript.read(run / "birch").masked_parts() if m.grid}
    seen = [m for m in host.masked_parts() if m.peer == "birch"]
    assert seen
    for each in seen:
        masks = own[each.round, each.attempt, each.part.number]
        assert masks.grid is not None
        width = masks.grid.width
        left = signed(widen(each.masked.numpy(), width) - widen(masks.masked.numpy(), width), width)
        assert abs(left).max() <= masks.grid.rest.largest


def test_under_a_budget_one_host_faces_the_noise_of_two_parties_and_all_hosts_that_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the closed form: sigma C for each party whose push is in the sum."""
    monkeypatch.setattr(self_check, "check", lambda *arguments: SimpleNamespace(unused=()))
    monkeypatch.setattr(plan, "needed_noise", lambda *arguments: SIGMA / 2)
    model = full_models()["alder"]
    model.save_pretrained(tmp_path / "start")
    config = private_settings(
        model={"path": tmp_path / "start"},
        aggregation="masked",
        noise_multiplier=SIGMA,
        train__rounds=1,
        trunk="shared",
        transcript={"rounds": "all", "max_gib": 1.0},
        deadline_s=60.0,
        round_deadline_s=600.0,
    )
    parts = with_privacy(
        make_parts(config, {name: copy.deepcopy(model) for name in PARTIES}, tmp_path), tmp_path, sigma=None
    )
    run_in_process(config, list(parts.values()), tmp_path / "coordinator")
    dump_yaml(tmp_path / "alder" / "federation.yaml", config)
    case = case_of(replace(evidence_of(tmp_path, "shared"), privacy=LedgerClaim(8.0, 1e-5)))
    one = standard_deviation(case.opened(Adversary.ALL_HOSTS, 1))
    two = standard_deviation(case.opened(Adversary.HOST_PUBLIC, 1))
    assert one == pytest.approx(SIGMA * CLIP, rel=0.05)
    assert two == pytest.approx(SIGMA * CLIP * math.sqrt(2), rel=0.05)
