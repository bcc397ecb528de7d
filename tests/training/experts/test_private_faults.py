"""An owner that dies between drawing a lot and the hosts' acknowledgement: nothing redrawn, nothing uncounted."""

from __future__ import annotations

import errno
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from coterie.dp import party_session
from coterie.dp.accounting.ledger import Ledger
from coterie.dp.accounting.spool import Spool
from coterie.dp.isolation.exact_engine import ExactEngine
from coterie.errors import CoterieError
from coterie.federation.experts.host import ExpertsHost
from coterie.federation.experts.owner import SumSender
from coterie.federation.experts.parts import Part
from coterie.federation.experts.push_sums import Pusher
from coterie.models.streaming import cache
from coterie.training.party.inputs import PartyInputs
from coterie.training.party.run import PartyResult
from helpers.federations import PARTIES
from helpers.private_federation import FATAL, ROUNDS, VICTIM, PrivateWorld
from helpers.private_federation import already_compared as already_compared
from helpers.private_federation import watched as watched
from helpers.waiting import until

pytestmark = pytest.mark.usefixtures("already_compared")


def _is_victims(owner: object) -> bool:
    """Whether a ledger, spool, pool or thread belongs to the victim."""
    folder = getattr(owner, "folder", None)
    if folder is not None:
        return f"ledger-{VICTIM}" in str(folder)
    if isinstance(owner, ExpertsHost):
        return owner.me == VICTIM
    if isinstance(owner, SumSender | Pusher):
        transport = owner._transport
        return transport.me == VICTIM
    return threading.current_thread().name == VICTIM


DEATHS: dict[str, tuple[type, str, bool, int]] = {
    # point: class, method, whether the method is carried out first, which of its calls in the fatal round
    "the lot is stored": (Spool, "store_lot", True, 1),
    "computed but not noised": (ExactEngine, "take", False, 1),  # of an empty lot as well
    "noised but not spooled": (Spool, "write_release", False, 1),
    "spooled but not counted": (Ledger, "record_release", False, 1),
    "counted but not declared": (Ledger, "record_release", True, 1),
    "declared but not pushed": (SumSender, "declare", True, 1),
    "in the middle of the push": (Pusher, "_end", False, 3),
    "pushed but not reported": (SumSender, "push", True, 1),
    "committed but not applied": (ExpertsHost, "commit", False, 1),
    "applied but not saved": (ExpertsHost, "commit", True, 1),
}


def arrange(monkeypatch: pytest.MonkeyPatch, world: PrivateWorld, point: str) -> threading.Event:
    """Let the victim die at a point of the fatal round, once."""
    kind, name, first, which = DEATHS[point]
    original = getattr(kind, name)
    dead, calls, lock = threading.Event(), [0], threading.Lock()

    def fatal(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        statuses = world.federation.statuses
        here = bool(statuses) and statuses[-1].state.round == FATAL and _is_victims(self) and not dead.is_set()
        if here:
            with lock:
                calls[0] += 1
                here = calls[0] == which
        if here and not first:
            dead.set()
            world.die()
        result = original(self, *args, **kwargs)
        if here:
            dead.set()
            world.die()
        return result

    monkeypatch.setattr(kind, name, fatal)
    return dead


@pytest.mark.parametrize("point", DEATHS)
def test_owner_that_dies_comes_back_with_the_same_bytes_and_counts_each_round_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watched, point: str
):
    world = watched(PrivateWorld(tmp_path))
    dead = arrange(monkeypatch, world, point)
    world.run_past(dead)
    assert not world.uncounted
    for name in PARTIES:  # the survivors go back as well, and had perhaps sent theirs
        assert world.releases(name) == [(round_no, 0) for round_no in range(1, ROUNDS + 1)], (
            f"{name}: nothing is burned"
        )
    for (host, round_no, part), digests in world.announced.items():
        assert len(set(digests)) == 1, f"{host} was sent different bytes for part {part} of round {round_no}"
    again = {key for key, digests in world.announced.items() if len(digests) > 1}
    sent_before = ("in the middle of the push", "pushed but not reported", "applied but not saved")
    assert bool(again) or point not in sent_before
    assert all(round_no == FATAL for _, round_no, _ in again)


