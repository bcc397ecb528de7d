"""Documents come out of every format alike, and each kind of bad file is refused in one sentence."""

from __future__ import annotations

import csv
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from coterie.config import DataSpec
from coterie.errors import DataError
from coterie.training.data.documents import read_documents

TEXTS = ("The first note.\nIt has two lines.", "A second, with a comma", "None", "drei Bäume")
USERS = ("ann", "bob", "ann", "7")


def write(path: Path, texts: tuple[str, ...] = TEXTS, column: str = "text") -> Path:
    rows = [{"id": number, column: texts[number], "who": USERS[number]} for number in range(len(USERS))]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(str(path))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def read(path: Path, user_column: str | None = None, **settings: Any) -> Any:
    return read_documents([path], DataSpec(train=(path,), **settings), user_column=user_column)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_every_format_gives_the_same_documents_and_users(tmp_path: Path, suffix: str) -> None:
    documents = read(write(tmp_path / f"a{suffix}"), user_column="who")
    assert documents.texts == TEXTS
    assert documents.users == USERS


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("file", ("one\ntwo\n\n \nthree\n",)),
        ("line", ("one", "two", "three")),
        ("paragraph", ("one\ntwo", "three")),
    ],
)
def test_plain_text_is_split_as_asked(tmp_path: Path, split: str, expected: tuple[str, ...]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\n \nthree\n")
    assert read(path, split_text=split).texts == expected


def test_blank_documents_are_left_out_together_with_their_users(tmp_path: Path) -> None:
    documents = read(write(tmp_path / "a.jsonl", ("x", " ", "", "y")), user_column="who")
    assert documents.texts == ("x", "y")
    assert documents.users == ("ann", "7")


def test_the_format_setting_wins_over_the_suffix(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text('{"text": "inside"}\n')
    assert read(path, format="jsonl").texts == ("inside",)


def test_reading_asks_nothing_of_the_network_and_leaves_no_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("private text was about to leave, or the library called home")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for suffix in (".jsonl", ".csv", ".parquet"):
        read(write(tmp_path / f"a{suffix}"))
    assert all(path.stat().st_size == 0 for path in (tmp_path / "cache").rglob("*") if path.is_file()), "lock files"


def missing(folder: Path) -> Path:
    return folder / "nowhere.jsonl"


def empty(folder: Path) -> Path:
    (folder / "empty.csv").write_text("")
    return folder / "empty.csv"


def blank(folder: Path) -> Path:
    return write(folder / "blank.jsonl", (" ", "\n", "", " "))


def other_column(folder: Path) -> Path:
    return write(folder / "other.csv", column="body")


def numbers(folder: Path) -> Path:
    (folder / "numbers.jsonl").write_text('{"text": 5, "note": "x"}\n')
    return folder / "numbers.jsonl"


def broken(folder: Path) -> Path:
    (folder / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    return folder / "broken.jsonl"


def unknown(folder: Path) -> Path:
    (folder / "notes.docx").write_text("x")
    return folder / "notes.docx"


def latin(folder: Path) -> Path:
    (folder / "latin.txt").write_bytes("Bäume".encode("latin-1"))
    return folder / "latin.txt"


@pytest.mark.parametrize(
    ("make", "code", "words"),
    [
        (missing, "data-no-file", "There is no data file"),
        (empty, "data-empty", "is empty (0 bytes)"),
        (blank, "data-empty", "holds no text"),
        (other_column, "data-no-column", "has no column `text`: its first line names 3 columns, none of them that"),
        (numbers, "data-not-text", "Column `text` of"),
        (broken, "data-unreadable", "cannot be read as jsonl"),
        (unknown, "data-format", "its suffix `.docx`"),
        (latin, "data-encoding", "not UTF-8 text (line 1, byte 2)"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_sentence_with_its_name(
    tmp_path: Path, make: Callable[[Path], Path], code: str, words: str
) -> None:
    path = make(tmp_path)
    with pytest.raises(DataError) as caught:
        read(path)
    assert caught.value.code == code
    assert words in caught.value.message
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message


def test_a_record_without_its_user_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x", "who": "ann"}\n{"text": "y", "who": null}\n')
    with pytest.raises(DataError, match=r"names no user in column `who` \(line 2\)"):
        read(path, user_column="who")
    plain = tmp_path / "a.txt"
    plain.write_text("x")
    with pytest.raises(DataError, match="plain text and has no column `who`"):
        read(plain, user_column="who")


def test_real_dialogues_are_read_whole(real_text_dir: Path) -> None:
    path = real_text_dir / "mts_dialog" / "valid.csv"
    documents = read(path, text="dialogue")
    with path.open(newline="", encoding="utf-8") as file:
        expected = tuple(row["dialogue"] for row in csv.DictReader(file))
    assert [text.split() for text in documents.texts] == [text.split() for text in expected]
