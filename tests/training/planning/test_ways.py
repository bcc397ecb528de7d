"""Which way of using devices is proposed."""

from __future__ import annotations

import pytest

from coterie.training.planning.ways import choose

GIB = 2**30


@pytest.mark.parametrize(
    ("device", "activations", "way", "ranks", "rank_bytes"),
    [
        (100, 0, "one device", 1, 100),
        (100, 1, "experts over devices", 2, 61),  # 20 + 80 / 2, and activations at each
        (60, 0, "experts over devices", 2, 60),
        (59, 0, "experts over devices", 3, 47),
        (30, 0, "experts over devices", 8, 30),
        (29, 0, "none", 8, 30),  # no more ranks than a layer has experts
    ],
)
def test_the_fewest_devices_that_hold_state_and_activations(
    device: int, activations: int, way: str, ranks: int, rank_bytes: int
) -> None:
    found = choose(100 * GIB, 0.8, (8, 16), device * GIB, activations * GIB)
    assert (found.way, found.ranks) == (way, ranks)
    assert found.rank_bytes == pytest.approx(rank_bytes * GIB, rel=0.01)
    assert ("experts_over: " in found.words()) == (way == "experts over devices")


def test_a_model_without_experts_is_not_spread() -> None:
    assert choose(100 * GIB, 0.0, (), 50 * GIB).way == "none"
    assert choose(100 * GIB, 0.0, (), 200 * GIB).way == "one device"
