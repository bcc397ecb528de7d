"""A host of the `tokens` exchange with a few experts, and what is sent to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coterie.federation.shard import Shard
from coterie.federation.tokens.host import DISPATCH, TokensHost
from coterie.federation.tokens.host_math import Rows
from coterie.federation.wire.transport import Address, Message
from coterie.models.seam import expert_layers
from coterie.models.zoo.tiny import tiny_model
from coterie.training.optim import make_optimizer
from helpers.tokens_world import PARTIES, SPEC, expert_weights

HOSTED = (0, 3, 5)  # of layer 0 and 1; layer 2 is somebody else's


def shard_weights(family: str = "olmoe") -> dict[str, Tensor]:
    return {
        key: value
        for key, value in expert_weights(tiny_model(family)).items()
        if int(key.split(".")[1]) < 2 and int(key.split(".")[3]) in HOSTED
    }


def make_host(family: str = "olmoe", optimizer: Any = None, **settings: Any) -> TokensHost:
    layers = expert_layers(tiny_model(family))
    shard = Shard(layers, shard_weights(family), optimizer or (lambda params: make_optimizer(params, SPEC)))
    return TokensHost("alder", PARTIES, layers, shard, **settings)


def rows(seed: int = 0, tokens: int = 7, weighted: bool = True, dtype: torch.dtype = torch.float32) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 3, (tokens,), generator=generator)
    ids = torch.cat([torch.tensor(HOSTED)[torch.randperm(3, generator=generator)[:n]] for n in counts.tolist()])
    weights = torch.rand(len(ids), generator=generator)
    hidden = torch.randn(tokens, 32, generator=generator).to(dtype)
    return Rows(hidden, counts, ids, weights if weighted else None)


def dispatch(part: Rows, keep: bool = True, **header: int) -> Message:
    tensors = (part.x_MD, part.counts_M.to(torch.uint8), part.ids_P.to(torch.uint8))
    tensors += () if part.routing_weights_P is None else (part.routing_weights_P,)
    return Message(DISPATCH, Address(**header), {"keep": keep}, tensors)
