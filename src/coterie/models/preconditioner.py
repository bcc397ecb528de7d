"""Weights in coordinates in which a record's gradient is about as long in every direction, known from public text.

Clipping bounds a record's whole gradient, and noise is equally strong in all of its entries. Gradients are not: in
the basis of their second moments a few hundredths of the entries hold nine tenths of a record's squared norm. A
preconditioned model holds ``W' = L^-1 W R^-1`` in place of each matrix W and computes with ``L W' R``, so it is the
same function; the gradient of W' is ``L G R``, and what is clipped, noised and stepped is that. L and R are powers of
the second moments of G's rows and columns on public text (the factors of K-FAC, Martens and Grosse,
arXiv:1503.05671; scaling before clipping: Li et al., arXiv:2202.05963). They are fixed before the first lot, so they
cost no privacy.

Parameters keep their names and shapes: whatever clips, exchanges, hosts or steps them needs to know nothing of it.

Shape letters: V rows of a table, D model width, I inputs, O outputs, E experts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.errors import ModelError
from coterie.models.seam import ExpertLayer, expert_layers
from coterie.storage import replacing

_IN, _OUT = "precondition_in", "precondition_out"
_KEY, _KIND = "coterie", "preconditioner"


@dataclass(frozen=True)
class Factors:
    """L and R of one module, each symmetric [n, n], or [n] for a diagonal; None is the identity.

    Attributes:
        inner: R, applied to what enters.
        outer: L, applied to what leaves.
    """

    inner: Tensor | None
    outer: Tensor | None

    def tensors(self) -> dict[str, Tensor]:
        return {end: value for end, value in (("in", self.inner), ("out", self.outer)) if value is not None}


@dataclass(frozen=True)
class Preconditioner:
    """Factors by the dotted path of the module that they belong to."""

    factors: Mapping[str, Factors]

    def tensors(self) -> dict[str, Tensor]:
        """For a file."""
        return {f"{name}/{end}": value for name, own in self.factors.items() for end, value in own.tensors().items()}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> Preconditioner:
        """What `tensors` gave."""
        names = dict.fromkeys(key.rpartition("/")[0] for key in tensors)
        return cls({name: Factors(tensors.get(f"{name}/in"), tensors.get(f"{name}/out")) for name in names})

    def save(self, path: Path) -> None:
        """Write a file, or replace it; it appears whole or not at all.

        Raises:
            OSError: the disk is full or broken.
        """
        plain = {name: tensor.contiguous() for name, tensor in self.tensors().items()}
        with replacing(path) as aside:
            save_file(plain, aside, {_KEY: json.dumps({"kind": _KIND, "format": 1})})

    @classmethod
    def load(cls, path: Path) -> Preconditioner:
        """Read what `save` wrote.

        Raises:
            ModelError: no such file, torn, or something else.
        """
        try:
            with safe_open(path, framework="pt", backend="pread") as file:
                content = json.loads((file.metadata() or {}).get(_KEY, "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as error:
            raise ModelError(
                f"There is no file {path}."
                if not path.exists()
                else f"{path} is no whole safetensors file: {error}.",
                code="model-preconditioner",
                fix="make it with `coterie precondition`",
            ) from error
        if content != {"kind": _KIND, "format": 1}:
            raise ModelError(
                f"{path} holds no preconditioner that this version knows.",
                code="model-preconditioner",
                fix="make it with `coterie precondition`",
            )
        bad = [name for name, factor in tensors.items() if not _is_usable(factor)]
        if bad:
            raise ModelError(
                f"{path} holds numbers for `{bad[0]}` that nothing can be computed with.",
                code="model-preconditioner",
                why="a factor is a vector or a square matrix of finite numbers that can be inverted",
                fix="make it with `coterie precondition`",
            )
        return cls.of_tensors(tensors)


def _is_usable(factor: Tensor) -> bool:
    if not factor.is_floating_point() or factor.dim() not in (1, 2) or not bool(factor.isfinite().all()):
        return False
    if factor.dim() == 1:
        return bool((factor != 0).all())
    return factor.shape[0] == factor.shape[1] and int(torch.linalg.inv_ex(factor.double()).info) == 0


# ---- which modules ----


@dataclass(frozen=True)
class Place:
    """A module that can be preconditioned.

    Attributes:
        name: dotted path.
        module: itself.
        inner, outer: parameters whose columns R acts on, and whose rows L acts on; the same one but for experts.
        turned: stacked matrices are [E, I, O].
        bias: is added to what experts give before L acts, [E, D]; None where there is none, or it is added after.
    """

    name: str
    module: nn.Module
    inner: nn.Parameter
    outer: nn.Parameter | None
    turned: bool = False
    bias: nn.Parameter | None = None

    @property
    def is_table(self) -> bool:
        return isinstance(self.module, nn.Embedding)

    @property
    def trained(self) -> bool:
        return self.inner.requires_grad and (self.outer is None or self.outer.requires_grad)

    @property
    def weights(self) -> set[int]:
        """By `id`."""
        return {id(each) for each in (self.inner, self.outer, self.bias) if each is not None}

    def sizes(self) -> tuple[int, int | None]:
        """Of R and L."""
        inner = self.inner.shape[-2 if self.turned else -1]
        return inner, None if self.outer is None else self.outer.shape[-1 if self.turned else -2]


def places_of(model: nn.Module) -> Iterator[Place]:
    """Modules of a model; a matrix that an embedding and an output layer share comes with the embedding."""
    experts = {layer.name: layer for layer in expert_layers(model)}
    tables = {id(m.weight) for m in model.modules() if _is_table(m)}
    for name, module in model.named_modules():
        if name in experts:
            yield _experts_place(name, experts[name])
        elif _is_table(module) or (_is_linear(module) and id(module.weight) not in tables):
            weight = cast("nn.Parameter", module.weight)
            yield Place(name, module, weight, weight)


def _experts_place(name: str, layer: ExpertLayer) -> Place:
    own = cast("Mapping[str, nn.Parameter]", layer.parameters())
    nonlinear = layer.layout.has_post_expert_norm  # what follows the second matrix is no sum that L could follow
    return Place(
        name, layer.module, own[layer.layout.up_name], None if nonlinear else own["down_proj"],
        layer.layout.is_transposed, None if nonlinear else own.get("down_proj_bias"),
    )  # fmt: skip


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and type(module).forward in (nn.Linear.forward, _Linear.forward)


def _is_table(module: nn.Module) -> bool:
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        return False
    return type(module).forward in (nn.Embedding.forward, _Table.forward) or _only_scales(module)


@torch.no_grad()
def _only_scales(table: nn.Embedding) -> bool:
    """Whether a table of a family's own gives its rows times one number: a norm of rows, say, is not linear."""
    if table.weight.is_meta:  # nothing to try it on: these are transformers' names
        return type(table).__name__.endswith("ScaledWordEmbedding")
    ids = torch.arange(min(8, table.num_embeddings), device=table.weight.device)
    plain, rows = F.embedding(ids, table.weight), table(ids)
    ratio = (rows * plain).sum() / plain.square().sum().clamp_min(1e-30)
    return torch.allclose(rows, ratio * plain, rtol=1e-3, atol=1e-6)


