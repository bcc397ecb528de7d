"""The engine against batches of one, on the user's own model, with synthetic records, before training starts.

Shape letters: B records (2 here), P parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from coterie.dp.engine import Engine
from coterie.dp.losses import Batch, batch_size, checked
from coterie.dp.padding import CollatedPairs, masked_pair
from coterie.dp.probe import synthetic_batch
from coterie.dp.refusals import check_batch, check_model, untrained_changed
from coterie.dp.untrained import Untrained
from coterie.errors import NoRuleError

RECORDS = 2
_TOKENS = 11
_TRIES = 3
"""A routing decision at a tie may fall differently in a batch of one; another draw of records settles it."""


def example_batch() -> dict[str, Tensor]:
    """The keys and types of a causal LM's batch, for a set-up that has seen no batch yet."""
    ids = torch.zeros(1, 2, dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def check(engine: Engine, batch: Batch | None = None, pairs: CollatedPairs | None = None) -> dict[str, float]:
    """Refuse what cannot be private, then compare the engine with batches of one.

    Args:
        engine: with the model as it will be trained. Where expert weights are lent, the model has to be able to
            compute by itself meanwhile (`seam.computed_by`); norms are then compared with the engine's on batches of
            one.
        batch: an example; only its keys, shapes and types are used. Default: a causal LM's.
        pairs: made-up records of two lengths as the collator pads them. Default: padded on the side that ``batch``
            pads, where it has an ``attention_mask``.

    Returns:
        Parameter name to the largest relative error of its per-sample norms.

    Raises:
        NoRuleError: an unsupported use of a parameter, a loss that couples records, a buffer that changes, norms
            that disagree, or a record that padding changes; the message names the parameter.
        PrivacyError: the loss is not one number per record, or the batch packs records.

    Cost: a few forwards and backwards of two records of 11 tokens. Dropout is off; tolerances in `tolerance`.
    """
    like = example_batch() if batch is None else batch
    with _mode(engine.model, training=True):
        check_model(engine.model)
    check_batch(like, engine.model)
    device = next(iter(engine.parameters.values())).device if engine.parameters else torch.device("cpu")
    like = {name: _on(value, device) for name, value in like.items()}
    with _mode(engine.model, training=True), _untrained_restored(engine.model) as before:
        _check_untrained(engine, synthetic_batch(engine.model, like, RECORDS, _TOKENS), before)
    with _mode(engine.model, training=False), _untrained_restored(engine.model):
        engine.prepare(like)
        for attempt in range(_TRIES):
            made = synthetic_batch(engine.model, like, RECORDS, _TOKENS, seed=attempt)
            try:
                errors = _compare(engine, made)
                pair = pairs.pair(attempt) if pairs is not None else masked_pair(made, like, _pad_token(engine))
                if pair is not None:
                    _compare_padded(engine, *({n: _on(v, device) for n, v in one.items()} for one in pair))
                return errors
            except NoRuleError:
                if attempt == _TRIES - 1:
                    raise
    raise AssertionError("unreachable")


def tolerance(dtype: torch.dtype) -> float:
    """Largest relative error of a parameter's norm that counts as agreement."""
    return 1e-3 if dtype in (torch.float32, torch.float64) else 0.1


def _compare(engine: Engine, batch: Mapping[str, Any]) -> dict[str, float]:
    with torch.no_grad():
        together = checked(engine.loss_fn(engine.model, batch), RECORDS).double()
        alone = torch.cat([checked(engine.loss_fn(engine.model, one), 1).double() for one in _singles(batch)])
    dtype = next(iter(engine.parameters.values())).dtype if engine.parameters else torch.float32
    allowed = tolerance(dtype)
    if bool(((together - alone).abs() > 0.1 * allowed * alone.abs().clamp_min(1e-3)).any()):
        raise NoRuleError(
            f"A record's loss changes with the records beside it ({together[0]:.6f} beside another, "
            f"{alone[0]:.6f} alone).",
            code="dp-batch-coupled",
            why="the gradient of one record then depends on others, and clipping per record bounds nothing",
            fix="leave out the balance (auxiliary) loss over the batch and divide by nothing that the batch decides; "
            "coterie's `balance` settings offer private replacements",
        )
    squares_PB, names = engine.norms_by_parameter(batch)
    reference_PB = torch.stack([_reference(engine, one, names) for one in _singles(batch)], 1)
    ours, theirs = squares_PB.sqrt(), reference_PB.sqrt()
    whole = theirs.square().sum(0).sqrt()
    # A parameter far below the whole norm cannot move it, and float32 leaves it little precision of its own.
    scale = torch.maximum(theirs, 1e-3 * whole).clamp_min(torch.finfo(torch.float32).tiny)
    errors = ((ours - theirs).abs() / scale).amax(1)
    worst = int(errors.argmax())
    if not bool(errors[worst] <= allowed):
        raise NoRuleError(
            f"The per-sample norms of `{names[worst]}` disagree with batches of one: "
            f"{ours[worst].tolist()} against {theirs[worst].tolist()}.",
            code="dp-self-check",
            where="the self-check with two synthetic records, before training",
            why="its gradient is not split by record as the engine assumes, so clipping would not bound it",
            fix="freeze that parameter, or report the model: this is a use that no rule describes",
        )
    _compare_sums(engine, batch, allowed)
    return dict(zip(names, errors.tolist(), strict=True))


def _compare_sums(engine: Engine, batch: Batch, allowed: float) -> None:
    """What the engine adds up, with factor one for every record, against plain autograd on the whole batch."""
    if engine.lent_shapes:
        return
    loss = checked(engine.loss_fn(engine.model, batch), RECORDS).sum()
    names = list(engine.parameters)
    found = torch.autograd.grad(loss, [engine.parameters[name] for name in names], allow_unused=True)
    sums = engine.summed(batch)
    whole = sum(float(g.double().square().sum()) for g in found if g is not None) ** 0.5
    for name, g in zip(names, found, strict=True):
        ours, theirs = (x.detach().double().cpu() if x is not None else torch.zeros(()) for x in (sums.get(name), g))
        if not float((ours - theirs).norm()) <= allowed * max(float(theirs.norm()), 1e-3 * whole):
            raise NoRuleError(
                f"The summed gradient of `{name}` disagrees with autograd's: "
                f"norm {float(ours.norm()):.6g} against {float(theirs.norm()):.6g}.",
                code="dp-self-check",
                where="the self-check with two synthetic records, before training",
                why="what is added is not what was measured, so clipping would not bound it",
                fix="freeze that parameter, or report the model: this is a use that no rule describes",
            )


def padding_example(model: nn.Module, collate: Callable[[list[Any]], Batch], item: Any) -> CollatedPairs | None:
    """Pairs for `check` from a dataset's collator; None if made-up records do not go through it."""
    pairs = CollatedPairs(model, collate, item)
    return pairs if pairs.usable() else None


def _on(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _pad_token(engine: Engine) -> int:
    pad = getattr(getattr(engine.model, "config", None), "pad_token_id", None)
    return pad if isinstance(pad, int) and pad >= 0 else 0


def _compare_padded(engine: Engine, beside: Batch, alone: Batch) -> None:
    """The short record of a pair, padded beside a full one, against itself alone: loss and norm of its gradient."""
    dtype = next(iter(engine.parameters.values())).dtype if engine.parameters else torch.float32
    allowed = tolerance(dtype)
    with torch.no_grad():
        losses = [
            float(checked(engine.loss_fn(engine.model, batch), batch_size(batch))[-1]) for batch in (beside, alone)
        ]
    squares, names = engine.norms_by_parameter(beside)
    norms = [float(squares[:, -1].sum().sqrt()), float(_reference(engine, alone, names).sum().sqrt())]
    for what, (padded, by_itself) in (("loss", losses), ("gradient norm", norms)):
        if not abs(padded - by_itself) <= allowed * max(abs(by_itself), 1e-3):
            raise NoRuleError(
                f"A record's {what} changes with its padding ({padded:.6f} padded to a longer record beside it, "
                f"{by_itself:.6f} alone).",
                code="dp-padding",
                where="the self-check with synthetic records of two lengths, before training",
                why="its gradient then depends on the length of the records beside it, and clipping per record does "
                "not bound what one long record changes",
                fix="mask padding wherever tokens meet (pooling, a loss's mean), pad on the right "
                "(padding_side='right') or give position_ids that count from the first real token, or prepare all "
                "records at one fixed length",
            )


def _singles(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            name: value[i : i + 1] if isinstance(value, Tensor) and value.ndim else value
            for name, value in batch.items()
        }
        for i in range(RECORDS)
    ]


def _reference(engine: Engine, one: Mapping[str, Any], names: list[str]) -> Tensor:
    """[P] float64 squared norms of one record by plain autograd; lent weights by the engine on a batch of one."""
    if engine.lent_shapes:
        return engine.norms_by_parameter(one)[0][:, 0]
    loss = checked(engine.loss_fn(engine.model, one), 1).sum()
    found = torch.autograd.grad(loss, [engine.parameters[name] for name in names], allow_unused=True)
    return torch.stack(
        [torch.zeros((), dtype=torch.float64) if g is None else g.double().square().sum().cpu() for g in found]
    )


def _check_untrained(engine: Engine, batch: Mapping[str, Any], before: Untrained) -> None:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        engine.loss_fn(engine.model, batch)
    changed = before.changed()
    if changed:
        raise untrained_changed(engine.model, changed[0])


@contextmanager
def _untrained_restored(model: nn.Module) -> Iterator[Untrained]:
    before = Untrained(model)
    try:
        yield before
    finally:
        before.restore()


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The model in train mode, as a private round runs it, or in eval mode, with dropout off."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, before in modes:
            module.training = before
