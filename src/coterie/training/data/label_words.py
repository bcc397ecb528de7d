"""Texts and their classes as sequences: a prompt, and the word of the class at one place in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from coterie.config import DataSpec
from coterie.config.data import LabelWordsSpec
from coterie.dp.label_words import LabelWords
from coterie.errors import ConfigError, DataError
from coterie.training.data.packing import Sequences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def classified(
    texts: Sequence[str], classes: Sequence[str], spec: DataSpec, tokenizer: PreTrainedTokenizerBase, pad_id: int
) -> Sequences:
    """One sequence for each text, written by the prompt; the word of its class alone is predicted.

    A text that is too long is cut at its end, so that the prompt stays whole.

    Args:
        texts: to write.
        classes: of each; empty: the first word stands where the answer would.
        spec: with ``label_words``.
        tokenizer: a fast one. With a mask token the answer is masked, else it ends the sequence.
        pad_id: fills up the batch behind short sequences.

    Raises:
        ConfigError: a class's word is not one token, or the prompt does not fit the kind of model.
        DataError: the prompt alone is longer than a sequence.
    """
    asked = spec.label_words
    if asked is None:
        raise ConfigError("there are no label words.", code="config-label-words", fix="set data.label_words")
    mask = tokenizer.mask_token
    before, after = asked.prompt.split("{word}")
    if mask is None and after.strip():
        raise ConfigError(
            "`data.label_words.prompt` goes on after {word}.",
            code="config-label-words",
            why="a causal model predicts the word from what stands before it, and never reads what follows",
            fix="end the prompt with {word}, or use a masked model, whose tokenizer has a mask token",
        )
    ids = word_ids(asked, tokenizer)
    of_class = dict(zip(asked.words, ids, strict=True))
    prompt = before if mask is None else f"{before}{mask}{after}"
    rows, places = [], []
    for text, name in zip(texts, classes, strict=True):
        row = _written(prompt, text, spec.sequence_length - (mask is None), tokenizer)
        place = len(row) if mask is None else row.index(tokenizer.mask_token_id)
        answer = of_class.get(name, ids[0])
        rows.append([*row, answer] if mask is None else [*row[:place], answer, *row[place + 1 :]])
        places.append(place)
    lengths = torch.tensor([len(row) for row in rows])
    starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    trained = torch.zeros(int(starts[-1]), dtype=torch.bool)
    trained[starts[:-1] + torch.tensor(places)] = True
    return Sequences(
        tokens=torch.tensor([token for row in rows for token in row], dtype=torch.int32),
        starts=starts,
        document_S=torch.arange(len(rows)),
        pad_id=pad_id,
        trained=trained,
        words=LabelWords(ids),
        mask_id=None if mask is None else tokenizer.mask_token_id,
    )


def word_ids(asked: LabelWordsSpec, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The token of each class's word, in the order of the settings.

    Raises:
        ConfigError: a word is not one token, or two are the same one.
    """
    found = []
    for name, word in asked.words.items():
        ids = tokenizer(word, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) != 1:
            raise ConfigError(
                f"the word {word!r} of class {name} is {len(ids)} tokens of this tokenizer.",
                code="config-label-words",
                why="the head is asked for one token",
                fix="choose a shorter or more common word; most tokenizers want a space before it (' good')",
            )
        found.append(int(ids[0]))
    if len(set(found)) < len(found) or tokenizer.unk_token_id in found:
        raise ConfigError(
            "two classes' words are the same token, or one is unknown to the tokenizer.",
            code="config-label-words",
            why="nothing would tell the classes apart",
            fix="choose other words",
        )
    return tuple(found)


def _written(prompt: str, text: str, most: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of the prompt around a text, which is cut at its end until both fit."""
    kept = text if tokenizer.mask_token is None else text.replace(tokenizer.mask_token, " ")
    while True:
        ids: list[int] = tokenizer(prompt.replace("{text}", kept), verbose=False)["input_ids"]
        if tokenizer.mask_token is None and ids[-1:] == [tokenizer.eos_token_id]:
            ids = ids[:-1]  # the word comes before the end of the text
        if 0 < len(ids) <= most:
            return ids
        if not kept:
            raise DataError(
                "`data.label_words.prompt` alone is longer than a sequence, or no token at all.",
                code="data-prompt-long",
                why="a text is cut so that the prompt stays whole; the word is predicted from what precedes it",
                fix="set data.sequence_length to more, or write another prompt",
            )
        places = tokenizer(kept, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ends = [last for _, last in places["offset_mapping"]]
        fitting = ends[: max(len(ends) - (len(ids) - most), 0)]
        # A character of several tokens ends with each of them, so an end may be the whole text's.
        kept = kept[: max((end for end in fitting if end < len(kept)), default=0)]