@pytest.mark.parametrize("point", ["computed but not noised", "pushed but not reported", "applied but not saved"])
def test_run_with_a_death_ends_with_the_weights_of_one_without_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watched, point: str
):
    quiet = PrivateWorld(tmp_path / "quiet", seeded=True)
    quiet.start()
    quiet.finished()
    world = watched(PrivateWorld(tmp_path / "disturbed", seeded=True))
    dead = arrange(monkeypatch, world, point)
    world.run_past(dead)
    for name in PARTIES:
        last = Path("private") / "checkpoints" / f"round-{ROUNDS:08d}"
        for stem in ("trunk", "experts"):
            one, other = (load_file(w.folder / name / last / f"{stem}.safetensors") for w in (quiet, world))
            assert one.keys() == other.keys()
            assert all(torch.equal(one[key], other[key]) for key in one), (name, stem)


def test_rounded_push_is_resent_with_the_same_coins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watched):
    """bfloat16 is rounded at random after the noise; a second rounding of the same noised sums would tell more."""
    world = watched(PrivateWorld(tmp_path, push_dtype="bfloat16", weights_dtype="bfloat16"))
    dead = arrange(monkeypatch, world, "applied but not saved")
    world.run_past(dead)
    twice = [digests for digests in world.announced.values() if len(digests) > 1]
    assert twice
    assert all(len(set(digests)) == 1 for digests in twice)


@pytest.mark.parametrize("checkpoints", [1, 2])
def test_rounds_that_were_sent_are_replayed_when_a_host_comes_back_with_an_older_version(
    tmp_path: Path, watched, checkpoints: int
):
    """Everybody goes back to a checkpoint before; the rounds since then are pushed again, byte for byte."""
    world = watched(PrivateWorld(tmp_path, rounds=8))
    world.start()
    until(lambda: world.at(round_no=8))
    world.go_back(checkpoints=checkpoints)
    world.federation.up(world.parts()["cedar"])
    world.finished()
    assert not world.uncounted
    for name in PARTIES:
        assert world.releases(name) == [(round_no, 0) for round_no in range(1, 9)], (
            "nothing is drawn or counted twice"
        )
    assert all(len(set(digests)) == 1 for digests in world.announced.values())
    again = {round_no for (_, round_no, _), digests in world.announced.items() if len(digests) > 1}
    assert set(range(7 - 2 * checkpoints, 7)) <= again, "the rounds since that checkpoint had to be made again"


def test_rounds_that_left_the_spool_are_burned_or_drawn_anew_and_all_of_them_count(tmp_path: Path, watched):
    """Back to before what is spooled: other lots and other noise, other weights from there on, a budget sooner spent.

    birch has lost the bytes of rounds 3 and 4 and keeps those of 5 and 6. Round 3 is drawn anew at birch alone, and
    repeated by the others. From then on nobody has the weights that the later bytes were computed on.
    """
    world = watched(PrivateWorld(tmp_path, rounds=9))
    world.start()
    until(lambda: world.at(round_no=7))
    world.federation.kill(VICTIM)
    made = [(round_no, 0) for round_no in range(1, len(world.releases()) + 1)]
    assert world.releases() == made
    for path in world.spooled():
        if path.name < "release-00000005":
            path.unlink()
    world.go_back(checkpoints=2)
    for name in (VICTIM, "cedar"):
        world.federation.up(world.parts()[name])
    world.finished()
    assert not world.uncounted
    budget = world.config.train.rounds - len(made)
    assert world.releases() == made + [(round_no, 1) for round_no in range(3, 3 + budget)], (
        "then the budget was spent"
    )
    burned = [entry["data"]["round"] for entry in world.entries() if entry["kind"] == "burned"]
    assert burned == [round_no for round_no, _ in made if round_no >= 5], (
        "what was spooled for other weights is never sent"
    )
    changed = {round_no for (_, round_no, _), digests in world.announced.items() if len(set(digests)) > 1}
    assert changed == {round_no for round_no, draw in world.releases() if draw == 1} & set(range(1, len(made) + 1))
    for name in ("alder", "cedar"):
        drawn_again = [round_no for round_no, draw in world.releases(name) if draw == 1]
        assert min(drawn_again) == 4, "round 3 began with the same weights, so its bytes were sent again"
        assert len(world.releases(name)) == world.config.train.rounds


