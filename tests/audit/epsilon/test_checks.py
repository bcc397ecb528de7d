"""Statistics of noise and lots, on made-up noise with a known fault."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from coterie.audit.epsilon import checks

SURE = 1e-6
Noise = list[dict[str, Tensor]]


def noise(seed: int = 0, rounds: int = 2) -> Noise:
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: torch.randn(size, generator=generator) for name, size in (("a", (60, 50)), ("b", (900,)))}
        for _ in range(rounds)
    ]


ALL = (checks.spread, checks.worst_spread, checks.shape, checks.within_rounds, checks.between_rounds)


@pytest.mark.parametrize("seed", range(5))
def test_gaussian_noise_is_quiet(seed: int) -> None:
    assert min(check(noise(seed)).chance for check in ALL) > 1e-4


def test_the_standard_deviation_comes_with_its_error() -> None:
    seen = checks.spread([{"a": torch.full((200,), 0.5), "b": torch.full((200,), -0.5)}])
    assert seen.value == pytest.approx(0.5)
    assert seen.error == pytest.approx((1 / 800) ** 0.5)
    assert seen.chance < SURE


def test_one_tensor_without_noise_is_seen_among_all() -> None:
    silent = [{**each, "c": torch.zeros(20)} for each in noise()]
    assert checks.spread(silent).chance > 1e-4
    assert checks.worst_spread(silent)[::2] == (0.0, pytest.approx(0.0, abs=SURE))


def test_noise_of_another_shape_is_seen_though_its_deviation_fits() -> None:
    flat = [{name: torch.erf(value / 2**0.5) * 3**0.5 for name, value in each.items()} for each in noise()]
    assert checks.spread(flat).chance > SURE
    assert checks.shape(flat).chance < SURE


def test_a_stream_that_is_used_twice_is_seen_wherever_it_comes_again() -> None:
    again = noise()
    again[1] = {"a": again[0]["a"].roll(7), "b": again[1]["b"]}
    assert checks.between_rounds(again).chance < SURE
    inside = noise()
    inside[0]["a"][30:] = inside[0]["a"][:30]
    assert checks.within_rounds(inside).chance < SURE


def test_correlations_are_those_of_the_definition() -> None:
    a, b = (torch.cat([each["a"].flatten(), each["b"]]).double() for each in noise())
    direct = max(abs(float((a * b.roll(shift)).sum() / a.norm() / b.norm())) for shift in range(len(a)))
    assert checks.between_rounds(noise()).value == pytest.approx(direct, rel=1e-6)


def lots(kind: str, seed: int, rounds: int = 200, units: int = 80) -> np.ndarray:
    chance = np.random.default_rng(seed)
    coins = chance.random((rounds, units)) < 0.25
    if kind == "often":
        return chance.random((rounds, units)) < 0.3
    if kind == "of one size":
        return np.argsort(chance.random((rounds, units)), 1) < units // 4
    if kind == "shuffled once an epoch":
        places = [np.argsort(np.argsort(chance.random(units))) // (units // 4) for _ in range(rounds // 4)]
        return np.concatenate([place[None] == np.arange(4)[:, None] for place in places])
    if kind == "with a favourite":
        coins[:, 0] = True
    return coins


@pytest.mark.parametrize("seed", range(5))
def test_lots_by_independent_coins_are_quiet(seed: int) -> None:
    assert all(seen.chance > 1e-4 for _, seen in checks.inclusion(lots("", seed), 0.25))


@pytest.mark.parametrize(
    ("kind", "seen_by"),
    [("often", "rate"), ("of one size", "sizes"), ("shuffled once an epoch", "units"), ("with a favourite", "units")],
)
def test_other_lots_are_seen(kind: str, seen_by: str) -> None:
    assert dict(checks.inclusion(lots(kind, 1), 0.25))[seen_by].chance < SURE


def test_lots_of_all_records_have_all_records() -> None:
    everyone = np.ones((3, 5), bool)
    assert checks.inclusion(everyone, 1.0) == [("rate", checks.Seen(1.0, 0.0, 1.0))]
    everyone[2, 4] = False
    assert checks.inclusion(everyone, 1.0)[0][1].chance == 0.0


def test_cut_lots_are_expected_to_be_cut() -> None:
    chance = np.random.default_rng(2)
    drawn = chance.random((400, 40)) < 0.25
    for each in drawn:
        each[np.flatnonzero(each)[10:]] = False
    found = dict(checks.inclusion(drawn, 0.25, 10))
    assert found["rate"].chance > 1e-4
    assert dict(checks.inclusion(drawn, 0.25))["rate"].chance < SURE
