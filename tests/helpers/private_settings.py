"""Settings and inputs of federations whose parties have budgets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from coterie.config import FederationConfig, PrivacySpec
from coterie.dp.noise.pooled import PooledNoise
from coterie.training.party.in_process import InProcessFederation
from coterie.training.party.inputs import PartyInputs, PrivacyInputs
from helpers.federations import experts_of, settings

LOT, CLIP = 5, 0.7


def private_settings(**changes: object) -> FederationConfig:
    rules = {"epsilon": 8.0, "delta": 1e-3, "clip_norm": CLIP, "lot_size": LOT}
    plain = {"exchange": "experts", "privacy": rules, "weights_dtype": "float32", "trunk": "shared"}
    return settings(**{**plain, **changes})


def with_privacy(
    parts: Mapping[str, PartyInputs],
    folder: Path,
    *,
    sigma: float | None,
    rounds: int | None = None,
    seeded: bool = True,
    **spec: object,
) -> dict[str, PartyInputs]:
    """Every party private, each with a ledger of its own; seeded, if not told otherwise, each with its own seed."""
    found = {}
    for number, (name, each) in enumerate(parts.items()):
        rules = each.federation.privacy
        assert not isinstance(rules, str)
        assert rules is not None
        lot = each.federation.lot_of(name)
        own = PrivacySpec(
            **{
                **rules.model_dump(),
                "lot_size": lot,
                "ledger": folder / f"ledger-{name}",
                "physical_batch": 2,
                **spec,
            }
        )
        planned = rounds or each.federation.train.rounds
        shared = each.federation.aggregation == "masked" and each.federation.trunk == "shared"
        pooled = PooledNoise(len(parts), each.federation.colluding) if shared else None
        agreed = each.federation.noise_multiplier
        privacy = PrivacyInputs(
            own, planned, seed=number if seeded else None, noise_multiplier=sigma, agreed_noise=agreed, pooled=pooled,
            largest_lot=each.federation.largest_lot,
        )  # fmt: skip
        found[name] = replace(each, privacy=privacy)
    return found


def clipped_gradient(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """One record's gradient by plain autograd, clipped as a whole."""
    model.zero_grad()
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    functional.cross_entropy(logits, ids[1:]).backward()
    found = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in found.values()))
    return {name: g.clone() * min(1.0, CLIP / norm) for name, g in found.items()}


def exchange_of(federation: InProcessFederation, name: str):  # type: ignore[no-untyped-def]
    return experts_of(federation.runs[name])


COEFFICIENT, SHARE, SMOOTHING = 0.3, 0.4, 0.6


def balanced_settings(mode: str, **changes: object) -> FederationConfig:
    rules = {
        "epsilon": 8.0, "delta": 1e-3, "clip_norm": CLIP, "lot_size": LOT, "balance": mode,
        "balance_coefficient": COEFFICIENT, "load_share": SHARE, "load_smoothing": SMOOTHING,
    }  # fmt: skip
    return private_settings(**{"privacy": rules, "optim__eps": 1e-3, **changes})
