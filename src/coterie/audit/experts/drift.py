"""A trunk that has drifted: with `trunk: private` the owner's trunk is known at the start only.

The adversary cannot follow it, but it knows how far such a trunk moves: it trains one on public text for as many
rounds, makes pushes with that one, and learns what rows of a push look like to somebody who has the other.
"""

from __future__ import annotations

import copy

import torch

from coterie.audit.experts.reader import Reader, summed_losses
from coterie.audit.experts.simulate import by_length
from coterie.config import OptimSpec
from coterie.models import seam
from coterie.training.loop import finish_round
from coterie.training.optim import make_optimizer


def drifted(
    reader: Reader, public: list[tuple[int, ...]], optim: OptimSpec, rounds: int, batch: int, seed: int
) -> Reader:
    """The model with a trunk that was trained on public text; experts as they are.

    Args:
        reader: the model as it started, with the experts of the round.
        public: records to train on.
        optim: the owner's.
        rounds: steps.
        batch: records in one.
        seed: of their order.
    """
    model = copy.deepcopy(reader.model)
    experts = {id(param) for layer in seam.expert_layers(model) for param in layer.parameters().values()}
    trunk = [param.requires_grad_(True) for param in model.parameters() if id(param) not in experts]
    seam.select(model)
    optimizer = make_optimizer(trunk, optim)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(rounds):
        chosen = [public[number] for number in torch.randperm(len(public), generator=generator)[:batch].tolist()]
        for _, ids_BT in by_length(chosen):
            torch.autograd.backward(summed_losses(model, ids_BT).sum())
            optimizer.gather()
        finish_round(optimizer, sum(len(record) - 1 for record in chosen), lr=optim.lr)
    return Reader(model)
