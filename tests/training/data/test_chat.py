"""Conversations become one record each, written by the chat template, with labels for answers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from coterie.config import DataSpec
from coterie.errors import DataError
from coterie.training.data.chat import Conversation, encoded
from coterie.training.data.documents import read_documents
from coterie.training.data.packing import Sequences
from coterie.training.data.tokenizer import tokenize, train_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FORGETFUL = (  # as templates of reasoning models: an earlier answer is written in another way
    "{% for m in messages %}<{{ m['role'] }}>"
    "{% if m['role'] == 'assistant' and not loop.last %}...{% else %}{{ m['content'] }}{% endif %}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "a cough?"},
    {"role": "assistant", "content": "rest, and water"},
    {"role": "user", "content": "and a fever?"},
    {"role": "assistant", "content": "see somebody"},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    made = train_tokenizer(["be brief, a cough? rest, and water. and a fever? see somebody"] * 3, 300)
    made.chat_template = TEMPLATE
    return made


def prepared(
    folder: Path, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, **changes: Any
) -> Sequences:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = DataSpec.model_validate({"train": [folder / "rows.jsonl"], "sequence_length": 256, **changes})
    return tokenize(read_documents(spec.train, spec), spec, tokenizer)


def parts(sequences: Sequences, tokenizer: PreTrainedTokenizerBase, row: int = 0) -> tuple[str, str]:
    """The whole record, and what of it has labels."""
    item = sequences[row]
    labels = item["labels"]
    assert torch.equal(labels[labels != -100], item["input_ids"][labels != -100])
    return tokenizer.decode(item["input_ids"]), tokenizer.decode(labels[labels != -100])


def test_answers_alone_have_labels_with_what_ends_them(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    sequences = prepared(tmp_path, [{"messages": TALK}, {"messages": TALK[:3]}], tokenizer, form="messages")
    whole, answers = parts(sequences, tokenizer)
    assert whole == tokenizer.apply_chat_template(TALK, tokenize=False)
    assert answers == "rest, and water</>\nsee somebody</>\n"
    assert sequences.document_S.tolist() == [0, 1]
    assert sequences.predicted_tokens == sum(int((sequences[row]["labels"][1:] != -100).sum()) for row in range(2))


def test_a_template_that_rewrites_earlier_answers_leaves_the_last_one(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "own.jinja").write_text(FORGETFUL)
    sequences = prepared(tmp_path, [{"messages": TALK}], tokenizer, form="messages", template=tmp_path / "own.jinja")
    whole, answers = parts(sequences, tokenizer)
    assert "<assistant>...</>" in whole
    assert answers == "see somebody</>"


@pytest.mark.parametrize(
    ("form", "row"),
    [
        ("instruction", {"instruction": "a cough?", "output": "rest, and water"}),
        ("instruction", {"instruction": "a cough?", "input": "", "output": "rest, and water"}),
        ("prompt_completion", {"prompt": "a cough?", "completion": "rest, and water"}),
        ("prompt_completion", {"prompt": [TALK[1]], "completion": [TALK[2]]}),
    ],
)
def test_every_form_is_the_same_conversation(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, form: str, row: dict[str, Any]
) -> None:
    whole, answers = parts(prepared(tmp_path, [row], tokenizer, form=form), tokenizer)
    assert whole == "<user>a cough?</>\n<assistant>rest, and water</>\n"
    assert answers == "rest, and water</>\n"


def test_an_input_follows_its_instruction(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    row = {"instruction": "be brief", "input": "a cough?", "output": "rest"}
    assert (
        "<user>be brief\n\na cough?</>"
        in parts(prepared(tmp_path, [row], tokenizer, form="instruction"), tokenizer)[0]
    )


def test_without_a_template_a_prompt_and_its_completion_follow_each_other(tmp_path: Path) -> None:
    plain = train_tokenizer(["a cough? rest, and water"] * 3, 300)
    row = {"prompt": "a cough? ", "completion": "rest, and water"}
    sequences = prepared(tmp_path, [row], plain, form="prompt_completion")
    assert parts(sequences, plain) == ("a cough? rest, and water<|endoftext|>", " rest, and water<|endoftext|>")
    with pytest.raises(DataError) as refused:
        prepared(tmp_path, [{"messages": TALK}], plain, form="messages")
    assert refused.value.code == "data-no-template"


def test_a_conversation_is_cut_at_its_end_and_one_without_an_answer_before_is_left_out(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    long = [{"role": "user", "content": "and a fever? " * 40}, TALK[2]]
    rows = [{"messages": long}, {"messages": TALK}]
    length = len(encoded(Conversation(tuple(TALK)), tokenizer)[0])
    sequences = prepared(tmp_path, rows, tokenizer, form="messages", sequence_length=length - 3)
    assert sequences.document_S.tolist() == [1]
    assert sequences.lengths.tolist() == [length - 3]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": "hello secret"}, "a list of turns"),
        ({"messages": [{"role": "user", "text": "secret"}]}, "every turn needs"),
        ({"messages": [{"role": "user", "content": "secret"}]}, "nothing would be trained"),
        ({"messages": [7]}, "every turn needs"),
        ({"messages": [{"role": "assistant", "content": 7}]}, "every turn needs"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": []}]}, "tool calls"),
        ({"messages": [{"role": "assistant", "content": [{"type": "text", "text": "secret"}]}]}, "content in parts"),
    ],
)
def test_what_is_no_conversation_is_said_by_place_without_its_words(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError, match=said) as refused:
        prepared(tmp_path, [{"messages": TALK}, row], tokenizer, form="messages")
    assert refused.value.code == "data-not-chat"
    assert "line 2" in str(refused.value)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"instruction": "secret", "output": 7}, "`output` is a number"),
        ({"instruction": "secret", "output": False}, "`output` is true or false"),
        ({"instruction": "secret", "output": None}, "`output` is nothing"),
        ({"instruction": None, "output": "secret"}, "`instruction` is nothing"),
        ({"instruction": "secret", "input": 0, "output": "secret"}, "`input` is a number"),
    ],
)
def test_an_instruction_is_text_and_so_is_its_answer(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError, match=said) as refused:
        prepared(tmp_path, [row], tokenizer, form="instruction")
    assert refused.value.code == "data-not-chat"
    assert "secret" not in str(refused.value)


def test_a_table_of_instructions_needs_no_column_for_their_input(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("output,instruction\nrest,a cough?\n")
    spec = DataSpec.model_validate({"train": [tmp_path / "rows.csv"], "form": "instruction"})
    (talk,) = read_documents(spec.train, spec).conversations or ()
    assert [message["content"] for message in talk.messages] == ["a cough?", "rest"]


def test_rows_of_another_shape_are_not_sent_to_a_setting_that_does_not_help(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"conversations": []}))
    spec = DataSpec.model_validate({"train": [tmp_path / "rows.jsonl"], "form": "messages"})
    with pytest.raises(DataError, match=r"its columns are: conversations") as refused:
        read_documents(spec.train, spec)
    assert "data.form" in str(refused.value.fix)


def test_a_template_that_refuses_is_one_sentence(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "own.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError) as refused:
        prepared(tmp_path, [{"messages": TALK}], tokenizer, form="messages", template=tmp_path / "own.jinja")
    assert refused.value.code == "data-template"


def test_a_conversation_is_a_record_unless_somebody_says_otherwise() -> None:
    spec = DataSpec.model_validate({"train": "rows.jsonl", "form": "messages"})
    assert spec.packing == "records"
    with pytest.raises(ValueError, match="a conversation is a record"):
        DataSpec.model_validate({"train": "rows.jsonl", "form": "messages", "packing": "chunks"})


def test_a_saved_dataset_folder_gives_the_rows_of_its_files(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"text": f"note {number}", "who": number % 2} for number in range(7)]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"), num_shards=2)
    spec = DataSpec.model_validate({"train": [tmp_path / "saved"]})
    found = read_documents(spec.train, spec, user_column="who")
    assert found.texts == tuple(row["text"] for row in rows)
    assert found.users == tuple(str(row["who"]) for row in rows)
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(tmp_path / "both"))
    for folder, code in ((tmp_path / "both", "data-splits"), (tmp_path, "data-format")):
        with pytest.raises(DataError) as refused:
            read_documents([folder], spec)
        assert refused.value.code == code
