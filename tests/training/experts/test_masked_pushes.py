"""Masked pushes through the whole exchange: as much is learnt, and hosts see nothing but a sum."""

from __future__ import annotations

import copy
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from coterie.cli.privacy_lines import stopped_contributing
from coterie.config import FederationConfig
from coterie.dp import plan
from coterie.dp.accounting.accountant import needed_noise
from coterie.dp.checks import self_check
from coterie.dp.lot_sums import LotSums
from coterie.dp.noise.joint_noise import RoundNoise
from coterie.errors import CoterieError, RoundError
from coterie.federation.cancel import CancelToken
from coterie.federation.experts.host import ExpertsHost
from coterie.federation.experts.masking.board import OPENING, MaskAgreement, MaskBoard
from coterie.federation.experts.masking.grid import MaskGrid
from coterie.federation.experts.masking.session import KeyMaker, MaskSession, Opening, Scope
from coterie.federation.experts.masking.streams import Masks, unmasked_sum
from coterie.federation.rounds.attempt import Attempt
from coterie.federation.rounds.state import State
from coterie.federation.wire.transport import Message
from coterie.training.experts import masked_push
from coterie.training.party.actor import PartyActor
from coterie.training.party.in_process import InProcessFederation, run_in_process
from coterie.training.party.inputs import PartyInputs
from helpers.comparing import relative
from helpers.federations import PARTIES, experts_settings, full_models, make_parts
from helpers.private_settings import CLIP, exchange_of, private_settings, with_privacy

