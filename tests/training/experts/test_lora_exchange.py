"""The `experts` exchange where adapters alone are trained, against peft's own forward in one process."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from coterie.config import FederationConfig, LoraSpec
from coterie.dp.checks import self_check
from coterie.errors import ModelError
from coterie.federation.cancel import NEVER
from coterie.federation.experts.parts import span
from coterie.federation.wire.transport import Lane, Message
from coterie.models.lora import attach_adapters
from coterie.models.seam import expert_layers
from coterie.models.streaming.cache import MemoryStore, WeightCache
from coterie.models.streaming.streamer import LayerStreamer
from coterie.models.zoo.tiny import tiny_model
from coterie.training.data.packing import RoundOrder
from coterie.training.evaluate import evaluate
from coterie.training.experts.held_sums import HeldSums
from coterie.training.experts.private_sums import PrivateSums
from coterie.training.party.in_process import InProcessFederation, run_in_process
from coterie.training.party.inputs import PartyInputs
from helpers.adapted_federations import adapted_parts
from helpers.comparing import relative
from helpers.federations import PARTIES, experts_of, full_models, settings
from helpers.private_settings import private_settings, with_privacy
from helpers.recorded import watch

pytest.importorskip("peft")
LORA = LoraSpec(rank=2, alpha=4.0, modules=("q_proj",))


def union_by_hand(config: FederationConfig, model: nn.Module, parts: Mapping[str, PartyInputs]) -> None:
    """One process on the union of the parties' sequences, through peft's merged weights and plain autograd."""
    optim = config.optim
    trained = [p for p in model.parameters() if p.requires_grad]
    step = torch.optim.AdamW(trained, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay)
    model.train()
    for round_no in range(1, config.train.rounds + 1):
        step.zero_grad()
        count = 0
        for name in PARTIES:
            for row in RoundOrder(len(parts[name].train), config.train.batch_size, config.train.seed).rows(round_no):
                ids = parts[name].train[row]["input_ids"].unsqueeze(0)
                logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
                functional.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
                count += ids.shape[1] - 1
        for param in trained:
            assert param.grad is not None
            param.grad /= count
        step.step()


def run(
    config: FederationConfig, folder: Path, lora: LoraSpec = LORA
) -> tuple[InProcessFederation, dict[str, PartyInputs], nn.Module, list]:
    one = full_models()[PARTIES[0]]
    parts = adapted_parts(config, {name: copy.deepcopy(one) for name in PARTIES}, folder, lora)
    seen: list[tuple] = []
    federation = InProcessFederation(config, folder / "coordinator")
    federation.coordinate()
    for each in parts.values():
        exchange = experts_of(federation.up(each))

        def record(peer: str, lane: Lane, message: Message) -> None:
            size = sum(t.nbytes for t in message.tensors)
            seen.append((message.kind, message.address, size))

        watch(exchange.host, record)
    federation.join()
    for end in federation.ends.values():
        if isinstance(end, BaseException):
            raise end
    return federation, parts, attach_adapters(copy.deepcopy(one), LORA, seed=0), seen


@pytest.mark.parametrize(("aggregation", "value_bytes"), [("plain", 4), ("masked", 5)])
def test_adapters_equal_one_process_and_base_weights_cross_once(
    tmp_path: Path, aggregation: str, value_bytes: int
) -> None:
    config = settings(
        exchange="experts", privacy="none", weights_dtype="float32", trunk="shared", lora=LORA.model_dump(),
        train__rounds=3, train__eval_every=1, optim__eps=1e-3, aggregation=aggregation,
        **({"push_limit": 30.0} if aggregation == "masked" else {}),
    )  # fmt: skip
    federation, parts, model, seen = run(config, tmp_path)
    union_by_hand(config, model, parts)
    whole = dict(model.named_parameters())
    trained = {name for name, p in whole.items() if p.requires_grad}
    held = {}
    for name in PARTIES:
        exchange = experts_of(federation.runs[name])
        held |= exchange.host.trunk.weights()
    assert held.keys() == trained
    for name, value in held.items():
        assert relative(value, whole[name]) < 1e-5, name

    measured, held_out = federation.runs["alder"].actor.evaluation, parts["alder"].test
    assert measured is not None
    assert held_out is not None
    assert abs(measured.loss - evaluate(model, held_out, batch_size=2).loss) < 1e-4, "adapters count in evaluation"

    exchange = experts_of(federation.runs["alder"])
    base = {part.number for part in exchange.parts if part.layer >= 0}
    assert {at.round for kind, at, _ in seen if kind == "weights-chunk" and at.part in base} == {1}
    assert not any(at.part in base for kind, at, _ in seen if kind == "push-chunk")
    adapters = sum(whole[name].numel() for name in trained) * (len(PARTIES) - 1)
    for round_no in range(2, 4):
        asked = [at for kind, at, _ in seen if kind == "weights-chunk" and at.round == round_no]
        sizes = [(at, exchange.parts[at.part].num_bytes(torch.float32)) for at in asked]
        down = sum(len(range(size)[span(size, at.chunk)]) for at, size in sizes)
        up = sum(size for kind, at, size in seen if kind == "push-chunk" and at.round == round_no)
        assert (down, up) == (4 * adapters, value_bytes * adapters)


def test_expert_adapters_are_shared_though_the_trunk_is_private(tmp_path: Path):
    """A router's are the trunk's, though peft wraps its matrix as it does those of experts."""
    lora = LORA.model_copy(update={"modules": ("q_proj", "gate")})
    config = settings(
        exchange="experts", privacy="none", weights_dtype="float32", lora=lora.model_dump(), train__rounds=2
    )
    federation, _, _, _ = run(config, tmp_path, lora)
    trunks, shared = [], set()
    for name in PARTIES:
        exchange = experts_of(federation.runs[name])
        shared |= exchange.host.trunk.weights().keys()
        trunks.append(dict(federation.runs[name].actor.inputs.model.named_parameters()))
    assert shared
    assert all("experts" in name for name in shared)
    private = [name for name, p in trunks[0].items() if p.requires_grad and "q_proj" in name and "lora_B" in name]
    assert private
    assert all(not torch.equal(trunks[0][name], trunks[1][name]) for name in private)


def test_a_private_party_with_adapters_passes_the_comparison_and_releases_their_noised_sums(tmp_path: Path):
    """Before the first lot, adapters on lent weights are compared with plain autograd, one record at a time."""
    config = private_settings(trunk="private", lora=LORA.model_dump())
    whole = full_models()["alder"]
    parts = adapted_parts(config, {name: copy.deepcopy(whole) for name in PARTIES}, tmp_path, LORA)
    inputs = with_privacy({"alder": parts["alder"]}, tmp_path, sigma=None)["alder"]
    assert inputs.privacy is not None
    cache = WeightCache(MemoryStore(), len(expert_layers(whole)))
    for layer in expert_layers(whole):
        cache.put(layer.index, {name: p.detach().clone() for name, p in layer.parameters().items()})
    streamer = LayerStreamer(cache, torch.device("cpu"), torch.float32)
    sums = PrivateSums(inputs.model, expert_layers(inputs.model), inputs.train, inputs.privacy, lambda: "run")
    try:
        sums.open(streamer)
        made = sums.sums(1, {}, streamer, NEVER)
    finally:
        sums.close()
        streamer.close()
    trained = {name for name, p in inputs.model.named_parameters() if p.requires_grad}
    assert isinstance(made.values, HeldSums)
    assert {name for _, name, *_ in made.values.listed()} == trained
    assert any("experts" in name for name in trained)
    assert all(bool(made.values.trunk(name).any()) for name in trained), "each gets noise"


@pytest.mark.slow
def test_adapters_under_a_budget_are_trained_alike_with_and_without_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With the same lots and noise: what differs is the float32 rounding of sums before they add up. Each host's
    adapters move, and each party counts every round."""
    monkeypatch.setattr(self_check, "check", lambda *arguments: SimpleNamespace(unused=()))
    held: dict[str, dict[str, Tensor]] = {}
    one = full_models()[PARTIES[0]]
    for aggregation, agreed in (("plain", None), ("masked", 40.0)):
        config = private_settings(
            lora=LORA.model_dump(), train__rounds=2, optim__eps=1e-3, aggregation=aggregation, noise_multiplier=agreed
        )
        folder = tmp_path / aggregation
        folder.mkdir()
        parts = adapted_parts(config, {name: copy.deepcopy(one) for name in PARTIES}, folder, LORA)
        private = with_privacy(parts, folder, sigma=0.5)
        federation, results = run_in_process(config, list(private.values()), folder / "coordinator")
        assert {result.privacy["rounds"] for result in results.values() if result.privacy is not None} == {2}
        held[aggregation] = {}
        for name in PARTIES:
            held[aggregation] |= experts_of(federation.runs[name]).host.trunk.weights()
    start = dict(attach_adapters(one, LORA, seed=0).named_parameters())
    assert held["plain"].keys() == held["masked"].keys() == {name for name, p in start.items() if p.requires_grad}
    moved = [float((value - start[name].detach()).abs().max()) for name, value in held["plain"].items()]
    assert max(moved) > 1e-4
    for name, value in held["plain"].items():
        assert relative(held["masked"][name], value) < 2e-5, name


def test_an_adapter_for_a_parameter_that_no_expert_has_is_refused_by_name():
    with pytest.raises(ModelError, match=r"`lora\.experts` names `gate_proj`"):
        attach_adapters(tiny_model("olmoe"), LoraSpec(experts=("gate_proj",)), seed=0)
