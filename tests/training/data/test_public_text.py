"""Text that is called public and is trained on under a promise is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from coterie.config import DataSpec
from coterie.errors import DataError
from coterie.training.data.documents import read_documents
from coterie.training.data.public_text import check_not_private, read_public

LONG = "a cough, a fever and no pain in the chest; the knee is swollen since Monday, and it is worse at night, too"


def refused(folder: Path, public: list[str], private: list[str], copy: str = "public.txt") -> str | None:
    (folder / "private.txt").write_text("\n".join(private) + "\n")
    if copy == "public.txt":
        (folder / copy).write_text("\n".join(public) + "\n")
    data = DataSpec(train=[folder / "private.txt"], sequence_length=16, split_text="line")
    files = [folder / copy]
    public_text, private_text = read_documents(files, data), read_documents(data.train, data)
    try:
        check_not_private(public_text, files, private_text, data.train, "--text", "name other text")
    except DataError as error:
        return f"{error.code}: {error}"
    return None


@pytest.mark.parametrize("copy", ["private.txt", "link.txt", "sub/../private.txt"])
def test_a_file_that_is_trained_on_is_refused_by_whatever_path(tmp_path: Path, copy: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.txt").symlink_to(tmp_path / "private.txt")
    assert "is a file of `data.train`" in (refused(tmp_path, [], ["a cough", "a fever"], copy) or "")


def test_a_copy_half_of_one_and_one_whole_document_are_refused(tmp_path: Path) -> None:
    private = [f"note {number}" for number in range(8)]
    for public in (private, [*private[:3], "the sun", "the moss", "a fern"]):
        assert "documents are in `data.train`, too" in (refused(tmp_path, public, private) or "")
    assert "1 of 9 documents" in (refused(tmp_path, [LONG, *(f"fern {n}" for n in range(8))], [*private, LONG]) or "")


def test_phrases_that_many_people_write_are_no_leak(tmp_path: Path) -> None:
    assert refused(tmp_path, ["Thank you.", "the sun", "the moss"], ["Thank you.", "a cough", "a fever"]) is None


def test_a_missing_file_is_looked_for_from_the_current_folder(tmp_path: Path) -> None:
    data = DataSpec(train=[tmp_path / "private.txt"], sequence_length=16)
    with pytest.raises(DataError, match="from the current folder") as error:
        read_public([tmp_path / "nowhere.txt"], data, "--public")
    assert error.value.where == "--public"
