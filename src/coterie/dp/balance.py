"""Keeping experts evenly used without mixing records.

The Switch balance loss is E * sum_e f_e P_e: f_e is the share of tokens that expert e got in the *batch*, P_e its
mean router probability. Through f every record's gradient depends on every other record, which clipping per record
cannot bound. Only P carries gradient, so f may come from elsewhere:

- ``per_sequence``: from the record itself. Separable, no privacy cost, but each record is pushed to balance alone.
- ``private_load``: from earlier rounds, released with noise inside the round's one Gaussian and smoothed; in the loss
  it is then a constant.
- ``bias``: the same released loads move a routing bias (DeepSeek-V3, arXiv:2412.19437); no loss, post-processing.

Shape letters: B records, T tokens, N = B T, K experts per token, E experts of a layer, L MoE layers,
S = sum of E over layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from coterie.config.privacy import RELEASED_LOADS
from coterie.dp.losses import Batch, LossFunction, batch_size
from coterie.dp.numbers import check_fields
from coterie.dp.router_watch import RouterWatch, SeenRouting
from coterie.errors import PrivacyError
from coterie.models.seam import ExpertLayer

BalanceMode = Literal["off", "per_sequence", "private_load", "bias"]

DEFAULT_COEFFICIENT: dict[BalanceMode, float] = {
    "off": 0.0,
    "per_sequence": 0.02,
    "private_load": 0.02,
    "bias": 0.003,
}
"""Chosen by benchmarks/balance.py: a bias step of 0.02 left experts as collapsed as no balance at all."""


@dataclass(frozen=True)
class Balance:
    """How experts are kept evenly used.

    Attributes:
        mode: see the module text.
        coefficient: weight of the balance loss, or step of the bias; None: `DEFAULT_COEFFICIENT` of the mode. A bias
            moves by as much in every round, so a step that is large beside a routing probability makes the router
            swing between experts.
        load_share: the part of the clip norm, in (0, 1), that the released loads take: with share r, gradients get
            noise 1 / sqrt(1 - r^2) times as large (0.5 % more at 0.1), and loads noise of C_load / r.
        smoothing: weight of the past in the running average of released loads, in [0, 1). More of it means less noise
            and more delay; a long delay makes the router swing between experts (docs/concepts/privacy.md).
    """

    mode: BalanceMode = "off"
    coefficient: float | None = None
    load_share: float = 0.1
    smoothing: float = 0.5

    def __post_init__(self) -> None:
        check_fields(self, "coefficient", "load_share", "smoothing")

    @property
    def releases_loads(self) -> bool:
        return self.mode in RELEASED_LOADS

    @property
    def strength(self) -> float:
        """The coefficient that holds."""
        return DEFAULT_COEFFICIENT[self.mode] if self.coefficient is None else self.coefficient


class LoadAverage:
    """The running average of released loads: post-processing, the same for one session and for a whole federation.

    Args:
        sizes: experts of every MoE layer.
        balance: settings.

    Attributes:
        even: [S] float64, what perfectly even loads would be.
        load: [S] float64, shares of each layer's tokens; None before the first release.
    """

    def __init__(self, sizes: Sequence[int], balance: Balance) -> None:
        self.even = torch.cat([torch.full((size,), 1 / size, dtype=torch.float64) for size in sizes])
        self.load: Tensor | None = None
        self._balance = balance
        self._rounds = 0

    def take(self, mean_S: Tensor) -> None:
        """Add a released, noised sum of centred load vectors, divided by the expected number of units."""
        fresh = self.even + mean_S.double()
        # Plain averaging until the window has filled up, so that the first rounds are not taken at face value.
        self._rounds += 1
        keep = min(self._balance.smoothing, 1 - 1 / self._rounds)
        self.load = fresh if self.load is None else keep * self.load + (1 - keep) * fresh

    def bias_step(self) -> Tensor:
        """[S] float64: by how much the routing bias moves now, up for experts with less than their even share."""
        assert self.load is not None
        return self._balance.strength * torch.sign(self.even - self.load)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps; all of it was released."""
        if self.load is None:
            return {}
        return {"balance.load": self.load, "balance.rounds": torch.tensor(self._rounds)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state`."""
        self.load = state.get("balance.load")
        self._rounds = int(state["balance.rounds"]) if self.load is not None else 0


class Balancer:
    """Adds the balance term to a per-sample loss and gathers the loads of a lot.

    Args:
        balance: settings.
        model: with at least one MoE layer.
        loss_fn: the loss without balance.

    Attributes:
        load_bound: largest L2 norm of one unit's centred load vector; larger ones are scaled down to it.
        average: of released loads.
    """

    def __init__(self, balance: Balance, model: nn.Module, loss_fn: LossFunction) -> None:
        self.balance = balance
        self.watch = RouterWatch(model)
        self.loss_fn = loss_fn
        self.sizes = [layer.num_experts for layer in self.watch.layers]
        # A layer's centred load (shares minus 1/E) has norm at most sqrt(1 - 1/E), reached when one expert gets all.
        self.load_bound = math.sqrt(sum(1 - 1 / size for size in self.sizes))
        self.average = LoadAverage(self.sizes, balance)
        self.latest: Tensor | None = None
        self._biases = _biases(self.watch) if balance.mode == "bias" else []

    @property
    def load(self) -> Tensor | None:
        """[S] float64, loads of earlier rounds as they are in the loss; None before the first release."""
        return self.average.load

    @load.setter
    def load(self, value: Tensor | None) -> None:
        self.average.load = value

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """[B] losses with the balance term; loads of the batch's records are in ``latest`` afterwards."""
        with self.watch.watching() as seen:
            losses = self.loss_fn(model, batch)
        shares = [self._shares(layer, seen, batch) for layer in self.watch.layers]
        self.latest = torch.cat([share.detach().double().cpu() for share in shares], 1)
        if self.balance.mode in ("off", "bias"):
            return losses
        return losses + self.balance.strength * self._term(seen, shares, batch)

    def _term(self, seen: SeenRouting, shares: Sequence[Tensor], batch: Batch) -> Tensor:
        """Mean over layers of E sum_e f_e P_e, [B]."""
        terms = []
        start = 0
        for layer, share_BE in zip(self.watch.layers, shares, strict=True):
            size = layer.num_experts
            if self.balance.mode == "per_sequence":
                fraction = share_BE.detach()
            elif self.load is None:
                fraction = torch.full((size,), 1 / size, device=share_BE.device)
            else:
                fraction = self.load[start : start + size].to(share_BE.device, torch.float32)
            start += size
            logits = seen.logits.get(layer.index)
            if logits is None:
                raise _no_logits(layer)
            mask_BT = _mask(batch, logits.numel() // size, logits.device)
            probabilities = self.watch.probabilities(logits.reshape(*mask_BT.shape, size))
            mean_BE = (probabilities * mask_BT[..., None]).sum(1) / mask_BT.sum(1, keepdim=True).clamp_min(1)
            terms.append(size * (mean_BE * fraction).sum(1))
        return torch.stack(terms).mean(0)

    def _shares(self, layer: ExpertLayer, seen: SeenRouting, batch: Batch) -> Tensor:
        """Share of each record's routed pairs that went to each expert, [B, E]; zero for a record without tokens."""
        ids_NK = seen.ids[layer.index]
        mask_BT = _mask(batch, ids_NK.shape[0], ids_NK.device)
        ids = ids_NK.reshape(mask_BT.shape[0], -1)
        weight = mask_BT.repeat_interleave(ids_NK.shape[1], dim=1)
        weight = weight * ((ids >= 0) & (ids < layer.num_experts))
        counts = torch.zeros(ids.shape[0], layer.num_experts, device=ids.device)
        counts.scatter_add_(1, ids.clamp(0, layer.num_experts - 1).long(), weight)
        return counts / counts.sum(1, keepdim=True).clamp_min(1)

    def unit_loads(self, loads_RS: Tensor, units_R: Tensor) -> Tensor:
        """What each unit of a lot contributes to the released loads: a centred, bounded load vector, [U, S] float64.

        Args:
            loads_RS: [R, S] float64 shares of each record; a row of NaN or zeros counts as nothing.
            units_R: [R] unit of each record, from 0.

        Returns:
            Rows of norm at most ``load_bound``; their sum is released.
        """
        if loads_RS.shape[0] == 0:
            return torch.zeros(0, sum(self.sizes), dtype=torch.float64)
        usable = torch.isfinite(loads_RS).all(1) & (loads_RS.sum(1) > 0)
        centred = torch.where(usable[:, None], loads_RS - self.average.even, 0.0)
        count = int(units_R.max()) + 1
        total = torch.zeros(count, loads_RS.shape[1], dtype=torch.float64).index_add_(0, units_R, centred)
        records = torch.zeros(count, dtype=torch.float64).index_add_(0, units_R, usable.double())
        mean = total / records.clamp_min(1)[:, None]
        norm: Tensor = torch.linalg.vector_norm(mean, dim=1, keepdim=True)
        return mean * (self.load_bound / norm.clamp_min(self.load_bound))

    def take_released(self, mean_S: Tensor) -> None:
        """Post-processing of a released load sum over the expected units: running average, and routing bias."""
        self.average.take(mean_S.double())
        if self.balance.mode == "bias":
            self.set_bias(self.bias().double() + self.average.bias_step())

    def bias(self) -> Tensor:
        """[S] float32, the model's routing biases; empty unless the mode is ``bias``."""
        return torch.cat([torch.empty(0), *(bias.detach().cpu().float() for bias, _ in self._biases)])

    @torch.no_grad()
    def set_bias(self, bias_S: Tensor) -> None:
        """Put routing biases into the model."""
        for (bias, _), own in zip(self._biases, torch.split(bias_S, [size for _, size in self._biases]), strict=True):
            bias.copy_(own)

    def follow(self, public_S: Tensor) -> None:
        """Compute with what the federation's host of the loads serves: smoothed loads, or the routing biases.

        Args:
            public_S: [S] floating point, the same at all parties.
        """
        if self.balance.mode == "bias":
            self.set_bias(public_S)
        else:
            self.load = public_S.double()

    def public(self) -> Tensor:
        """[S] what `follow` was given last; before that, even loads or the model's own biases."""
        if self.balance.mode == "bias":
            return self.bias()
        return self.average.even if self.load is None else self.load

    def figures(self) -> dict[str, float]:
        """How evenly experts are used, by what was released: the most and the least used one's load over an even
        share. Noise may make them negative. Empty before the first release and where loads are not told."""
        if self.load is None:
            return {}
        over_S = self.load / self.average.even
        return {"load_most": float(over_S.max()), "load_least": float(over_S.min())}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps; all of it was released."""
        return self.average.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state`."""
        self.average.restore(state)


def _mask(batch: Batch, tokens: int, device: torch.device) -> Tensor:
    """[B, T] float32: which of a batch's tokens are text."""
    records = batch_size(batch)
    if tokens % records:
        raise PrivacyError(
            f"the router saw {tokens} tokens of {records} records, which is no whole number each.",
            code="dp-balance-rows",
            why="loads and probabilities could not be told apart by record",
            fix="set balance to off for this model",
        )
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == (records, tokens // records):
        return mask.to(device, torch.float32)
    return torch.ones(records, tokens // records, device=device)


def _no_logits(layer: ExpertLayer) -> PrivacyError:
    return PrivacyError(
        f"the router of {layer.name} does not show its logits.",
        code="dp-balance-router",
        why="the balance loss is made of router probabilities",
        fix="set balance to off, or to bias if the family has a routing bias",
    )


def _biases(watch: RouterWatch) -> list[tuple[Tensor, int]]:
    """The routing bias of every MoE layer: a buffer or parameter [E] of the router with `bias` in its name."""
    found: list[tuple[Tensor, int]] = []
    for layer in watch.layers:
        named = [
            (name, tensor)
            for module in watch.beside(layer)
            for name, tensor in [*module.named_buffers(recurse=False), *module.named_parameters(recurse=False)]
        ]
        biases = [
            tensor
            for name, tensor in named
            if "bias" in name and tensor.shape == (layer.num_experts,) and not tensor.requires_grad
        ]
        if len(biases) != 1:
            raise PrivacyError(
                f"the router of {layer.name} has no routing bias to move.",
                code="dp-balance-bias",
                why="balance: bias steers routing by a bias that is added to the scores and not trained",
                fix="use balance: private_load, or a family with e_score_correction_bias (frozen)",
            )
        found.append((biases[0], layer.num_experts))
    return found
