"""Experts behind the seam, computed so that every record's gradient can be told apart.

Rows are sorted once by (expert, record). The backward is in closed form: it forms no weight gradient, it hands the
rows and the gradients at each matrix to the `Capture`. Weights come from the module, or are lent layer by layer by a
`WeightSource`.

Shape letters: N tokens, K experts per token, R routed rows, E experts, D model width, G width before the gate,
F expert width, r rank of an adapter, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from coterie.dp.per_sample.capture import Capture, node_of, refusal
from coterie.dp.per_sample.stacked_terms import Segments, StackedBias, StackedOuter
from coterie.dp.per_sample.weight_expressions import Node
from coterie.errors import NoRuleError
from coterie.models.autograd import applied
from coterie.models.grouped import as_EIO, grouped_mm, no_wider
from coterie.models.lora import ExpertAdapter
from coterie.models.seam import ExpertLayer, ExpertsCall, RoutedRows, bias_rows
from coterie.models.streaming.streamer import WeightSource, as_stored
from coterie.models.tensors import compute_dtype

Adapters = Mapping[tuple[nn.Module, str], list[ExpertAdapter]]
Stacked = Mapping[str, Tensor]


@dataclass
class _LowRank:
    """One adapter of one matrix: plain factors, and their nodes where they are trained."""

    down_ErI: Tensor
    up_EOr: Tensor
    scaling: float
    down_node: Node | None
    up_node: Node | None

    @classmethod
    def of(cls, adapter: ExpertAdapter, dtype: torch.dtype) -> _LowRank:
        down, up = adapter.down_ErI, adapter.up_EOr
        down_node, up_node = node_of(down), node_of(up)
        plain_down = down.detach() if down_node is None else down_node.value
        plain_up = up.detach() if up_node is None else up_node.value
        return cls(plain_down.to(dtype), plain_up.to(dtype), adapter.scaling, down_node, up_node)


@dataclass
class _Matrix:
    """One stacked expert matrix with its bias and adapters. The weight itself is passed in at each use."""

    name: str
    transposed: bool
    dtype: torch.dtype
    node: Node | None
    bias_node: Node | None
    adapters: list[_LowRank] = field(default_factory=list)

    def _weight(self, stacked: Stacked) -> Tensor:
        return as_EIO(no_wider(as_stored(stacked, self.name).detach(), self.dtype), self.transposed)

    def apply(self, stacked: Stacked, x_RI: Tensor, ends_E: Tensor) -> Tensor:
        x_RI = x_RI.to(self.dtype)
        out = grouped_mm(x_RI, self._weight(stacked), ends_E)
        bias = stacked.get(f"{self.name}_bias")
        if bias is not None:
            out = out + bias_rows(bias.detach().to(self.dtype), ends_E)
        for low in self.adapters:
            narrow = grouped_mm(x_RI, low.down_ErI.mT, ends_E)
            out = out + low.scaling * grouped_mm(narrow, low.up_EOr.mT, ends_E)
        return out

    def gradient_of_input(self, stacked: Stacked, g_RO: Tensor, ends_E: Tensor) -> Tensor:
        grad = grouped_mm(g_RO, self._weight(stacked).mT, ends_E)
        for low in self.adapters:
            narrow = grouped_mm(g_RO, low.up_EOr, ends_E)
            grad = grad + low.scaling * grouped_mm(narrow, low.down_ErI, ends_E)
        return grad

    def nodes(self) -> list[Node]:
        low = [node for adapter in self.adapters for node in (adapter.down_node, adapter.up_node)]
        return [node for node in (self.node, self.bias_node, *low) if node is not None]

    def deliver(
        self, capture: Capture, x: Tensor, g_RO: Tensor, segments: Segments, gather: Tensor | None = None
    ) -> None:
        """Hand over what this matrix's gradients are made of; ``x`` and ``gather`` as in `StackedOuter`."""
        if self.node is not None:
            shape = self.node.value.shape
            capture.deliver(self.node, StackedOuter(x, g_RO, segments, shape, self.transposed, gather))
        if self.bias_node is not None:
            capture.deliver(self.bias_node, StackedBias(g_RO, segments))
        for low in self.adapters:
            if low.down_node is not None:
                narrow = low.scaling * grouped_mm(g_RO, low.up_EOr, segments.ends_E)
                shape = low.down_node.value.shape
                capture.deliver(low.down_node, StackedOuter(x, narrow, segments, shape, False, gather))
            if low.up_node is not None:
                rows = (x if gather is None else x[gather]).to(self.dtype)
                narrow = low.scaling * grouped_mm(rows, low.down_ErI.mT, segments.ends_E)
                shape = low.up_node.value.shape
                capture.deliver(low.up_node, StackedOuter(narrow, g_RO, segments, shape, False))


