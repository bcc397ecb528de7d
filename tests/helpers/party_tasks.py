"""What the ranks of a party do in tests: rank 0 runs a whole federation, in which one party has all the ranks."""

from __future__ import annotations

import copy
import json
import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import Tensor

from coterie.config import FederationConfig, LoraSpec, PartyConfig, load_yaml
from coterie.dp.checks import self_check
from coterie.dp.checks.comparison import ComparisonReport
from coterie.dp.noise.discrete_gaussian import GRID_SIGMA
from coterie.dp.per_sample.engine import Engine
from coterie.errors import PrivacyError, RoundError
from coterie.federation.cancel import NEVER, CancelToken
from coterie.models.lora import attach_adapters
from coterie.models.seam import expert_layers
from coterie.models.split.shards import parse_expert_key
from coterie.models.spread.beside import spread_beside
from coterie.models.streaming.cache import FileStore, MemoryStore, PinnedFiles, WeightCache, digest_layer
from coterie.models.streaming.streamer import LayerStreamer
from coterie.ranks import ranks as ranks_module
from coterie.ranks.ranks import Alone, Ranks
from coterie.training.experts import contribution, private_sums
from coterie.training.experts.contribution import Contribution
from coterie.training.experts.exchange import make_contribution
from coterie.training.experts.gateway import GatewayContribution, dismiss
from coterie.training.experts.held_sums import HeldSums
from coterie.training.experts.host import model_parts
from coterie.training.experts.shared_trunk import shared_names
from coterie.training.loop import use_checkpointing
from coterie.training.party.helping import HelpingRank
from coterie.training.party.in_process import InProcessFederation
from coterie.training.party.inputs import PartyInputs, Weights, trunk_tensors
from coterie.training.party.own_trunk import OwnTrunk
from coterie.training.party.process import prepare_party
from coterie.training.party.run import PartyResult
from helpers.comparing import relative
from helpers.federations import PARTIES, experts_settings, full_models, make_parts
from helpers.private_settings import balanced_settings, private_settings, with_privacy
from helpers.rank_tasks import kill_at
from helpers.spread_tasks import FAULTS
from helpers.struck_ranks import Point, note_steps, strike
from helpers.waiting import until

SEVERAL = "alder"
"""The party of several ranks."""
STOPPED_AT, LOST_AT = 2, 4
"""Which of the gateway's physical batches is its last before an attempt is given up; layers that are read."""
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
    over = changes.get("experts_over", 1) if ranks.world > 1 else 1
    agreed = {name: value for name, value in changes.items() if name not in ("experts_over", "sizes", "own")}
    config = SETTINGS[kind](**BUSY | agreed)
    first = full_models(**changes.get("sizes", {}))[PARTIES[0]]
    parts = make_parts(config, {name: copy.deepcopy(first) for name in PARTIES}, folder)
    if config.lora is not None:
        parts = {name: _adapted(each, config.lora) for name, each in parts.items()}
    if kind != "plain":
        own = {"isolation": "fast"} if kind == "fast" or "experts_over" in changes else {}
        own |= changes.get("own", {})
        parts = with_privacy(parts, folder, sigma=None if kind == "masked" else 0.5, **own)
        parts = {name: _in_constant_time(each, config.push_after_s) for name, each in parts.items()}
    if config.model.gradient_checkpointing:
        use_checkpointing(parts[SEVERAL].model)
    spread = spread_beside(parts[SEVERAL].model, ranks, over) if over > 1 else None
    return parts | {SEVERAL: replace(parts[SEVERAL], ranks=ranks, spread=spread)}


def _in_constant_time(inputs: PartyInputs, push_after_s: float | None) -> PartyInputs:
    assert inputs.privacy is not None
    return replace(inputs, privacy=replace(inputs.privacy, push_after_s=push_after_s))


def _adapted(inputs: PartyInputs, lora: LoraSpec) -> PartyInputs:
    experts, model = inputs.weights().experts, attach_adapters(inputs.model, lora, seed=0)
    start = {key: value.detach().clone() for key, value in trunk_tensors(model).items()}
    return replace(inputs, model=model, weights=lambda: Weights(start, experts))


def federation(ranks: Ranks, folder: Path, kind: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """A federation from start to end: what every party stores; where a party has several ranks, what every round left
    at this one, values by layer and name, and the digest of the trunk with which it had computed."""
    parts = parts_of(ranks, folder, kind, changes)
    config, own, trunks = parts[SEVERAL].federation, list[dict[str, int]](), list[str]()
    listed_before = HeldSums.listed

    def listed_now(held: HeldSums) -> list[list[Any]]:
        found = listed_before(held)
        own.append({" ".join(map(str, piece)): math.prod(shape) for *piece, _, shape in found})
        trunks.append(digest_layer(trunk_tensors(parts[SEVERAL].model)))  # the gateway hands out the next one later
        return found

    HeldSums.listed = listed_now  # type: ignore[method-assign]
    if ranks.rank > 0:
        HelpingRank(parts[SEVERAL]).run()
        return {"own": own, "trunks": trunks}
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
        "own": own,
        "trunks": trunks,
    }


