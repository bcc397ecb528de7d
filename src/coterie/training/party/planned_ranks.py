"""What a party's process holds, and what each of several ranks would: `coterie plan party.yaml`.

From party.yaml, federation.yaml and the model's config; no weight is read and no text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from transformers import PreTrainedModel

from coterie.config import FederationConfig, PartyConfig, PrivacySpec
from coterie.config.federation import check_devices, party_privacy
from coterie.dp.isolation.exact_engine import chosen, computes_in_half
from coterie.errors import CoterieError
from coterie.models.seam import expert_layers
from coterie.models.split.placement import Placement
from coterie.models.zoo.build import build_model, torch_dtype
from coterie.training.party.process import check_compared, check_experts_over, check_member
from coterie.training.planning.closed_form import Need, predict
from coterie.training.planning.party_memory import PartyMemory, SumBytes
from coterie.training.planning.plan import adapters_of, hosted_values, shape_of
from coterie.training.planning.rank_memory import held_adapters, held_of
from coterie.training.planning.ways import Chosen, choose, memory_here
from coterie.training.single.setup import pick_device

NUMBERS = (2, 4, 8)
Way = Literal["devices", "experts_over"]


@dataclass(frozen=True)
class RankRow:
    """What so many ranks would hold, in bytes of state.

    Attributes:
        ranks: of the party.
        experts_over: of these that hold the experts of a layer together; 1: each borrows whole layers.
        gateway: rank 0, which hosts and speaks to the other parties.
        other: each of the others.
        together: all of them, in the memory of one machine.
        device: of the gateway's, what it holds where it computes: on its GPU, where it has one.
    """

    ranks: int
    experts_over: int
    gateway: int
    other: int
    together: int
    device: int

    @property
    def setting(self) -> str:
        """What party.yaml says for it."""
        if self.experts_over == 1:
            return f"devices: {self.ranks}"
        over = f"experts_over: {self.experts_over}"
        return over if self.ranks == self.experts_over else f"devices: {self.ranks}, {over}"


@dataclass(frozen=True)
class PlannedRanks:
    """What `coterie plan party.yaml` prints.

    Attributes:
        party, federation, exchange: by name.
        trained: values that are; adapters: these are adapters' alone.
        isolation: of records, within a budget; None without one.
        one: most that one process holds where it computes, and beside that.
        one_together: the most of both at one moment, where they are one memory; None where they are not.
        rows: what several ranks would hold.
        now: what party.yaml asks for; None where it asks for one process, or for what is refused.
        refused: why not, or why ranks or one of their two ways are not possible at all; empty where all are.
        chosen: the fewest ranks that hold it.
        shared: the ranks share the memory that was chosen for.
    """

    party: str
    federation: str
    exchange: str
    trained: int
    adapters: bool
    isolation: str | None
    one: Need
    one_together: int | None
    rows: tuple[RankRow, ...]
    now: RankRow | None
    refused: str
    chosen: Chosen
    shared: bool

    def as_json(self) -> dict[str, Any]:
        """Plain figures."""
        return {**asdict(self), "advice": self.advice}

    @property
    def advice(self) -> str:
        """What suits, in a sentence that names no ranks where these are refused."""
        if self.chosen.way == "one device" and all(row.experts_over > 1 for row in self.rows):
            return "one process holds it"
        return self.chosen.words()


def planned_ranks(config: PartyConfig, federation: FederationConfig, device_bytes: int | None = None) -> PlannedRanks:
    """Plan the ranks of a party.

    Args:
        config: party.yaml.
        federation: federation.yaml.
        device_bytes: memory of one rank, of its GPU where it has one; None: they share this machine's, or each has
            a GPU as it is here.

    Raises:
        RosterError: the federation has no such party.
        ConfigError: the party's budget does not fit the federation's.
        ModelError, PlacementError: model, placement or what gets an adapter do not exist.
    """
    check_member(config, federation)
    spec, model = party_privacy(federation, config), build_model(federation.model, meta=True)
    layers = expert_layers(model)
    placement = Placement.of_spec(federation.placement, list(federation.parties), model)
    shape = shape_of(federation, model, layers, sum(hosted_values(layers, placement, config.party)))
    on_gpu = config.device != "cpu" and pick_device("auto").type != "cpu"
    compute_bytes = torch_dtype(federation.model).itemsize
    lora = federation.lora
    isolation = None if spec is None else chosen(spec.isolation, computes_in_half(model), against_hosts=True)
    memory = PartyMemory(
        shape,
        held_of(model, compute_bytes) if lora is None else held_adapters(model, lora),
        min(layer.num_experts for layer in layers),
        _sum_bytes(federation, spec, isolation),
        private=spec is not None,
        adapters=None if lora is None else adapters_of(federation, model, lora)[config.party],
        cached=config.cache == "memory",
        on_gpu=on_gpu,
    )
    tokens = federation.exchange == "tokens"
    one = predict("tokens", shape) if tokens else memory.alone()
    together = None if on_gpu else one.device + one.host if tokens else memory.gateway()
    refused: dict[Way, str] = {
        "devices": _why_not(config, federation, model, devices=2),
        "experts_over": _why_not(config, federation, model, experts_over=2),
    }
    most: dict[Way, int] = {"devices": max(NUMBERS), "experts_over": memory.experts_in_layer}
    rows = [
        _row(memory, number, 1 if way == "devices" else number)
        for way, why in refused.items()
        for number in NUMBERS
        if not why and number <= most[way]
    ]
    asks = (config.device_count, config.experts_over)
    why_now = _why_not(config, federation, model, devices=asks[0], experts_over=asks[1])
    shared = device_bytes is None and not on_gpu
    alone = one.device if together is None else together

    def count(world: int, over: int) -> int:
        return memory.device(over) if on_gpu else (memory.together if shared else memory.gateway)(world, over)

    def at_rank(way: Way, sizes: Sequence[tuple[int, int]]) -> list[int]:
        return [alone, *(() if refused[way] else (count(*size) for size in sizes[1:]))]

    suits = choose(
        at_rank("devices", memory.over_devices()), at_rank("experts_over", memory.over_experts()),
        memory_here() if device_bytes is None else device_bytes,
    )  # fmt: skip
    return PlannedRanks(
        config.party, federation.name, federation.exchange, memory.held.kept(), lora is not None,
        isolation, one, together, tuple(rows),
        _row(memory, config.ranks, config.experts_over) if config.ranks > 1 and not why_now else None,
        why_now or refused["devices"] or refused["experts_over"],
        suits, shared,
    )  # fmt: skip


def _row(memory: PartyMemory, ranks: int, over: int) -> RankRow:
    return RankRow(
        ranks, over, memory.gateway(ranks, over), memory.other(ranks, over), memory.together(ranks, over),
        memory.device(over),
    )  # fmt: skip


def _sum_bytes(federation: FederationConfig, spec: PrivacySpec | None, isolation: str | None) -> SumBytes:
    if spec is None:
        return SumBytes()
    return SumBytes.clipped(
        exact=isolation == "exact", users=spec.unit == "user", masked=federation.aggregation == "masked"
    )


def _why_not(config: PartyConfig, federation: FederationConfig, model: PreTrainedModel, **asked: int) -> str:
    """Why a party may not have so many ranks, in a sentence; empty where it may."""
    changed = config.model_copy(update={"devices": 1, "experts_over": 1, **asked})
    try:
        check_devices(changed, federation)
        check_compared(changed, federation)
        check_experts_over(changed, model)
    except CoterieError as error:
        return f"{error.message} To have it otherwise: {error.fix}" if error.fix else error.message
    return ""
