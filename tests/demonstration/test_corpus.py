"""The demo's text: read from source only, split by subject, nothing in two places."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from coterie.demonstration import corpus
from coterie.demonstration.corpus import Corpus, Document, Size, TextPart
from coterie.errors import DataError

NAMES = ("alder", "birch", "cedar", "dogwood", "elm", "fir")


@pytest.fixture(scope="module")
def installed() -> Corpus:
    return corpus.build(NAMES)


def parts(built: Corpus) -> Iterator[TextPart]:
    yield built.public
    yield from built.parties.values()


def documents(built: Corpus) -> Iterator[Document]:
    for part in parts(built):
        yield from (*part.train, *part.test)


def write_library(folder: Path) -> Path:
    """A standard library of one file per subject, with enough to train and hold out."""
    for subject in corpus.SUBJECTS:
        module = sorted(subject.modules)[0]
        lines = [f'def f{n}():\n    """{module} {n} ' + f"says {n} things " * 12 + '"""' for n in range(24)]
        (folder / f"{module}.py").write_text("\n".join(lines), encoding="utf-8")
    (folder / "pydoc_data").mkdir()
    topics = {f"topic{n}": f"about {n} " * 20 for n in range(24)}
    (folder / "pydoc_data" / "topics.py").write_text(f"topics = {topics!r}\n", encoding="utf-8")
    return folder


def test_every_part_has_text_to_train_and_to_test_on(installed: Corpus) -> None:
    for part in installed.parties.values():
        assert 30_000 < sum(len(d.text) for d in part.train) <= Size().party_train
        assert 20_000 < sum(len(d.text) for d in part.test) <= Size().party_test
    assert sum(len(d.text) for d in installed.public.train) > 300_000


def test_no_paragraph_is_in_two_places(installed: Corpus) -> None:
    paragraphs = [p.strip().lower() for d in documents(installed) for p in d.text.split("\n\n")]
    whole = [p for p in paragraphs if len(p) > 60]
    assert len(whole) - len(set(whole)) < 0.001 * len(whole)  # documents cut at a size limit may end alike


def test_a_document_is_held_out_whole(installed: Corpus) -> None:
    for part in parts(installed):
        assert not {d.title for d in part.train} & {d.title for d in part.test}


def test_a_party_has_only_its_own_subject(installed: Corpus) -> None:
    for part, subject in zip(installed.parties.values(), corpus.SUBJECTS, strict=True):
        assert part.subject == subject.name
        assert {d.title.split(".")[0] for d in (*part.train, *part.test)} <= subject.modules


def test_no_module_belongs_to_two_subjects() -> None:
    modules = [module for subject in corpus.SUBJECTS for module in subject.modules]
    assert len(modules) == len(set(modules))
    assert not set(modules) & corpus.LEFT_OUT


def test_subjects_that_no_party_has_are_dealt_to_all_each_document_once(tmp_path: Path) -> None:
    library, whole = write_library(tmp_path), Size(party_test=100_000)
    six, two = corpus.build(NAMES, whole, library), corpus.build(NAMES[:2], whole, library)
    assert two.public == six.public
    everything = [document for part in six.parties.values() for document in (*part.all, *part.test)]
    dealt = [document for part in two.parties.values() for document in (*part.all, *part.test)]
    assert sorted(d.title for d in dealt) == sorted(d.title for d in everything)
    for own, part in zip(("alder", "birch"), two.parties.values(), strict=True):
        kept = {d.title for d in (*part.all, *part.test)}
        assert {d.title for d in (*six.parties[own].all, *six.parties[own].test)} < kept


def test_a_party_has_its_own_share_of_its_own_subject() -> None:
    built = corpus.build(NAMES[:3])
    for part, subject in zip(built.parties.values(), corpus.SUBJECTS, strict=False):
        documents = (*part.all, *part.test)
        own = sum(len(d.text) for d in documents if d.title.split(".")[0] in subject.modules)
        assert 0.25 < own / sum(len(d.text) for d in documents) < 0.55, subject.name


def test_what_is_not_held_out_begins_with_what_is_trained_on() -> None:
    built = corpus.build(NAMES[:3])
    for part in built.parties.values():
        assert [d.title for d in part.all[: len(part.train)]] == [d.title for d in part.train]
        assert not {d.title for d in part.all} & {d.title for d in part.test}
        assert sum(len(d.text) for d in part.all) > sum(len(d.text) for d in part.train)
    assert built.public.all == ()


def test_modules_are_read_and_never_run(tmp_path: Path) -> None:
    library = write_library(tmp_path)
    (library / "json.py").write_text(
        '"""A module that would end the process if it ran. """ + "x"\nimport sys\nsys.exit("was run")\n'
        'def kept():\n    """' + "kept documentation " * 10 + '"""\n',
        encoding="utf-8",
    )
    built = corpus.build(NAMES, library=library)
    assert "json.kept" in {d.title for d in documents(built)}


def test_a_file_that_does_not_parse_is_passed_over(tmp_path: Path) -> None:
    library = write_library(tmp_path)
    (library / "broken.py").write_text("def (:\n", encoding="utf-8")
    (library / "strange.py").write_bytes(b"\xff\xfe\x00 nonsense")
    assert corpus.build(NAMES, library=library) == corpus.build(NAMES, library=library)


def test_methods_stay_with_their_class(tmp_path: Path) -> None:
    library = write_library(tmp_path)
    (library / "json.py").write_text(
        'class Encoder:\n    """' + "Makes text of values. " * 5 + '"""\n'
        '    def encode(self):\n        """Return the text of one value."""\n',
        encoding="utf-8",
    )
    found = {d.title: d.text for d in documents(corpus.build(NAMES, library=library))}
    assert "Encoder.encode: Return the text of one value." in found["json.Encoder"]


def test_repeated_documentation_is_kept_once(tmp_path: Path) -> None:
    library = write_library(tmp_path)
    same = '    """' + "The same words in two classes. " * 5 + '"""\n'
    (library / "json.py").write_text(f"def one():\n{same}def two():\n{same}", encoding="utf-8")
    texts = [d.text for d in documents(corpus.build(NAMES, library=library)) if "same words" in d.text]
    assert len(texts) == 1


def test_the_files_hold_the_documents(tmp_path: Path) -> None:
    built = corpus.build(NAMES[:2], Size(2000, 500, 800, 400), write_library(tmp_path))
    files = built.write(tmp_path / "data")
    assert set(files) == {"public", "alder", "birch"}
    rows = [json.loads(line) for line in files["birch"]["test"].read_text("utf-8").splitlines()]
    assert [Document(**row) for row in rows] == list(built.parties["birch"].test)


def test_parts_are_cut_to_size(tmp_path: Path) -> None:
    built = corpus.build(NAMES, Size(2000, 500, 800, 400), write_library(tmp_path))
    assert all(sum(len(d.text) for d in p.train) <= 800 for p in built.parties.values())
    assert sum(len(d.text) for d in built.public.train) <= 2000


def test_a_library_without_source_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too little documentation") as caught:
        corpus.build(NAMES[:3], library=tmp_path)
    assert caught.value.code == "demo-no-library-source"


@pytest.mark.parametrize("count", [0, 7])
def test_more_parties_than_subjects_is_a_clear_error(count: int) -> None:
    with pytest.raises(DataError, match="6 subjects"):
        corpus.build([f"p{n}" for n in range(count)])
