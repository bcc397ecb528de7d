"""What the ranks of a party are said to hold: by hand, as it was measured, and as live tensors of a federation."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coterie.dp.checks import self_check
from coterie.training.party.in_process import InProcessFederation
from coterie.training.planning.closed_form import Adapters, Shape
from coterie.training.planning.party_memory import PartyMemory, SumBytes
from coterie.training.planning.rank_memory import Held
from helpers.federations import PARTIES, experts_of, experts_settings, full_models, make_parts
from helpers.live_tensors import live_bytes
from helpers.party_sums import allocated, memory_of

FAST = SumBytes.clipped(exact=False, users=False, masked=False)
SHAPE = Shape(trunk=16, experts=80, layers=2, parties=2, matrix=24, largest_trunk=10, own=40)
"""Two layers of four experts, ten values each; the two parties host a half each."""
HELD = Held({"a": 10, "b": 6}, {"c": (40, 4), "d": (40, 4)}, 4)
PARTY = PartyMemory(SHAPE, HELD, 4, FAST, private=True)
STORED = 4 * 40 + 8 * 40 + 8 * 16 + 2 * 40  # weights and moments of experts, moments of the trunk, what is served


def test_bytes_of_sums_are_those_of_their_formats() -> None:
    kinds = [(exact, masked) for exact in (False, True) for masked in (False, True)]
    found = [SumBytes.clipped(exact=exact, users=False, masked=masked) for exact, masked in kinds]
    # Float32 is noised in place; integers become float32, or stay: then both are there for a moment.
    assert found == [SumBytes(4, 4, 4), SumBytes(4, 12, 8), SumBytes(12, 12, 4), SumBytes(12, 16, 8)]
    assert SumBytes.clipped(exact=False, users=True, masked=False).computing == 8


def test_one_process_and_the_ranks_by_hand() -> None:
    pushed = 4 * 2 * 40 + max(4 * 96, 4 * 40 + 8 * 16)  # of both parties, and sums, or gradients and own sums
    assert PARTY.gateway() == 4 * 16 + STORED + 2 * 80 + max(4 * 96 + 4 * 24, pushed)
    lot = 2 * 2 * 40 + 4 * 96 + 4 * 24
    assert PARTY.other(2) == 4 * 16 + lot
    owned = 56  # of 96: one rank owns a layer and the trunk
    assert HELD.owned(2) == owned
    assert PARTY.gateway(2) == 4 * 16 + STORED + max(lot, 320 + max(4 * owned, 4 * 40 + 8 * 16))
    spread = 2 * 2 * 20 + 4 * (16 + 40) + 4 * 12
    assert PARTY.other(2, 2) == 4 * 16 + spread
    gateway = 4 * 16 + STORED + 320 + max(4 * (10 + 40), 4 * 40 + 8 * 16)  # one owner has ten of the trunk
    assert PARTY.gateway(2, 2) == gateway
    assert PARTY.together(4, 2) == PARTY.gateway(4, 2) + 3 * PARTY.other(4, 2)
    exact = replace(PARTY, sums=SumBytes.clipped(exact=True, users=False, masked=False))
    assert exact.other(2) - PARTY.other(2) == 8 * 96
    plain = replace(PARTY, private=False, sums=SumBytes())
    assert plain.other(2) - PARTY.other(2) == 4 * (40 + 16) - 4 * 24, "a layer's gradients at once, and the trunk's"
    assert replace(PARTY, cached=False).gateway() < PARTY.gateway()


def test_ranks_on_gpus_by_hand() -> None:
    """There a rank has what it computes with; with experts over ranks the gateway evaluates with whole layers."""
    party = replace(PARTY, on_gpu=True)
    assert party.device() == party.alone().device == 4 * 16 + 2 * 2 * 40 + 4 * 24
    assert party.device(2) == 4 * 16 + 2 * 2 * 40
    assert party.gateway(2) - PARTY.gateway(2) == 4 * 16, "what is stepped lies beside it at any number of ranks"


def test_adapters_by_hand() -> None:
    """Ten values in the experts of each layer, six beside; five of the experts' are stored here, and the six own."""
    held = Held({"m": 6}, {"e": (12, 4), "f": (8, 4)}, 4)
    party = PartyMemory(SHAPE, held, 4, FAST, private=True, adapters=Adapters(20, 6, stored=5, matrix=9))
    made = {1: 4 * 26 // 2 + 4 * 9, 2: 4 * 16 // 2 + 4 * 9}
    assert party.other(2) == 4 * 16 + 4 * 26 + 2 * 2 * 40 + 4 * 26 + made[1]
    assert party.other(2, 2) == 4 * 16 + 4 * (26 + 10) + 2 * 2 * 20 + 4 * 16 + made[2], "own ones lie twice"
    pushed = 4 * 2 * 5 + max(4 * 26, 4 * 5 + 8 * 6)
    stored = 12 * 5 + 8 * 6 + 2 * 5
    assert party.gateway() == 4 * 16 + 4 * 26 + stored + 2 * 80 + max(4 * 26 + made[1], pushed)


SIZES = {"hidden_size": 96, "intermediate_size": 96, "num_hidden_layers": 4, "num_experts": 12}


def test_what_a_lot_allocates_is_what_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums, and what is made on the way to them, in one process: fast, exact, and without a budget."""
    monkeypatch.setattr(self_check, "check", self_check.check)  # the helper leaves it out, for its process
    changes = {"train__batch_size": 2, "train__micro_batch": 1, "sizes": SIZES}
    kinds = [("fast", changes), ("private", changes), ("plain", changes)]
    for measured, planned in allocated(tmp_path, kinds):
        assert planned / measured == pytest.approx(1, abs=0.1)


def test_what_a_federation_holds_when_all_have_pushed_is_what_is_planned(tmp_path: Path) -> None:
    """The moment with the most: everybody's sums are at their hosts, and still with those that made them."""
    config = experts_settings(
        train__rounds=2, train__batch_size=2, train__micro_batch=1, evaluate=False, deadline_s=60.0
    )
    one = full_models(**SIZES)["alder"]
    parts = make_parts(config, {name: copy.deepcopy(one) for name in PARTIES}, tmp_path)
    memories = [memory_of(each) for each in parts.values()]
    gc.collect()
    before, held = live_bytes(), list[int]()
    together = threading.Barrier(len(PARTIES), lambda: held.append(live_bytes()), 60.0)
    federation = InProcessFederation(config, tmp_path / "coordinator")
    federation.coordinate()
    for inputs in parts.values():
        sender = experts_of(federation.up(replace(inputs, test=None))).owner.sender

        def push(*arguments: Any, own: Callable[..., None] = sender.push) -> None:
            own(*arguments)
            together.wait()

        sender.push = push  # type: ignore[method-assign]
    federation.join()
    for end in federation.ends.values():
        if isinstance(end, BaseException):
            raise end
    assert len(held) == 2
    trunks = sum(4 * memory.shape.trunk for memory in memories)  # they were there before
    planned = sum(memory.gateway() for memory in memories)
    assert planned / (held[-1] - before + trunks) == pytest.approx(1, abs=0.1)
