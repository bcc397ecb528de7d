"""What the ranks of a party do in tests: rank 0 runs a whole federation, in which one party has all the ranks."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coterie.config import FederationConfig, LoraSpec, PartyConfig, load_yaml
from coterie.dp.checks import self_check
from coterie.dp.checks.comparison import ComparisonReport
from coterie.dp.noise.discrete_gaussian import GRID_SIGMA
from coterie.models.lora import attach_adapters
from coterie.ranks import ranks as ranks_module
from coterie.ranks.ranks import Ranks
from coterie.training.experts.gateway import dismiss
from coterie.training.experts.held_sums import HeldSums
from coterie.training.party.helping import HelpingRank
from coterie.training.party.in_process import InProcessFederation
from coterie.training.party.inputs import PartyInputs, Weights, trunk_tensors
from coterie.training.party.process import prepare_party
from coterie.training.party.run import PartyResult
from helpers.federations import PARTIES, experts_settings, full_models, make_parts
from helpers.private_settings import balanced_settings, private_settings, with_privacy
from helpers.rank_tasks import kill_at
from helpers.waiting import until

SEVERAL = "alder"
"""The party of several ranks."""
BUSY = {"deadline_s": 60.0, "round_deadline_s": 600.0, "join_deadline_s": 600.0}
"""A machine on which many tests run."""
SETTINGS: dict[str, Callable[..., FederationConfig]] = {
    "private": private_settings,
    "fast": private_settings,
    "plain": experts_settings,
    "balanced": lambda **changes: balanced_settings("private_load", **changes),
    "masked": lambda **changes: private_settings(aggregation="masked", noise_multiplier=2.5, **changes),
}


def parts_of(ranks: Ranks, folder: Path, kind: str, changes: Mapping[str, Any]) -> dict[str, PartyInputs]:
    """What all parties bring; every rank makes the same."""
    setattr(self_check, "check", lambda *_: ComparisonReport({}, []))  # noqa: B010 - it takes longer than all rounds
    config = SETTINGS[kind](**BUSY | changes)
    first = full_models()[PARTIES[0]]
    parts = make_parts(config, {name: copy.deepcopy(first) for name in PARTIES}, folder)
    if config.lora is not None:
        parts = {name: _adapted(each, config.lora) for name, each in parts.items()}
    if kind != "plain":
        own = {"isolation": "fast"} if kind == "fast" else {}
        parts = with_privacy(parts, folder, sigma=None if kind == "masked" else 0.5, **own)
    return parts | {SEVERAL: replace(parts[SEVERAL], ranks=ranks)}


def _adapted(inputs: PartyInputs, lora: LoraSpec) -> PartyInputs:
    experts, model = inputs.weights().experts, attach_adapters(inputs.model, lora, seed=0)
    start = {key: value.detach().clone() for key, value in trunk_tensors(model).items()}
    return replace(inputs, model=model, weights=lambda: Weights(start, experts))


def federation(ranks: Ranks, folder: Path, kind: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """A federation from start to end: what every party stores, and this rank's trunk."""
    parts = parts_of(ranks, folder, kind, changes)
    config = parts[SEVERAL].federation
    if ranks.rank > 0:
        HelpingRank(parts[SEVERAL]).run()
        return {"trunk": listed(trunk_tensors(parts[SEVERAL].model))}
    setattr(ranks_module, "check_alone", lambda: None)  # noqa: B010 - the other parties live in this process, too
    ran = InProcessFederation(config, folder / "coordinator")
    ran.coordinate()
    for inputs in parts.values():
        ran.up(inputs)
    until(lambda: isinstance(ran.ends.get(SEVERAL), PartyResult | BaseException), 1500.0)
    end = ran.ends[SEVERAL]
    if isinstance(end, BaseException):
        raise end
    dismiss(ranks)
    ran.join()
    results = {name: ran.ends[name] for name in PARTIES}
    stored = {name: ran.runs[name].actor.exchange.hosted_state() for name in PARTIES}
    return {
        "trunk": listed(trunk_tensors(parts[SEVERAL].model)),
        "stored": {name: listed(tensors) for name, tensors in stored.items()},
        "privacy": {name: dict(end.privacy or {}) for name, end in results.items() if isinstance(end, PartyResult)},
        "counted": counted(folder),
    }


def reading(ranks: Ranks, folder: Path, changes: Mapping[str, Any]) -> None:
    """Read a party's files, rank 1 with some of the shared settings changed."""
    federation = load_yaml(folder / "federation.yaml", FederationConfig)
    if ranks.rank == 1:
        federation = federation.model_copy(update=changes)
    prepare_party(load_yaml(folder / "alder.yaml", PartyConfig), federation, ranks=ranks)


def owning(ranks: Ranks, folder: Path, kind: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The same, and what every round left at this rank: values by layer and name."""
    own: list[dict[str, int]] = []
    listed_before = HeldSums.listed

    def listed_now(held: HeldSums) -> list[list[Any]]:
        found = listed_before(held)
        own.append({f"{layer} {name}": math.prod(shape) for layer, name, _, shape in found})
        return found

    HeldSums.listed = listed_now  # type: ignore[method-assign]
    return federation(ranks, folder, kind, changes) | {"own": own}


def deadly(ranks: Ranks, folder: Path, kind: str, changes: Mapping[str, Any], rank: int, step: str, when: str) -> Any:
    """The same, where one rank of the party is killed at a step that its ranks do together."""
    if ranks.rank == rank:
        kill_at(ranks, step, when)
    return federation(ranks, folder, kind, changes)


def faulty(ranks: Ranks, folder: Path, kind: str, changes: Mapping[str, Any], fault: str) -> Any:
    """The same with a mistake in what the party's ranks do together."""
    plain = ranks.add_up

    def noised(pieces: Sequence[Tensor], owner: int) -> None:
        for piece in pieces:  # on the noise's grid, since hosts choose the weights
            piece += (torch.randn(piece.shape) * GRID_SIGMA).to(piece.dtype)
        plain(pieces, owner)

    faults = {"noise at every rank": noised, "missing exchange": lambda pieces, owner: None}
    ranks.add_up = faults[fault]  # type: ignore[method-assign]
    return federation(ranks, folder, kind, changes)


def counted(folder: Path) -> list[tuple[int, int]]:
    """(round, draw) of every release in the ledger of the party of several ranks."""
    lines = [line for path in (folder / f"ledger-{SEVERAL}").glob("*/ledger.jsonl") for line in path.open()]
    entries = [json.loads(line) for line in lines]
    return [(e["data"]["round"], e["data"]["draw"]) for e in entries if e["kind"] == "release"]


def listed(tensors: Mapping[str, Any]) -> dict[str, list[float]]:
    return {name: tensor.detach().double().reshape(-1).tolist() for name, tensor in tensors.items()}