# ---- computing ----


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    """Rows times a symmetric factor."""
    if factor is None:
        return x
    return x * factor if factor.dim() == 1 else x @ factor


class _Preconditioned:
    """Modules whose matrix is stored in other coordinates. Buffers: R and L."""

    precondition_in: Tensor | None
    precondition_out: Tensor | None


class _Linear(_Preconditioned):
    """``x R W'^T L + b``."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        y = _times(F.linear(_times(x, self.precondition_in), self.weight), self.precondition_out)
        return y if self.bias is None else y + self.bias


class _Table(_Preconditioned):
    """Rows of ``L W' R``, L diagonal."""

    def forward(self, ids: Tensor) -> Tensor:
        rows: Tensor = super().forward(ids)  # type: ignore[misc]
        if self.precondition_out is not None:
            rows = rows * self.precondition_out[ids].unsqueeze(-1)
        return _times(rows, self.precondition_in)


class _Experts(_Preconditioned):
    """R before the experts' first matrices, L after the sum over experts, which is linear in their second ones."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = super().forward(_times(hidden, self.precondition_in), *args, **kwargs)  # type: ignore[misc]
        return _times(out, self.precondition_out)


def _class_of(plain: type[nn.Module]) -> type[nn.Module]:
    """A module's own class, computing in other coordinates."""
    kind = _Table if issubclass(plain, nn.Embedding) else _Linear if issubclass(plain, nn.Linear) else _Experts
    return type(plain.__name__, (kind, plain), {})