SIGMA = 40.0
"""The noise that is agreed on; more than any of these budgets needs."""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes most of a short run is no subject here: the engine's comparison with batches of one, and finding
    the noise of a budget, which is the agreed number anyway."""
    monkeypatch.setattr(self_check, "check", lambda *arguments: SimpleNamespace(unused=()))
    monkeypatch.setattr(plan, "needed_noise", lambda *arguments: SIGMA / 2)


def masked_settings(privacy: str = "budget", **changes: object) -> FederationConfig:
    plain = {"aggregation": "masked", "train__rounds": 2, "deadline_s": 60.0, "round_deadline_s": 600.0}
    if privacy == "none":
        return experts_settings(**{**plain, **changes})
    return private_settings(**{**plain, "noise_multiplier": SIGMA, **changes})


def parts_of(config: FederationConfig, folder: Path, **privacy: object) -> dict[str, PartyInputs]:
    folder.mkdir(parents=True, exist_ok=True)
    one = full_models()[PARTIES[0]]
    parts = make_parts(config, {name: copy.deepcopy(one) for name in PARTIES}, folder)
    return parts if config.privacy == "none" else with_privacy(parts, folder, **privacy)  # type: ignore[arg-type]


def run(config: FederationConfig, folder: Path, **privacy: object) -> InProcessFederation:
    parts = parts_of(config, folder, **privacy)
    return run_in_process(config, list(parts.values()), folder / "coordinator")[0]


def trained(federation: InProcessFederation) -> dict[str, Tensor]:
    """Everything that the parties trained."""
    found = {}
    for name in PARTIES:
        actor = federation.runs[name].actor
        hosted = {key: value.clone() for key, value in actor.exchange.hosted_state().items() if "ledger:" not in key}
        own = {key: p.detach().clone() for key, p in actor.inputs.model.named_parameters() if not p.is_meta}
        found |= {f"{name}/{key}": value for key, value in (hosted | own).items() if value.is_floating_point()}
    return found


LOTS = {"privacy__lot_size": None, "lot_sizes": {"alder": 4, "birch": 5, "cedar": 6}}


@pytest.mark.parametrize(
    ("privacy", "trunk", "lots", "last"),
    [
        ("none", "private", {}, 2),
        ("budget", "shared", {}, 2),
        ("budget", "private", {}, 2),
        ("budget", "shared", LOTS, 1),
    ],
)
def test_masked_and_plain_federations_train_the_same_model(
    tmp_path: Path, privacy: str, trunk: str, lots: dict, last: int
):
    """With the same lots and the same noise: what differs is the float32 rounding of sums before they add up. In one
    of them a budget is spent after the first round."""
    sigma = {} if privacy == "none" else {"sigma": 0.5}
    masked = masked_settings(privacy, trunk=trunk, **lots)
    plain = masked.model_copy(update={"aggregation": "plain", "noise_multiplier": None})
    found = {}
    for each in (masked, plain):
        folder = tmp_path / each.aggregation
        parts = parts_of(each, folder, **sigma)
        parts = with_last_round(parts, "birch", last) if last < 2 else parts
        found[each.aggregation] = trained(run_in_process(each, list(parts.values()), folder / "coordinator")[0])
    start = trained_at_start(plain)
    assert max(relative(found["plain"][key], value) for key, value in start.items()) > 1e-2  # it trained at all
    assert found["plain"].keys() == found["masked"].keys()
    for key, value in found["plain"].items():
        if value.norm() > 0:
            assert relative(found["masked"][key], value) < 2e-5, key


def trained_at_start(config: FederationConfig) -> dict[str, Tensor]:
    model = full_models()[PARTIES[0]]
    return {f"{name}/{key}": p for name in PARTIES for key, p in model.named_parameters() if "experts" not in key}


# ---- what leaves a party, and what is drawn again ----


class Pushes:
    """Every masked push: what went in and what came out, by (party, part), attempt by attempt.

    Attributes:
        made: how often each was masked.
        grids: that hosts read sums on, by how many contribute.
        noise: standard deviation that each draw was noised with, in the unit of gradients.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clear: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
        self.masked: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
        self.made: Counter[tuple[str, int]] = Counter()
        self.grids: dict[int, MaskGrid] = {}
        self.noise: list[float] = []
        mask, expect, noise = Masks.mask, ExpertsHost.expect_masked, LotSums.noise

        def expected(host: ExpertsHost, grid: MaskGrid, contributors: Sequence[str]) -> None:
            self.grids[len(contributors)] = grid
            expect(host, grid, contributors)

        def noised(lot: LotSums, sums: Mapping[str, Tensor]) -> RoundNoise:
            found = noise(lot, sums)
            self.noise.append(found.std_of(min(sums)))
            return found

        monkeypatch.setattr(ExpertsHost, "expect_masked", expected)
        monkeypatch.setattr(LotSums, "noise", noised)

        def seen(masks: Masks, part: int, integers: Tensor, width: int) -> Tensor:
            out = mask(masks, part, self.change(masks._me, integers, width), width)  # noqa: SLF001
            self.made[masks._me, part] += 1  # noqa: SLF001
            if (masks, part) in sessions:  # masked for its digest, and again to be sent
                assert torch.equal(out, self.masked[masks._me, part][-1])  # noqa: SLF001
                return out
            sessions.append((masks, part))
            self.clear[masks._me, part].append(integers.clone())  # noqa: SLF001
            self.masked[masks._me, part].append(out.clone())  # noqa: SLF001
            self.width = width
            return out

        sessions: list[tuple[Masks, int]] = []
        monkeypatch.setattr(Masks, "mask", seen)
        self.change: Callable[[str, Tensor, int], Tensor] = lambda party, integers, width: integers


def fail_once(monkeypatch: pytest.MonkeyPatch, then: Callable[[], object] = lambda: None) -> None:
    """One host gives up the first attempt of all, when everybody's masked values are there."""
    check, calls = ExpertsHost.check_masked, []

    def failing(host: ExpertsHost, told: Mapping[str, str]) -> None:
        check(host, told)
        if host.me == "birch" and not calls:
            calls.append(then())
            raise RoundError("made to fail", code="made-up")

    monkeypatch.setattr(ExpertsHost, "check_masked", failing)


