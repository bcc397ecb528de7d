"""Made-up records for the self-check: batches of any lengths, and each record in a batch of its own.

Nothing of a real record is used but its keys, shapes and types. Some records are of an extreme kind, because what
one record does to the others is seen best where it has most to do it with.

Shape letters: B records, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.dp.checks.draws import RowDraws
from coterie.dp.heads import TARGETS
from coterie.dp.losses import IGNORED, Batch
from coterie.dp.per_sample.probe import classes_of, synthetic_batch, vocabulary_of
from coterie.dp.refusals import check_rows

TOKENS, SHORT = 11, 6
"""Lengths of made-up records where nothing asks for others."""

PLAIN, EXTREME, ONE_LABEL = "plain", "extreme", "one label"
"""Kinds of records: random tokens; the model's most extreme token, everywhere; random tokens, only one label."""


Side = Literal["left", "right"]
"""Where padding is."""


class SyntheticRecord(NamedTuple):
    """One made-up record: its tokens, what its values are drawn from, its kind, and whether it is filled up to the
    source's longest before the collator sees it, as records are that the data holds padded.
    """

    length: int
    seed: int
    kind: str = PLAIN
    filled: bool = False


class Source(Protocol):
    """Where the self-check gets its batches."""

    @property
    def base(self) -> int:
        """Length of the records where lengths do not matter."""

    @property
    def longest(self) -> int:
        """Most tokens that a record of the data can have."""

    @property
    def padding(self) -> Side | None:
        """Where records are padded before the collator sees them; None if none is."""

    def batch(self, records: Iterable[SyntheticRecord]) -> Batch | None:
        """The records together; None where they do not go into one batch."""


class FromCollator:
    """Batches as the user's collator makes them.

    Args:
        model: its config names the vocabulary.
        collate: list of items to a batch.
        item: a record; its values are not used.
        longest: most tokens of a record of the data, where that is known.
        padding: where records of the data are padded before the collator sees them; None if none is.
        numbers: least and largest of the whole numbers that records hold under a name (a task, a language); made-up
            records take values between, in no order. Default: all alike.
    """

    def __init__(
        self,
        model: Any,
        collate: Callable[[list[Any]], Mapping[str, Any]],
        item: Any,
        longest: int | None = None,
        padding: Side | None = None,
        numbers: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        self._model = model
        self._collate = collate
        self._item = item
        self._whole = length_of(item)
        self._tokens = _Tokens(model)
        self._filler = _filler(model)
        self._numbers = dict(numbers or {})
        self.padding = padding if self._whole is not None else None
        self.base = min(TOKENS, longest or TOKENS)
        if self._whole is not None and not self.usable():
            self.base = self._whole  # a collator of this length only
        self.longest = max(longest or 0, self.base)

    def usable(self) -> bool:
        """Whether made-up records of one length go through the collator.

        Raises:
            PrivacyError: it packs them into one row, or makes no mapping.
        """
        return self.batch([SyntheticRecord(self.base, 0), SyntheticRecord(self.base, 1)]) is not None

    def batch(self, records: Iterable[SyntheticRecord]) -> Batch | None:
        records = list(records)
        items = [self._item_like(record) for record in records]
        try:
            with RowDraws([record.seed for record in records]):
                batch = self._collate(items)
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError):
            return None
        check_rows(batch, len(items))
        return batch

    def _item_like(self, record: SyntheticRecord) -> Any:
        tokens = self._tokens.of(record)
        if isinstance(self._item, Mapping):
            return {name: self._like(name, value, tokens, record) for name, value in self._item.items()}
        if isinstance(self._item, tuple | list):
            return type(self._item)(self._like("", value, tokens, record) for value in self._item)
        return self._like("", self._item, tokens, record)

    def _like(self, name: str, value: Any, tokens: Tensor, record: SyntheticRecord) -> Any:
        if isinstance(value, str):
            return " ".join(_WORDS[int(token) % len(_WORDS)] for token in tokens)
        if not isinstance(value, list | Tensor):
            return self._single(name, value, record)
        given = value if isinstance(value, Tensor) else _numbers(value)
        if given is None:
            return value
        if given.ndim == 1 and len(given) == self._whole and not given.is_floating_point():
            values = self._filled(name, self._sequence(name, tokens, record), record)
        elif given.ndim == 0 and not given.is_floating_point():
            values = torch.tensor(self._single(name, int(given), record))
        elif given.is_floating_point():
            values = torch.randn(given.shape, generator=torch.Generator().manual_seed(record.seed))
        else:
            values = torch.zeros_like(given)
        return values.tolist() if isinstance(value, list) else values.to(value.dtype)

    def _filled(self, name: str, values_T: Tensor, record: SyntheticRecord) -> Tensor:
        gap = self.longest - record.length if record.filled else 0
        sides = (gap, 0) if self.padding == "left" else (0, gap)
        return F.pad(values_T, sides, value=self._filler.get(name, 0))

    def _sequence(self, name: str, tokens: Tensor, record: SyntheticRecord) -> Tensor:
        if "mask" in name:
            return torch.ones_like(tokens)
        if name == "labels":
            return self._tokens.labels(tokens, record)
        if name == "position_ids":
            return torch.arange(len(tokens))
        return tokens if name == "input_ids" else torch.zeros_like(tokens)

    def _single(self, name: str, value: Any, record: SyntheticRecord) -> Any:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return value
        classes = getattr(getattr(self._model, "config", None), "num_labels", None)
        if isinstance(value, int) and name in ("label", "labels") and isinstance(classes, int) and classes > 1:
            return record.seed % classes
        if isinstance(value, int) and name in self._numbers:
            least, largest = self._numbers[name]
            return least + (record.seed ^ 1) % (largest - least + 1)
        return type(value)(isinstance(value, float))