def one_round(ranks: Ranks, folder: Path, kinds: Sequence[tuple[str, Mapping[str, Any]]]) -> list[float]:
    """A round of a party whose experts are over the ranks, without a federation: how far what its gateway pushes is
    from what one process pushes, for each kind."""
    found = []
    for number, (kind, changes) in enumerate(kinds):
        place = folder / str(number)
        inputs = parts_of(ranks, place, kind, {"experts_over": ranks.world, **changes})[SEVERAL]
        if ranks.rank > 0:
            HelpingRank(inputs).run()
            continue
        experts = tiny_experts()
        made = _sums_of_a_round(inputs, experts)
        dismiss(ranks)
        spec = None if inputs.privacy is None else inputs.privacy.spec.model_copy(update={"ledger": place / "ledger"})
        privacy = None if inputs.privacy is None or spec is None else replace(inputs.privacy, spec=spec)
        alone = _sums_of_a_round(replace(inputs, ranks=Alone(), spread=None, privacy=privacy), experts)
        found.append(_largest_difference(made, alone))
    return found


def refusing(ranks: Ranks, folder: Path, over: int) -> None:
    """A round of a party in which rank 1 refuses a batch of its lot before anything is exchanged."""
    inputs = parts_of(ranks, folder, "fast", {"experts_over": over})[SEVERAL]
    begin, prepare, begun = Engine.begin, Engine.prepare, list[str]()

    def noted(self: Engine, lot: str) -> None:
        begun.append(lot)
        begin(self, lot)

    def refused(self: Engine, batch: Any) -> None:
        if begun and ranks.rank == 1:
            raise PrivacyError("the loss mixes records.", code="dp-loss", fix="use a loss of one record each")
        prepare(self, batch)

    with patch.object(Engine, "begin", noted), patch.object(Engine, "prepare", refused):
        if ranks.rank > 0:
            HelpingRank(inputs).run()
        else:
            _sums_of_a_round(inputs, tiny_experts())


def tiny_experts(**sizes: int) -> dict[int, dict[str, Tensor]]:
    """Those of the models of `parts_of`, by layer."""
    layers = expert_layers(full_models(**sizes)[PARTIES[0]])
    return {each.index: {name: value.detach() for name, value in each.parameters().items()} for each in layers}


