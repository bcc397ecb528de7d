"""Ledgers of two machines put together: never below what either says, and exact where texts can be compared."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from coterie.dp.accounting.accountant import epsilon
from coterie.dp.accounting.ledger import FILE, open_ledger
from coterie.dp.accounting.lifetime import MERGED, ledger_folders, ledgers_under, lifetime, private_runs_on
from coterie.dp.accounting.merging import Merge, merge
from coterie.dp.accounting.texts import OTHER_KEYS, OWN_KEY, Keyring, Originals
from coterie.errors import LedgerError
from helpers.spending import DELTA, MECHANISM, ROUNDS, TEXTS, composed, spend


def test_what_was_spent_elsewhere_on_some_of_the_same_text_is_added_up(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    own = spend(here, "own", TEXTS)
    spend(there, "theirs", [*TEXTS, "one more"])
    spend(there, "theirs, other", ["something", "else"])
    assert merge(there, here) == Merge(2, 0)
    found = lifetime(own, "own", DELTA)
    assert found.spent.epsilon == composed(3), "under another key texts cannot be compared, so all is assumed"
    assert any("hashed with another key" in line for line in found.lines)
    later = spend(here, "later", TEXTS[:1])
    assert later.lifetime(DELTA, "later").epsilon == composed(3), "it shares nothing with `theirs, other`"
    assert spend(here, "apart", ["new text"]).lifetime(DELTA, "apart").epsilon == composed(1)


def test_a_machine_that_has_counted_nothing_takes_the_key_and_compares_exactly(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    spend(first, "one", TEXTS)
    merge(first, second)
    assert Keyring(first).own == Keyring(second).own
    spend(second, "two", TEXTS[3:])
    spend(second, "apart", ["something", "else"])
    own = spend(first, "three", TEXTS[:5])
    merge(second, first)
    assert own.lifetime(DELTA, "three").epsilon == composed(3)


def test_merging_again_adds_what_is_new_and_counts_nothing_twice(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    own = spend(here, "own", TEXTS)
    theirs = spend(there, "theirs", TEXTS, rounds=ROUNDS + 5)
    theirs_before = shutil.copytree(there, tmp_path / "old copy")
    merge(there, here)
    assert merge(there, here) == Merge(0, 1)
    more = epsilon([(MECHANISM, 2 * ROUNDS + 5)], DELTA)
    assert own.lifetime(DELTA, "own").epsilon == more
    theirs.start_run("again", MECHANISM, 1, unit="record", units=40, record={"packing": "records"})
    theirs.record_release("again", 1, 0, "f" * 64, {})
    merge(there, here)
    assert own.lifetime(DELTA, "own").epsilon == epsilon([(MECHANISM, 2 * ROUNDS + 6)], DELTA)
    assert merge(theirs_before, here) == Merge(0, 1), "an older copy takes nothing back"
    assert own.lifetime(DELTA, "own").epsilon == epsilon([(MECHANISM, 2 * ROUNDS + 6)], DELTA)


def test_copies_that_went_their_own_ways_keep_what_each_of_them_knows(tmp_path: Path) -> None:
    here = tmp_path / "here"
    own = spend(here, "shared", TEXTS, rounds=2)
    shutil.copytree(here, tmp_path / "copy")
    copy = spend(tmp_path / "copy", "theirs", TEXTS)
    own = spend(here, "own", TEXTS)
    merge(tmp_path / "copy", here)
    before = own.lifetime(DELTA, "own").epsilon
    assert before == epsilon([(MECHANISM, 2 * ROUNDS + 2)], DELTA)
    merge(here, tmp_path / "copy")
    assert copy.lifetime(DELTA, "theirs").epsilon == before


def test_users_are_compared_between_machines_too(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    spend(there, "theirs", TEXTS[:20], ["ana"] * 20)
    merge(there, here)
    own = spend(here, "own", TEXTS[20:], ["ana"] * 20)
    assert own.lifetime(DELTA, "own").epsilon == composed(2)
    records = spend(here, "records", TEXTS[:20])
    assert records.lifetime(DELTA, "records").epsilon > composed(2)


def test_bad_folders_are_refused_and_nothing_is_copied(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    with pytest.raises(LedgerError, match="holds no ledgers"):
        merge(tmp_path / "nothing", here)
    ledger = spend(there, "theirs", TEXTS)
    spend(here, "own", TEXTS)
    path = ledger.folder / "ledger.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"rounds":20', b'"rounds":19'))
    with pytest.raises(LedgerError, match="does not continue the chain"):
        merge(there, here)
    assert len(ledger_folders(here)) == 1


@pytest.mark.parametrize("damage", ["hashes gone", "hashes torn", "ledger empty", "key gone", "second ledger torn"])
def test_a_copy_that_is_not_whole_is_refused_and_the_whole_one_taken_afterwards(tmp_path: Path, damage: str) -> None:
    """Taken as it is, it would end every figure of one's own, and hide that something is missing."""
    here, there, copy = tmp_path / "here", tmp_path / "there", tmp_path / "copy"
    own, theirs = spend(here, "own", TEXTS), spend(there, "theirs", TEXTS)
    spend(there, "second", ["another", "text"])
    shutil.copytree(there, copy)
    copied = copy / theirs.folder.name
    (hashes,) = (copied / "texts").iterdir()
    if damage == "hashes gone":
        hashes.unlink()
    elif damage == "hashes torn":
        hashes.write_bytes(hashes.read_bytes()[:-1])
    elif damage == "ledger empty":
        (copied / FILE).write_bytes(b"")
    elif damage == "key gone":
        (copy / OWN_KEY).unlink()
    else:
        last = ledger_folders(copy)[-1] / FILE
        last.write_bytes(last.read_bytes()[:-9])
    with pytest.raises(LedgerError):
        merge(copy, here)
    assert len(ledger_folders(here)) == 1
    assert own.lifetime(DELTA, "own").epsilon == composed(1)
    assert merge(there, here) == Merge(2, 0)
    # the other text's hashes are under another key, so it is counted, too
    assert own.lifetime(DELTA, "own").epsilon == composed(3)


