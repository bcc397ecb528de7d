"""The model as an adversary has it: what enters each expert of each MoE layer, for text that the adversary supposes.

Everything passes the one seam, so a family needs no code of its own. Where many continuations of one prefix are
looked at, the prefix is computed once and the continuations stand side by side behind it, each seeing the prefix and
itself only; families whose attention does not take such a mask are computed row by row.

Shape letters: N tokens, R routed rows (one per chosen (token, expert) pair), B prefixes, T places, V candidates,
D model width, G width before the gate, F expert width, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.models import seam
from coterie.models.grouped import as_EIO
from coterie.models.seam import ExpertLayer, ExpertsCall, RoutedRows

_SIDE_BY_SIDE = 128
"""Continuations that share one mask: it is quadratic in them, and every further mask repeats the prefix."""

_CLOSE = 1e-3
"""Largest relative difference between hidden vectors side by side and row by row."""


@dataclass(frozen=True)
class LayerView:
    """What enters the experts of one MoE layer.

    Attributes:
        hidden_ND: the layer's input, float32.
        experts_NK: chosen experts, int64.
        token_R, expert_R: of each routed row.
        inner_RF: input of each row's second projection, float32.
    """

    hidden_ND: Tensor
    experts_NK: Tensor
    token_R: Tensor
    expert_R: Tensor
    inner_RF: Tensor

    @property
    def hidden_RD(self) -> Tensor:
        """Input of each row's first projection."""
        return self.hidden_ND[self.token_R]


@dataclass(frozen=True)
class LayerRows:
    """Both factors of every routed row's gradient: its share in an expert's sums is two outer products.

    Attributes:
        token_R, expert_R: of each row.
        hidden_RD, before_RG: of the first projection, input and gradient at the output, float32.
        inner_RF, after_RD: of the second one.
    """

    token_R: Tensor
    expert_R: Tensor
    hidden_RD: Tensor
    before_RG: Tensor
    inner_RF: Tensor
    after_RD: Tensor


class _Enough(Exception):
    """The layers that were asked for are seen."""


class _Watch:
    """An `ExpertsImplementation` on the module's own weights that notes rows and, where asked, their gradients.

    Args:
        depth: layers to look at before the forward is given up; None goes to the end.
        gradient_from: the first layer whose rows want a gradient; None wants none.
    """

    def __init__(self, depth: int | None = None, gradient_from: int | None = None) -> None:
        self._depth, self._from = depth, gradient_from
        self.views: list[LayerView] = []
        self.rows: list[tuple[LayerView, Tensor, Tensor]] = []

    def __call__(self, call: ExpertsCall) -> Tensor:
        layer = call.layer
        weights = layer.parameters()
        wanted = self._from is not None and layer.index >= self._from
        rows = RoutedRows.of(call.expert_ids_NK, layer.num_experts)
        ends = rows.ends_E
        expert_R = torch.repeat_interleave(
            torch.arange(layer.num_experts), torch.diff(ends, prepend=ends.new_zeros(1))
        )
        inner: list[Tensor] = []
        taps: list[Tensor] = []

        def linear(name: str, x_RI: Tensor, ends_E: Tensor) -> Tensor:
            out = _grouped(x_RI, as_EIO(weights[name], layer.layout.is_transposed), ends_E)
            bias = weights.get(f"{name}_bias")
            out = out if bias is None else out + seam.bias_rows(bias, ends_E)
            if name == "down_proj":
                inner.append(x_RI.detach())
            if wanted:
                tap = torch.zeros_like(out, requires_grad=True)
                taps.append(tap)
                return out + tap
            return out

        out_RD = seam.expert_rows(layer, call.hidden_ND.index_select(0, rows.token_R), ends, linear)
        view = LayerView(call.hidden_ND.detach(), call.expert_ids_NK.detach(), rows.token_R, expert_R, inner[0])
        self.views.append(view)
        if wanted:
            self.rows.append((view, taps[0], taps[1]))
        if self._depth is not None and len(self.views) >= self._depth:
            raise _Enough
        return rows.combine(out_RD, call.routing_weights_NK, call.hidden_ND.dtype)