@pytest.mark.parametrize(("limit", "kept"), [(2**30, [3, 4, 5, 6, 7, 8]), (0, [7, 8])])
def test_spool_keeps_what_any_checkpoint_may_need_and_less_where_there_is_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watched, limit: int, kept: list[int]
):
    """Checkpoints of rounds 4, 6 and 8 are on disk in the end; 2 is let go last, when 8 is published."""
    monkeypatch.setattr(party_session, "SPOOL_LIMIT_BYTES", limit)
    world = watched(PrivateWorld(tmp_path, rounds=8))
    world.start()
    world.finished()
    assert [int(path.name.split("-")[1]) for path in world.spooled()] == kept


def test_rolled_back_ledger_stops_the_run_before_anything_is_drawn(tmp_path: Path, watched):
    world = watched(PrivateWorld(tmp_path))
    world.start()
    until(lambda: world.at(round_no=3))
    world.federation.kill(VICTIM)
    released = len(world.releases())
    shutil.rmtree(tmp_path / f"ledger-{VICTIM}")
    world.back()
    world.federation.join()
    end = world.federation.ends[VICTIM]
    assert isinstance(end, CoterieError)
    assert world.told("dp-ledger-behind")
    assert released >= 2
    assert world.releases() == [], "nothing was drawn or released on the strength of the older ledger"


def test_ledger_that_knows_the_newest_round_but_not_all_its_draws_stops_the_run(tmp_path: Path, watched):
    """Hosts count rounds; that rounds 3 and 4 were drawn twice is known from the party's own checkpoint."""
    world = watched(PrivateWorld(tmp_path, rounds=8))
    world.start()
    until(lambda: world.at(round_no=5))
    world.federation.kill(VICTIM)
    (ledger,) = (tmp_path / f"ledger-{VICTIM}").glob("*/ledger.jsonl")
    older = ledger.read_text()
    for path in world.spooled():
        path.unlink()
    world.go_back(checkpoints=1)
    for name in (VICTIM, "cedar"):
        world.federation.up(world.parts()[name])
    until(lambda: (4, 1) in world.releases() and world.at_last(5))
    world.federation.kill(VICTIM)
    ledger.write_text(older)
    for path in world.spooled():
        path.unlink()
    released = world.releases()
    world.back()
    world.federation.join()
    end = world.federation.ends[VICTIM]
    assert isinstance(end, CoterieError)
    assert world.told("dp-ledger-behind")
    assert world.releases() == released, "nothing was drawn on the strength of the older ledger"


def test_release_made_under_another_roster_is_burned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watched):
    """Somebody left or renewed a certificate while a round was spooled: it is paid for, and never sent."""
    world = watched(PrivateWorld(tmp_path))
    dead = arrange(monkeypatch, world, "counted but not declared")
    world.start(roster="one")
    assert dead.wait(120.0)
    for name in PARTIES:
        world.federation.kill(name)
    before = {name: world.releases(name) for name in PARTIES}
    assert before[VICTIM][-1] == (FATAL, 0)
    for each in world.parts(roster="two").values():
        world.federation.up(each)
    world.finished()
    assert not world.uncounted
    assert (FATAL, 1) in world.releases()
    burned = [entry["data"]["round"] for entry in world.entries() if entry["kind"] == "burned"]
    assert FATAL in burned
    assert all(len(set(digests)) == 1 for (_, round_no, _), digests in world.announced.items() if round_no == FATAL)


