"""Tokenizers: the model's own, one from a path, or a byte-level BPE trained on public files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from coterie.config import DataSpec, ModelSpec, TokenizerSpec
from coterie.errors import ConfigError, DataError
from coterie.models.zoo.build import files_alone
from coterie.training.data.chat import encoded, read_template
from coterie.training.data.documents import Documents, read_documents
from coterie.training.data.label_words import classified
from coterie.training.data.packing import Sequences, pack, pack_answers

END = "<|endoftext|>"
PAD = "<|pad|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; every string can be encoded and decoded again without loss.

    Its vocabulary repeats pieces of the texts, so they must be public. Id 0 ends a text, id 1 pads.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def get_tokenizer(spec: TokenizerSpec, model: ModelSpec, data: DataSpec) -> PreTrainedTokenizerBase:
    """The tokenizer that the settings name; a trained one is made now.

    Raises:
        ConfigError: none is named, and the model is a family with random weights, which brings none.
        DataError: the path holds no tokenizer, or a public file cannot be read.
    """
    if spec.train is None and spec.path is None and model.family is not None:
        raise ConfigError(
            f"The model is given by `family: {model.family}`, which brings no tokenizer.",
            code="config-no-tokenizer",
            where="data.tokenizer",
            fix="set it to a path, or make one from public text with a `train` block",
        )
    if spec.train is not None:
        return train_tokenizer(read_vocabulary_text(spec.train.files, data).texts, spec.train.vocab_size)
    if spec.path is not None:
        return load_tokenizer_from(spec.path)
    if model.path is not None:
        return load_tokenizer_from(model.path)
    try:
        return AutoTokenizer.from_pretrained(model.hub, revision=model.revision, local_files_only=files_alone(model))
    except (OSError, ValueError) as error:
        raise DataError(
            f"The tokenizer of hub model {model.hub} cannot be loaded: {str(error).splitlines()[0]}",
            code="data-tokenizer",
            fix="check the name and the network, or set data.tokenizer to a path",
        ) from None


def read_vocabulary_text(files: Sequence[Path], data: DataSpec) -> Documents:
    """The text that a vocabulary is made from: plain text, whatever the run's own is.

    Raises:
        DataError: it cannot be read.
    """
    plain = data.model_copy(update={"format": None, "form": "text", "task": "text", "label_words": None})
    return read_documents(files, plain)


def load_tokenizer_from(path: Path) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder, or from a bare tokenizer.json (which then has no special-token roles)."""
    try:
        if path.is_file():
            return PreTrainedTokenizerFast(tokenizer_file=str(path))
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # tokenizers raises a bare Exception for a broken file
        reason = f"{path} holds no tokenizer that can be loaded: {str(error).splitlines()[0]}"
        raise DataError(
            reason if path.exists() else f"There is no folder and no file {path} with a tokenizer.",
            code="data-tokenizer",
            fix="give a folder with tokenizer.json, or that file (in settings: data.tokenizer.path)",
        ) from None


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, with what the tokenizer itself puts at the beginning (and end) of a text."""
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=True, verbose=False)["input_ids"]
    return ids


def tokenize(documents: Documents, spec: DataSpec, tokenizer: PreTrainedTokenizerBase) -> Sequences:
    """Documents as sequences, cut as ``spec`` says; of conversations only the answers have labels.

    Raises:
        DataError: nothing is left to train on; there is no chat template, or it does not fit the turns.
    """
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    if documents.conversations is not None:
        template = read_template(spec.template)
        talks = [encoded(talk, tokenizer, template) for talk in documents.conversations]
        sequences = pack_answers(talks, sequence_length=spec.sequence_length, pad_id=pad_id)
        return sequences if documents.users is None else sequences.with_users(documents.users)
    if documents.classes is not None:
        sequences = classified(documents.texts, documents.classes, spec, tokenizer, pad_id)
        return sequences if documents.users is None else sequences.with_users(documents.users)
    sequences = pack(
        encode(tokenizer, documents.texts),
        sequence_length=spec.sequence_length,
        packing=spec.packing,
        end_id=tokenizer.eos_token_id,
        pad_id=pad_id,
    )
    return sequences if documents.users is None else sequences.with_users(documents.users)