def summed_losses(model: nn.Module, ids_BT: Tensor) -> Tensor:
    """Summed next-token loss of each of some texts of one length, [B]."""
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits_BTV.transpose(1, 2), ids_BT[:, 1:], reduction="none").sum(1)


def _grouped(x_RI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    """Row blocks by expert; plain products, which autograd differentiates with respect to the rows."""
    ends = ends_E.tolist()
    blocks = zip(weight_EIO, [0, *ends], ends, strict=False)
    return torch.cat([x_RI[start:end] @ weight for weight, start, end in blocks])


class Reader:
    """Looks at a model with text that is supposed.

    Args:
        model: a causal language model behind the seam, float32; put into eval mode, and its parameters are frozen.

    Attributes:
        layers: its MoE layers.
        vocabulary: rows of its embedding.
        side_by_side: whether continuations of a prefix are computed together.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)
        self._model: Any = model
        self.layers: list[ExpertLayer] = seam.expert_layers(model)
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
        self.side_by_side = self._takes_masks()

    # ---- whole texts ----

    @torch.no_grad()
    def views(self, ids_BT: Tensor, depth: int | None = None) -> list[LayerView]:
        """Every place of some texts of one length, tokens in the order of ``ids_BT.flatten()``."""
        with self._watching(depth) as watch:
            self._model(input_ids=ids_BT, use_cache=False)
        return watch.views

    @torch.no_grad()
    def log_prior(self, ids_BT: Tensor) -> Tensor:
        """Log-probability of every token at the place after each, [B, T, V]."""
        return torch.log_softmax(self._model(input_ids=ids_BT, use_cache=False).logits.float(), -1)

    def rows(self, ids_BT: Tensor) -> list[LayerRows]:
        """Rows of the summed next-token loss of some texts of one length, layer by layer."""
        with torch.enable_grad(), self._watching(None, 0) as watch:
            return _rows(watch, self.losses(ids_BT).sum())

    def losses(self, ids_BT: Tensor) -> Tensor:
        """Summed next-token loss of each of some texts of one length, [B]."""
        return summed_losses(self.model, ids_BT)

    # ---- continuations of prefixes ----

    @torch.no_grad()
    def continuations(self, prefixes_BT: Tensor, candidates_BV: Tensor, depth: int | None = None) -> list[LayerView]:
        """The last place of every prefix continued by each of its candidates; tokens in the order [B, V].

        Args:
            prefixes_BT: T may be 0.
            candidates_BV: token ids.
            depth: MoE layers to look at.
        """
        with self._watching(depth) as watch:
            self._continue(prefixes_BT, candidates_BV)
        keep_N = self._last_places(prefixes_BT, candidates_BV)
        return [_kept_view(view, keep_N) for view in watch.views]

    def last_rows(self, prefixes_BT: Tensor, next_BV: Tensor) -> LayerRows:
        """The last MoE layer's rows at the last place of each prefix, were the next token each of the candidates.

        No later place reads what the last layer computes, so its gradient there follows from the prefix and the next
        token alone. Tokens in the order [B, V].
        """
        before_BT, same_BV = prefixes_BT[:, :-1], prefixes_BT[:, -1:].expand_as(next_BV)
        with torch.enable_grad(), self._watching(None, len(self.layers) - 1) as watch:
            logits_NV = self._continue(before_BT, same_BV)
            loss = F.cross_entropy(logits_NV.float(), next_BV.flatten(), reduction="sum")
            (rows,) = _rows(watch, loss)
        return _kept_rows(rows, self._last_places(before_BT, same_BV))

    def _continue(self, prefixes_BT: Tensor, candidates_BV: Tensor) -> Tensor:
        """[B * V, vocabulary] logits at the last place of every continuation."""
        (batch, length), count = prefixes_BT.shape, candidates_BV.shape[1]
        if not self.side_by_side or length == 0:
            rows = torch.cat([prefixes_BT.repeat_interleave(count, 0), candidates_BV.reshape(-1, 1)], 1)
            last_NV: Tensor = self._model(input_ids=rows, use_cache=False).logits[:, -1]
            return last_NV
        groups, side = _split(count)
        filled = F.pad(candidates_BV, (0, groups * side - count))
        with seam.computed_by(self.model, seam.LocalExperts()), torch.no_grad():
            cache = self._model(input_ids=prefixes_BT, use_cache=True).past_key_values
        cache.batch_repeat_interleave(groups)
        seen = torch.cat([torch.ones(side, length, dtype=torch.bool), torch.eye(side, dtype=torch.bool)], 1)
        logits: Tensor = self._model(
            input_ids=filled.view(batch * groups, side),
            position_ids=torch.full((batch * groups, side), length),
            attention_mask=seen.expand(batch * groups, 1, side, length + side),
            past_key_values=cache,
            use_cache=True,
        ).logits
        return logits.view(batch, groups * side, -1)[:, :count].flatten(0, 1)

    def _last_places(self, prefixes_BT: Tensor, candidates_BV: Tensor) -> Tensor:
        """[N] which of the tokens that `_continue` computes are continuations."""
        (batch, length), count = prefixes_BT.shape, candidates_BV.shape[1]
        if not self.side_by_side or length == 0:
            keep = torch.zeros(batch * count, length + 1, dtype=torch.bool)
            keep[:, -1] = True
            return keep.flatten()
        groups, side = _split(count)
        return (torch.arange(groups * side) < count).repeat(batch)

    def _takes_masks(self) -> bool:
        """Whether continuations side by side come out as row by row."""
        ids = torch.arange(min(self.vocabulary, 12)).view(2, -1)
        prefixes, candidates = ids[:, :3], ids[:, 3:]
        self.side_by_side = False
        plain = self.continuations(prefixes, candidates)
        self.side_by_side = True
        try:
            beside = self.continuations(prefixes, candidates)
        except (RuntimeError, ValueError, TypeError, AttributeError):
            return False
        return all(
            torch.equal(one.experts_NK, other.experts_NK)
            and bool((one.hidden_ND - other.hidden_ND).norm() <= _CLOSE * one.hidden_ND.norm())
            for one, other in zip(plain, beside, strict=True)
        )

    @contextmanager
    def _watching(self, depth: int | None, gradient_from: int | None = None) -> Iterator[_Watch]:
        watch = _Watch(depth, gradient_from)
        with seam.computed_by(self.model, watch), suppress(_Enough):
            yield watch


def _split(count: int) -> tuple[int, int]:
    """Groups of continuations, and how many stand in each."""
    groups = -(-count // _SIDE_BY_SIDE)
    return groups, -(-count // groups)


def _rows(watch: _Watch, loss: Tensor) -> list[LayerRows]:
    taps = [tap for _, *pair in watch.rows for tap in pair]
    grads = iter(torch.autograd.grad(loss, taps))
    return [
        LayerRows(view.token_R, view.expert_R, view.hidden_ND[view.token_R], before, view.inner_RF, after)
        for view, before, after in zip((view for view, *_ in watch.rows), grads, grads, strict=False)
    ]


def _kept_view(view: LayerView, keep_N: Tensor) -> LayerView:
    if bool(keep_N.all()):
        return view
    rows = keep_N[view.token_R]
    renumbered = keep_N.cumsum(0) - 1
    return LayerView(
        view.hidden_ND[keep_N],
        view.experts_NK[keep_N],
        renumbered[view.token_R[rows]],
        view.expert_R[rows],
        view.inner_RF[rows],
    )


def _kept_rows(rows: LayerRows, keep_N: Tensor) -> LayerRows:
    if bool(keep_N.all()):
        return rows
    kept = keep_N[rows.token_R]
    renumbered = keep_N.cumsum(0) - 1
    others = (rows.expert_R, rows.hidden_RD, rows.before_RG, rows.inner_RF, rows.after_RD)
    return LayerRows(renumbered[rows.token_R[kept]], *(each[kept] for each in others))
