"""`lost_party: continue` with `experts`: the lost host's experts are masked, its share of the trunk stands still."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from coterie.config import FederationConfig
from coterie.dp.clipping import Flat
from coterie.dp.noise.joint_noise import LOAD
from coterie.dp.per_sample.engine import Engine
from coterie.federation.experts.parts import expert_parts, present_parts
from coterie.models import seam
from coterie.models.seam import expert_layers
from coterie.models.zoo.tiny import tiny_model
from coterie.training.party.in_process import InProcessFederation
from coterie.training.party.inputs import PartyInputs
from helpers.by_hand import ByHand, Union, _Masked
from helpers.comparing import relative
from helpers.federations import PARTIES, experts_settings, full_models, make_parts, text
from helpers.kills import Deadly, Killed
from helpers.private_federation import PrivateWorld
from helpers.private_federation import already_compared as already_compared
from helpers.private_federation import watched as watched
from helpers.private_settings import balanced_settings, exchange_of
from helpers.waiting import until

pytestmark = pytest.mark.usefixtures("already_compared")

LEFT = ("alder", "birch")


def until_gone(federation: InProcessFederation) -> None:
    until(lambda: any("going on without cedar" in status.state.note for status in federation.statuses))


def lose_cedar(config: FederationConfig, parts: dict[str, PartyInputs], folder: Path) -> InProcessFederation:
    """Cedar dies when it reads its third round's text."""
    federation = InProcessFederation(config, folder / "coordinator")
    federation.coordinate()
    cedar = Deadly(**vars(parts["cedar"].train))
    for each in (parts | {"cedar": replace(parts["cedar"], train=cedar)}).values():
        federation.up(each)
    return federation


def left(federation: InProcessFederation) -> None:
    federation.join()
    assert isinstance(federation.ends["cedar"], Killed)
    for name in LEFT:
        end = federation.ends[name]
        assert not isinstance(end, BaseException), (name, end)


def hosted_of(federation: InProcessFederation, name: str) -> dict[tuple[int, int, str], torch.Tensor]:
    found = {}
    for key, value in exchange_of(federation, name).host.shard.state_dict().items():
        if "/" not in key:
            _, layer, _, expert, parameter = key.split(".")
            found[int(layer), int(expert), parameter] = value
    return found


def test_with_a_private_trunk_the_others_train_on_as_by_hand_without_it_and_its_experts(tmp_path: Path):
    config = experts_settings(train__rounds=5, train__micro_batch=6, deadline_s=4.0, lost_party="continue")
    models = full_models()
    parts = make_parts(config, models, tmp_path)
    federation = lose_cedar(config, parts, tmp_path)
    left(federation)
    by_hand = ByHand(config, models, parts)
    by_hand.train([1, 2])
    by_hand.train([3, 4, 5], LEFT, parts["cedar"].placement.hosted("cedar"))
    layers = expert_layers(models["alder"])
    for name in LEFT:
        whole = dict(models[name].named_parameters())
        for key, value in federation.runs[name].actor.inputs.model.named_parameters():
            if not value.is_meta:
                assert relative(value, whole[key]) < 1e-5, (name, key)
        for (layer, expert, parameter), value in hosted_of(federation, name).items():
            assert relative(value, layers[layer].parameters()[parameter][expert]) < 1e-5


@pytest.mark.parametrize("whole_layer", [False, True])
def test_with_a_shared_trunk_the_lost_share_stands_still_and_all_compute_with_the_same_copy(
    tmp_path: Path, whole_layer: bool
):
    """Also where cedar hosts all experts of a layer, so that nothing of it is left."""
    dealt = {expert: PARTIES[expert % 3] for expert in range(8)}
    placement = {0: dealt, 1: dict.fromkeys(range(8), "cedar"), 2: dealt}
    config = experts_settings(
        trunk="shared", train__rounds=5, train__micro_batch=6, deadline_s=4.0, lost_party="continue",
        **({"placement": placement} if whole_layer else {}),
    )  # fmt: skip
    one = full_models()[PARTIES[0]]
    parts = make_parts(config, {name: copy.deepcopy(one) for name in PARTIES}, tmp_path)
    federation = lose_cedar(config, parts, tmp_path)
    left(federation)
    theirs = frozenset(exchange_of(federation, "cedar").host.trunk.weights())
    assert theirs, "cedar is home to some of the trunk"
    union = Union(config, one, parts)
    union.train([1])
    before = {name: value.detach().clone() for name, value in one.named_parameters() if name in theirs}
    union.train([2])
    # Cedar may die before alder has fetched what round 2 made of its share: then the copy of round 1 is the newest.
    stands = dict(federation.runs["alder"].actor.inputs.model.named_parameters())
    if all(relative(stands[name], before[name]) < 1e-5 for name in theirs):
        with torch.no_grad():
            for name, value in one.named_parameters():
                if name in theirs:
                    value.copy_(before[name])
    union.train([3, 4, 5], LEFT, theirs, parts["cedar"].placement.hosted("cedar"))
    whole, layers = dict(one.named_parameters()), expert_layers(one)
    for name in LEFT:
        for key, value in exchange_of(federation, name).host.trunk.weights().items():
            assert relative(value, whole[key]) < 1e-5, (name, key)
        for (layer, expert, parameter), value in hosted_of(federation, name).items():
            assert relative(value, layers[layer].parameters()[parameter][expert]) < 1e-5
        held = dict(federation.runs[name].actor.inputs.model.named_parameters())
        for key in theirs:
            assert relative(held[key], whole[key]) < 1e-5, (name, key)


