"""The host's side of a party in the `experts` exchange: which parts there are, and what is stored here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from coterie.config import FederationConfig
from coterie.dp.balance import Balancer
from coterie.dp.noise.joint_noise import LOAD
from coterie.federation.experts.frozen_shard import FrozenShard
from coterie.federation.experts.host import ExpertsHost
from coterie.federation.experts.parts import Part, expert_parts
from coterie.federation.experts.shared_trunk import TrunkHost
from coterie.federation.shard import OptimizerFactory, Shard
from coterie.models import seam
from coterie.models.split.placement import Placement
from coterie.training.experts.public_loads import PublicLoads, releases_loads
from coterie.training.experts.shared_trunk import TrunkCopy, shared_names
from coterie.training.party.agreed_limits import experts_limits

_AHEAD = 2
"""Rounds: nobody who follows the same history can be so far ahead of another party."""


def model_parts(federation: FederationConfig, model: nn.Module, placement: Placement) -> tuple[Part, ...]:
    """Every part of a federation's model, in the order in which parts cross."""
    layers = seam.expert_layers(model)
    own = dict(model.named_parameters())
    shared = {name: tuple(own[name].shape) for name in shared_names(federation, model)}
    if releases_loads(federation):
        shared[LOAD] = (sum(layer.num_experts for layer in layers),)
    return expert_parts(
        [{name: tuple(param.shape) for name, param in layer.parameters().items()} for layer in layers],
        [[placement.host_name(layer.index, e) for e in range(layer.num_experts)] for layer in layers],
        tuple(federation.parties),
        shared,
        train_experts=federation.lora is None,
    )


def make_host(
    party: str,
    federation: FederationConfig,
    model: nn.Module,
    parts: Sequence[Part],
    trunk: Mapping[str, Tensor],
    experts: Mapping[str, Tensor],
    make_optimizer: OptimizerFactory,
    copy: TrunkCopy,
    balancer: Balancer | None = None,
) -> ExpertsHost:
    """What a party stores for everybody, as it is before the first round.

    Args:
        party: its name.
        federation: shared settings.
        model: partial model.
        parts: see `model_parts`.
        trunk: starting weights of the trunk, for the share this party hosts.
        experts: starting weights of the hosted experts, by global key.
        make_optimizer: of hosted parts.
        copy: lends the share of a host that is absent.
        balancer: where parties release expert loads.
    """
    names = {name for part in parts if part.layer < 0 and part.host == party for name, _ in part.shapes}
    loads = {LOAD: PublicLoads(balancer)} if balancer is not None and LOAD in names else {}
    layers, frozen = seam.expert_layers(model), federation.lora is not None
    return ExpertsHost(
        party,
        tuple(federation.parties),
        parts,
        Shard(layers, {} if frozen else experts, make_optimizer),
        TrunkHost({name: trunk[name] for name in sorted(names - {LOAD})}, make_optimizer, loads),
        weights_dtype=getattr(torch, federation.weights_dtype),
        push_dtype=getattr(torch, federation.push_dtype),
        lend=copy.lend,
        ahead=_AHEAD,
        limits=experts_limits(federation, model),
        masked=federation.aggregation == "masked",
        frozen=FrozenShard(layers, experts) if frozen else None,
    )