def released(folder: Path, name: str) -> list[tuple[int, int]]:
    (ledger,) = (folder / f"ledger-{name}").glob("*/ledger.jsonl")
    entries = [json.loads(line) for line in ledger.read_text().splitlines()]
    return [(e["data"]["round"], e["data"]["draw"]) for e in entries if e["kind"] == "release"]


def test_a_retry_sends_the_same_noised_integers_under_new_masks_and_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of the masked parts some are kept until they are sent, and the others made again."""
    pushes, serials, take = Pushes(monkeypatch), list[int](), MaskBoard.take
    fail_once(monkeypatch)
    monkeypatch.setattr(masked_push, "_KEPT", 40_000)

    def heard(board: MaskBoard, peer: str, message: Message) -> Message:
        if message.kind == OPENING and peer == board._me == "cedar":  # noqa: SLF001
            serials.append(message.body["serial"])
        return take(board, peer, message)

    monkeypatch.setattr(MaskBoard, "take", heard)
    run(masked_settings(), tmp_path, sigma=None, seeded=False)
    assert serials == [1, 2, 3]
    once, twice = ({part for (_, part), n in pushes.made.items() if n == 3 * times} for times in (1, 2))
    assert twice
    for name in PARTIES:
        assert 0 < sum(len(pushes.masked[name, part][0]) for part in once) <= 40_000
    assert once | twice == {part for _, part in pushes.made}
    for (party, part), (first, again, second) in pushes.clear.items():
        assert torch.equal(first, again)
        assert not torch.equal(first, second)
        bytes_each = pushes.masked[party, part]
        equal = (bytes_each[0] == bytes_each[1]).double().mean()
        assert float(equal) < 0.05, (party, part)  # 1 of 256 by chance
    for part in {part for _, part in pushes.clear}:
        blobs = {name: pushes.masked[name, part][1] for name in PARTIES}
        expected = sum(pushes.clear[name, part][1] for name in PARTIES)
        assert torch.equal(unmasked_sum(blobs, pushes.width), expected)
    for name in PARTIES:
        assert released(tmp_path, name) == [(1, 0), (2, 0)]


def lose_draw(folder: Path, name: str) -> None:
    """A party's spooled result of round 1 is gone."""
    for path in (folder / f"ledger-{name}").glob("*/spool/*/release-00000001-*"):
        path.unlink()


def test_where_one_party_lost_its_draw_all_draw_anew_and_all_count_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A sum with old noise and one with new noise of one party must never both be seen."""
    pushes = Pushes(monkeypatch)
    fail_once(monkeypatch, then=lambda: lose_draw(tmp_path, "birch"))
    config = masked_settings()
    parts = parts_of(config, tmp_path, sigma=None, seeded=False, rounds=3)
    run_in_process(config, list(parts.values()), tmp_path / "coordinator")
    for first, again, _ in pushes.clear.values():
        assert not torch.equal(first, again)
    for name in PARTIES:
        assert released(tmp_path, name) == [(1, 0), (1, 1), (2, 0)]


def test_a_draw_that_is_lost_when_all_agreed_to_push_it_again_is_not_replaced_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The others would push their old draws beside new noise: over two such sums the lost party's averages out. Of
    every attempt's keys, those of attempts that failed with the draw or with the sum included, nothing is left."""
    pushes, agree = Pushes(monkeypatch), MaskAgreement.agree
    fail_once(monkeypatch)
    sessions: list[MaskSession] = []
    makers: list[KeyMaker] = []
    begun = KeyMaker.sign

    def noted(maker: KeyMaker, openings: Mapping[str, Opening]) -> tuple[str, str]:
        makers.append(maker)
        return begun(maker, openings)

    monkeypatch.setattr(KeyMaker, "sign", noted)

    def losing(agreement: MaskAgreement, scope: Scope, *rest: object) -> MaskSession | None:
        session = agree(agreement, scope, *rest)  # type: ignore[arg-type]
        assert session is not None
        sessions.append(session)
        if (agreement._me, scope.attempt) == ("birch", Attempt(1, 2)):  # noqa: SLF001
            lose_draw(tmp_path, "birch")
        return session

    monkeypatch.setattr(MaskAgreement, "agree", losing)
    parts = parts_of(masked_settings(), tmp_path, sigma=None, seeded=False, rounds=3)
    federation, _ = run_in_process(masked_settings(), list(parts.values()), tmp_path / "coordinator")
    assert "dp-draw-gone" in " ".join(status.state.note for status in federation.statuses)
    for (party, part), each in pushes.clear.items():
        assert not torch.equal(each[0], each[-2]), (party, part)  # attempts 1 and 3 of round 1
    assert len({session.digest for session in sessions}) == 4
    for session in sessions:
        assert not session.masks._secrets  # noqa: SLF001
        with pytest.raises(RoundError) as refused:
            session.masks.mask(0, torch.zeros(3, dtype=torch.int64), 5)
        assert refused.value.code == "mask-used"
    assert len(makers) >= len(sessions)
    assert all(maker._key is None for maker in makers)  # noqa: SLF001
    for name in PARTIES:
        assert released(tmp_path, name) == [(1, 0), (1, 1), (2, 0)]


