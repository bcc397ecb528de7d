"""Which party hosts which expert of which layer.

Layers are numbered as `ExpertLayer.index` numbers them: the position among the model's MoE layers, from 0.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from torch import nn

from coterie.errors import PlacementError
from coterie.models.seam import expert_layers

Hosted = Mapping[str, Mapping[int, Iterable[int]]]
"""{party: {layer: experts}}."""


@dataclass(frozen=True)
class Placement:
    """Every expert has exactly one host; made by one of the class methods, which check that.

    Attributes:
        parties: all parties, in the federation's order; one may host nothing.
        hosts: for each layer the host of each expert, as positions in ``parties``.
    """

    parties: tuple[str, ...]
    hosts: tuple[tuple[int, ...], ...]

    @classmethod
    def round_robin(cls, parties: Sequence[str], num_experts: Sequence[int]) -> Placement:
        """Deal the experts in turn, on through the layers, so that no party hosts two more than another.

        Args:
            parties: names, at least one, all different.
            num_experts: E of each MoE layer.

        Raises:
            PlacementError: there are fewer experts than parties.
        """
        names = _party_names(parties)
        if sum(num_experts) < len(names):
            raise PlacementError(
                f"{len(names)} parties cannot share {sum(num_experts)} experts: "
                f"{', '.join(names[sum(num_experts) :])} would host none.",
                code="placement-too-few",
                why="a party that hosts nothing has nothing that the others need it for",
                fix=f"take a model with at least {len(names)} experts in all layers together, or at most "
                f"{sum(num_experts)} parties; a `placement` table may leave a party out on purpose",
            )
        party_numbers = cycle(range(len(names)))
        return cls(names, tuple(tuple(next(party_numbers) for _ in range(count)) for count in num_experts))

    @classmethod
    def of_table(
        cls, table: Mapping[int, Mapping[int, str]], parties: Sequence[str], num_experts: Sequence[int]
    ) -> Placement:
        """From ``{layer: {expert: party}}``, the form of federation.yaml.

        Raises:
            PlacementError: as `of_hosted`.
        """
        hosted: dict[str, dict[int, list[int]]] = {}
        for layer, experts in table.items():
            for expert, party in experts.items():
                hosted.setdefault(party, {}).setdefault(layer, []).append(expert)
        return cls.of_hosted(hosted, parties, num_experts)

    @classmethod
    def of_hosted(cls, hosted: Hosted, parties: Sequence[str], num_experts: Sequence[int]) -> Placement:
        """From ``{party: {layer: experts}}``, the form of a placement file.

        Raises:
            PlacementError: an expert is hosted by nobody or by two parties, a party is unknown, or a layer or an
                expert does not exist in the model. All of them are named.
        """
        names = _party_names(parties)
        problems: list[str] = []
        claims: dict[tuple[int, int], list[str]] = {}
        for party, layers in hosted.items():
            if party not in names:
                problems.append(f"party {party} is not in the federation ({', '.join(names)})")
                continue
            for layer, experts in layers.items():
                problems += _claim(claims, party, layer, experts, num_experts)
        problems += [
            f"{_where(*key)} is hosted by {' and by '.join(by)}" for key, by in claims.items() if len(by) > 1
        ]
        everything = [(layer, expert) for layer, count in enumerate(num_experts) for expert in range(count)]
        problems += _nobody([key for key in everything if key not in claims])
        if problems:
            raise PlacementError(
                f"The placement does not give every expert one host: {'; '.join(problems)}.",
                code="placement-invalid",
                why="tokens routed to an expert without a host, or with two, could not be computed",
                fix="give each expert of each MoE layer exactly one party, or use `placement: round_robin`",
            )
        position = {name: index for index, name in enumerate(names)}
        hosts = [
            tuple(position[claims[layer, expert][0]] for expert in range(count))
            for layer, count in enumerate(num_experts)
        ]
        return cls(names, tuple(hosts))

    @classmethod
    def of_spec(
        cls, spec: str | Mapping[int, Mapping[int, str]], parties: Sequence[str], model: nn.Module
    ) -> Placement:
        """From federation.yaml's ``placement`` for a model, which may be on the meta device.

        Raises:
            PlacementError: as `of_hosted`.
        """
        num_experts = [layer.num_experts for layer in expert_layers(model)]
        if isinstance(spec, str):
            return cls.round_robin(parties, num_experts)
        return cls.of_table(spec, parties, num_experts)

    @property
    def num_experts(self) -> tuple[int, ...]:
        """E of each layer."""
        return tuple(len(layer) for layer in self.hosts)

    def hosted(self, party: str) -> dict[int, list[int]]:
        """The experts of one party, ascending, by layer; a layer of which it hosts none is left out.

        Raises:
            PlacementError: no such party.
        """
        if party not in self.parties:
            raise PlacementError(
                f"Party {party} is not in the placement.",
                code="placement-unknown-party",
                fix=f"choose one of {', '.join(self.parties)}",
            )
        me = self.parties.index(party)
        found = {
            layer: [expert for expert, host in enumerate(hosts) if host == me]
            for layer, hosts in enumerate(self.hosts)
        }
        return {layer: experts for layer, experts in found.items() if experts}

    def host_of(self, layer: int) -> tuple[int, ...]:
        """The host of each expert of a layer, [E], as positions in ``parties``."""
        return self.hosts[layer]

    def host_name(self, layer: int, expert: int) -> str:
        """The host of one expert."""
        return self.parties[self.hosts[layer][expert]]

    def check_model(self, model: nn.Module) -> None:
        """Make sure that a model has the layers and experts that are placed here.

        Raises:
            PlacementError: it has others.
        """
        found = tuple(layer.num_experts for layer in expert_layers(model))
        if found != self.num_experts:
            raise PlacementError(
                f"The placement is for {_counts(self.num_experts)}, the model has {_counts(found)}.",
                code="placement-other-model",
                why="layers and experts are known to all parties by number",
                fix="use the placement that was made for this model",
            )

    def content_hash(self) -> str:
        """SHA-256 of the content, hex; equal on every party that places the same experts the same way."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` reads it back."""
        return {
            "parties": list(self.parties),
            "experts": list(self.num_experts),
            "hosted": {
                party: {str(layer): experts for layer, experts in self.hosted(party).items()}
                for party in self.parties
            },
        }

    @classmethod
    def from_json(cls, data: Any) -> Placement:
        """What `to_json` wrote, checked again.

        Raises:
            PlacementError: the data is of another form, or the placement is not valid.
        """
        try:
            hosted = {
                str(party): {int(layer): [int(expert) for expert in experts] for layer, experts in layers.items()}
                for party, layers in data["hosted"].items()
            }
            parties = [str(party) for party in data["parties"]]
            num_experts = [int(count) for count in data["experts"]]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlacementError(
                "This is not a placement: it needs `parties`, `experts` and `hosted`.",
                code="placement-format",
                fix='write {"parties": ["alder"], "experts": [2], "hosted": {"alder": {"0": [0, 1]}}}',
            ) from error
        return cls.of_hosted(hosted, parties, num_experts)


