"""Probe passes: small forwards and backwards on synthetic records, in numbers that divide none of the model's own.

They teach `Sites` which dimension holds the records in every tensor that meets a parameter, and raise `NoRuleError`
for a use that no rule covers. Nothing of a real record is used, only the batch's keys, shapes and types.

Shape letters: B records, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from coterie.dp.heads import TARGETS, head_of, num_classes
from coterie.dp.losses import Batch
from coterie.dp.per_sample.captured_pass import CapturedPass
from coterie.dp.per_sample.shared_batch import SharedBatch
from coterie.dp.per_sample.sites import Sites, Size
from coterie.dp.per_sample.weight_expressions import Pullback, Root
from coterie.errors import NoRuleError, PrivacyError

_PRIMES = (5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47)
_LENGTHS = (11, 13, 17, 19, 23, 29)
_ATTEMPTS = 3
_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")


def learn_sites(passes: CapturedPass, batch: Batch, shared: Callable[[int], SharedBatch]) -> Sites:
    """Run the probes on the passes' model; with other numbers if one of the model happens to be a multiple of theirs.

    Args:
        passes: of the model.
        batch: see `synthetic_batch`.
        shared: a batch of so many records of this process alone.

    Raises:
        NoRuleError: see the module text.
    """
    failure: NoRuleError | None = None
    for attempt in range(_ATTEMPTS):
        sites = Sites(probe_sizes(passes.model, attempt))
        try:
            for seed, (records, tokens) in enumerate(sites.sizes):
                trial = synthetic_batch(passes.model, batch, records, tokens, seed)
                with torch.random.fork_rng(devices=[]):
                    passes.run(trial, _forget, sites, shared(records), (records, tokens))
        except NoRuleError as error:
            failure = error
            continue
        misled = sites.settle()
        if misled is None:
            return sites
        parameter, operation, _ = misled
        failure = NoRuleError(
            f"`{parameter}` meets data in `{operation}`, whose sizes are not those of records in any number of them.",
            why="which row belongs to which record cannot be told, so clipping would not bound it",
            fix="freeze the parameter, or use a model whose shapes do not depend on how many records it is given",
        )
    assert failure is not None
    raise failure


def _forget(root: Root) -> None:
    """Keep nothing; but expressions that cannot be run again are found here, not in the first round."""
    for node in {node: None for node, _ in root.captured}:
        Pullback(node, root)
    root.captured = []


def probe_sizes(model: nn.Module, attempt: int = 0) -> tuple[Size, Size, Size]:
    """Records and tokens of the three passes: primes that divide no dimension of a parameter or buffer."""
    taken = {size for tensor in (*model.parameters(), *model.buffers()) for size in tensor.shape}
    free = [prime for prime in _PRIMES if all(size % prime for size in taken)]
    free += [prime for prime in _PRIMES if prime not in free]
    first, second = free[2 * attempt : 2 * attempt + 2]
    config = getattr(model, "config", None)
    limit = min(
        (n for name in _LIMITS if isinstance(n := getattr(config, name, None), int) and n > 0), default=1 << 30
    )
    lengths = [n for n in _LENGTHS if n <= limit and n not in taken and not _related(n, first, second)]
    lengths += [n for n in range(min(limit, 11), 0, -1) if n not in lengths][:2]
    short, long = (lengths * 2)[:2]
    return (first, short), (second, short), (second, long)


def _related(tokens: int, *records: int) -> bool:
    """A number that models make of the tokens is a multiple of a number of records."""
    return any((a * tokens + b) % n == 0 for a in (1, 2) for b in (-2, -1, 0, 1, 2) for n in records)


def synthetic_batch(model: Any, like: Batch, records: int, tokens: int, seed: int = 0) -> dict[str, Any]:
    """A batch with the keys and types of ``like``, made-up values and other sizes.

    Dimensions equal to the length of ``input_ids`` become ``tokens``; token ids are drawn from the vocabulary,
    masks are full, labels of a sequence are its own tokens, numbers of a record are at most the largest of ``like``.
    """
    generator = torch.Generator().manual_seed(seed)
    main = next((like[name] for name in ("input_ids", "inputs_embeds") if name in like), None)
    length = main.shape[1] if isinstance(main, Tensor) and main.ndim > 1 else None
    vocabulary = vocabulary_of(model)
    batch: dict[str, Any] = {}
    for name, value in like.items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            batch[name] = value
            continue
        shape = (records, *(tokens if size == length else size for size in value.shape[1:]))
        batch[name] = _values(name, value, shape, vocabulary, model, generator).to(value.device)
    labels, ids = batch.get("labels"), batch.get("input_ids")
    if isinstance(labels, Tensor) and ids is not None and labels.shape == ids.shape and classes_of(model) is None:
        batch["labels"] = ids.clone()
    return batch


def _values(
    name: str, like: Tensor, shape: tuple[int, ...], vocabulary: int, model: Any, generator: torch.Generator
) -> Tensor:
    if "mask" in name:
        return torch.ones(shape, dtype=like.dtype)
    if name == "position_ids":
        return torch.arange(shape[-1]).expand(shape).clone()
    if like.is_floating_point():
        return torch.randn(shape, generator=generator).to(like.dtype)
    if name == "token_type_ids" or like.dtype == torch.bool:
        return torch.zeros(shape, dtype=like.dtype)
    top = vocabulary
    if name in TARGETS[1:]:
        top = 2  # a place that is there in short records too
    elif name == "labels" and len(shape) == 1:
        top = int(getattr(getattr(model, "config", None), "num_labels", 2))
    elif name == "labels":
        top = classes_of(model) or vocabulary
    elif len(shape) == 1:  # a task, a language, a length: neither beyond the model's tables nor its tokens
        top = min(max(int(like.max()) + 1, 1), _LENGTHS[0]) if like.numel() else 1
    return torch.randint(0, top, shape, generator=generator, dtype=like.dtype)


def classes_of(model: Any) -> int | None:
    """Classes of a token's label, where these are not the vocabulary's tokens."""
    try:
        head = head_of(model)
    except PrivacyError:  # the caller's own loss knows
        return None
    classes = num_classes(model, head)
    return None if classes is None or head.kind != "tokens" or classes == vocabulary_of(model) else classes


def vocabulary_of(model: Any) -> int:
    """Number of token ids to draw from."""
    config = getattr(model, "config", None)
    text: Any = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    return int(getattr(text, "vocab_size", 2) or 2)