def with_last_round(parts: dict[str, PartyInputs], name: str, rounds: int) -> dict[str, PartyInputs]:
    """A party whose budget lasts for so many releases."""
    privacy = parts[name].privacy
    assert privacy is not None
    return {**parts, name: replace(parts[name], privacy=replace(privacy, rounds=rounds))}


def laws(folder: Path, name: str) -> list[object]:
    """What each of a party's ledger entries says of whose noise lay in the sum, where it was not everybody's."""
    (ledger,) = (folder / f"ledger-{name}").glob("*/ledger.jsonl")
    entries = [json.loads(line) for line in ledger.read_text().splitlines()]
    return [e["data"].get("pooled") for e in entries if e["kind"] == "release"]


@pytest.mark.parametrize("lost", [False, True])
def test_where_too_few_budgets_last_nobody_draws_and_what_all_hold_is_still_pushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: bool
):
    """Cedar pays for one draw, whose first attempt fails: where it is not pushed again, nobody pays for another."""
    pushes, config = Pushes(monkeypatch), masked_settings(noise="shared", colluding=2)
    fail_once(monkeypatch, then=lambda: lose_draw(tmp_path, "birch") if lost else None)
    parts = with_last_round(parts_of(config, tmp_path, sigma=None, seeded=False), "cedar", 1)
    federation, results = run_in_process(config, list(parts.values()), tmp_path / "coordinator")
    assert all(result.finished for result in results.values())
    notes = " ".join(status.state.note for status in federation.statuses)
    assert "made-up" in notes
    assert "push-withdrawn" not in notes  # nobody said that it could draw and then could not
    assert {len(each) for each in pushes.clear.values()} == {1 if lost else 2}
    for name in PARTIES:
        assert released(tmp_path, name) == [(1, 0)]
        privacy = results[name].privacy
        assert privacy is not None
        words = "fewer parties than masked pushes need" if name != "cedar" else "the privacy budget is spent"
        assert words in stopped_contributing(privacy)
    assert {exchange_of(federation, name).host.version for name in PARTIES} == {2}