# ---- attaching ----


@torch.no_grad()
def attach(model: nn.Module, preconditioner: Preconditioner) -> None:
    """Store a model's matrices in other coordinates; it computes what it did before, to rounding.

    Factors become buffers of their modules, so that a checkpoint of the model is whole. `save_pretrained` is refused
    until it is `detach`ed.

    Args:
        model: whole or partial; what is on the meta device is given the factors alone.
        preconditioner: for this model.

    Raises:
        ModelError: a module is not in the model, or of another size; the model has a preconditioner already. Nothing
            is changed then.
    """
    if any(isinstance(module, _Preconditioned) for module in model.modules()):
        raise ModelError(
            "The model has a preconditioner already.", code="model-preconditioner", fix="load the model anew"
        )
    places = {place.name: place for place in places_of(model)}
    for name, own in preconditioner.factors.items():
        _check_fits(name, own, places.get(name))
    heads = _heads(model)
    for name, exact in preconditioner.factors.items():
        place = places[name]
        own = Factors(*(None if f is None else _beside(place.inner, f) for f in (exact.inner, exact.outer)))
        _convert(place, own, torch.linalg.inv)
        for module in (place.module, *heads.get(id(place.inner), ())):
            module.__class__ = _class_of(type(module))
            module.register_buffer(_IN, own.inner)
            module.register_buffer(_OUT, own.outer)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = _refuse_to_save  # type: ignore[assignment]


def attached(model: nn.Module) -> Preconditioner:
    """The factors that a model computes with; empty where it has none."""
    return Preconditioner({
        place.name: Factors(place.module.precondition_in, place.module.precondition_out)
        for place in places_of(model)
        if isinstance(place.module, _Preconditioned)
    })  # fmt: skip


@torch.no_grad()
def detach(model: nn.Module) -> None:
    """Store a model's matrices as they were before `attach`; without a preconditioner nothing is done."""
    factors, heads = attached(model).factors, _heads(model)
    for place in places_of(model):
        if place.name in factors:
            for module in (place.module, *heads.get(id(place.inner), ())):
                module.__class__ = type(module).__bases__[1]
                delattr(module, _IN)
                delattr(module, _OUT)
            _convert(place, factors[place.name], lambda factor: factor)
    vars(model).pop("save_pretrained", None)


def _refuse_to_save(*args: Any, **kwargs: Any) -> None:
    raise ModelError(
        "This model has a preconditioner, and transformers would load other weights than it has.",
        code="model-preconditioner",
        why="its matrices are stored in other coordinates, of which the file would say nothing",
        fix="call coterie.models.preconditioner.detach(model) first, after the last round",
    )


def _heads(model: nn.Module) -> dict[int, list[nn.Module]]:
    """Output layers that share the matrix of a table, by the `id` of the matrix."""
    found: dict[int, list[nn.Module]] = {id(m.weight): [] for m in model.modules() if _is_table(m)}
    for module in model.modules():
        if _is_linear(module) and id(module.weight) in found:
            found[id(module.weight)].append(module)
    return found


def _check_fits(name: str, own: Factors, place: Place | None) -> Place:
    if place is None:
        raise ModelError(
            f"the preconditioner has factors for `{name}`, which is no matrix of this model.",
            code="model-preconditioner",
            fix="measure it for this model with `coterie precondition`",
        )
    for factor, size in zip((own.inner, own.outer), place.sizes(), strict=True):
        if factor is not None and not _is_usable(factor):
            raise ModelError(
                f"the preconditioner's factor for `{name}` holds numbers that nothing can be computed with.",
                code="model-preconditioner",
                why="a factor is a vector or a square matrix of finite numbers that can be inverted",
                fix="measure it for this model with `coterie precondition`",
            )
        if factor is not None and factor.shape[0] != size:
            raise ModelError(
                f"the preconditioner's factor for `{name}` has {factor.shape[0]} rows, the model needs {size}.",
                code="model-preconditioner",
                fix="measure it for this model with `coterie precondition`",
            )
    return place


