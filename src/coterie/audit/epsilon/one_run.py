"""End to end: canaries put in by secret coin flips, one round, and what can be told from all that came out.

Premises see the sums; this sees whatever a round changes, also outside them. The settings are the run's own but for a
claim of its own, small enough for a few hundred canaries to contradict: one round over all records.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from coterie.audit.epsilon import bounds
from coterie.audit.epsilon.canaries import FAMILIES, CanaryFamily, Ids, sequences
from coterie.audit.epsilon.findings import CONFIDENCE, SHOWN, ClaimVerdict, OneRun, Premise
from coterie.audit.epsilon.rehearsal import Rehearsal
from coterie.audit.epsilon.shares import Directions
from coterie.audit.epsilon.subject import Subject
from coterie.audit.metrics import Scores, auc
from coterie.dp.accounting.budget import Budget
from coterie.dp.losses import Batch, LossFunction
from coterie.dp.noise.randomness import random_source

CANARIES = 200
CLAIM = 2.0
"""Epsilon of the audit's own round; a smaller claim of the run is taken as it is."""

_LENGTH = 16
_STEP = 0.02
"""Length of the step that black-box scores look at, as a share of the weights' own: short enough to be a slope."""

_SCORES = 2
_TOGETHER = 50
"""Canaries whose losses are computed at once."""


@dataclass(frozen=True)
class Coins:
    """Canaries and how their coins fell.

    Attributes:
        canaries: token ids of each.
        heads_M: bool, which were put in.
    """

    canaries: Sequence[Ids]
    heads_M: Tensor


def toss(subject: Subject, count: int, families: Sequence[CanaryFamily], seed: int | None) -> Coins:
    """Make canaries, an equal part of each family, and toss a coin for each.

    Args:
        subject: gives vocabulary and length.
        count: of canaries.
        families: see `CanaryFamily`.
        seed: for tests; None: the operating system's randomness.
    """
    source = random_source(seed)
    chance = np.random.default_rng(source.stream("canaries").integer(64))
    length = max(2, min(_LENGTH, subject.longest))
    canaries: list[Ids] = []
    for number, family in enumerate(families):
        share = count * (number + 1) // len(families) - count * number // len(families)
        canaries += family.make(share, subject.vocabulary, length, chance)
    heads = source.stream("coins").read(len(canaries)) & 1
    if heads.all() or not heads.any():  # nobody to tell apart; with 200 canaries never seen
        return toss(subject, count, families, None if seed is None else seed + 1)
    return Coins(canaries, torch.from_numpy(heads.astype(bool)))


def audit(
    subject: Subject,
    *,
    canaries: int = CANARIES,
    families: Sequence[CanaryFamily] = FAMILIES,
    seed: int | None = None,
) -> tuple[tuple[OneRun, ...], Premise]:
    """One round on canaries.

    Args:
        subject: the run; its model is left as it was.
        canaries: how many.
        families: made equally often.
        seed: for tests; None: the operating system's randomness.

    Returns:
        What each score proves, and whether the round changed the model by more than what it released.
    """
    claim = subject.claim
    coins = toss(subject, canaries, families, seed)
    inside = [ids for ids, head in zip(coins.canaries, coins.heads_M.tolist(), strict=True) if head]
    plan = replace(
        subject.plan, budget=Budget(min(CLAIM, claim.epsilon), claim.delta), rounds=1, lot_size=len(inside),
        bands=None, agreed_noise=None, pooled=None, sampler="poisson", max_lot=None, noise_multiplier=None, seed=seed,
    )  # fmt: skip
    rehearsal = Rehearsal(subject.model, subject.data(sequences(inside, subject.records)), plan, subject.options)
    everyone = subject.data(sequences(coins.canaries, subject.records))
    device = next(subject.model.parameters()).device
    batches = [everyone.batch([number], device) for number in range(len(coins.canaries))]
    loss_fn = rehearsal.engine.loss_fn
    directions = Directions.of(subject.model, loss_fn, batches)
    together = [
        everyone.batch(range(start, min(start + _TOGETHER, len(batches))), device)
        for start in range(0, len(batches), _TOGETHER)
    ]
    before = _losses(subject, loss_fn, together)
    moved = _step(rehearsal, float(plan.lot_size))
    shares_M, spread_M = directions.shares(moved.sums)
    # A share of 0 and one of C are equally far from C / 2; what noise spreads more says less.
    scores = {
        "shares of the released sum (white box)": (shares_M - plan.clip_norm / 2) / spread_M.square(),
        "fall of the loss (black box)": before - _losses(subject, loss_fn, together, moved.direction),
    }
    sigma = rehearsal.opened.noise_multiplier
    runs = tuple(_judged(name, values, coins.heads_M, plan.budget, sigma) for name, values in scores.items())
    return runs, moved.outside