def _party_names(parties: Sequence[str]) -> tuple[str, ...]:
    if not parties or len(set(parties)) != len(parties):
        raise PlacementError(
            f"A placement needs at least one party and different names (found: {', '.join(parties) or 'none'}).",
            code="placement-parties",
            fix="list each party of the federation once",
        )
    return tuple(parties)


def _claim(
    claims: dict[tuple[int, int], list[str]],
    party: str,
    layer: int,
    experts: Iterable[int],
    num_experts: Sequence[int],
) -> list[str]:
    """Note who claims which expert; returns what is out of range."""
    if not 0 <= layer < len(num_experts):
        return [f"{party} hosts layer {layer}, but the MoE layers are 0 to {len(num_experts) - 1}"]
    problems = []
    for expert in experts:
        if 0 <= expert < num_experts[layer]:
            claims.setdefault((layer, expert), []).append(party)
        else:
            problems.append(
                f"{party} hosts {_where(layer, expert)}, but its experts are 0 to {num_experts[layer] - 1}"
            )
    return problems


def _nobody(missing: Sequence[tuple[int, int]]) -> list[str]:
    """One phrase a layer, so that a forgotten layer does not fill the screen."""
    by_layer: dict[int, list[int]] = {}
    for layer, expert in missing:
        by_layer.setdefault(layer, []).append(expert)
    return [
        f"layer {layer} expert{'s' if len(experts) > 1 else ''} {', '.join(map(str, experts))} hosted by nobody"
        for layer, experts in by_layer.items()
    ]


def _where(layer: int, expert: int) -> str:
    return f"layer {layer} expert {expert}"


def _counts(num_experts: Sequence[int]) -> str:
    if len(set(num_experts)) == 1:
        return f"{len(num_experts)} MoE layers of {num_experts[0]} experts"
    return f"MoE layers of {', '.join(map(str, num_experts))} experts"