class FromExample:
    """Batches with the keys and types of an example, padded where it has an attention mask.

    Args:
        model: its config names the vocabulary and the token of the padding.
        like: the example; it also says on which side padding is.
    """

    base = TOKENS
    longest = TOKENS
    padding: Side | None = None

    def __init__(self, model: nn.Module, like: Batch) -> None:
        self._model = model
        self._like = like
        self._tokens = _Tokens(model)
        self._filler = _filler(model)
        mask = like.get("attention_mask")
        self._masked = isinstance(mask, Tensor) and mask.ndim == 2
        self._left = self._masked and bool((mask[:, 0] == 0).any())  # type: ignore[index]

    def batch(self, records: Iterable[SyntheticRecord]) -> Batch | None:
        records = list(records)
        longest = max(record.length for record in records)
        if not self._masked and any(record.length != longest for record in records):
            return None
        rows = [self._row(record, longest) for record in records]
        shapes = [{name: value.shape for name, value in row.items() if _has_rows(value)} for row in rows]
        if any(shape != shapes[0] for shape in shapes):
            return None
        return {
            name: torch.cat([row[name] for row in rows]) if _has_rows(value) else value
            for name, value in rows[0].items()
        }

    def _row(self, record: SyntheticRecord, longest: int) -> dict[str, Any]:
        row = synthetic_batch(self._model, self._like, 1, record.length, seed=record.seed)
        ids, labels = row.get("input_ids"), row.get("labels")
        if isinstance(ids, Tensor) and ids.ndim == 2:
            tokens = self._tokens.of(record).to(ids.device, ids.dtype)
            row["input_ids"] = tokens[None]
            if isinstance(labels, Tensor) and labels.shape == ids.shape:
                row["labels"] = self._tokens.labels(tokens, record)[None]
        gap = longest - record.length
        sides = (gap, 0) if self._left else (0, gap)
        for name, value in row.items() if gap else ():
            if _has_rows(value) and value.ndim > 1 and value.shape[1] == record.length:
                padding = (0, 0) * (value.ndim - 2) + sides
                row[name] = F.pad(value, padding, value=self._filler.get(name, 0))
        return row


