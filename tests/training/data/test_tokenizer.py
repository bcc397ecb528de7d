"""A trained tokenizer loses nothing, is the same every time, and survives saving."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from coterie.config import DataSpec, ModelSpec, TokenizerSpec
from coterie.errors import ConfigError, DataError
from coterie.training.data.documents import Documents
from coterie.training.data.tokenizer import encode, get_tokenizer, load_tokenizer_from, tokenize, train_tokenizer

PUBLIC = ("the cat sat on the mat, the cat sat still", "a dog and a cat and a mat") * 3


def test_a_folder_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    """Not that a name of Hugging Face's has another form."""
    with pytest.raises(DataError) as refused:
        load_tokenizer_from(tmp_path / "nowhere")
    assert refused.value.message == f"There is no folder and no file {tmp_path / 'nowhere'} with a tokenizer."


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(PUBLIC, 300)


def test_common_words_become_single_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert 258 < len(tokenizer) <= 300
    assert len(encode(tokenizer, [" cat"])[0]) == 1


_TOKENIZER = train_tokenizer(PUBLIC, 300)


@settings(max_examples=50)
@given(st.text())
def test_any_text_is_decoded_as_it_was(text: str) -> None:
    (ids,) = encode(_TOKENIZER, [text])
    assert _TOKENIZER.decode(ids) == text


def test_training_twice_gives_the_same_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    again = train_tokenizer(PUBLIC, 300)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_saved_and_loaded_it_encodes_alike(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.save_pretrained(str(tmp_path))
    loaded = load_tokenizer_from(tmp_path)
    assert encode(loaded, PUBLIC) == encode(tokenizer, PUBLIC)
    assert (loaded.eos_token_id, loaded.pad_token_id) == (0, 1)
    bare = load_tokenizer_from(tmp_path / "tokenizer.json")
    assert encode(bare, PUBLIC) == encode(tokenizer, PUBLIC)


def test_documents_end_with_the_end_token(tokenizer: PreTrainedTokenizerFast) -> None:
    spec = DataSpec(train=("x.txt",), sequence_length=64)
    sequences = tokenize(Documents(("the cat", "a dog"), ("ann", "bob")), spec, tokenizer)
    assert [sequences[row]["input_ids"][-1].item() for row in range(2)] == [0, 0]
    assert sequences.users == ("ann", "bob")
    assert sequences.pad_id == 1


def test_the_settings_choose_the_tokenizer(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.save_pretrained(str(tmp_path / "given"))
    (tmp_path / "public.txt").write_text("\n".join(PUBLIC))
    model = ModelSpec(family="olmoe")
    by_path = DataSpec(train=("x.jsonl",), tokenizer=str(tmp_path / "given"))
    assert get_tokenizer(by_path.tokenizer, model, by_path).get_vocab() == tokenizer.get_vocab()
    trained = DataSpec(
        train=("x.jsonl",),
        format="jsonl",
        tokenizer={"train": {"files": [tmp_path / "public.txt"], "vocab_size": 280}},
    )
    assert len(get_tokenizer(trained.tokenizer, model, trained)) <= 280
    beside = DataSpec(train=("x.jsonl",))
    chosen = get_tokenizer(beside.tokenizer, ModelSpec(path=tmp_path / "given"), beside)
    assert chosen.get_vocab() == tokenizer.get_vocab()


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no tokenizer"):
        load_tokenizer_from(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json holds no tokenizer"):
        load_tokenizer_from(tmp_path / "tokenizer.json")


def test_a_family_without_a_named_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="which brings no tokenizer"):
        get_tokenizer(TokenizerSpec(), ModelSpec(family="olmoe"), DataSpec(train=(tmp_path / "a.txt",)))


def test_public_files_need_no_column_of_the_private_text(tmp_path: Path) -> None:
    """Classes and conversations are what the private rows hold; a vocabulary is made of any text."""
    (tmp_path / "public.txt").write_text("\n".join(PUBLIC))
    (tmp_path / "public.jsonl").write_text('{"text": "a cat and a dog"}\n')
    words = {"prompt": "{text} is{word}", "words": {"0": " a", "1": " b"}}
    made = {"train": {"files": [tmp_path / "public.txt", tmp_path / "public.jsonl"], "vocab_size": 280}}
    for rows in ({"task": "label_words", "label_words": words}, {"form": "messages"}):
        spec = DataSpec.model_validate({"train": ["x.jsonl"], "tokenizer": made, **rows})
        assert len(get_tokenizer(spec.tokenizer, ModelSpec(family="olmoe"), spec)) > 258
