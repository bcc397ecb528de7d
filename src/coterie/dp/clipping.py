"""From per-sample norms to the factor that each record's gradient is multiplied with.

Shape letters: B records of a physical batch, G gradient groups (one for flat clipping).

Whatever the policy, the factor of record b in group k obeys ``factor * norm <= threshold_k`` (`bounded_factors`), so
one record moves group k's sum by at most ``threshold_k`` and the whole release by at most
``sqrt(sum_k threshold_k ** 2)``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from coterie.dp.numbers import check_fields
from coterie.errors import PrivacyError

SMALLEST, LARGEST = 1e-9, 1e30
"""Clip norms that the engine's float32 sums hold to."""

_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|block|blocks)\.(\d+)\.")
_KINDS = (
    ("router", re.compile(r"\.(?:gate|router)(?:\.|$)")),
    ("experts", re.compile(r"\.experts\.")),
    ("attention", re.compile(r"attn|attention|mixer|mamba|conv")),
    ("norms", re.compile(r"norm", re.IGNORECASE)),
    ("embeddings", re.compile(r"embed|lm_head|wte|wpe|score|classifier")),
)


@dataclass(frozen=True)
class Flat:
    """One norm over all parameters, clipped to ``clip_norm``: the DP-SGD of Abadi et al. 2016.

    Args:
        clip_norm: C > 0, in units of the loss gradient.
    """

    clip_norm: float

    def __post_init__(self) -> None:
        check_fields(self, "clip_norm")

    def group_of(self, name: str) -> str:
        return "all"

    def thresholds(self, groups: Sequence[str]) -> Tensor:
        """[G] float64: equal shares whose squares sum to C squared."""
        return torch.full((len(groups),), self.clip_norm / math.sqrt(max(len(groups), 1)), dtype=torch.float64)

    def factors(self, norms_GB: Tensor, thresholds_G: Tensor) -> Tensor:
        """[G, B]: ``min(1, threshold / norm)``, given upper bounds of the norms."""
        return (thresholds_G[:, None] / norms_GB.clamp_min(torch.finfo(norms_GB.dtype).tiny)).clamp_max(1.0)


@dataclass(frozen=True)
class PerLayer(Flat):
    """Every decoder layer, and the rest of the model, has its own threshold (McMahan et al. 2018)."""

    def group_of(self, name: str) -> str:
        layer = _LAYER.search(name)
        return f"layer {layer.group(1)}" if layer else "outside layers"


@dataclass(frozen=True)
class PerGroup(Flat):
    """Groups of parameters have their own thresholds (He et al. 2022, arXiv:2212.01539).

    Args:
        groups: group name to substrings of parameter names, first match wins; empty: router, experts, attention,
            norms, embeddings, other.
    """

    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def group_of(self, name: str) -> str:
        for group, parts in self.groups.items():
            if any(part in name for part in parts):
                return group
        if not self.groups:
            for group, pattern in _KINDS:
                if pattern.search(name):
                    return group
        return "other"


@dataclass(frozen=True)
class Automatic(Flat):
    """AUTO-S (Bu et al. 2023, arXiv:2206.07136): ``C / (norm + gamma)``, which never exceeds ``C / norm``.

    Args:
        gamma: stability constant; small gradients keep a size that depends on their norm.
    """

    gamma: float = 0.01

    def factors(self, norms_GB: Tensor, thresholds_G: Tensor) -> Tensor:
        return thresholds_G[:, None] / (norms_GB + self.gamma)


Clipping = Flat
"""Every policy is a `Flat` with something replaced."""


def bounded_factors(clipping: Clipping, norms_GB: Tensor, thresholds_G: Tensor) -> Tensor:
    """The policy's factors, none of them more than ``threshold / norm``, whatever the policy says.

    Args:
        clipping: gets copies, and may do with them what it likes.
        norms_GB: float64, finite upper bounds of the norms, above 0.
        thresholds_G: float64, checked.

    Returns:
        [G, B] float64, at least 0.

    Raises:
        PrivacyError: the policy gives something else than a number for each norm.
    """
    given = clipping.factors(norms_GB.clone(), thresholds_G.clone())
    reason = ""
    if not isinstance(given, Tensor) or given.layout != torch.strided or given.is_complex():
        reason = f"it gives {type(given).__name__} instead of a tensor of real numbers"
    elif given.shape != norms_GB.shape:
        reason = f"it gives shape {list(given.shape)} for norms of shape {list(norms_GB.shape)}"
    elif bool(torch.isnan(given).any()):
        reason = "it gives NaN"
    if reason:
        raise PrivacyError(
            f"The clipping policy {type(clipping).__name__} does not give a factor for each record.",
            code="dp-clipping-factors",
            where=reason,
            why="a gradient without a factor cannot be clipped",
            fix="let `factors` return a tensor like its first argument, with numbers from 0 to threshold / norm",
        )
    most = thresholds_G[:, None] / norms_GB
    return torch.minimum(given.detach().to(most), most).clamp_min(0.0)


def checked_thresholds(thresholds_G: Tensor, groups: int) -> Tensor:
    """A float64 copy of the thresholds.

    Raises:
        PrivacyError: they are not one clip norm for each group.
    """
    thresholds = torch.as_tensor(thresholds_G).detach().to("cpu", torch.float64, copy=True)
    if thresholds.shape != (groups,):
        raise PrivacyError(
            f"There are thresholds of shape {list(thresholds.shape)} for {groups} gradient groups.",
            code="dp-clip-norm",
            why="a group without a threshold is not clipped",
            fix="let `thresholds` return one positive number for each group",
        )
    if not bool(((thresholds >= SMALLEST) & (thresholds <= LARGEST)).all()):
        raise PrivacyError(
            f"Every clip norm must be a number from {SMALLEST:g} to {LARGEST:g}, not {thresholds.tolist()}.",
            code="dp-clip-norm",
            why="it bounds what one record may contribute, and beyond these sizes float32 sums do not keep the bound",
            fix="set clip_norm to a positive number, such as 1.0",
        )
    return thresholds


def policy(name: str, clip_norm: float) -> Clipping:
    """The policy a config names: ``flat``, ``per_layer``, ``per_group`` or ``automatic``."""
    kinds = {"flat": Flat, "per_layer": PerLayer, "per_group": PerGroup, "automatic": Automatic}
    if name not in kinds:
        raise PrivacyError(
            f"`{name}` is not a way of clipping.", code="dp-clipping", fix="choose one of: " + ", ".join(kinds)
        )
    return kinds[name](clip_norm)


def quantile_update(thresholds_G: Tensor, noisy_fraction_G: Tensor, target: float = 0.5, rate: float = 0.2) -> Tensor:
    """Next round's thresholds: ``C * exp(-rate * (fraction - target))`` (Andrew et al. 2021, arXiv:1905.03871).

    Args:
        thresholds_G: current thresholds.
        noisy_fraction_G: *released* share of records whose norm was at or below the threshold; it must come out of
            the round's one Gaussian (invariant 9), never from raw indicators.
        target: share of records that should stay unclipped.
        rate: step on the logarithm of the threshold.

    Returns:
        [G], same dtype as ``thresholds_G``.
    """
    moved = thresholds_G * torch.exp(-rate * (noisy_fraction_G.to(thresholds_G) - target))
    return moved.clamp(SMALLEST, LARGEST)