class _Tokens:
    """Token ids, and labels for them, that a model can be given: none that stands for an image or the like."""

    def __init__(self, model: Any) -> None:
        vocabulary = vocabulary_of(model)
        allowed = torch.ones(vocabulary, dtype=torch.bool)
        allowed[[token for token in _special(model) if token < vocabulary]] = False
        self._allowed = allowed.nonzero().flatten() if int(allowed.sum()) > 1 else torch.arange(vocabulary)
        self._extreme: int | None = None
        self._model = model
        self._classes = classes_of(model)

    def of(self, record: SyntheticRecord) -> Tensor:
        """[T] int64."""
        if record.kind == EXTREME:
            if self._extreme is None:
                self._extreme = self._most_extreme()
            return torch.full((record.length,), self._extreme)
        generator = torch.Generator().manual_seed(record.seed)
        return self._allowed[torch.randint(len(self._allowed), (record.length,), generator=generator)]

    def labels(self, tokens_T: Tensor, record: SyntheticRecord) -> Tensor:
        """[T] labels of a sequence: its own tokens, or classes for a tagger."""
        labels = tokens_T.clone() if self._classes is None else tokens_T % self._classes
        if record.kind == ONE_LABEL:
            labels[:-1] = IGNORED
        return labels

    def _most_extreme(self) -> int:
        table = _embedding(self._model, vocabulary_of(self._model))
        if table is None:
            return int(self._allowed[-1])
        norms = torch.linalg.vector_norm(table.detach(), dim=-1).nan_to_num(0.0, 0.0).cpu()
        here = self._allowed[self._allowed < len(norms)]
        return int(here[norms[here].argmax()])


def length_of(item: Any) -> int | None:
    """Tokens of a record of token ids; None for any other."""
    ids = item.get("input_ids") if isinstance(item, Mapping) else None
    return len(ids) if isinstance(ids, list) or (isinstance(ids, Tensor) and ids.ndim == 1) else None


def padding_of(item: Any, pad: int | None) -> Side | None:
    """Where a record is padded: by its attention mask or, without one, by the token at its ends.

    Args:
        item: a record.
        pad: the model's padding token.
    """
    length = length_of(item)
    if not length:
        return None
    mask = item.get("attention_mask")
    masked = mask is not None and len(mask) == length
    values_T, filler = torch.as_tensor(mask if masked else item["input_ids"]), 0 if masked else pad
    if values_T.ndim != 1 or filler is None or not bool((values_T == filler).any()):
        return None
    return "left" if int(values_T[0]) == filler else "right"


def numbers_of(item: Any) -> Iterator[tuple[str, int]]:
    """The whole numbers of a record by name, those apart that outputs are compared with."""
    for name, value in item.items() if isinstance(item, Mapping) else ():
        if name in ("label", *TARGETS) or isinstance(value, bool):
            continue
        if isinstance(value, Tensor) and value.ndim == 0 and not value.is_floating_point() and not value.is_complex():
            yield name, int(value)
        elif isinstance(value, int):
            yield name, value


def pad_token(model: Any) -> int | None:
    """The padding token that a model's config names."""
    pad = getattr(getattr(model, "config", None), "pad_token_id", None)
    return pad if isinstance(pad, int) and pad >= 0 else None


def _filler(model: Any) -> dict[str, int]:
    """What padding is made of; zeros in all other parts of a record."""
    return {"labels": IGNORED, "input_ids": pad_token(model) or 0}


def _special(model: Any) -> set[int]:
    """Ids that a model's config, or a part of it, gives a meaning of their own."""
    ids: set[int] = set()
    for name, value in config_numbers(getattr(model, "config", None)).items():
        if name.endswith(("_token_id", "_token_index")) and value >= 0:
            ids.add(value)
    return ids


def config_numbers(config: Any) -> dict[str, int]:
    """Every whole number of a config and of its parts, by the path to it."""
    numbers: dict[str, int] = {}

    def walk(path: str, value: Any, depth: int) -> None:
        if isinstance(value, int) and not isinstance(value, bool):
            numbers[path] = value
        elif isinstance(value, float) and value.is_integer():
            numbers[path] = int(value)
        elif depth and isinstance(value, Mapping):
            for name, part in value.items():
                walk(f"{path}.{name}".lstrip("."), part, depth - 1)
        elif depth and hasattr(value, "__dict__") and not isinstance(value, type) and not callable(value):
            walk(path, vars(value), depth - 1)

    walk("", config, 4)
    return numbers


def _embedding(model: Any, vocabulary: int) -> Tensor | None:
    """The table that tokens are looked up in, if its values are here."""
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, nn.Embedding) and module.num_embeddings >= vocabulary and not module.weight.is_meta:
            return module.weight
    return None


def _has_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _numbers(value: list[Any]) -> Tensor | None:
    try:
        return torch.tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return None


_WORDS = ("one", "record", "is", "made", "of", "plain", "words", "that", "nobody", "wrote", "but", "a", "machine")
