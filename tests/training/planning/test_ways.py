"""Which way of using devices is proposed."""

from __future__ import annotations

import pytest

from coterie.training.planning.ways import choose

GIB = 2**30
DEVICES = (100, 75, 66, 62)
EXPERTS_OVER = (100, 55, 40, 30)


@pytest.mark.parametrize(
    ("device", "activations", "way", "ranks", "rank_bytes"),
    [
        (100, 0, "one device", 1, 100),
        (100, 1, "records over devices", 2, 76),  # 75, and activations at each
        (75, 0, "records over devices", 2, 75),
        (74, 0, "experts over devices", 2, 55),
        (54, 0, "experts over devices", 3, 40),
        (30, 0, "experts over devices", 4, 30),
        (29, 0, "none", 4, 30),
    ],
)
def test_the_fewest_devices_that_hold_state_and_activations(
    device: int, activations: int, way: str, ranks: int, rank_bytes: int
) -> None:
    at_rank = [[each * GIB for each in way] for way in (DEVICES, EXPERTS_OVER)]
    found = choose(*at_rank, device * GIB, activations * GIB)
    assert (found.way, found.ranks, found.rank_bytes) == (way, ranks, rank_bytes * GIB)
    assert ("experts_over: " in found.words()) == (way == "experts over devices")
    assert ("`devices: 2`" in found.words()) == (way == "records over devices")


def test_a_model_without_experts_is_not_spread() -> None:
    assert choose((100, 75), (100,), 50).way == "none"
    assert choose((100, 75), (100,), 80).way == "records over devices"
    assert choose((100, 75), (100,), 200).way == "one device"