@dataclass(frozen=True)
class _Moved:
    """What a round did to the model, which is itself again.

    Attributes:
        sums: by parameter name, as an observer of the model's weights gets them.
        direction: of the step, by parameter name.
        outside: whether the release explains the whole change.
    """

    sums: Mapping[str, Tensor]
    direction: Mapping[str, Tensor]
    outside: Premise


def _step(rehearsal: Rehearsal, divisor: float) -> _Moved:
    """One round of a session, with plain gradient descent so that the change is the release itself."""
    model = rehearsal.model
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    held = {name: tensor.detach().clone() for name, tensor in _held(model).items()}
    session = rehearsal.session(torch.optim.SGD(list(trained.values()), lr=1.0))
    try:
        session.step(session.next_lot())
        changed = {name: tensor.detach().clone() for name, tensor in _held(model).items()}
    finally:
        with torch.no_grad():
            for name, tensor in _held(model).items():
                tensor.copy_(held[name])
    released = rehearsal.released
    unexplained = [
        name
        for name, tensor in changed.items()
        if not torch.equal(
            tensor,
            held[name].add(released[name].to(tensor.device, tensor.dtype), alpha=-1.0)
            if name in trained
            else held[name],
        )
    ]
    direction = {
        name: (changed[name].float() - held[name].float()).cpu() if p.dtype == torch.float32 else -released[name]
        for name, p in trained.items()
    }
    sentence = (
        "After the round every tensor of the model is what its release alone makes of it."
        if not unexplained
        else f"{len(unexplained)} tensors changed by something that was not released with noise, `{unexplained[0]}` "
        "first."
    )
    outside = Premise(
        "nothing outside the sums", float(len(unexplained)), 0.0, 0.0, None,
        ClaimVerdict.ALARM if unexplained else ClaimVerdict.CONSISTENT, sentence,
    )  # fmt: skip
    return _Moved({name: -value * divisor for name, value in direction.items()}, direction, outside)


def _held(model: torch.nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _losses(
    subject: Subject,
    loss_fn: LossFunction,
    batches: Sequence[Batch],
    direction: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """[M] float64 losses of the canaries, a short step along a direction."""
    model = subject.model
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    held = {name: p.detach().clone() for name, p in trained.items()}
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            if direction is not None:
                length = _length(direction.values())
                step = _STEP * _length(held.values()) / length if length > 0 else 0.0
                for name, parameter in trained.items():
                    parameter.add_(direction[name].to(parameter.device, parameter.dtype), alpha=step)
            return torch.cat([loss_fn(model, batch).double().cpu() for batch in batches])
    finally:
        model.train(mode)
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(held[name])


def _length(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(math.fsum(float(tensor.double().square().sum()) for tensor in tensors))


def _judged(name: str, scores_M: Tensor, heads_M: Tensor, budget: Budget, sigma: float) -> OneRun:
    """Bounds that are shown, all scores' together at `SHOWN`, and the verdict, which needs far more.

    The noise multiplier of the round is the claim's Gaussian: mu 1 / sigma.
    """
    count, delta = len(scores_M), budget.delta
    error = (1 - SHOWN) / _SCORES
    shown, most = bounds.bounds(scores_M, heads_M, delta, error), bounds.ceilings(count, delta, error)
    sure = bounds.bounds(scores_M, heads_M, delta, (1 - CONFIDENCE) / (2 * _SCORES))
    able = bounds.ceilings(count, delta, (1 - CONFIDENCE) / (2 * _SCORES))
    alarm_lower = max(sure.epsilon, sure.gaussian(delta))
    wrong = sure.epsilon > budget.epsilon or sure.mu > 1 / sigma
    blind = max(able.epsilon, able.gaussian(delta)) <= budget.epsilon
    verdict = ClaimVerdict.ALARM if wrong else ClaimVerdict.OPEN if blind else ClaimVerdict.CONSISTENT
    area = auc(Scores.of(scores_M[heads_M], scores_M[~heads_M])).value
    return OneRun(
        count, budget.epsilon, delta, name, area, shown.epsilon, most.epsilon, shown.gaussian(delta),
        most.gaussian(delta), alarm_lower, shown.mu * sigma, most.mu * sigma, verdict,
    )  # fmt: skip