@pytest.mark.parametrize("noise", [{}, {"noise": "shared", "colluding": 1}])
def test_where_one_budget_is_spent_the_others_go_on_with_the_noise_that_fewer_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noise: dict
):
    """Cedar pays for one draw. It lies in the sum of round 1 and of its retry; round 2 is the two others'."""
    pushes, config = Pushes(monkeypatch), masked_settings(**noise)
    fail_once(monkeypatch)
    parts = with_last_round(parts_of(config, tmp_path, sigma=None, seeded=False), "cedar", 1)
    federation, results = run_in_process(config, list(parts.values()), tmp_path / "coordinator")
    assert "made-up" in " ".join(status.state.note for status in federation.statuses)
    for name in PARTIES:
        stops = name == "cedar"
        assert {len(each) for (party, _), each in pushes.clear.items() if party == name} == {2 if stops else 3}
        assert released(tmp_path, name) == ([(1, 0)] if stops else [(1, 0), (2, 0)])
        now = {"parties": 2, "colluding": config.colluding}
        assert laws(tmp_path, name) == ([None] if stops else [None, now])
        statement, privacy = results[name].statement, results[name].privacy
        assert ("of 3 contributed 2 in 1 round, as the others' budgets were spent" in statement) is not stops
        assert privacy is not None
        assert privacy["contributing"] is not stops
        if not stops:
            for attempt, count in ((0, 3), (2, 2)):
                share = 1.0 if not noise else (count - 1) ** -0.5  # t = 1
                values = torch.cat([each[attempt] for (party, _), each in pushes.clear.items() if party == name])
                found = float(values.double().std()) * pushes.grids[count].rest.step
                assert found == pytest.approx(SIGMA * CLIP * share, rel=0.05)
    shares = [1.0] * 5 if not noise else [2**-0.5] * 3 + [1.0] * 2
    assert sorted(pushes.noise) == pytest.approx([SIGMA * CLIP * share for share in shares], rel=1e-3)
    for part in {part for _, part in pushes.clear}:
        for attempt, who in ((1, PARTIES), (2, ("alder", "birch"))):
            blobs = {name: pushes.masked[name, part][attempt] for name in who}
            expected = sum(pushes.clear[name, part][attempt] for name in who)
            assert torch.equal(unmasked_sum(blobs, pushes.width), expected)
    assert {exchange_of(federation, name).host.version for name in PARTIES} == {2}


def test_a_draw_that_was_noised_for_a_party_that_stopped_since_is_burned_by_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Cedar lost its last draw. The others' noise was a third each; alone they need half each, and count both."""
    pushes, config = Pushes(monkeypatch), masked_settings(noise="shared", colluding=1)
    fail_once(monkeypatch, then=lambda: lose_draw(tmp_path, "cedar"))
    parts = with_last_round(parts_of(config, tmp_path, sigma=None, seeded=False, rounds=3), "cedar", 1)
    run_in_process(config, list(parts.values()), tmp_path / "coordinator")
    now = {"parties": 2, "colluding": 1}
    for name in PARTIES:
        stops = name == "cedar"
        assert released(tmp_path, name) == ([(1, 0)] if stops else [(1, 0), (1, 1), (2, 0)])
        assert laws(tmp_path, name) == ([None] if stops else [None, now, now])
    assert {len(each) for (party, _), each in pushes.clear.items() if party == "cedar"} == {1}
    shares = [2**-0.5] * 3 + [1.0] * 4
    assert sorted(pushes.noise) == pytest.approx([SIGMA * CLIP * share for share in shares], rel=1e-3)
    for name in ("alder", "birch"):
        values = torch.cat([each[1] for (party, _), each in pushes.clear.items() if party == name])
        assert float(values.double().std()) * pushes.grids[2].rest.step == pytest.approx(SIGMA * CLIP, rel=0.05)


@pytest.mark.parametrize("colluding", [1, 2])
def test_a_party_that_tells_others_different_things_of_its_budget_gets_no_push_out_of_anybody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, colluding: int
):
    """Alder hears that cedar goes on, birch that it stopped: a sum that both believe in would lack noise. Where birch
    alone believes that too few are left, alder does not wait for it."""
    pushes = Pushes(monkeypatch)
    config = masked_settings(noise="shared", colluding=colluding, max_attempts=1, round_deadline_s=60.0)
    said = MaskBoard.take

    def two_views(board: MaskBoard, peer: str, message: Message) -> Message:
        if message.kind == OPENING and peer == "cedar" and board._me == "birch":  # noqa: SLF001
            message = replace(message, body={**message.body, "can_draw": False})
        return said(board, peer, message)

    monkeypatch.setattr(MaskBoard, "take", two_views)
    parts = parts_of(config, tmp_path, sigma=None, seeded=False)
    with pytest.raises(CoterieError) as ended:
        run_in_process(config, list(parts.values()), tmp_path / "coordinator")
    assert ended.value.code == "mask-signature"
    assert not pushes.masked
    for name in PARTIES:
        assert released(tmp_path, name) == []


