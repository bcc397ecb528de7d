"""Lifetime figures: by overlap of text, across units, across folders; never below what composition gives."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coterie.dp.accounting.dataset import dataset_digest
from coterie.dp.accounting.groups import Share, group_epsilon, joint_epsilon
from coterie.dp.accounting.ledger import open_ledger
from coterie.dp.accounting.lifetime import lifetime, private_runs_on
from coterie.dp.accounting.overlap import _users_touched
from coterie.dp.accounting.texts import FOLDER, OWN_KEY, Fingerprints, Keyring, Originals
from coterie.errors import LedgerError
from helpers.spending import CHUNKS, DELTA, MECHANISM, ROUNDS, TEXTS, composed, spend


@pytest.mark.parametrize(
    "later",
    [
        [*TEXTS, "one more"],
        TEXTS[1:],
        TEXTS[-1:] + [f"other {i}" for i in range(50)],
        [text.replace(" ", "  ").replace("about", "about\r\n") + "\n" for text in TEXTS[:5]],
        list(reversed(TEXTS)),
    ],
    ids=["one more", "one less", "one in common", "other spaces and line ends", "other order"],
)
def test_runs_on_some_of_the_same_text_add_up_whatever_else_is_in_the_data(tmp_path: Path, later: list[str]) -> None:
    first = spend(tmp_path, "first", TEXTS)
    second = spend(tmp_path, "second", later)
    assert second.lifetime(DELTA, "second").epsilon == composed(2)
    assert first.lifetime(DELTA, "first").epsilon == composed(2)
    assert lifetime(second, "second", DELTA).lines == ("2 runs for the same unit",)


def test_runs_on_other_text_do_not_add_up(tmp_path: Path) -> None:
    spend(tmp_path, "first", TEXTS)
    other = spend(tmp_path, "other", [text.upper() for text in TEXTS])
    assert other.lifetime(DELTA, "other").epsilon == composed(1)


def test_documents_are_one_unit_at_every_length_and_pieces_of_them_are_not(tmp_path: Path) -> None:
    for length in (64, 65, 4096):
        ledger = spend(tmp_path, f"at {length}", TEXTS, record={"packing": "records", "sequence_length": length})
    assert ledger.lifetime(DELTA, "at 64").epsilon == composed(3)
    spend(tmp_path, "cut", TEXTS, record=CHUNKS, pieces=3)
    whole, cut = lifetime(ledger, "at 64", DELTA), lifetime(ledger, "cut", DELTA)
    documents = Share(MECHANISM, 3 * ROUNDS)
    assert whole.spent.epsilon == pytest.approx(joint_epsilon([documents, Share(MECHANISM, ROUNDS, 3)], DELTA))
    assert cut.spent.epsilon == pytest.approx(
        joint_epsilon([Share(MECHANISM, ROUNDS), Share(MECHANISM, 3 * ROUNDS, 1, True)], DELTA), rel=1e-6
    )
    assert "1 run for pieces of documents: counts as a group of 3, the most that a document has" in whole.lines
    assert any("3 runs for documents: counts as a group of two" in line for line in cut.lines)
    finer = spend(tmp_path, "finer", TEXTS, record={**CHUNKS, "sequence_length": 32}, pieces=5)
    assert any("counts as a group of 6" in line for line in lifetime(finer, "finer", DELTA).lines)


def test_for_a_record_a_run_on_users_counts_as_a_group_of_two(tmp_path: Path) -> None:
    spend(tmp_path, "users", TEXTS, [i // 8 for i in range(40)])
    records = spend(tmp_path, "records", TEXTS)
    found = lifetime(records, "records", DELTA)
    two = group_epsilon([(MECHANISM, ROUNDS)], DELTA, 2)
    assert max(two, composed(2)) < found.spent.epsilon < math.inf
    assert "1 run for users: counts as a group of two, since a record's user remains without it" in found.lines


def test_for_a_user_a_run_on_records_counts_as_the_group_of_its_most_records(tmp_path: Path) -> None:
    owners = [0] * 5 + [1 + i // 2 for i in range(35)]
    spend(tmp_path, "records", TEXTS)
    users = spend(tmp_path, "users", TEXTS, owners)
    found = lifetime(users, "users", DELTA)
    expected = joint_epsilon([Share(MECHANISM, ROUNDS), Share(MECHANISM, ROUNDS, 5)], DELTA)
    assert found.spent.epsilon == pytest.approx(expected)
    assert "1 run for records: counts as a group of 5, the most that a user has" in found.lines
    spend(tmp_path, "more records", [*TEXTS, "nobody knows whose", "nor this"])
    assert any("a group of 7" in line for line in lifetime(users, "users", DELTA).lines)
    spend(tmp_path, "cut", TEXTS, record=CHUNKS, pieces=4)
    assert any("a group of 20" in line for line in lifetime(users, "users", DELTA).lines)
    spend(tmp_path, "a crowd", [*TEXTS, *(f"somebody's {i}" for i in range(200))])
    assert lifetime(users, "users", DELTA).spent.epsilon == math.inf


def test_a_run_on_records_without_hashes_has_no_bound_for_a_user(tmp_path: Path) -> None:
    spend(tmp_path, "records", TEXTS, hashed=False)
    users = spend(tmp_path, "users", TEXTS, [i // 2 for i in range(40)])
    assert users.lifetime(DELTA, "users").epsilon == math.inf


@pytest.mark.parametrize("spelled", [str, int, torch.tensor, np.int32], ids=["text", "int", "tensor", "numpy"])
def test_a_user_is_the_same_whatever_type_names_it_and_whatever_it_wrote(tmp_path: Path, spelled: Any) -> None:
    spend(tmp_path, "first", TEXTS[:20], [str(i // 2) for i in range(20)])
    second = spend(tmp_path, "second", TEXTS[20:], [spelled(i // 2) for i in range(20)])
    assert second.lifetime(DELTA, "second").epsilon == composed(2)


def test_texts_that_changed_users_count_as_the_users_they_touch(tmp_path: Path) -> None:
    spend(tmp_path, "first", TEXTS, [f"a{i // 4}" for i in range(40)])
    renamed = spend(tmp_path, "renamed", TEXTS, [f"b{i // 4}" for i in range(40)])
    assert renamed.lifetime(DELTA, "renamed").epsilon == composed(2)
    mixed = spend(tmp_path, "mixed", TEXTS, [f"c{i % 10}" for i in range(40)])
    shares = [Share(MECHANISM, ROUNDS), Share(MECHANISM, ROUNDS, 4, True), Share(MECHANISM, ROUNDS, 4, True)]
    assert mixed.lifetime(DELTA, "mixed").epsilon == pytest.approx(joint_epsilon(shares, DELTA), rel=1e-6)


def test_how_many_users_are_touched_agrees_with_counting_them_one_by_one() -> None:
    drawn = np.random.default_rng(7)
    for _ in range(60):
        prints = []
        for _ in range(2):
            texts = np.sort(drawn.integers(0, 12, drawn.integers(1, 15))).astype(np.uint64)
            prints.append(Fingerprints(texts, drawn.integers(100, 105, texts.size).astype(np.uint64), 1))
        own, other = prints
        most, remains = 0, False
        for user in set(own.users.tolist()):
            mine = set(own.texts[own.users == user].tolist())
            touched = 0
            for their in set(other.users.tolist()):
                theirs = set(other.texts[other.users == their].tolist())
                if their == user or mine & theirs:
                    touched += 1
                    remains |= their != user and not theirs <= mine
            most = max(most, touched)
        assert _users_touched(own, other) == (most, remains)


def test_token_ids_are_known_again_without_their_padding_and_other_columns(tmp_path: Path) -> None:
    rows = [[5, 6, i] for i in range(10)]
    spend(tmp_path, "lists", [{"input_ids": row, "attention_mask": [1, 1, 1]} for row in rows])
    padded = [
        {"input_ids": torch.tensor([*row, 0]), "attention_mask": torch.tensor([1, 1, 1, 0]), "number": i}
        for i, row in enumerate(rows)
    ]
    second = spend(tmp_path, "tensors", padded)
    assert second.lifetime(DELTA, "tensors").epsilon == composed(2)


def test_ledgers_without_hashes_count_by_digest_and_the_figure_says_so(tmp_path: Path) -> None:
    spend(tmp_path, "old", TEXTS, hashed=False)
    spend(tmp_path, "old, other text", ["a", "b"], hashed=False)
    new = spend(tmp_path, "new", TEXTS)
    found = lifetime(new, "new", DELTA)
    assert found.spent.epsilon == composed(2)
    assert "1 run known by its data set's digest" in found.lines
    assert "1 run older than text hashes, so not compared" in found.lines


def test_text_shown_to_others_ends_every_figure_that_speaks_of_some_of_it(tmp_path: Path) -> None:
    private = spend(tmp_path, "private", TEXTS)
    apart = spend(tmp_path, "apart", ["nothing", "in common"])
    shown = [*TEXTS[:1], "and more"]
    assert [run.run for run in private_runs_on(tmp_path, Originals(shown), dataset_digest(shown))] == ["private"]
    assert private_runs_on(tmp_path, Originals(["new"]), dataset_digest(["new"])) == []
    ledger = open_ledger(dataset_digest(shown), tmp_path)
    ledger.record_texts("grove-alder", Originals(shown))
    ledger.record_revealed("grove-alder", "tokens")
    assert lifetime(private, "private", DELTA).revealed == ("grove-alder",)
    assert private.lifetime(DELTA, "private").epsilon == math.inf
    assert apart.lifetime(DELTA, "apart").epsilon == composed(1)


def test_nothing_in_a_ledger_tells_a_text_to_who_has_no_key(tmp_path: Path) -> None:
    ledger = spend(tmp_path / "here", "run", TEXTS, [f"person {i}" for i in range(40)])
    elsewhere = spend(tmp_path / "there", "run", TEXTS, [f"person {i}" for i in range(40)])
    first, second = ([p.read_bytes() for p in (book.folder / FOLDER).iterdir()] for book in (ledger, elsewhere))
    assert first != second
    assert all(b"note" not in content and b"person" not in content for content in first)
    assert 40 * 16 < len(first[0]) < 40 * 16 + 400
    key = tmp_path / "here" / OWN_KEY
    for path in (key, *(ledger.folder / FOLDER).iterdir()):
        assert path.stat().st_mode & 0o777 == 0o600
    assert ledger.public_name() not in str(ledger.folder)
    assert ledger.public_name() != elsewhere.public_name()
    os.chmod(key, 0o644)
    with pytest.raises(LedgerError, match="can be read by others"):
        Keyring(tmp_path / "here")


def test_changed_hashes_and_a_damaged_neighbour_are_refused_not_skipped(tmp_path: Path) -> None:
    ledger = spend(tmp_path, "run", TEXTS)
    other = spend(tmp_path, "other", TEXTS[:3])
    (file,) = (other.folder / FOLDER).iterdir()
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(LedgerError, match="is not what the ledger wrote"):
        ledger.lifetime(DELTA, "run")
    file.write_bytes(content)
    assert ledger.lifetime(DELTA, "run").epsilon == composed(2)
    (other.folder / "ledger.jsonl").write_text("{}\n")
    with pytest.raises(LedgerError, match="is not a ledger"):
        ledger.lifetime(DELTA, "run")


def test_a_run_on_the_same_text_in_another_form_is_named_as_not_compared(tmp_path: Path) -> None:
    spend(tmp_path, "text", TEXTS)
    ids = [{"input_ids": torch.tensor([len(word) for word in text.split()])} for text in TEXTS]
    later = lifetime(spend(tmp_path, "ids", ids), "ids", DELTA)
    assert later.spent.epsilon == pytest.approx(composed(1))
    assert "1 run prepared in another form (text, token ids), so not compared" in later.lines
    spend(tmp_path, "both", [*TEXTS[:1], ids[0]])
    third = lifetime(open_ledger(dataset_digest(ids), tmp_path), "ids", DELTA)
    assert len([line for line in third.lines if "not compared" in line]) == 1, "a form in common is compared"