def _largest_difference(found: Mapping[Any, Tensor], expected: Mapping[Any, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(relative(found[key], value) for key, value in expected.items())


def checked(ranks: Ranks, folder: Path) -> tuple[int, float]:
    """A round of a party whose files are read by its ranks, self-check and all.

    Returns:
        How often this rank ran the self-check; how far what it pushes, if it is the gateway, is from what one process
        pushes that reads the same files.
    """
    config = load_yaml(folder / f"{SEVERAL}.yaml", PartyConfig)
    federation = load_yaml(folder / "federation.yaml", FederationConfig)
    with patch.object(self_check, "check", wraps=self_check.check) as checks:
        inputs = prepare_party(config, federation, ranks=ranks)
        if ranks.rank > 0:
            HelpingRank(inputs).run()
            return checks.call_count, 0.0
        experts = _experts_in(folder / "split")
        made = _sums_of_a_round(inputs, experts)
        dismiss(ranks)
    assert config.privacy is not None
    other = config.model_copy(
        update={
            "experts_over": 1,
            "devices": 1,
            "run_dir": folder / "alone",
            "privacy": config.privacy.model_copy(update={"ledger": folder / "ledger-alone"}),
        }
    )
    with patch.object(self_check, "check", lambda *_: ComparisonReport({}, [])):
        alone = _sums_of_a_round(prepare_party(other, federation, ranks=Alone()), experts)
    return checks.call_count, _largest_difference(made, alone)


def _experts_in(split: Path) -> dict[int, dict[str, Tensor]]:
    """The stacked experts of all shards, by layer."""
    found: dict[tuple[int, str], dict[int, Tensor]] = {}
    for path in split.glob("experts-*.safetensors"):
        for key, value in load_file(path).items():
            layer, expert, name = parse_expert_key(key)
            found.setdefault((layer, name), {})[expert] = value
    experts: dict[int, dict[str, Tensor]] = {}
    for (layer, name), each in found.items():
        experts.setdefault(layer, {})[name] = torch.stack([each[number] for number in sorted(each)])
    return experts


@contextmanager
def lending(
    inputs: PartyInputs, experts: Mapping[int, Mapping[str, Tensor]]
) -> Iterator[tuple[Contribution, LayerStreamer]]:
    """What makes a party's sums, without a federation, and what lends it layers."""
    folder = inputs.cache_folder
    cache = WeightCache(MemoryStore() if folder is None else FileStore(folder), len(experts), inputs.experts_over)
    for layer, tensors in experts.items():
        cache.put(layer, dict(tensors))
    trunk = OwnTrunk(inputs, inputs.weights(), shared_names(inputs.federation, inputs.model))
    own = make_contribution(trunk, lambda: "run")
    made = own if inputs.ranks.world == 1 else GatewayContribution(own, inputs, lambda: "run")
    with closing(LayerStreamer(cache, inputs.device, torch.float32)) as streamer, closing(made):
        made.open(streamer)
        yield made, streamer


def _sums_of_a_round(
    inputs: PartyInputs, experts: Mapping[int, Mapping[str, Tensor]]
) -> dict[tuple[int, str], Tensor]:
    """What is pushed, by part and name."""
    parts = model_parts(inputs.federation, inputs.model, inputs.placement)
    with lending(inputs, experts) as (made, streamer):
        values = made.sums(1, {"weights": "00"}, streamer, NEVER).values
        assert values is not None
        return {
            (part.number, name): value.clone()
            for part in parts
            if part.trained
            for name, value in values.of(part).items()
        }


def reading(ranks: Ranks, folder: Path, changes: Mapping[str, Any]) -> None:
    """Read a party's files, rank 1 with some of the shared settings changed."""
    federation = load_yaml(folder / "federation.yaml", FederationConfig)
    if ranks.rank == 1:
        federation = federation.model_copy(update=changes)
    prepare_party(load_yaml(folder / "alder.yaml", PartyConfig), federation, ranks=ranks)


def deadly(ranks: Ranks, folder: Path, kind: str, changes: Mapping[str, Any], rank: int, step: str, when: str) -> Any:
    """The same, where one rank of the party is killed at a step that its ranks do together."""
    if ranks.rank == rank:
        kill_at(ranks, step, when)
    return federation(ranks, folder, kind, changes)


def frozen(ranks: Ranks, folder: Path, kind: str, changes: Mapping[str, Any], point: Point, since: str) -> Any:
    """The same, where one rank of the party freezes; the steps that each came to are written down."""
    note_steps(ranks, folder / f"steps-{ranks.rank}")
    strike(ranks, point, signal.SIGSTOP, since)
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


def wrongly_exchanged(ranks: Ranks, folder: Path, kind: str, changes: Mapping[str, Any], fault: str) -> Any:
    """The same with a mistake in what crosses between ranks that experts are spread over."""
    with FAULTS[fault](ranks):
        return federation(ranks, folder, kind, changes)


def interrupted(ranks: Ranks, folder: Path, kind: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The same, where rank 0 gives an attempt up in the middle of a lot; how often."""
    given_up, calls = list[int](), list[bool]()
    real = contribution.next_batch

    def asked(share: Ranks, cancel: CancelToken, *, spread: bool) -> None:
        here = share is ranks and ranks.rank == 0
        calls.append(here)
        stop = here and not given_up and sum(calls) == STOPPED_AT
        given_up.extend([1] * stop)
        real(share, CancelToken(lambda: True) if stop else cancel, spread=spread)

    for module in (contribution, private_sums):
        module.next_batch = asked
    return federation(ranks, folder, kind, changes) | {"interrupted": len(given_up)}


def losing_layers(ranks: Ranks, folder: Path, kind: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The same, where rank 1 cannot read a layer in the middle of a batch."""
    get, calls = PinnedFiles.get, list[int]()

    def lost(self: PinnedFiles, layer: int) -> Any:
        calls.append(layer)
        if ranks.rank == 1 and len(calls) > LOST_AT:
            raise RoundError("layer 1 is not in the cache.", code="weights-changed")
        return get(self, layer)

    with patch.object(PinnedFiles, "get", lost):
        return federation(ranks, folder, kind, changes)


def counted(folder: Path) -> list[tuple[int, int]]:
    """(round, draw) of every release in the ledger of the party of several ranks."""
    files = (folder / f"ledger-{SEVERAL}").glob("*/ledger.jsonl")
    entries = [json.loads(line) for path in files for line in path.read_text("utf-8").splitlines()]
    return [(e["data"]["round"], e["data"]["draw"]) for e in entries if e["kind"] == "release"]


def listed(tensors: Mapping[str, Any]) -> dict[str, list[float]]:
    return {name: tensor.detach().double().reshape(-1).tolist() for name, tensor in tensors.items()}