def test_a_wild_sum_is_refused_by_all_and_the_second_pauses_the_run_without_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pushes = Pushes(monkeypatch)
    pushes.change = lambda party, integers, width: integers + (party == "cedar") * int(1.9 * 2 ** (8 * width - 2))
    config = masked_settings(max_attempts=5)
    parts = parts_of(config, tmp_path, sigma=None, seeded=False)
    with pytest.raises(CoterieError) as ended:
        run_in_process(config, list(parts.values()), tmp_path / "coordinator")
    assert ended.value.code == "sum-wild"
    assert "paused at round 0" in ended.value.message
    assert "2nd time" in ended.value.message
    assert not any(name in ended.value.message for name in PARTIES)
    assert {len(each) for each in pushes.clear.values()} == {2}
    for name in PARTIES:
        assert released(tmp_path, name) == [(1, 0)]


def test_values_beyond_the_signed_limit_stay_at_their_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pushes = Pushes(monkeypatch)
    with pytest.raises(CoterieError) as ended:
        run(masked_settings("none", push_limit=1e-6, max_attempts=1), tmp_path)
    assert ended.value.code == "run-diverged"
    assert not pushes.masked


def test_a_budget_that_needs_more_noise_than_was_agreed_is_refused_before_anything_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(plan, "needed_noise", needed_noise)
    pushes, config = Pushes(monkeypatch), masked_settings(noise_multiplier=0.3, max_attempts=1)
    parts = parts_of(config, tmp_path, sigma=None, seeded=False)
    with pytest.raises(CoterieError) as ended:
        run_in_process(config, list(parts.values()), tmp_path / "coordinator")
    assert ended.value.code == "dp-noise-below-needed"
    assert not pushes.masked


def test_a_coordinator_that_leaves_parties_out_gets_no_push(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It could otherwise have one party's sum masked against its accomplice alone."""
    pushes, config = Pushes(monkeypatch), masked_settings("none", max_attempts=1)
    compute = PartyActor.compute

    def without(actor: PartyActor, state: State, cancel: CancelToken) -> None:
        compute(actor, replace(state, absent=("birch",)), cancel)

    monkeypatch.setattr(PartyActor, "compute", without)
    with pytest.raises(CoterieError) as ended:
        run(config, tmp_path)
    assert ended.value.code == "mask-parties"
    assert not pushes.masked


@pytest.mark.parametrize(("colluding", "share"), [(1, 2**-0.5), (2, 1.0)])
def test_shared_noise_adds_up_to_what_was_promised_against_t(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, colluding: int, share: float
):
    """Of three parties each adds sigma C / sqrt(3 - t), so that what t of them do not know is sigma C at least."""
    pushes, config = Pushes(monkeypatch), masked_settings(noise="shared", colluding=colluding, train__rounds=1)
    parts = parts_of(config, tmp_path, sigma=None, seeded=False)
    _, results = run_in_process(config, list(parts.values()), tmp_path / "coordinator")
    assert pushes.noise == pytest.approx([SIGMA * CLIP * share] * 3, rel=1e-3)
    step = pushes.grids[3].rest.step
    for name, result in results.items():
        values = torch.cat([each[0] for (party, _), each in pushes.clear.items() if party == name])
        assert float(values.double().std() * step) == pytest.approx(SIGMA * CLIP * share, rel=0.05)
        assert f"any {colluding} of the 2 other parties together" in result.statement
        assert ("if all others pool what they know" in result.statement) is (colluding == 1)
        assert result.privacy is not None
        assert result.privacy["noise_multiplier"] == SIGMA  # what the budget counts
