"""What `coterie data check` counts, on texts whose counts are known by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coterie.cli.app import main
from coterie.config import DataSpec
from coterie.training.data.check import DataReport, check_data
from coterie.training.data.documents import read_documents
from coterie.training.data.tokenizer import tokenize, train_tokenizer

WORDS = "the quick brown fox jumps over the lazy dog while seven old owls watch from a tall dark tree"


def report(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> DataReport:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = DataSpec.model_validate({"train": [folder / "rows.jsonl"], **changes})
    tokenizer = train_tokenizer([], 260)  # a byte is a token, and an end
    documents = read_documents(spec.train, spec)
    return check_data(documents, tokenize(documents, spec, tokenizer), spec, tokenizer)


def test_counts_lengths_and_what_is_cut(tmp_path: Path) -> None:
    rows = [{"text": "abcd"}, {"text": "abcdefgh"}, {"text": "xy"}]
    whole = report(tmp_path, rows, packing="records", sequence_length=6)
    assert (whole.documents, whole.records, whole.tokens, whole.predicted) == (3, 3, 5 + 6 + 3, 4 + 5 + 2)
    assert (whole.shortest, whole.median, whole.longest) == (3, 5, 6)
    assert (whole.cut, whole.cut_tokens, whole.left_out, whole.most_pieces) == (1, 2, 0, 1)
    pieces = report(tmp_path, rows, packing="chunks", sequence_length=6)
    assert (pieces.records, pieces.cut, pieces.most_pieces) == (4, 0, 2)


def test_what_says_nothing_is_counted(tmp_path: Path) -> None:
    found = report(tmp_path, [{"text": "abcd"}, {"text": " "}, {"text": None}, {"text": ""}])
    assert (found.documents, found.records, found.blank) == (1, 1, 3)
    (tmp_path / "lines.txt").write_text("one\n\ntwo\n")
    spec = DataSpec.model_validate({"train": [tmp_path / "lines.txt"], "split_text": "line"})
    assert read_documents(spec.train, spec).blank == 1  # the end of the last line begins no other


def test_duplicates_and_texts_that_say_nearly_the_same(tmp_path: Path) -> None:
    near = WORDS.replace("tree", "oak")
    other = "a report on the weather of last week, with rain on monday and wind on every other day of it"
    found = report(tmp_path, [{"text": text} for text in (WORDS, other, WORDS, near.upper(), "something else")])
    assert found.duplicates == 1
    assert found.alike == (3,)


def test_what_has_no_label_stands_in_brackets_and_figures_hold_no_text(tmp_path: Path) -> None:
    found = report(tmp_path, [{"prompt": "ab", "completion": "cd"}], form="prompt_completion")
    assert found.first == ("[|a|b|]|c|d|<|endoftext|>",)
    assert found.predicted == 3
    assert "first" not in found.as_json()


def test_the_command_says_it_of_a_train_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "ab", "completion": "cd"}) + "\n")
    (tmp_path / "public.txt").write_text("a")
    (tmp_path / "train.yaml").write_text(
        "model: {family: olmoe}\nrun_dir: run\ntrain: {rounds: 1}\nprivacy: {epsilon: 8}\n"
        "data: {train: rows.jsonl, test: test.jsonl, form: prompt_completion,\n"
        "       tokenizer: {train: {files: [public.txt], vocab_size: 260}}}\n"
    )
    held_out = [json.dumps({"prompt": "e", "completion": word}) + "\n" for word in ("f", "gh")]
    (tmp_path / "test.jsonl").write_text("".join(held_out))
    with pytest.raises(SystemExit) as ended:
        main(["data", "check", str(tmp_path / "train.yaml"), "--json", str(tmp_path / "figures.json")])
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert "1 (prompt_completion), as 1 records" in shown
    assert "[|a|b|]|c|d|" in shown
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["predicted"] == 3
    assert "held out    2 documents, as 2 records with 5 tokens to predict" in shown
    assert figures["held_out"] == {"documents": 2, "records": 2, "blank": 0, "predicted": 5, "trained": 0}
    assert not (tmp_path / "run").exists()
    assert "NOTE" not in shown
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(SystemExit) as ended:
        main(["data", "check", str(tmp_path / "train.yaml")])
    assert ended.value.code == 1
    assert "data-no-file" in capsys.readouterr().err


def test_held_out_text_that_is_trained_on_and_users_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [("ann", "one two"), ("bob", "three four"), ("ann", "five six"), ("ann", "seven")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"who": w, "text": t}) + "\n" for w, t in rows))
    (tmp_path / "test.jsonl").write_text('{"text": "five six"}\n{"text": "five six!"}\n{"text": " "}\n')
    (tmp_path / "public.txt").write_text("a")
    (tmp_path / "train.yaml").write_text(
        "model: {family: olmoe}\nrun_dir: run\ntrain: {rounds: 1}\n"
        "privacy: {epsilon: 8, unit: user, user_column: who}\n"
        "data: {train: rows.jsonl, test: test.jsonl, packing: records,\n"
        "       tokenizer: {train: {files: [public.txt], vocab_size: 260}}}\n"
    )
    with pytest.raises(SystemExit) as ended:
        main(["data", "check", str(tmp_path / "train.yaml"), "--json", str(tmp_path / "figures.json")])
    assert not ended.value.code
    shown, figures = capsys.readouterr().out, json.loads((tmp_path / "figures.json").read_text())
    assert "NOTE: 1 of them is in the text to train on, too" in shown
    assert "everything of one user (2 users, of up to 3 records)" in shown
    assert (figures["users"], figures["most_of_one"], figures["held_out"]["trained"]) == (2, 3, 1)


def test_the_text_of_a_party_is_checked_by_what_was_agreed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [("ann", "one two"), ("bob", "three four"), ("ann", "five six")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"who": w, "text": t}) + "\n" for w, t in rows))
    (tmp_path / "public.txt").write_text("a")
    (tmp_path / "federation.yaml").write_text(
        "name: grove\nmodel: {family: olmoe}\ntrain: {rounds: 1}\ncoordinator: {endpoint: 'h:3'}\n"
        "parties: {alder: {endpoint: 'h:1'}, birch: {endpoint: 'h:2'}}\nprivacy: {epsilon: 8, unit: user}\n"
    )
    party = (
        "party: {name}\nfederation: federation.yaml\nkit: kit\nrun_dir: run\ntrunk: t\nshard: s\n"
        "privacy: {{ledger: ledger, user_column: who}}\n"
        "data: {{train: rows.jsonl, packing: records,\n"
        "       tokenizer: {{train: {{files: [public.txt], vocab_size: 260}}}}}}\n"
    )
    for name in ("alder", "cedar"):
        (tmp_path / f"{name}.yaml").write_text(party.format(name=name))
    for file, code, words in (
        ("alder.yaml", 0, "everything of one user (2 users, of up to 2 records)"),
        ("cedar.yaml", 1, "cedar is not a party of grove"),
        ("federation.yaml", 2, "a federation.yaml names no text"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["data", "check", str(tmp_path / file)])
        shown = capsys.readouterr()
        assert ((ended.value.code or 0), words in " ".join((shown.out + shown.err).split())) == (code, True), file
    assert not (tmp_path / "run").exists()
