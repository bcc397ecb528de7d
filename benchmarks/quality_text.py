"""The text of `quality.py`: seven public sets that play seven parties' private domains, and what is public to all.

Each set's held-out text is its own held-out file where it has one, else the last tenth. Documents are dealt in an
order fixed by their digest, so that no seed decides what a party holds.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from coterie.demonstration.corpus import build

MIN_CHARACTERS = 40
PIECE = 2000
"""Characters of one document where a set is one long text."""

Texts = list[str]


@dataclass(frozen=True)
class Domain:
    """What one party holds; ``train`` is everything it may train on."""

    train: Texts
    test: Texts


def data_folder(named: Path | None = None) -> Path:
    """The folder of the sets: ``named``, COTERIE_TEST_DATA, or shared/data beside the repository.

    Raises:
        FileNotFoundError: it is not there.
    """
    variable = os.environ.get("COTERIE_TEST_DATA")
    folder = named or (Path(variable) if variable else Path(__file__).resolve().parents[2] / "shared" / "data")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} holds no text; name its folder with --data or COTERIE_TEST_DATA")
    return folder


def read_domains(folder: Path) -> dict[str, Domain]:
    """All seven sets, in the order in which parties join."""
    found = {}
    for name, read in _READERS.items():
        train, test = read(folder)
        held = set(_ordered(test))
        found[name] = Domain([text for text in _ordered(train) if text not in held], _ordered(test))
    return found


def public_text(folder: Path, characters: int) -> Texts:
    """What everybody starts from: documentation of Python's library, and questions of the commonsense train files."""
    half = characters // 2
    library = [document.text for document in build(("nobody",)).public.train]
    asked = [
        f"{row['instruction']}\n{row['output']}"
        for name in ("boolq", "openbookqa", "ARC-Easy", "ARC-Challenge")
        for row in json.loads((folder / "commonsense_qa" / name / "train.json").read_text("utf-8"))
    ]
    return _first(library, half) + _first(_ordered(asked), half)


def shares(domains: Mapping[str, Domain], characters: Mapping[str, int]) -> dict[str, Texts]:
    """Each party its own set, cut to so many characters."""
    return {name: _first(domains[name].train, most) for name, most in characters.items()}


def dealt(domains: Mapping[str, Domain], characters: int) -> dict[str, Texts]:
    """The same text, dealt out evenly: every party holds a part of every set."""
    names = list(domains)
    whole = shares(domains, dict.fromkeys(names, characters))
    return {
        name: [text for domain in names for text in whole[domain][number :: len(names)]]
        for number, name in enumerate(names)
    }


def held_out(domain: Domain, characters: int) -> Texts:
    """What a model is measured on."""
    return _first(domain.test, characters)


def write_texts(path: Path, texts: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def _first(texts: Iterable[str], characters: int) -> Texts:
    """Texts from the front; the one that would pass the limit is cut there."""
    taken: Texts = []
    for text in texts:
        if characters < MIN_CHARACTERS:
            break
        taken.append(text[:characters])
        characters -= len(taken[-1])
    return taken


def _ordered(texts: Iterable[str]) -> Texts:
    """Each text once, in an order that has nothing to do with its content."""
    return sorted(
        {text.strip() for text in texts if len(text.strip()) >= MIN_CHARACTERS},
        key=lambda text: hashlib.sha256(text.encode()).digest(),
    )


def _column(folder: Path, files: Iterable[str], column: str) -> Texts:
    rows = (csv.DictReader(io.StringIO((folder / name).read_text("utf-8"), newline="")) for name in files)
    return [row[column] for table in rows for row in table]


def _before_tab(path: Path) -> Texts:
    return [line.rpartition("\t")[0] for line in path.read_text("utf-8").split("\n")]


def _mts_dialog(folder: Path) -> tuple[Texts, Texts]:
    where = folder / "mts_dialog"
    return _column(where, ["train.csv", "valid.csv"], "dialogue"), _column(where, ["test1.csv"], "dialogue")


def _aci_bench(folder: Path) -> tuple[Texts, Texts]:
    where = folder / "aci_bench"
    held = _column(where, ["clinicalnlp_taskB_test1.csv"], "dialogue")
    return _column(where, ["train.csv", "valid.csv"], "dialogue"), held


def _ag_news(folder: Path) -> tuple[Texts, Texts]:
    return _before_tab(folder / "ag_news" / "train_10k.tsv"), _before_tab(folder / "ag_news" / "test.tsv")


def _gsm8k(folder: Path) -> tuple[Texts, Texts]:
    sides = [
        [json.loads(line) for line in (folder / "gsm8k" / f"{side}.jsonl").read_text("utf-8").splitlines()]
        for side in ("train", "test")
    ]
    train, test = ([f"{row['question']}\n{row['answer']}" for row in rows] for rows in sides)
    return train, test


def _shakespeare(folder: Path) -> tuple[Texts, Texts]:
    whole = (folder / "tiny_shakespeare" / "input.txt").read_text("utf-8")
    border = whole.index("\n\n", len(whole) * 9 // 10)
    return _pieces(whole[:border]), _pieces(whole[border:])


def _pieces(text: str) -> Texts:
    """Speeches, joined until a document is long enough."""
    found, piece = [], ""
    for speech in text.split("\n\n"):
        piece += speech + "\n\n"
        if len(piece) >= PIECE:
            found.append(piece)
            piece = ""
    return [*found, piece]


def _wikitext(folder: Path) -> tuple[Texts, Texts]:
    where = folder / "wikitext2_eval"
    train, test = (
        re.split(r"\n (?== [^=\n]+ = \n)", (where / f"{side}.txt").read_text("utf-8")) for side in ("valid", "test")
    )
    return train, test


def _sst2(folder: Path) -> tuple[Texts, Texts]:
    where = folder / "sst2_sentences"
    return _before_tab(where / "train.tsv"), _before_tab(where / "test.tsv")


_READERS: dict[str, Callable[[Path], tuple[Texts, Texts]]] = {
    "mts_dialog": _mts_dialog,
    "aci_bench": _aci_bench,
    "ag_news": _ag_news,
    "gsm8k": _gsm8k,
    "shakespeare": _shakespeare,
    "wikitext": _wikitext,
    "sst2": _sst2,
}
DOMAINS = tuple(_READERS)
