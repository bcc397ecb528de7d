"""LoRA on stacked expert parameters: the low-rank factors of each expert, read instead of the merged weight.

peft's ``target_parameters`` makes the experts module compute with ``W + scaling * B @ A``, a tensor as large as all
experts. Here A and B are read per expert, so that rows meet them one after the other and ``W + B A`` never exists.

Shape letters: E experts, r rank, I inputs, O outputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from coterie.config import LoraSpec
from coterie.errors import ModelError
from coterie.models.seam import expert_layers

_APART: WeakSet[nn.Module] = WeakSet()
"""Wrappers that `factors_stay_apart` has switched off: their adapters count all the same."""


@dataclass(frozen=True)
class ExpertAdapter:
    """One low-rank update of one stacked expert parameter: expert e adds ``scaling * up[e] @ down[e]``.

    Attributes:
        wrapper: the peft module that holds the factors.
        name: name of the adapter inside it.
    """

    wrapper: Any
    name: str

    @property
    def scaling(self) -> float:
        return float(self.wrapper.scaling[self.name])

    @property
    def down_ErI(self) -> Tensor:
        """A, a view of the stored ``[E * r, I]``."""
        weight: Tensor = self.wrapper.lora_A[self.name].weight
        return weight.reshape(self.wrapper.num_experts, -1, weight.shape[-1])

    @property
    def up_EOr(self) -> Tensor:
        """B, a view of the stored ``[O, r * E]``."""
        weight: Tensor = self.wrapper.lora_B[self.name].weight
        return weight.reshape(weight.shape[0], -1, self.wrapper.num_experts).permute(2, 0, 1)


def load_peft() -> Any:
    """The package that adapters need.

    Raises:
        ModelError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ModelError(
            "Adapters need the package peft, which is not installed.",
            code="model-no-peft",
            fix="install it with: pip install 'coterie[lora]'",
        ) from error
    return peft


def attach_adapters(model: nn.Module, spec: LoraSpec, seed: int) -> nn.Module:
    """Freeze a model and give it adapters; works for a model whose experts are on the meta device.

    Args:
        model: a whole or partial model.
        spec: which parameters get adapters, of what rank.
        seed: of A; B starts at zero, so the model computes what it did before.

    Returns:
        peft's model around the given one; its adapters are never on meta.

    Raises:
        ModelError: peft is not installed, or a name is not in the model.
    """
    peft = load_peft()
    _check_targets(model, spec)
    paths = {f"{layer.name.rpartition('.')[2]}.{name}" for layer in expert_layers(model) for name in spec.experts}
    routers = {end for end in spec.modules if _is_router(model, end)}
    settings = peft.LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        target_modules=[end for end in spec.modules if end not in routers] or None,
        target_parameters=sorted(paths | {f"{end}.weight" for end in routers}),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of parameters it does not know from linear layers
        adapted: nn.Module = peft.get_peft_model(model, settings)
    generator = torch.Generator().manual_seed(seed)
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    for module in adapted.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            if param.requires_grad:
                is_up = any(part is module for layer in adapted.modules() for part in _ups(layer))
                value = torch.zeros(param.shape)
                if not is_up:
                    value.normal_(std=param.shape[-1] ** -0.5, generator=generator)
                setattr(module, name, nn.Parameter(value.to(device, torch.float32)))
    return adapted


@dataclass(frozen=True)
class AdapterSizes:
    """How many values each factor of each adapter has.

    Attributes:
        experts: of stacked expert parameters.
        modules: of layers of the trunk.
    """

    experts: tuple[int, ...]
    modules: tuple[int, ...]


def adapter_sizes(model: nn.Module, spec: LoraSpec) -> AdapterSizes:
    """What `attach_adapters` would attach, from shapes alone: the model may be on the meta device, and peft absent.

    Raises:
        ModelError: a name is not in the model.
    """
    _check_targets(model, spec)
    stacked = [
        param.shape for layer in expert_layers(model) for name, param in layer.parameters().items()
        if name in spec.experts
    ]  # fmt: skip
    plain = [weight.shape for name, weight in _matrices(model).items() if _ends_with_one_of(name, spec.modules)]
    return AdapterSizes(
        tuple(shape[0] * spec.rank * side for shape in stacked for side in shape[1:]),
        tuple(spec.rank * side for shape in plain for side in shape),
    )


def larger_than_matrix(model: nn.Module, spec: LoraSpec) -> str | None:
    """The matrix whose adapter would hold more values than the matrix does, in a sentence; None where there is none.

    Args:
        model: may be on the meta device, without adapters.
        spec: of the adapters.
    """
    stacked = {
        name: param.shape[1:] for layer in expert_layers(model) for name, param in layer.parameters().items()
        if name in spec.experts
    }  # fmt: skip
    plain = {
        name.rpartition(".")[2]: weight.shape
        for name, weight in _matrices(model).items()
        if _ends_with_one_of(name, spec.modules)
    }
    for name, (rows, columns) in (stacked | plain).items():
        values = spec.rank * (rows + columns)
        if values > rows * columns:
            return (
                f"an adapter of rank {spec.rank} on `{name}` holds {values:,} values, and the matrix itself "
                f"{rows * columns:,}: it saves nothing there; a `lora.rank` of at most "
                f"{max(1, rows * columns // (rows + columns))} does"
            )
    return None