def _beside(weight: Tensor, factor: Tensor) -> Tensor:
    """A factor in the number format and on the device of its weight; on the CPU where that is elsewhere."""
    return factor.to("cpu" if weight.is_meta else weight.device, weight.dtype)


def _convert(place: Place, own: Factors, of: Callable[[Tensor], Tensor]) -> None:
    """Multiply a module's matrices by its factors, or by their inverses, in float64."""
    if place.inner.is_meta:
        return
    for weight, factor, of_rows in _sides_of(place, own):
        weight.copy_(_multiplied(weight, factor.to(weight.device), of, of_rows=of_rows))


def _sides_of(place: Place, own: Factors) -> Iterator[tuple[nn.Parameter, Tensor, bool]]:
    """What each factor multiplies, and whether it does so from the left."""
    if own.inner is not None:
        yield place.inner, own.inner, place.turned
    if own.outer is not None:
        assert place.outer is not None
        yield place.outer, own.outer, not place.turned
        if place.bias is not None:
            yield place.bias, own.outer, False


def _multiplied(weight: Tensor, factor: Tensor, of: Callable[[Tensor], Tensor], *, of_rows: bool) -> Tensor:
    wide = of(torch.diag(factor.double()) if factor.dim() == 1 else factor.double())
    return wide @ weight.double() if of_rows else weight.double() @ wide


# ---- tensors of files ----


class Converter:
    """Tensors of a model that is never in memory as a whole, one at a time between its own coordinates and others.

    Args:
        model: may be on the meta device.
        preconditioner: for it; without factors nothing is changed.

    Raises:
        ModelError: a module is not in the model, or of another size.
    """

    def __init__(self, model: nn.Module, preconditioner: Preconditioner) -> None:
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        self._sides: dict[str, list[tuple[Tensor, bool]]] = {}
        places = {place.name: place for place in places_of(model)}
        for path, own in preconditioner.factors.items():
            for weight, factor, of_rows in _sides_of(_check_fits(path, own, places.get(path)), own):
                for name in names[id(weight)]:
                    self._sides.setdefault(name, []).append((factor, of_rows))

    def stored(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the plain model, as one with the factors stores it; both of all experts."""
        return self._times(name, tensor, torch.linalg.inv)

    def plain(self, name: str, tensor: Tensor) -> Tensor:
        """What `stored` was given, to rounding."""
        return self._times(name, tensor, lambda factor: factor)

    def _times(self, name: str, tensor: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
        out = tensor
        for factor, of_rows in self._sides.get(name, ()):
            out = _multiplied(out, factor, of, of_rows=of_rows).to(tensor.dtype)  # the same bits as `attach` gives
        return out


def in_file(model: nn.Module, names: Collection[str], read: Callable[[str], Tensor]) -> Preconditioner:
    """The factors that a file of a model's weights holds beside them; empty where it holds none.

    Args:
        model: without a preconditioner; may be on the meta device.
        names: of the file's tensors.
        read: gives one of them.
    """
    found = {}
    for place in places_of(model):
        own = [f"{place.name}.{end}" for end in (_IN, _OUT)]
        if any(name in names for name in own):
            found[place.name] = Factors(*(read(name) if name in names else None for name in own))
    return Preconditioner(found)


def in_trunk(model: nn.Module, path: Path) -> Preconditioner:
    """The factors of a federation, as the signed trunk file holds them: what settings name may have been made anew.

    Args:
        model: without a preconditioner.
        path: of the trunk.

    Raises:
        ModelError: no such file, torn, or without factors.
    """
    try:
        with safe_open(path, framework="pt", backend="pread") as file:
            found = in_file(model, set(file.keys()), file.get_tensor)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"There is no file {path}." if not path.exists() else f"{path} is no whole safetensors file: {error}.",
            code="model-preconditioner",
            fix="copy it from where `coterie split` wrote it",
        ) from error
    if not found.factors:
        raise ModelError(
            f"{path} holds no preconditioner.",
            code="model-preconditioner",
            fix="name the trunk that the federation's roster was signed for",
        )
    return found


def is_factor(name: str) -> bool:
    """Whether a tensor of that name is a factor, and no weight."""
    return name.rpartition(".")[2] in (_IN, _OUT)
