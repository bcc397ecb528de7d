"""The one place where coterie meets Hugging Face's Mixture-of-Experts models.

transformers 5 sends every MoE layer of the families behind its experts interface through a registered function.
coterie registers one, ``"coterie"``. Behind it sits one small interface, `ExpertsImplementation`: local weights,
experts hosted elsewhere, or experts fetched a layer at a time. A family needs no code of its own.

Shape letters: N tokens (batch and time flattened), K experts chosen per token, E experts of the layer,
R routed rows (one per chosen (token, expert) pair), D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from coterie.errors import ModelError
from coterie.models.autograd import applied
from coterie.models.grouped import GroupedLinear
from coterie.models.sizes import check_routing
from coterie.models.tensors import compute_dtype

NAME = "coterie"
_BINDING = "coterie_binding"
_MASKED = "coterie_masked"
_OWN = "coterie_own"


@dataclass(frozen=True)
class ExpertsLayout:
    """How a family stores its expert weights; read here only, with the defaults of older transformers.

    ``gate_up_proj`` is [E, O, I], or [E, I, O] when ``is_transposed``; without a gate it is called ``up_proj``.
    """

    has_gate: bool = True
    has_bias: bool = False
    is_transposed: bool = False
    is_concatenated: bool = True
    has_post_expert_norm: bool = False

    @classmethod
    def of(cls, module: nn.Module) -> ExpertsLayout:
        """The layout flags of an experts module."""
        return cls(**{name: bool(getattr(module, name, getattr(cls, name))) for name in cls.__annotations__})

    @property
    def up_name(self) -> str:
        return "gate_up_proj" if self.has_gate else "up_proj"

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """The stacked parameters, first dimension E, in the order they are used."""
        names = (self.up_name, "down_proj")
        return names + tuple(f"{name}_bias" for name in names) if self.has_bias else names


@dataclass(frozen=True)
class ExpertLayer:
    """One MoE layer of a model.

    Attributes:
        index: position among the model's MoE layers, from 0: the ``layer`` of every (layer, expert, parameter) key.
        name: dotted path of the experts module inside the model.
        num_experts: E: the experts that the router chooses from.
        layout: storage flags.
        module: the family's experts module; its parameters may be on the meta device, or of some experts only.
    """

    index: int
    name: str
    num_experts: int
    layout: ExpertsLayout
    module: nn.Module

    def activate(self, pre_RG: Tensor) -> Tensor:
        """The family's own elementwise gate or activation, [R, G] to [R, F]. Touches no parameter."""
        if self.layout.has_gate:
            gate: Callable[[Tensor], Tensor] = self.module._apply_gate  # type: ignore[assignment]
            return gate(pre_RG)
        activation: Callable[[Tensor], Tensor] = self.module.act_fn  # type: ignore[assignment]
        return activation(pre_RG)

    def parameters(self) -> dict[str, Tensor]:
        """The stacked expert parameters that the module holds, by name."""
        return {name: getattr(self.module, name) for name in self.layout.parameter_names}

    def all_parameters(self) -> dict[str, Tensor]:
        """`parameters`, for whoever computes with them what any token may choose.

        Raises:
            ModelError: the module holds some of the experts only, or transformers shares them out.
        """
        check_not_shared_out(self.module, self.name)
        own = self.parameters()
        held = {int(stacked.shape[0]) for stacked in own.values()}
        if held != {self.num_experts}:
            raise ModelError(
                f"{self.name} holds {min(held)} of its {self.num_experts} experts, and computes with them alone.",
                code="model-experts-elsewhere",
                why="what tokens ask of the experts that are not here would be zero, without a word",
                fix="load the whole model in every process, or let an exchange compute the experts",
            )
        return own


@dataclass(frozen=True)
class ExpertsCall:
    """What a MoE layer asks for: the combined output of the chosen experts, [N, D] in ``hidden_ND``'s dtype."""

    layer: ExpertLayer
    hidden_ND: Tensor
    expert_ids_NK: Tensor
    routing_weights_NK: Tensor


class ExpertsImplementation(Protocol):
    """Computes one MoE layer. Called in the model's forward, and again when a checkpointed layer is recomputed."""

    def __call__(self, call: ExpertsCall) -> Tensor: ...


