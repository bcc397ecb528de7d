"""What a federation will need before anybody starts: memory of every party, bytes of a round, and which exchange is
cheaper on the wire.

Everything follows from federation.yaml and the model's config; no weight is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from coterie.config import FederationConfig, FederationTrainSpec, LoraSpec, MemberAddress
from coterie.errors import ConfigError
from coterie.federation.experts.parts import expert_parts
from coterie.models import seam
from coterie.models.lora import adapter_sizes, larger_than_matrix
from coterie.models.second_moments import factor_values
from coterie.models.sizes import experts_per_token
from coterie.models.split.placement import Placement
from coterie.models.zoo.build import build_model, torch_dtype
from coterie.models.zoo.presets import preset
from coterie.training.experts.push_grid import masked_width
from coterie.training.planning.closed_form import Adapters, Need, Shape, predict, predict_adapters
from coterie.training.planning.equal_rates import EqualRates, equal_rates
from coterie.training.planning.exposure import Reach, of_pushes, of_tokens
from coterie.training.planning.full_or_lora import SUITS, of_noise, usual_lora
from coterie.training.planning.pooled_noise import NoiseTable, noise_table

Exchange = Literal["tokens", "experts"]
EXCHANGES: tuple[Exchange, ...] = ("tokens", "experts")


@dataclass(frozen=True)
class PartyPlan:
    """One party in one exchange.

    Attributes:
        hosted: expert parameters that it hosts.
        need: bytes of state; activations come on top.
        saving: share of the centralised device memory that it does without.
        down, up: for `experts`, bytes of weights that come and of sums that go in a round, the same whatever the
            text; a party whose weights did not change sends fewer. For `tokens`, None: they depend on the text.
        served, taken: the same as a host: weights that go to all other parties, and their sums that come.
        once: bytes of frozen weights that come in the first round and never again.
    """

    party: str
    exchange: Exchange
    hosted: int
    need: Need
    saving: float
    down: int | None = None
    up: int | None = None
    served: int | None = None
    taken: int | None = None
    once: int = 0


@dataclass(frozen=True)
class LoraPlan:
    """The same federation with adapters in place of full training, beside it.

    Attributes:
        agreed: federation.yaml says so; otherwise this is what its default settings would mean.
        rank: of every update.
        adapters: values of all adapters that a party trains; shared: of these, those that cross.
        weights: that full training changes.
        centralised_bytes: device memory in one place, without activations.
        parties: every party, in the `experts` exchange.
        remark: on adapters that are larger than what they adapt, where federation.yaml has such.
    """

    agreed: bool
    rank: int
    adapters: int
    shared: int
    weights: int
    centralised_bytes: int
    parties: tuple[PartyPlan, ...]
    remark: str | None


@dataclass(frozen=True)
class FederationPlan:
    """What `coterie plan` prints.

    Attributes:
        trunk, experts: parameters.
        expert_share: f.
        layers: MoE layers.
        centralised_bytes: device memory of training all of it in one place, without activations.
        parties: every party in both exchanges, all weights trained.
        lora: the same with adapters alone.
        bytes_per_token: of `tokens`, there and back, forward and backward, in all layers, with experts chosen
            evenly; one party's.
        break_even_tokens: tokens in one party's round from which `experts` moves fewer bytes than `tokens`.
        largest_layer_down: bytes of one layer that a party fetches at most; computing on it hides the next one's.
        readable_tokens: about so many tokens in a push without noise can be read; see `exposure.Reach`.
        warnings: what others can read, for each exchange without a budget.
        noise: what pooled noise is worth; empty where each party's own is seen.
        budgeted: whether there is a privacy budget.
        equal_rates: lots at which every party draws each of its records equally often; None where nobody said how
            many these are.
        factor_bytes: of a preconditioner, on every party's device with the trunk.
    """

    trunk: int
    experts: int
    expert_share: float
    layers: int
    centralised_bytes: int
    parties: tuple[PartyPlan, ...]
    bytes_per_token: float
    break_even_tokens: int
    largest_layer_down: int
    readable_tokens: int
    warnings: dict[Exchange, list[str]]
    lora: LoraPlan
    noise: NoiseTable
    equal_rates: EqualRates | None
    factor_bytes: int
    budgeted: bool

    def as_json(self) -> dict[str, Any]:
        """Plain figures."""
        return {**asdict(self), "advice": self.advice()}

    def trained_as_agreed(self, exchange: Exchange) -> tuple[PartyPlan, ...]:
        """Every party as federation.yaml has it."""
        return self.lora.parties if self.lora.agreed else tuple(p for p in self.parties if p.exchange == exchange)

    def advice(self) -> list[str]:
        """Full training or adapters, in sentences."""
        full = [each for each in self.parties if each.exchange == "experts"]
        lora = self.lora

        def most(parties: Iterable[PartyPlan], what: Callable[[PartyPlan], int]) -> int:
            return max(what(each) for each in parties)

        def ratio(what: Callable[[PartyPlan], int]) -> str:
            return f"{most(full, what) / max(1, most(lora.parties, what)):.3g}"

        return [
            f"full training or adapters (LoRA, rank {lora.rank}): with adapters the device holds 1/"
            f"{ratio(lambda each: each.need.device)} of the state, host memory "
            f"1/{ratio(lambda each: each.need.host)}, and a round moves 1/{ratio(_moved)} of the bytes; the frozen "
            "weights cross once, in the first round",
            *([of_noise(lora.weights, lora.adapters)] if self.budgeted else []),
            SUITS,
            *([] if lora.remark is None else [f"note: {lora.remark}"]),
        ]


def _moved(party: PartyPlan) -> int:
    return (party.down or 0) + (party.up or 0)


def preset_federation(name: str, parties: int) -> FederationConfig:
    """A federation around a published model, all else at its defaults, for the figures alone.

    Args:
        name: see `coterie.models.zoo.presets`.
        parties: from 2.

    Raises:
        ModelError: no model of that name is known.
        ConfigError: one party is no federation (code ``plan-parties``).
    """
    check_parties(parties)
    model = preset(name)
    names = [f"party-{number}" for number in range(1, parties + 1)]
    return FederationConfig(
        name=name.lower().replace(".", "-"),
        model=model,
        parties={party: MemberAddress(endpoint=f"{party}.invalid:7443") for party in names},
        coordinator=MemberAddress(endpoint="coordinator.invalid:7443"),
        train=FederationTrainSpec(rounds=1),
        privacy="none",
    )


def check_parties(parties: int) -> None:
    """Whether so many are a federation.

    Raises:
        ConfigError: one party is none.
    """
    if parties < 2:
        raise ConfigError(
            f"--parties is {parties}, and a federation has at least two.",
            code="plan-parties",
            fix="give the number of organisations that would train together",
        )


def make_plan(federation: FederationConfig, units: Mapping[str, int] | None = None) -> FederationPlan:
    """Plan a federation.

    Args:
        federation: its settings.
        units: every party's number of records, or users where these are the unit; lots are proposed for them.

    Raises:
        ConfigError, BudgetError: see `equal_rates`.
        ModelError, PlacementError: model, placement or what gets an adapter do not exist.
    """
    model = build_model(federation.model, meta=True)
    layers = seam.expert_layers(model)
    names = list(federation.parties)
    placement = Placement.of_spec(federation.placement, names, model)
    hosted = {name: hosted_values(layers, placement, name) for name in names}
    shapes = {name: shape_of(federation, model, layers, sum(hosted[name])) for name in names}
    first = shapes[names[0]]
    whole = predict("centralised", first).device
    per_token = _token_bytes(federation, model, layers, len(names))
    plans = []
    for exchange in EXCHANGES:
        for name in names:
            need = predict(exchange, shapes[name])
            saved = 1 - need.device / whole
            moved = _experts_bytes(shapes[name]) if exchange == "experts" else ()
            plans.append(PartyPlan(name, exchange, sum(hosted[name]), need, saved, *moved))
    rounds = [plan.down + plan.up for plan in plans if plan.down is not None and plan.up is not None]
    per_layer = first.experts // first.layers
    largest = max((per_layer - own) * first.wire_bytes for name in names for own in hosted[name])
    reach = Reach.of_model(model, federation.lora)
    budgeted = federation.privacy not in (None, "none")
    lots = equal_rates(federation, units) if units else None
    return FederationPlan(
        first.trunk, first.experts, first.expert_share, len(layers), whole, tuple(plans), per_token,
        math.ceil(max(rounds) / per_token) if per_token else 0, largest, reach.tokens,
        {"tokens": of_tokens(federation), "experts": [] if budgeted else of_pushes(federation, reach)},
        _with_adapters(federation, model, shapes), noise_table(federation, units),
        lots, first.compute_bytes * first.factors,
        budgeted,
    )  # fmt: skip


def _with_adapters(federation: FederationConfig, model: nn.Module, shapes: Mapping[str, Shape]) -> LoraPlan:
    spec = federation.lora or usual_lora(seam.expert_layers(model)[0])
    names, by_party = list(shapes), adapters_of(federation, model, spec)
    first, one = shapes[names[0]], by_party[names[0]]
    whole = predict_adapters("centralised", first, one).device
    plans = []
    for name, shape in shapes.items():
        adapters = by_party[name]
        need, served = predict_adapters("experts", shape, adapters), adapters.stored * (len(names) - 1)
        elsewhere = adapters.shared - adapters.stored
        plans.append(
            PartyPlan(
                name, "experts", shape.hosted, need, 1 - need.device / whole,
                shape.wire_bytes * elsewhere, shape.push_bytes * elsewhere,
                shape.wire_bytes * served, shape.push_bytes * served,
                shape.wire_bytes * (shape.experts - shape.hosted),
            )
        )  # fmt: skip
    agreed, weights = federation.lora is not None, first.trunk + first.experts
    remark = larger_than_matrix(model, spec) if agreed else None
    return LoraPlan(agreed, spec.rank, one.trained, one.shared, weights, whole, tuple(plans), remark)


def adapters_of(federation: FederationConfig, model: nn.Module, spec: LoraSpec) -> dict[str, Adapters]:
    """Adapters by party, with those that it stores."""
    sizes, names = adapter_sizes(model, spec), list(federation.parties)
    together = (*sizes.experts, *(sizes.modules if federation.trunk == "shared" else ()))
    own = 0 if federation.trunk == "shared" else sum(sizes.modules)
    stored = dict.fromkeys(names, 0)
    for part in expert_parts([], [], names, {str(number): (size,) for number, size in enumerate(together)}):
        stored[part.host] += part.num_values
    matrix = max(p[0].numel() for layer in seam.expert_layers(model) for p in layer.parameters().values())
    return {name: Adapters(sum(together), own, stored[name], matrix) for name in names}


def hosted_values(layers: list[seam.ExpertLayer], placement: Placement, name: str) -> list[int]:
    """Parameters of a party's experts, layer by layer."""
    experts = placement.hosted(name)
    return [len(list(experts.get(layer.index, ()))) * _values(layer) // layer.num_experts for layer in layers]


def _values(layer: seam.ExpertLayer) -> int:
    return sum(param.numel() for param in layer.parameters().values())


def shape_of(federation: FederationConfig, model: nn.Module, layers: list[seam.ExpertLayer], own: int) -> Shape:
    """Sizes of a model and of who shares it, for a party that hosts so many values of experts."""
    stacked = {id(param) for layer in layers for param in layer.parameters().values()}
    trunk = [param.numel() for param in model.parameters() if id(param) not in stacked]
    return Shape(
        trunk=sum(trunk),
        experts=sum(_values(layer) for layer in layers),
        layers=len(layers),
        parties=len(federation.parties),
        matrix=max(param.numel() for layer in layers for param in layer.parameters().values()),
        largest_trunk=max(trunk),
        own=own,
        compute_bytes=torch_dtype(federation.model).itemsize,
        wire_bytes=getattr(torch, federation.weights_dtype).itemsize,
        push_bytes=_push_bytes(federation),
        shared_trunk=federation.trunk == "shared",
        factors=0 if federation.preconditioner is None else factor_values(model),
    )


def _push_bytes(federation: FederationConfig) -> int:
    """Of one value of a sum."""
    if federation.aggregation == "plain":
        return int(getattr(torch, federation.push_dtype).itemsize)
    return masked_width(federation)


def _experts_bytes(shape: Shape) -> tuple[int, int, int, int]:
    """Down and up: every part that other parties store, whatever the lot. Served and taken: the parts stored here,
    once for each other party."""
    own_trunk = shape.trunk // shape.parties if shape.shared_trunk else 0
    trunk_of_others = shape.trunk - own_trunk if shape.shared_trunk else 0
    others = shape.experts - shape.hosted + trunk_of_others
    own = (shape.hosted + own_trunk) * (shape.parties - 1)
    return shape.wire_bytes * others, shape.push_bytes * others, shape.wire_bytes * own, shape.push_bytes * own


def _token_bytes(
    federation: FederationConfig, model: nn.Module, layers: list[seam.ExpertLayer], parties: int
) -> float:
    """One hidden vector for each remote host of a token's experts, its output, and both gradients.

    Experts are taken to be chosen evenly and hosted in equal shares. A pair of token and expert adds the expert's
    number (1 byte), its weight and the weight's gradient.
    """
    text = model.config.get_text_config()  # type: ignore[union-attr,operator]
    chosen = experts_per_token(text)
    item = torch_dtype(federation.model).itemsize
    hosts = (parties - 1) * (1 - (1 - 1 / parties) ** chosen)
    pairs = chosen * (1 - 1 / parties)
    return len(layers) * (hosts * 4 * int(text.hidden_size) * item + pairs * (1 + 2 * item))
