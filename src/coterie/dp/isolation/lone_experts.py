"""Experts of one record alone, differentiated by autograd as the rest of its model is.

Weights come from the module, or are lent layer by layer; then their gradients, too, end outside the module.

Shape letters as in `coterie.dp.per_sample.private_experts`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coterie.dp.per_sample.private_experts import Adapters
from coterie.models.autograd import applied
from coterie.models.grouped import GroupedLinear, as_EIO, grouped_mm, grouped_sum, no_wider, weight_outer
from coterie.models.seam import ExpertLayer, ExpertsCall, RoutedRows, bias_rows, expert_rows
from coterie.models.streaming.cache import LayerWeights
from coterie.models.streaming.streamer import WeightSource, as_stored
from coterie.models.tensors import compute_dtype


class LoneExperts:
    """An `ExpertsImplementation` for one pass over one record.

    Args:
        adapters: LoRA factors by (experts module, parameter).
        source: lends the weights, instead of the module.
        trained: names ``{layer.name}.{parameter}`` of lent weights whose gradients are wanted.
        keep_on: device that these gradients go to as they are formed, a matrix of a layer at a time.

    Attributes:
        gradients: of lent weights, by these names; filled by the backward.
    """

    def __init__(
        self, adapters: Adapters, source: WeightSource | None, trained: frozenset[str], keep_on: torch.device
    ) -> None:
        self.source = source
        self.trained = trained
        self.gradients: dict[str, Tensor] = {}
        self._keep_on = keep_on
        self._adapters = adapters

    def __call__(self, call: ExpertsCall) -> Tensor:
        layer, own = call.layer, call.layer.all_parameters()
        rows = RoutedRows.of(call.expert_ids_NK, layer.num_experts)
        # The anchor makes autograd visit the backward even where the rows themselves need no gradient.
        anchor = torch.zeros((), requires_grad=torch.is_grad_enabled())

        def linear(name: str, x_RI: Tensor, ends_E: Tensor) -> Tensor:
            x_RI = x_RI.to(compute_dtype(call.hidden_ND, own[name]))
            if self.source is None:
                out = _own_linear(layer, own, name, x_RI, ends_E)
            else:
                out = applied(_LentLinear, x_RI, ends_E, anchor, layer, name, self)
            for adapter in self._adapters.get((layer.module, name), ()):
                narrow = applied(GroupedLinear, x_RI, adapter.down_ErI.to(x_RI.dtype), ends_E, False)
                out = out + adapter.scaling * applied(
                    GroupedLinear, narrow, adapter.up_EOr.to(x_RI.dtype), ends_E, False
                )
            return out

        out_RD = expert_rows(layer, call.hidden_ND.index_select(0, rows.token_R), rows.ends_E, linear)
        return rows.combine(out_RD, call.routing_weights_NK, call.hidden_ND.dtype)

    def add(self, name: str, gradient: Tensor) -> None:
        """Take a gradient of a lent tensor, if it is trained."""
        if name in self.trained:
            kept, known = gradient.to(self._keep_on), self.gradients.get(name)
            self.gradients[name] = kept if known is None else known + kept


def _own_linear(layer: ExpertLayer, own: dict[str, Tensor], name: str, x_RI: Tensor, ends_E: Tensor) -> Tensor:
    out: Tensor = applied(GroupedLinear, x_RI, own[name].to(x_RI.dtype), ends_E, layer.layout.is_transposed)
    bias = own.get(f"{name}_bias")
    return out if bias is None else out + bias_rows(bias.to(x_RI.dtype), ends_E)


def _lent_EIO(lent: LayerWeights, layer: ExpertLayer, name: str, dtype: torch.dtype) -> Tensor:
    return as_EIO(no_wider(as_stored(lent, name), dtype), layer.layout.is_transposed)


class _LentLinear(torch.autograd.Function):
    """One expert matrix, lent for the forward and lent again for the backward."""

    @staticmethod
    def forward(
        ctx: Any, x_RI: Tensor, ends_E: Tensor, anchor: Tensor, layer: ExpertLayer, name: str, experts: LoneExperts
    ) -> Tensor:
        ctx.save_for_backward(x_RI, ends_E)
        ctx.layer, ctx.name, ctx.experts = layer, name, experts
        assert experts.source is not None
        with experts.source.layer(layer.index) as lent:
            out = grouped_mm(x_RI, _lent_EIO(lent, layer, name, x_RI.dtype), ends_E)
            bias = lent.get(f"{name}_bias")
            return out if bias is None else out + bias_rows(bias.to(x_RI.dtype), ends_E)

    @staticmethod
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Any, ...]:
        x_RI, ends_E = ctx.saved_tensors
        layer: ExpertLayer = ctx.layer
        name: str = ctx.name
        experts: LoneExperts = ctx.experts
        full, transposed = f"{layer.name}.{name}", layer.layout.is_transposed
        grad_x = None
        if ctx.needs_input_grad[0]:
            assert experts.source is not None
            with experts.source.layer(layer.index) as lent:
                weight_EIO = _lent_EIO(lent, layer, name, x_RI.dtype)
                grad_x = grouped_mm(grad_RO, weight_EIO.transpose(1, 2), ends_E)
        if full in experts.trained:
            experts.add(full, weight_outer(x_RI, grad_RO, ends_E, transposed))
        if f"{full}_bias" in experts.trained:
            experts.add(f"{full}_bias", grouped_sum(grad_RO, ends_E))
        return grad_x, None, None, None, None, None
