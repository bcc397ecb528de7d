"""Whatever a party adds to a round of `experts` keeps the rules of `Contribution`; the same tests run over each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from coterie.config import LoraSpec, PrivacySpec
from coterie.errors import RoundError
from coterie.federation.cancel import NEVER, CancelToken
from coterie.models.lora import attach_adapters
from coterie.models.seam import expert_layers
from coterie.models.streaming.cache import MemoryStore, WeightCache
from coterie.models.streaming.streamer import LayerStreamer
from coterie.training.data.packing import Batch
from coterie.training.experts.adapter_sums import AdapterSums
from coterie.training.experts.contribution import Contribution, PlainSums, Sums
from coterie.training.experts.held_sums import HeldSums, Piece
from coterie.training.experts.private_sums import PrivateSums
from coterie.training.loop import loss_sum
from coterie.training.party.inputs import PartyInputs, PrivacyInputs
from helpers.federations import PARTIES, full_models, make_parts, settings

PINS = {"weights": "00", "agreement": "11", "epoch": "1"}
RULES = {"epsilon": 8.0, "delta": 1e-3, "clip_norm": 0.7, "lot_size": 5}


class Case(NamedTuple):
    """A contribution, what lends it weights, and the shapes that its sums have to have."""

    made: Contribution
    streamer: LayerStreamer
    experts: dict[tuple[int, str], torch.Size]
    trunk: dict[str, torch.Size]


def batches(parts: PartyInputs) -> Callable[[int], list[Batch]]:
    return lambda round_no: [parts.train.batch([round_no, round_no + 1]), parts.train.batch([round_no + 2])]


def plain(parts: PartyInputs, folder: Path) -> Contribution:
    layers = expert_layers(parts.model)
    return PlainSums(parts.model, layers, batches(parts), lambda batch: loss_sum(parts.model, batch), 3)


def adapters(parts: PartyInputs, folder: Path) -> Contribution:
    pytest.importorskip("peft")
    attach_adapters(parts.model, LoraSpec(rank=2, alpha=4.0, modules=("q_proj",)), seed=0)
    return AdapterSums(parts.model, batches(parts), 3)


def private(parts: PartyInputs, folder: Path, *, masked: bool = False, **more: float) -> PrivateSums:
    spec = PrivacySpec(**{**RULES, "ledger": folder / "ledger", "physical_batch": 2})
    privacy = PrivacyInputs(spec, rounds=4, seed=0, noise_multiplier=0.5, **more)
    return PrivateSums(parts.model, expert_layers(parts.model), parts.train, privacy, lambda: "run", masked=masked)


KINDS: dict[str, Callable[[PartyInputs, Path], Contribution]] = {
    "plain": plain,
    "adapters": adapters,
    "private": private,
    "constant work": lambda parts, folder: private(parts, folder, push_after_s=0.1),
}


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Case]:
    whole = full_models()[PARTIES[0]]
    config = settings(exchange="experts", privacy="none", weights_dtype="float32", trunk="shared")
    parts = make_parts(config, dict.fromkeys(PARTIES, whole), tmp_path)[PARTIES[0]]
    cache = WeightCache(MemoryStore(), len(expert_layers(whole)))
    for layer in expert_layers(whole):
        cache.put(layer.index, {name: value.detach().clone() for name, value in layer.parameters().items()})
    made = request.param(parts, tmp_path)
    experts = {
        (layer.index, name): value.shape
        for layer in expert_layers(parts.model)
        for name, value in layer.parameters().items()
        if value.requires_grad
    }
    trunk = {name: p.shape for name, p in parts.model.named_parameters() if p.requires_grad and not p.is_meta}
    with closing(LayerStreamer(cache, parts.device, torch.float32)) as streamer, closing(made):
        made.open(streamer)
        yield Case(made, streamer, experts, trunk)


@pytest.mark.parametrize(("masked", "recorded"), [(True, True), (True, False), (False, True)])
def test_a_statement_says_that_recordings_open_masked_sums(tmp_path: Path, masked: bool, recorded: bool) -> None:
    config = settings(exchange="experts", privacy="none", weights_dtype="float32", trunk="shared")
    parts = make_parts(config, dict.fromkeys(PARTIES, full_models()[PARTIES[0]]), tmp_path)[PARTIES[0]]
    made = private(parts, tmp_path, masked=masked, recorded=recorded)
    with (
        closing(made),
        closing(LayerStreamer(WeightCache(MemoryStore(), 1), parts.device, torch.float32)) as streamer,
    ):
        told = made.open_ledger(streamer).run.statement().not_covered
    assert any("`transcript`" in line for line in told) is (masked and recorded)


def made_in(case: Case, round_no: int) -> tuple[Sums, dict[object, Tensor]]:
    """The sums of a round, and all their tensors by name."""
    sums = case.made.sums(round_no, PINS, case.streamer, NEVER)
    assert isinstance(sums.values, HeldSums)
    found: dict[object, Tensor] = {}
    for *piece, _, _ in sums.values.listed():
        layer, name, *experts = piece
        assert layer < 0 or experts == [0, case.experts[layer, name][0]]
        found[name if layer < 0 else (layer, name)] = sums.values.rows(Piece(*piece), ())
    return sums, found


def test_sums_cover_all_that_is_trained_in_float32_off_the_device_and_leave_nothing_behind(case: Case) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    sums, found = made_in(case, 1)
    assert {name: value.shape for name, value in found.items()} == {**case.experts, **case.trunk}
    assert {(value.dtype, value.device.type) for value in found.values()} == {(torch.float32, "cpu")}
    assert sums.weight > 0
    assert all(isinstance(value, int | float) for value in sums.metrics.values())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_second_attempt_gives_the_same_sums_and_the_same_bytes_where_they_were_released(case: Case) -> None:
    first, there = made_in(case, 1)
    second, again = made_in(case, 1)
    assert first.digest == second.digest
    for name, value in there.items():
        off = float((again[name] - value).norm())
        assert off <= (0.0 if first.digest else 1e-6 * float(value.norm())), name
    _, other = made_in(case, 2)
    assert any(float((other[name] - value).norm()) > 1e-3 * float(value.norm()) for name, value in there.items())


def test_an_attempt_given_up_on_the_way_raises_and_leaves_nothing_in_the_next_one(case: Case) -> None:
    asked = iter([True])
    with pytest.raises(RoundError):
        case.made.sums(1, PINS, case.streamer, CancelToken(lambda: not next(asked, False)))
    _, there = made_in(case, 1)
    _, again = made_in(case, 1)
    assert all(float((again[name] - value).norm()) <= 1e-6 * float(value.norm()) for name, value in there.items())


def test_rounds_that_were_applied_are_let_go_and_closing_twice_is_closing(case: Case) -> None:
    made_in(case, 1)
    case.made.check_not_behind(1)
    case.made.applied(1, 1)
    made_in(case, 2)
    case.made.close()
    case.made.close()


def test_ledger_budget_and_statement_come_together_or_not_at_all(case: Case) -> None:
    made_in(case, 1)
    made = case.made
    promised = isinstance(made, PrivateSums)
    assert (made.open_ledger(case.streamer) is not None) == promised
    assert (made.ledger_head() is not None) == promised
    assert (made.privacy() is not None) == promised
    assert bool(made.statement()) == promised
    made.expect(made.ledger_head())
    made.check_not_behind(1)
