"""A model whose experts are lent, once more with this rank's experts alone: everything that is no expert is shared.

A party computes its lots with the one, and all else with the other.
"""

from __future__ import annotations

import copy
from itertools import chain

import torch
from torch import nn

from coterie.models import seam
from coterie.models.spread.spread import spread_experts, spread_of
from coterie.ranks.ranks import Ranks


def spread_beside(model: nn.Module, ranks: Ranks, over: int) -> nn.Module:
    """A second model over the same trunk, with this rank's part of adapters of experts.

    Args:
        model: its experts are on the meta device.
        ranks: all of them call this.
        over: ranks of a group, which hold every expert once.

    Raises:
        ModelError, RankError: see `coterie.models.spread.spread.spread_experts`.
    """
    shared = {id(own): own for own in chain(model.parameters(), model.buffers()) if not own.is_meta}
    beside = copy.deepcopy(model, shared)
    spread_experts(beside, ranks, over)
    return beside


@torch.no_grad()
def follow(beside: nn.Module, model: nn.Module) -> None:
    """Bring what the second model has for itself to where the first is: adapters of experts, and who is left out."""
    spread = spread_of(beside)
    if spread is None:
        return
    whole, own = dict(model.named_parameters()), dict(beside.named_parameters())
    for name, cut in spread.cuts.items():
        if not own[name].is_meta:
            own[name].copy_(cut.part(whole[name], spread.held(cut)))
    seam.mask(beside, seam.masked(model))
