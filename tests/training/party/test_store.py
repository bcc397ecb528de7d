"""A party's checkpoints: verified, of one run, of one party."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path

import pytest
import torch

from coterie.errors import CheckpointError
from coterie.federation.rounds.state import Saved
from coterie.revision import software
from coterie.training.party.store import PartyStore

AGREEMENT = "a" * 64


def store(folder: Path, party: str = "alder", agreement: str = AGREEMENT) -> PartyStore:
    return PartyStore(folder, party, agreement)


def parts(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"trunk": {"w": torch.full((2,), value)}, "experts": {"e": torch.full((3,), -value)}}


def test_what_was_saved_is_offered_and_loads_in_a_new_process(tmp_path: Path):
    first = store(tmp_path)
    assert (first.run, first.held()) == ("", ())
    first.adopt("run-1")
    digest = first.save(4, parts(1.5))
    second = store(tmp_path)
    assert second.run == "run-1"
    assert software().items() <= json.loads((tmp_path / "run.json").read_text()).items()
    assert second.held() == (Saved(4, digest),)
    loaded = second.load(Saved(4, digest), ("trunk", "experts"))
    assert loaded["trunk"]["w"].tolist() == [1.5, 1.5]
    assert loaded["experts"]["e"].tolist() == [-1.5] * 3


def test_damaged_checkpoint_is_refused_and_not_offered_again(tmp_path: Path):
    one = store(tmp_path)
    one.adopt("run-1")
    digests = [one.save(round_no, parts(round_no)) for round_no in (2, 4)]
    (file,) = tmp_path.rglob("round-00000004/trunk.safetensors")
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert one.held()[-1] == Saved(4, digests[1])  # the manifest is whole; only loading reads every byte
    with pytest.raises(CheckpointError, match="is not what was written"):
        one.load(Saved(4, digests[1]), ("trunk",))
    assert one.held() == (Saved(2, digests[0]),)


def test_checkpoint_with_another_digest_than_the_published_one_is_refused(tmp_path: Path):
    one = store(tmp_path)
    one.adopt("run-1")
    one.save(2, parts(1.0))
    with pytest.raises(CheckpointError) as caught:
        one.load(Saved(2, "f" * 64), ("trunk",))
    assert caught.value.code == "checkpoint-digest"


def test_a_checkpoint_that_leaves_frozen_weights_out_goes_with_those_alone(tmp_path: Path):
    one, bases = store(tmp_path), {"trunk": "a" * 64, "experts": "b" * 64}
    one.adopt("run-1")
    saved = Saved(2, one.save(2, parts(1.0), bases=bases))
    assert one.load(saved, ("trunk", "experts"), bases)["trunk"]["w"].tolist() == [1.0, 1.0]
    for other, words in (({**bases, "experts": "c" * 64}, "other frozen weights"), ({}, "other frozen weights")):
        with pytest.raises(CheckpointError, match=words) as caught:
            one.load(saved, ("trunk", "experts"), other)
        assert caught.value.code == "checkpoint-base"
    whole = Saved(4, one.save(4, parts(2.0)))
    with pytest.raises(CheckpointError, match="as an earlier version wrote them"):
        one.load(whole, ("trunk", "experts"), bases)
    assert one.held() == (saved, whole), "nothing is wrong with the files"


def rounds_of(one: PartyStore) -> list[int]:
    return [saved.round for saved in one.held()]


def test_old_checkpoints_go_once_the_next_one_is_published_and_the_last_three_stay(tmp_path: Path):
    one = store(tmp_path)
    one.adopt("run-1")
    one.published(0)
    for round_no in (1, 2, 3, 4):
        one.save(round_no, parts(round_no))
        one.published(round_no - 1)  # a party lags behind: the others' newest is not published yet
    assert rounds_of(one) == [1, 2, 3, 4]
    one.published(4)
    assert rounds_of(one) == [2, 3, 4]
    one.published(4)
    assert rounds_of(one) == [2, 3, 4]


def test_no_checkpoint_goes_before_the_next_is_published_however_many_are_written(tmp_path: Path):
    one = store(tmp_path)
    one.adopt("run-1")
    for round_no in range(2, 12):
        one.save(round_no, parts(round_no))
        one.published(2)
    assert rounds_of(one) == list(range(2, 12))


def test_new_process_does_not_know_what_was_published_before_and_keeps_all_until_the_next(tmp_path: Path):
    one = store(tmp_path)
    one.adopt("run-1")
    for round_no in (2, 4, 6, 8):
        one.save(round_no, parts(round_no))
        one.published(round_no)
    again = store(tmp_path)
    again.published(8)
    assert rounds_of(again) == [4, 6, 8]
    for round_no, kept in ((10, [4, 6, 8, 10]), (12, [8, 10, 12])):
        again.save(round_no, parts(round_no))
        again.published(round_no)
        assert rounds_of(again) == kept


@pytest.mark.parametrize("killed_at", range(8))
def test_process_killed_while_one_goes_leaves_it_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
):
    class Killed(BaseException):
        pass

    calls, this = 0, threading.current_thread()

    def dying(function):
        def call(*arguments, **options):
            nonlocal calls
            if threading.current_thread() is this:  # a thread that an earlier test left behind goes on
                calls += 1
                if calls > killed_at:
                    raise Killed
            return function(*arguments, **options)

        return call

    one = store(tmp_path)
    one.adopt("run-1")
    kept = Saved(2, one.save(2, parts(2)))
    one.published(2)
    one.save(4, parts(4))
    with monkeypatch.context() as patched:
        for name in ("unlink", "rmdir", "replace", "rename"):
            patched.setattr(os, name, dying(getattr(os, name)))
        try:
            one.save(4, parts(4.5))  # the same round anew, as after a missed lease
            one.published(4)
            one.save(6, parts(6))
            one.published(6)
        except Killed:
            pass
    again = store(tmp_path)
    for saved in again.held():
        again.load(saved, ("trunk", "experts"))
    assert kept in again.held() or rounds_of(again)[-2:] == [4, 6]


def test_disk_that_cannot_be_read_now_is_not_taken_for_a_checkpoint_that_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    one = store(tmp_path)
    one.adopt("run-1")
    digest = one.save(2, parts(2))

    def none_left(*arguments: object) -> bytes:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", none_left)
        for look in (one.held, lambda: one.load(Saved(2, digest), ("trunk",))):
            with pytest.raises(CheckpointError) as caught:
                look()
            assert caught.value.code == "checkpoint-read"
    assert one.held() == (Saved(2, digest),)


def test_folder_of_another_run_party_or_agreement_is_refused(tmp_path: Path):
    one = store(tmp_path)
    one.adopt("run-1")
    with pytest.raises(CheckpointError, match="run run-1, not of run-2"):
        store(tmp_path).adopt("run-2")
    with pytest.raises(CheckpointError, match="party alder, not of birch"):
        store(tmp_path, party="birch")
    with pytest.raises(CheckpointError, match="other settings"):
        store(tmp_path, agreement="b" * 64)


def test_run_goes_on_with_the_same_text_only(tmp_path: Path):
    PartyStore(tmp_path, "alder", AGREEMENT, "text-1").adopt("run-1")
    assert PartyStore(tmp_path, "alder", AGREEMENT, "text-1").run == "run-1"
    with pytest.raises(CheckpointError, match=r"training text .* changed"):
        PartyStore(tmp_path, "alder", AGREEMENT, "text-2")


def test_checkpoint_copied_from_another_party_is_not_offered(tmp_path: Path):
    for party in ("alder", "birch"):
        (tmp_path / party).mkdir()
        one = store(tmp_path / party, party)
        one.adopt("run-1")
    store(tmp_path / "alder").save(2, parts(1.0))
    (tmp_path / "alder" / "private").rename(tmp_path / "birch" / "private")
    assert store(tmp_path / "birch", "birch").held() == ()


def test_checkpoints_of_a_line_that_was_given_up_do_not_push_out_valid_ones(tmp_path: Path):
    """After going back to round 2, rounds 20 and 30 must not count among those that are kept."""
    one = store(tmp_path)
    one.adopt("run-1")
    published = one.save(2, parts(2.0))
    for round_no in (20, 30):
        one.save(round_no, parts(round_no))
    again = store(tmp_path)  # a new process goes back, as everybody does
    again.load(Saved(2, published), ("trunk",))
    again.went_back_to(2)
    assert [saved.round for saved in again.held()] == [2, 20, 30]  # nothing is deleted before there is something new
    again.published(2)
    again.save(4, parts(4.0))
    assert rounds_of(again) == [2, 4, 20, 30]
    again.published(4)
    assert rounds_of(again) == [2, 4]
    again.save(6, parts(6.0))
    again.published(6)
    assert rounds_of(again) == [2, 4, 6]


def test_rewritten_round_of_a_line_that_was_given_up_is_kept(tmp_path: Path):
    one = store(tmp_path)
    one.adopt("run-1")
    for round_no in (2, 4, 6):
        one.save(round_no, parts(round_no))
    one.went_back_to(2)
    digest = one.save(4, parts(4.5))
    assert Saved(4, digest) in one.held()
    one.published(2)
    one.published(4)
    assert rounds_of(one) == [2, 4]
    one.save(6, parts(6.5))
    assert rounds_of(one) == [2, 4, 6]
