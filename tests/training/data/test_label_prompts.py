"""Texts written into a prompt: whatever they are made of, they are cut until both fit, and never the prompt."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from coterie.config import DataSpec
from coterie.errors import DataError
from coterie.training.data.label_words import classified
from coterie.training.data.tokenizer import train_tokenizer

TEXTS = (
    "\U0001f600", "so \U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f600\U0001f600",
    "\u4f60\u597d" * 4, "hello \u4f60\u597d", "\u043f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438",
    "e\u0301" * 6,
    "hello hello hello", "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35", " ", "\x00\x00\x00\x00\x00",
)  # fmt: skip
PROMPT = "{text} so{word}"


@pytest.fixture(scope="module")
def byte_level() -> PreTrainedTokenizerFast:
    """Characters outside of ASCII are several tokens each."""
    return train_tokenizer(["hello so bad good"] * 9, 270)


def spec(prompt: str, length: int) -> DataSpec:
    words = {"0": "a", "1": "b"}
    return DataSpec.model_validate(
        {"train": ["x.jsonl"], "task": "label_words", "sequence_length": length,
         "label_words": {"prompt": prompt, "words": words}}
    )  # fmt: skip


def longest(text: str, room: int, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The prompt around the longest beginning of a text that leaves it whole, by trying all."""
    written = [tokenizer(f"{text[:end]} so")["input_ids"] for end in range(len(text), -1, -1)]
    return next(ids for ids in written if len(ids) <= room)


@pytest.mark.parametrize("length", range(4, 17))
def test_a_text_is_cut_between_characters_until_it_fits(length: int, byte_level: PreTrainedTokenizerFast) -> None:
    found = classified(TEXTS, ["1"] * len(TEXTS), spec(PROMPT, length), byte_level, 0)
    word = byte_level("b")["input_ids"]
    for row, text in enumerate(TEXTS):
        best = longest(text, length - 1, byte_level)
        ids = found[row]["input_ids"].tolist()
        assert ids[-1:] == word
        assert byte_level.decode(best).startswith(byte_level.decode(ids[:-1]).removesuffix(" so"))
        assert byte_level.decode(ids[:-1]).endswith(" so")
        assert len(best) - 4 <= len(ids) - 1 <= len(best)  # merges across the cut may cost a character


def test_a_word_that_nothing_precedes_is_refused(byte_level: PreTrainedTokenizerFast) -> None:
    for text in ("\u4f60\u597d", "\U0001f600"):  # three bytes a character, and four
        with pytest.raises(DataError) as caught:
            classified([text], ["1"], spec("{text}{word}", 3), byte_level, 0)
        assert caught.value.code == "data-prompt-long"