class PrivateExperts:
    """An `ExpertsImplementation` for one pass: see the module text.

    Args:
        capture: the pass. Stacked parameters that it tracks under ``{layer.name}.{parameter}`` are trained.
        adapters: LoRA factors by (experts module, parameter).
        source: lends the weights, instead of the module.
    """

    def __init__(self, capture: Capture, adapters: Adapters, source: WeightSource | None = None) -> None:
        self.capture = capture
        self._adapters = adapters
        self._source = source

    def __call__(self, call: ExpertsCall) -> Tensor:
        return self.compute(call, self.record_of(call), self.capture.batch)

    def record_of(self, call: ExpertsCall) -> Tensor:
        """[N] whose each token is, where a batch has every record at the same padded length.

        Raises:
            NoRuleError: it has not.
        """
        tokens, records = call.hidden_ND.shape[0], self.capture.batch
        if tokens % records:
            raise NoRuleError(
                f"The experts of `{call.layer.name}` got {tokens} tokens, which do not split over {records} records.",
                why="without knowing whose each token is, no expert gradient can be clipped per record",
                fix="give every record of the batch the same padded length",
            )
        return torch.arange(tokens, device=call.hidden_ND.device) // max(tokens // records, 1)

    def compute(self, call: ExpertsCall, record_N: Tensor, records: int) -> Tensor:
        """The layer's output, [N, D].

        Args:
            call: of tokens whose records ascend.
            record_N: whose each token is.
            records: how many there are, also of those without a token here.
        """
        capture = self.capture
        rows = RoutedRows.of(call.expert_ids_NK, call.layer.num_experts)
        experts_pass = _ExpertsPass(self, call, rows, Segments(record_N[rows.token_R], rows.ends_E, records))
        if torch.is_grad_enabled():
            for node in (*experts_pass.up.nodes(), *experts_pass.down.nodes()):
                capture.expect(node)
        pre_RG = applied(_Up, capture.anchor, call.hidden_ND, experts_pass)
        out_RD = applied(_Down, capture.anchor, call.layer.activate(pre_RG), experts_pass)
        if call.layer.layout.has_post_expert_norm:
            with capture.rows_belong_to(experts_pass.segments.record_R):
                out_RD = call.layer.module.post_expert_norm(out_RD)  # type: ignore[operator]
        return rows.combine(out_RD, call.routing_weights_NK, call.hidden_ND.dtype)

    @contextmanager
    def lent(self, layer: ExpertLayer) -> Iterator[Stacked]:
        """The layer's stacked tensors, for the length of the block."""
        if self._source is None:
            yield layer.all_parameters()
        else:
            with self._source.layer(layer.index) as stacked:
                yield stacked

    def described(self, layer: ExpertLayer) -> Stacked:
        """The stacked tensors of the module; where weights are lent it has none of them, or some experts' only."""
        return layer.all_parameters() if self._source is None else layer.parameters()

    def matrix(self, layer: ExpertLayer, name: str, hidden: Tensor, weight: Tensor) -> _Matrix:
        """The description of one matrix for this call."""
        dtype = compute_dtype(hidden, weight)
        roots = self.capture.roots
        return _Matrix(
            name,
            layer.layout.is_transposed,
            dtype,
            roots.get(f"{layer.name}.{name}"),
            roots.get(f"{layer.name}.{name}_bias"),
            [_LowRank.of(adapter, dtype) for adapter in self._adapters.get((layer.module, name), [])],
        )


class _ExpertsPass:
    """What the forward decided and the backward needs again; holds no expert weight."""

    def __init__(self, experts: PrivateExperts, call: ExpertsCall, rows: RoutedRows, segments: Segments) -> None:
        self.layer = call.layer
        self.experts = experts
        self.rows = rows
        self.segments = segments
        own, up = experts.described(call.layer), call.layer.layout.up_name
        for name, weight in own.items():
            node = node_of(weight)
            if node is not None and node is not experts.capture.roots.get(f"{call.layer.name}.{name}"):
                raise refusal(node, "experts", f"`{call.layer.name}.{name}` is computed from it")
        self.up = experts.matrix(call.layer, up, call.hidden_ND, own[up])
        self.down = experts.matrix(call.layer, "down_proj", call.hidden_ND, own["down_proj"])


class _Up(torch.autograd.Function):
    """``hidden [N, D]`` to the rows before the gate, [R, G]."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, hidden_ND: Tensor, experts_pass: _ExpertsPass) -> Tensor:
        ctx.save_for_backward(hidden_ND)
        ctx.experts_pass = experts_pass
        with experts_pass.experts.lent(experts_pass.layer) as stacked:
            return experts_pass.up.apply(
                stacked, hidden_ND.index_select(0, experts_pass.rows.token_R), experts_pass.rows.ends_E
            )

    @staticmethod
    def backward(ctx: Any, grad_RG: Tensor) -> tuple[Any, ...]:
        (hidden_ND,) = ctx.saved_tensors
        experts_pass: _ExpertsPass = ctx.experts_pass
        rows = experts_pass.rows
        grad_ND = None
        if ctx.needs_input_grad[1]:
            with experts_pass.experts.lent(experts_pass.layer) as stacked:
                grad_RD = experts_pass.up.gradient_of_input(stacked, grad_RG, rows.ends_E)
            grad_ND = rows.sum_by_token(grad_RD, hidden_ND.dtype)
        experts_pass.up.deliver(
            experts_pass.experts.capture, hidden_ND.detach(), grad_RG, experts_pass.segments, rows.token_R
        )
        return None, grad_ND, None


class _Down(torch.autograd.Function):
    """Gated rows [R, F] to expert outputs [R, D], before a post-expert norm and routing weights."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, act_RF: Tensor, experts_pass: _ExpertsPass) -> Tensor:
        ctx.save_for_backward(act_RF)
        ctx.experts_pass = experts_pass
        with experts_pass.experts.lent(experts_pass.layer) as stacked:
            return experts_pass.down.apply(stacked, act_RF, experts_pass.rows.ends_E)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Any, ...]:
        (act_RF,) = ctx.saved_tensors
        experts_pass: _ExpertsPass = ctx.experts_pass
        with experts_pass.experts.lent(experts_pass.layer) as stacked:
            grad_RF = experts_pass.down.gradient_of_input(stacked, grad_RD, experts_pass.rows.ends_E)
        experts_pass.down.deliver(experts_pass.experts.capture, act_RF.detach(), grad_RD, experts_pass.segments)
        return None, grad_RF.to(act_RF.dtype), None
