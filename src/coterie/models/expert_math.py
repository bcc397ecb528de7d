"""Forward and backward of one layer's experts in closed form, without an autograd graph.

An expert host, and an owner that streams weights, hold rows and weights but no graph: they call these functions.
The matrix products are written out; only the family's own elementwise gate, which coterie does not know, is
differentiated by autograd, alone and without ever waiting for anything.

Shape letters: R routed rows sorted by expert, D model width, G width before the gate, F expert width, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.models.grouped import as_EIO, grouped_mm, grouped_sum, weight_outer
from coterie.models.seam import ExpertLayer, bias_rows

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class RowGradients:
    """What a backward over rows yields; enough to form every weight gradient without the weights.

    Attributes:
        grad_x_RD: gradient at the rows that entered.
        act_RF: input of ``down_proj``.
        grad_pre_RG: gradient at the output of ``gate_up_proj`` (or ``up_proj``).
        grad_routing_weights_R: gradient at the rows' routing weights, float32 or wider; None where there were none.
    """

    grad_x_RD: Tensor
    act_RF: Tensor
    grad_pre_RG: Tensor
    grad_routing_weights_R: Tensor | None = None


def apply_linear(layer: ExpertLayer, weights: Weights, name: str, x_RI: Tensor, ends_E: Tensor) -> Tensor:
    """One expert matrix applied to its rows, bias included, in the weight's dtype. [R, O]."""
    weight = weights[name]
    out = grouped_mm(x_RI.to(weight.dtype), as_EIO(weight, layer.layout.is_transposed), ends_E)
    bias = weights.get(f"{name}_bias")
    return out if bias is None else out + bias_rows(bias, ends_E)


@torch.no_grad()
def forward_rows(layer: ExpertLayer, weights: Weights, x_RD: Tensor, ends_E: Tensor) -> tuple[Tensor, Tensor]:
    """Expert outputs before a post-expert norm and routing weights, and what the backward needs.

    Returns:
        ``(out_RD, pre_RG)``; keep ``x_RD`` and ``pre_RG`` for `backward_rows`.
    """
    pre_RG = apply_linear(layer, weights, layer.layout.up_name, x_RD, ends_E)
    return apply_linear(layer, weights, "down_proj", layer.activate(pre_RG), ends_E), pre_RG


@torch.no_grad()
def backward_rows(
    layer: ExpertLayer,
    weights: Weights,
    pre_RG: Tensor,
    grad_out_RD: Tensor,
    ends_E: Tensor,
    routing_weights_R: Tensor | None = None,
) -> RowGradients:
    """Gradients at the rows, given the gradient at `forward_rows`' output.

    Args:
        layer: names the layout and the activation.
        weights: {name: [E, ...]}, as in `forward_rows`.
        pre_RG: what `forward_rows` returned beside its output.
        grad_out_RD: gradient at that output.
        ends_E: where each expert's rows end.
        routing_weights_R: if ``grad_out_RD`` is the gradient at the weighted output. Their own gradient is then
            formed too, without the expert's output: (x W) . g = x . (g W^T), and g W^T is needed anyway.
    """
    transposed, down = layer.layout.is_transposed, weights["down_proj"]
    grad_out_RD = grad_out_RD.to(down.dtype)
    unscaled_RF = grouped_mm(grad_out_RD, as_EIO(down, transposed).transpose(1, 2), ends_E)
    grad_act_RF = (
        unscaled_RF if routing_weights_R is None else (unscaled_RF * routing_weights_R.unsqueeze(-1)).to(down.dtype)
    )
    act_RF, grad_pre_RG = _gate_backward(layer, pre_RG, grad_act_RF)
    up_EIO = as_EIO(weights[layer.layout.up_name], transposed)
    grad_routing_weights_R = None
    if routing_weights_R is not None:
        grad_routing_weights_R = _row_dot(act_RF, unscaled_RF)
        if layer.layout.has_bias:
            grad_routing_weights_R += _row_dot(bias_rows(weights["down_proj_bias"], ends_E), grad_out_RD)
    return RowGradients(
        grouped_mm(grad_pre_RG, up_EIO.transpose(1, 2), ends_E), act_RF, grad_pre_RG, grad_routing_weights_R
    )


def _row_dot(a_RI: Tensor, b_RI: Tensor) -> Tensor:
    dtype = torch.promote_types(a_RI.dtype, torch.float32)
    return (a_RI.to(dtype) * b_RI.to(dtype)).sum(-1)


def _gate_backward(layer: ExpertLayer, pre_RG: Tensor, grad_act_RF: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = pre_RG.detach().requires_grad_()
        act_RF = layer.activate(leaf)
        (grad_pre_RG,) = torch.autograd.grad(act_RF, leaf, grad_act_RF)
    return act_RF.detach(), grad_pre_RG


@torch.no_grad()
def weight_gradients(
    layer: ExpertLayer, x_RD: Tensor, rows: RowGradients, grad_out_RD: Tensor, ends_E: Tensor
) -> dict[str, Tensor]:
    """Summed gradient of every stacked expert parameter, in the family's storage order.

    Returns:
        One tensor per name of ``layer.layout.parameter_names``, first dimension E; zero for experts without rows.
    """
    layout, dtype = layer.layout, rows.grad_pre_RG.dtype
    grad_out_RD = grad_out_RD.to(dtype)
    gradients = {
        layout.up_name: weight_outer(x_RD.to(dtype), rows.grad_pre_RG, ends_E, layout.is_transposed),
        "down_proj": weight_outer(rows.act_RF, grad_out_RD, ends_E, layout.is_transposed),
    }
    if layout.has_bias:
        gradients[f"{layout.up_name}_bias"] = grouped_sum(rows.grad_pre_RG, ends_E)
        gradients["down_proj_bias"] = grouped_sum(grad_out_RD, ends_E)
    return gradients