def test_a_ledger_is_called_the_same_wherever_it_was_copied(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    spend(here, "own", TEXTS)
    theirs = spend(there, "theirs", TEXTS)
    merge(there, here)
    (copied,) = (book for book in ledgers_under(here) if book.folder.parent.parent.name == MERGED)
    assert copied.public_name() == theirs.public_name()
    assert not (copied.folder.parent / OWN_KEY).exists()


def test_keys_stay_secret_where_they_are_copied(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    spend(here, "own", TEXTS)
    spend(there, "theirs", TEXTS)
    merge(there, here)
    keys = [here / OWN_KEY, *(here / OTHER_KEYS).iterdir()]
    assert len(keys) == 2
    assert {path.stat().st_mode & 0o777 for path in keys} == {0o600}
    assert (here / OTHER_KEYS).stat().st_mode & 0o777 == 0o700


def test_a_run_that_went_on_in_two_copies_counts_every_release_of_both(tmp_path: Path) -> None:
    here = tmp_path / "here"
    own = spend(here, "shared", TEXTS, rounds=2)
    own.start_run("long", MECHANISM, 10, unit="record", units=40, record={"packing": "records"})
    shutil.copytree(here, tmp_path / "copy")
    copy = open_ledger(own.dataset, tmp_path / "copy")
    for number in (1, 2, 3):
        own.record_release("long", number, 0, f"here {number}", {})
    for number in (1, 2):
        copy.record_release("long", number, 0, f"there {number}", {})
    merge(tmp_path / "copy", here)
    assert own.lifetime(DELTA, "long").epsilon == epsilon([(MECHANISM, 2 + 3 + 2)], DELTA)


def test_text_is_taken_to_be_trained_on_where_hashes_are_under_a_key_that_is_gone(tmp_path: Path) -> None:
    spend(tmp_path, "own", TEXTS)
    (tmp_path / OWN_KEY).unlink()
    found = private_runs_on(tmp_path, Originals(["new"]), "e" * 64)
    assert [run.run for run in found] == ["own"]