@dataclass(frozen=True)
class RoutedRows:
    """The chosen (token, expert) pairs, sorted by expert and, within an expert, by token.

    Attributes:
        pair_R: index into the flattened [N * K] pairs.
        token_R: index into the N tokens. Because the sort is stable, it ascends within each expert, so rows of one
            sample are contiguous there.
        ends_E: cumulative row counts, int64.
        num_tokens: N.
        top_k: K.
    """

    pair_R: Tensor
    token_R: Tensor
    ends_E: Tensor
    num_tokens: int
    top_k: int

    @classmethod
    def of(cls, expert_ids_NK: Tensor, num_experts: int) -> RoutedRows:
        """Sort the pairs. Ids outside [0, num_experts) mean "no expert": such pairs get no row and add zero."""
        num_tokens, top_k = expert_ids_NK.shape
        ids, pair_R = torch.sort(expert_ids_NK.reshape(-1), stable=True)
        valid = (ids >= 0) & (ids < num_experts)
        if not bool(valid.all()):
            ids, pair_R = ids[valid], pair_R[valid]
        ends_E = torch.bincount(ids, minlength=num_experts).cumsum(0)
        return cls(pair_R, pair_R // top_k, ends_E, num_tokens, top_k)

    def combine(self, out_RD: Tensor, routing_weights_NK: Tensor, dtype: torch.dtype) -> Tensor:
        """Weight each row and sum the rows of each token: [N, D]. Deterministic: no scattered addition."""
        weighted_RD = out_RD * routing_weights_NK.reshape(-1)[self.pair_R].unsqueeze(-1)
        return self.sum_by_token(weighted_RD, dtype)

    def sum_by_token(self, weighted_RD: Tensor, dtype: torch.dtype) -> Tensor:
        """Sum the rows of each token: [N, D]."""
        if self.pair_R.shape[0] == self.num_tokens * self.top_k:
            inverse = torch.empty_like(self.pair_R)
            inverse[self.pair_R] = torch.arange(self.pair_R.shape[0], device=self.pair_R.device)
            pairs = weighted_RD.index_select(0, inverse)
        else:
            empty = weighted_RD.new_zeros(self.num_tokens * self.top_k, weighted_RD.shape[-1])
            pairs = empty.index_copy(0, self.pair_R, weighted_RD)
        return pairs.view(self.num_tokens, self.top_k, weighted_RD.shape[-1]).sum(dim=1).to(dtype)


def bias_rows(bias_EO: Tensor, ends_E: Tensor) -> Tensor:
    """The bias of each row's expert, [R, O]."""
    counts = torch.diff(ends_E, prepend=ends_E.new_zeros(1))
    return torch.repeat_interleave(bias_EO, counts, dim=0)


Linear = Callable[[str, Tensor, Tensor], Tensor]
"""``linear(parameter_name, x_RI, ends_E)``: one expert matrix applied to its rows, bias included."""


def expert_rows(layer: ExpertLayer, x_RD: Tensor, ends_E: Tensor, linear: Linear) -> Tensor:
    """Output of each row's expert, before routing weights: the one description of what an expert computes. [R, D]."""
    pre_RG = linear(layer.layout.up_name, x_RD, ends_E)
    out_RD = linear("down_proj", layer.activate(pre_RG), ends_E)
    if layer.layout.has_post_expert_norm:
        out_RD = layer.module.post_expert_norm(out_RD)  # type: ignore[operator]
    return out_RD


class LocalExperts:
    """The weights are in the module: plain training on one machine."""

    def __call__(self, call: ExpertsCall) -> Tensor:
        layer, weights = call.layer, call.layer.all_parameters()

        def linear(name: str, x_RI: Tensor, ends_E: Tensor) -> Tensor:
            weight, bias = weights[name], weights.get(f"{name}_bias")
            dtype = compute_dtype(x_RI, weight)
            out = applied(GroupedLinear, x_RI.to(dtype), weight.to(dtype), ends_E, layer.layout.is_transposed)
            return out if bias is None else out + bias_rows(bias.to(dtype), ends_E)

        rows = RoutedRows.of(call.expert_ids_NK, layer.num_experts)
        out_RD = expert_rows(layer, call.hidden_ND.index_select(0, rows.token_R), rows.ends_E, linear)
        return rows.combine(out_RD, call.routing_weights_NK, call.hidden_ND.dtype)


def expert_layers(model: nn.Module) -> list[ExpertLayer]:
    """Every MoE layer of a model that goes through the experts interface, in the model's own order.

    Empty for a dense model or a family outside the interface.
    """
    modules = [(name, module) for name, module in model.named_modules() if _is_experts(module)]
    return [
        ExpertLayer(index, name, _num_experts(module), ExpertsLayout.of(module), module)
        for index, (name, module) in enumerate(modules)
    ]


def _is_experts(module: nn.Module) -> bool:
    return hasattr(module, "_apply_gate") and hasattr(module, "is_transposed") and hasattr(module, "down_proj")


def _num_experts(module: nn.Module) -> int:
    down, named = module.down_proj, getattr(module, "num_experts", None)
    assert isinstance(down, Tensor)
    return named if isinstance(named, int) else down.shape[0]


def check_not_shared_out(module: nn.Module, name: str) -> None:
    """Refuse an experts module that transformers has shared out over processes.

    Raises:
        ModelError: it has.
    """
    if getattr(module, "_is_expert_parallel", False):
        raise ModelError(
            f"transformers has shared out the experts of {name} over several processes.",
            code="model-expert-parallel",
            why="rows arrive here from other processes, and nothing says which record they belong to",
            fix="load the model without a distributed config (no tp_plan, ep_size or expert parallelism)",
        )


def select(model: nn.Module, implementation: ExpertsImplementation | None = None) -> list[ExpertLayer]:
    """Route every MoE layer of ``model`` through coterie, computed by ``implementation``.

    Default: what `computes_itself` says of the layer, else with the weights in the module.

    Call it again after every load: Hugging Face resets the choice to its own.

    Raises:
        ModelError: the model has no MoE layer behind the experts interface, its tokens ask for other experts than
            there are, or transformers shares its experts out.
    """
    layers = expert_layers(model)
    for layer in layers:
        check_not_shared_out(layer.module, layer.name)
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no Mixture-of-Experts layer that coterie can reach.",
            code="model-no-experts",
            why="its experts are not behind the transformers experts interface, or it is a dense model",
            fix="choose a family from docs/models.md, or turn a dense model into one with `coterie upcycle`",
        )
    stacked = [param for layer in layers for param in layer.parameters().values()]
    check_routing(layers[0].module.config, [layer.num_experts for layer in layers], stacked)
    for layer in layers:
        layer.module.config._experts_implementation = NAME  # type: ignore[union-attr]
        own = implementation or getattr(layer.module, _OWN, LocalExperts())
        setattr(layer.module, _BINDING, (own, layer))
    return layers