def test_lost_party_that_comes_back_takes_up_its_experts_and_its_share_of_the_trunk(tmp_path: Path):
    config = experts_settings(
        trunk="shared", train__rounds=9, train__micro_batch=6, deadline_s=4.0, lost_party="continue"
    )
    one = full_models()[PARTIES[0]]

    def parts() -> dict[str, PartyInputs]:
        return make_parts(config, {name: copy.deepcopy(one) for name in PARTIES}, tmp_path)

    federation = lose_cedar(config, parts(), tmp_path)
    until_gone(federation)
    federation.up(parts()["cedar"])
    federation.join()
    for name, end in federation.ends.items():
        assert not isinstance(end, BaseException), (name, end)
    restored = [s.state for s in federation.statuses if s.state.phase == "restore"]
    assert {name: saved.round for name, saved in restored[-1].sources.items()} == {"cedar": 2}
    assert not federation.statuses[-1].state.absent
    served = {}
    for name in PARTIES:
        served |= exchange_of(federation, name).host.trunk.weights()
    for name in PARTIES:
        held = dict(federation.runs[name].actor.inputs.model.named_parameters())
        for key, value in served.items():
            assert torch.equal(held[key], value), "after the last evaluation everybody has the hosts' own weights"


def test_a_new_membership_epoch_burns_what_was_released_and_draws_anew(tmp_path: Path, watched):
    """birch had released round 3 when cedar was lost: those bytes were made for another federation."""
    world = watched(PrivateWorld(tmp_path, rounds=6, lost_party="continue", max_attempts=20))
    world.start()
    until(lambda: world.at(round_no=3) and (3, 0) in world.releases())
    lost_in = world.federation.statuses[-1].state.round
    world.federation.kill("cedar")
    until_gone(world.federation)
    world.federation.join()
    for name in LEFT:
        end = world.federation.ends[name]
        assert not isinstance(end, BaseException), (name, end)
        counted = world.releases(name)
        assert len(counted) == len(set(counted))
        again = [round_no for round_no, draw in counted if draw == 1]
        burned = [entry["data"]["round"] for entry in world.entries(name) if entry["kind"] == "burned"]
        assert again == burned, "what was released under the old epoch is never used"
        assert all(round_no in (lost_in, lost_in + 1) for round_no in again)
    assert not world.uncounted
    for (_, round_no, _), digests in world.announced.items():
        assert len(set(digests)) <= 1 + ((round_no, 1) in world.releases())


@pytest.mark.parametrize("mode", ["private_load", "bias"])
def test_lost_home_of_the_loads_is_stood_in_for(tmp_path: Path, watched, mode: str):
    """The loads (or biases) stand still then, as a trunk share does; all parties still have one value."""
    rules = balanced_settings(mode).privacy
    world = watched(PrivateWorld(tmp_path, rounds=5, privacy=rules, lost_party="continue", max_attempts=20))
    if mode == "bias":
        world.model = full_models(family="deepseek_v3")[PARTIES[0]]
    world.start()
    until(lambda: world.at(round_no=3))
    (home,) = [name for name in PARTIES if LOAD in exchange_of(world.federation, name).host.trunk.weights()]
    others = [name for name in PARTIES if name != home]
    world.federation.kill(home)
    world.federation.join()
    values = []
    for name in others:
        assert not isinstance(world.federation.ends[name], BaseException), world.federation.ends[name]
        balancer = exchange_of(world.federation, name).contribution.balancer
        assert balancer is not None
        values.append(balancer.public())
    assert torch.equal(*values)
    assert float(values[0].abs().sum()) > 0


@pytest.mark.parametrize("method", ["book_keeping", "ghost"])
@pytest.mark.parametrize("masked", [{0: [1, 4, 6]}, {0: list(range(8)), 1: [0]}])
def test_clipped_sums_with_masked_experts_are_those_of_one_record_at_a_time(method, masked):
    records = text(5, sequences=4)
    model = tiny_model("olmoe", num_hidden_layers=2)
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    with seam.computed_by(model, _Masked(masked)):
        for row in range(4):
            ids = records[row]["input_ids"]
            model.zero_grad()
            functional.cross_entropy(model(input_ids=ids[None], use_cache=False).logits[0, :-1], ids[1:]).backward()
            found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
            norm = float(torch.cat([g.flatten() for g in found.values()]).double().norm())
            for name, gradient in found.items():
                total[name] += gradient * min(1.0, 0.5 / norm)
    seam.select(model)
    seam.mask(model, masked)
    engine = Engine(model, None, Flat(0.5), method)
    engine.accumulate(records.collate([records[row] for row in range(4)]))
    for name, value in engine.take().items():
        assert relative(value, total[name]) < 1e-4, name
    seam.mask(model, {})
    engine.accumulate(records.collate([records[row] for row in range(4)]))
    layer = expert_layers(model)[0]
    assert float(engine.take()[f"{layer.name}.down_proj"][1].abs().sum()) > 0, "the mask was taken off"


def test_present_parts_leave_out_absent_experts_and_lend_absent_trunk_shares():
    parts = expert_parts([{"down_proj": (3, 2, 2)}], [list(PARTIES)], PARTIES, {"a": (4,), "b": (3,), "c": (2,)})
    assert present_parts(parts, PARTIES) == parts
    found = present_parts(parts, ("birch", "cedar"))
    assert [part.host for part in found if part.layer == 0] == ["birch", "cedar"]
    lent = [part for part in found if part.host != parts[part.number].host]
    assert [(part.host, part.trained, part.shapes) for part in lent] == [("birch", False, (("a", (4,)),))]
    assert {name for part in found if part.layer < 0 for name, _ in part.shapes} == {"a", "b", "c"}