@pytest.mark.parametrize("phase", ["compute", "checkpoint"])
def test_full_cache_disk_aborts_the_attempt_and_the_same_lot_is_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watched, phase: str
):
    """New weights come in while a round is computed, and before a checkpoint is written."""
    world = watched(PrivateWorld(tmp_path))
    full, lots = threading.Event(), []
    save, store = cache.save_file, Spool.store_lot

    def fails_once(tensors, path):  # type: ignore[no-untyped-def]
        now = world.federation.statuses[-1].state
        if VICTIM in str(path) and (now.phase, now.round) == (phase, 2) and not full.is_set():
            full.set()
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path)

    def drawn(self, lot, draw, pins):  # type: ignore[no-untyped-def]
        if _is_victims(self):
            lots.append((lot.round, draw))
        store(self, lot, draw, pins)

    monkeypatch.setattr(cache, "save_file", fails_once)
    monkeypatch.setattr(Spool, "store_lot", drawn)
    world.start(cache="disk")
    world.finished()
    assert full.is_set()
    assert any("cache-full" in status.state.note for status in world.federation.statuses), (
        "the party's own code is told"
    )
    assert not world.uncounted
    assert lots == world.releases() == [(round_no, 0) for round_no in range(1, ROUNDS + 1)]


def test_push_with_nan_is_refused_and_the_spooled_bytes_are_sent_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watched
):
    """A memory fault on the way: the host takes nothing of it, and nothing is drawn or counted again."""
    # Nothing here waits for a deadline; a short one would end attempts of its own accord on a busy machine.
    world = watched(PrivateWorld(tmp_path, deadline_s=60.0))
    push, broken = SumSender.push, threading.Event()

    def damaged(self, attempt, blob_of: Callable[[Part], Tensor], versions):  # type: ignore[no-untyped-def]
        if attempt.round == FATAL and _is_victims(self) and not broken.is_set():
            broken.set()
            push(self, attempt, lambda part: torch.full_like(blob_of(part), 0xFF), versions)
        else:
            push(self, attempt, blob_of, versions)

    monkeypatch.setattr(SumSender, "push", damaged)
    world.start()
    world.finished()
    assert broken.is_set()
    assert any("message-not-finite" in status.state.note for status in world.federation.statuses)
    assert world.releases() == [(round_no, 0) for round_no in range(1, ROUNDS + 1)]
    spoiled = {len(set(digests)) for (_, round_no, _), digests in world.announced.items() if round_no == FATAL}
    assert max(spoiled) == 2, "the damaged bytes and the spooled ones"


def test_party_that_comes_back_after_its_budget_was_spent_draws_nothing_and_goes_on_hosting(tmp_path: Path, watched):
    world = watched(PrivateWorld(tmp_path, rounds=6))

    def poor() -> dict[str, PartyInputs]:
        parts = world.parts()
        privacy = parts[VICTIM].privacy
        assert privacy is not None
        return parts | {VICTIM: replace(parts[VICTIM], privacy=replace(privacy, rounds=2))}

    world.federation.coordinate()
    for each in poor().values():
        world.federation.up(each)
    until(lambda: world.at(round_no=5))
    world.federation.kill(VICTIM)
    world.federation.up(poor()[VICTIM])
    world.finished()
    assert world.releases() == [(1, 0), (2, 0)]
    assert {round_no for _, round_no, _ in world.announced} == {1, 2}
    end = world.federation.ends[VICTIM]
    assert isinstance(end, PartyResult)
    assert end.privacy is not None
    assert not end.privacy["contributing"]
    assert world.releases("alder") == [(round_no, 0) for round_no in range(1, 7)]