def computes_itself(module: nn.Module, implementation: ExpertsImplementation) -> None:
    """Say what computes an experts module wherever `select` names nothing else: one with weights at several ranks."""
    setattr(module, _OWN, implementation)


@contextmanager
def computed_by(model: nn.Module, implementation: ExpertsImplementation) -> Iterator[list[ExpertLayer]]:
    """Inside, every MoE layer is computed by ``implementation``; afterwards by whatever did before.

    A model without MoE layers behind the interface is left alone.
    """
    modules = [layer.module for layer in expert_layers(model)]
    before = [(m, getattr(m, _BINDING, None), m.config, m.config._experts_implementation) for m in modules]  # type: ignore[union-attr]
    layers = select(model, implementation) if modules else []
    try:
        yield layers
    finally:
        for module, binding, config, name in before:
            config._experts_implementation = name  # type: ignore[union-attr]
            if binding is None:
                delattr(module, _BINDING)
            else:
                setattr(module, _BINDING, binding)


def mask(model: nn.Module, experts: Mapping[int, Collection[int]]) -> None:
    """From now on some experts add nothing to the tokens that choose them, whatever computes the others.

    Heeded wherever coterie computes them (`select`, `computed_by`), not by Hugging Face's own code.

    Args:
        model: any model with expert layers.
        experts: by layer index; every layer that is not named computes with all of its experts again.
    """
    for layer in expert_layers(model):
        setattr(layer.module, _MASKED, tuple(sorted(experts.get(layer.index, ()))))


def masked(model: nn.Module) -> dict[int, tuple[int, ...]]:
    """What `mask` was told last, by layer index."""
    return {layer.index: getattr(layer.module, _MASKED, ()) for layer in expert_layers(model)}


def check_selected(model: nn.Module) -> None:
    """Make sure that every MoE layer still goes through coterie.

    Raises:
        ModelError: something (a reload, a config change) put another implementation in its place.
    """
    for layer in expert_layers(model):
        current = getattr(layer.module.config, "_experts_implementation", None)
        if current != NAME or not hasattr(layer.module, _BINDING):
            raise ModelError(
                f"{layer.name} computes its experts with `{current}`, not through coterie.",
                code="model-seam-lost",
                why="experts outside coterie would skip the exchange and, in private training, the clipping",
                fix="call coterie.models.seam.select(model) again after loading or reconfiguring the model",
            )


def bindings(model: nn.Module) -> Iterator[tuple[ExpertLayer, ExpertsImplementation]]:
    """The layers that were selected, with what computes them."""
    for module in model.modules():
        bound = getattr(module, _BINDING, None)
        if bound is not None:
            yield bound[1], bound[0]


def _experts_function(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers calls. A module that was never bound computes with its own weights."""
    bound = getattr(module, _BINDING, None)
    if bound is None:
        layer = ExpertLayer(0, "experts", _num_experts(module), ExpertsLayout.of(module), module)
        bound = (LocalExperts(), layer)
    implementation, layer = bound
    masked = getattr(module, _MASKED, ())
    if masked:
        gone = torch.isin(top_k_index, torch.tensor(masked, device=top_k_index.device, dtype=top_k_index.dtype))
        top_k_index = top_k_index.masked_fill(gone, layer.num_experts)
    return implementation(ExpertsCall(layer, hidden_states, top_k_index, top_k_weights))


ALL_EXPERTS_FUNCTIONS.register(NAME, _experts_function)
