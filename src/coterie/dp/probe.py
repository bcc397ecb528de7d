"""Probe passes: two small forwards and backwards on synthetic records whose sizes share no factor.

They teach `Sites` what the first dimension of every tensor is where it meets a parameter, and raise `NoRuleError`
for a use that no rule covers. Nothing of a real record is used, only the batch's keys, shapes and types.

Shape letters: B records, T tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from coterie.dp.capture import Sites
from coterie.dp.derived import Root
from coterie.dp.losses import Batch, checked

if TYPE_CHECKING:
    from coterie.dp.engine import Engine

_SIZES = ((3, 11), (5, 13))
"""(records, tokens) of the probes: distinct primes, none of which divides another size by accident for both."""


def learn_sites(engine: Engine, batch: Batch) -> Sites:
    """Run both probes."""
    sites = Sites()
    for records, tokens in _SIZES:
        made = synthetic_batch(engine.model, batch, records, tokens)
        with torch.random.fork_rng(devices=[]), engine.capturing(records, _forget, sites) as capture:
            losses = checked(engine.loss_fn(engine.model, made), records)
            capture.backward(losses.float().sum())
    return sites


def _forget(root: Root) -> None:
    root.captured = []


def synthetic_batch(model: Any, like: Batch, records: int, tokens: int, seed: int = 0) -> dict[str, Any]:
    """A batch with the keys and types of ``like``, made-up values and other sizes.

    Dimensions equal to the length of ``input_ids`` become ``tokens``; token ids are drawn from the vocabulary,
    masks are full, labels of a sequence are its own tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    main = next((like[name] for name in ("input_ids", "inputs_embeds") if name in like), None)
    length = main.shape[1] if isinstance(main, Tensor) and main.ndim > 1 else None
    vocabulary = vocabulary_of(model)
    made: dict[str, Any] = {}
    for name, value in like.items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            made[name] = value
            continue
        shape = (records, *(tokens if size == length else size for size in value.shape[1:]))
        made[name] = _values(name, value, shape, vocabulary, model, generator).to(value.device)
    if (
        isinstance(made.get("labels"), Tensor)
        and "input_ids" in made
        and made["labels"].shape == made["input_ids"].shape
    ):
        made["labels"] = made["input_ids"].clone()
    return made


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
    if name == "labels" and len(shape) == 1:
        top = int(getattr(model.config, "num_labels", 2))
    return torch.randint(0, top, shape, generator=generator, dtype=like.dtype)


def vocabulary_of(model: Any) -> int:
    """Number of token ids to draw from."""
    config = getattr(model, "config", None)
    text: Any = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    return int(getattr(text, "vocab_size", 2) or 2)