def _matrices(model: nn.Module) -> dict[str, Tensor]:
    """The weights of linear layers, routers and embeddings, by the module's name."""
    found = {name: getattr(module, "weight", None) for name, module in model.named_modules()}
    return {name: weight for name, weight in found.items() if isinstance(weight, nn.Parameter) and weight.dim() == 2}


def _ends_with_one_of(name: str, ends: Collection[str]) -> bool:
    """As peft looks for modules."""
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _is_router(model: nn.Module, end: str) -> bool:
    """Whether modules of that name hold a matrix and compute more than its product: peft adapts the matrix."""
    named = [module for name, module in model.named_modules() if _ends_with_one_of(name, (end,))]
    return any(isinstance(getattr(module, "weight", None), nn.Parameter) for module in named) and not any(
        isinstance(module, nn.Embedding) or type(module).forward is nn.Linear.forward for module in named
    )


def _check_targets(model: nn.Module, spec: LoraSpec) -> None:
    names = {name for layer in expert_layers(model) for name in layer.parameters() if not name.endswith("_bias")}
    unknown = sorted(set(spec.experts) - names)
    if unknown:
        raise ModelError(
            f"`lora.experts` names `{unknown[0]}`, which is no matrix of the experts of {type(model).__name__}.",
            code="model-lora-target",
            fix=f"choose from: {', '.join(sorted(names))}",
        )
    layers = _matrices(model)
    for end in spec.modules:
        if not any(_ends_with_one_of(name, (end,)) for name in layers):
            raise ModelError(
                f"`lora.modules` names `{end}`, which is no layer of {type(model).__name__} that an adapter fits.",
                code="model-lora-target",
                why="nothing of that name would be trained, and nothing would say so",
                fix=f"choose from: {', '.join(sorted({name.rpartition('.')[2] for name in layers}))}",
            )


def _ups(module: nn.Module) -> list[nn.Module]:
    """The second factors of a peft layer."""
    return list(module.lora_B.values()) if hasattr(module, "lora_B") else []  # type: ignore[operator]


def parameter_wrappers(model: nn.Module) -> list[Any]:
    """peft's wrappers of parameters anywhere in the model: stacked experts, and routers that are no linear layers.

    Empty without peft or without adapters.
    """
    return [module for module in model.modules() if _is_wrapper(module)]


def expert_wrappers(model: nn.Module) -> list[Any]:
    """Those of stacked experts."""
    experts = {layer.module for layer in expert_layers(model)}
    return [each for each in parameter_wrappers(model) if each.get_base_layer() in experts]


def _is_wrapper(module: nn.Module) -> bool:
    return hasattr(module, "parameter_name") and hasattr(module, "lora_A") and hasattr(module, "num_experts")


def _beside_experts(model: nn.Module) -> list[Any]:
    """The wrappers of matrices that whoever computes the experts reads; a router computes with its own."""
    read = {(layer.module, name) for layer in expert_layers(model) for name in (layer.layout.up_name, "down_proj")}
    return [each for each in parameter_wrappers(model) if (each.get_base_layer(), each.parameter_name) in read]


def expert_adapters(model: nn.Module) -> dict[tuple[nn.Module, str], list[ExpertAdapter]]:
    """Active adapters of each (experts module, parameter name).

    Raises:
        ModelError: an adapter is merged into the weights, so its factors no longer say what the model computes.
    """
    adapters: dict[tuple[nn.Module, str], list[ExpertAdapter]] = {}
    for wrapper in _beside_experts(model):
        if wrapper.merged:
            raise ModelError(
                f"The LoRA adapters of `{wrapper.parameter_name}` are merged into the expert weights.",
                code="model-lora-merged",
                why="training would change factors that the model no longer uses",
                fix="call unmerge_adapter() before training",
            )
        if wrapper.disable_adapters and wrapper not in _APART:
            continue
        active = [ExpertAdapter(wrapper, name) for name in wrapper.active_adapters if name in wrapper.lora_A]
        adapters.setdefault((wrapper.get_base_layer(), wrapper.parameter_name), []).extend(active)
    return adapters


@contextmanager
def factors_stay_apart(model: nn.Module) -> Iterator[None]:
    """Inside, peft leaves the expert weights alone; whoever computes the experts adds `expert_adapters` to them."""
    changed = [wrapper for wrapper in _beside_experts(model) if not wrapper.disable_adapters]
    for wrapper in changed:
        wrapper._disable_adapters = True
        _APART.add(wrapper)
    try:
        yield
    finally:
        for wrapper in changed:
            wrapper._disable_adapters = False
            _APART.discard(wrapper)
