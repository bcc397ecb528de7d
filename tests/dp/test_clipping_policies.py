"""A caller's own clipping policy cannot raise what one record contributes; what is no policy is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coterie import dp
from coterie.dp.clipping import Automatic, Flat, PerGroup, PerLayer, quantile_update
from coterie.dp.per_sample.engine import Engine
from coterie.errors import PrivacyError
from coterie.models.zoo.tiny import tiny_model
from helpers.engine_reference import clipped, distance, gradients, norms, only, size, token_batch

METHODS = ("book_keeping", "ghost")


@dataclass(frozen=True)
class Own(Flat):
    """A policy whose factors are made by a function of norms and thresholds."""

    make: Callable[[Tensor, Tensor], Any] = lambda norms, thresholds: torch.ones_like(norms)

    def factors(self, norms_GB: Tensor, thresholds_G: Tensor) -> Tensor:
        return self.make(norms_GB, thresholds_G)  # type: ignore[no-any-return]


def cheat(norms: Tensor, thresholds: Tensor) -> Tensor:
    """Changes what it was given, so that a bound made from it would be none."""
    thresholds.fill_(1e6)
    return norms.fill_(1e-9)


RAISING = {
    "ones": lambda norms, thresholds: torch.ones_like(norms),
    "infinity": lambda norms, thresholds: torch.full_like(norms, math.inf),
    "float32": lambda norms, thresholds: torch.full(norms.shape, 3e38),
    "half": lambda norms, thresholds: torch.ones_like(norms, dtype=torch.float16),
    "whole numbers": lambda norms, thresholds: torch.full(norms.shape, 59),
    "truth": lambda norms, thresholds: torch.ones_like(norms, dtype=torch.bool),
    "some": lambda norms, thresholds: torch.where(torch.arange(norms.shape[1]) % 2 == 0, 1e9, 1e-9).expand_as(norms),
    "a graph": lambda norms, thresholds: torch.ones_like(norms, requires_grad=True) * 2,
    "changed arguments": cheat,
    "twice": lambda norms, thresholds: 2 * thresholds[:, None] / norms,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", RAISING)
def test_invariant_2_no_policy_raises_a_contribution(kind: str, method: Any) -> None:
    model, batch = tiny_model("qwen3_moe"), token_batch(3, 9)
    clip = 0.1 * float(norms(gradients(model, batch)).min())
    engine = Engine(model, clipping=Own(clip, RAISING[kind]), method=method)
    engine.accumulate(batch)
    engine.take()
    assert engine.sensitivity == pytest.approx(clip * (1 + engine.eta))
    for record in range(3):
        engine.accumulate(only(batch, record))
        assert size(engine.take()) <= engine.sensitivity
    engine.accumulate_user([batch, token_batch(2, 5, seed=1)])
    assert size(engine.take()) <= engine.sensitivity


@pytest.mark.parametrize("base", [PerLayer, PerGroup])
def test_invariant_2_no_policy_raises_one_group(base: type[Flat]) -> None:
    class Raises(base):  # type: ignore[valid-type,misc]
        def factors(self, norms_GB: Tensor, thresholds_G: Tensor) -> Tensor:
            return 59 * super().factors(norms_GB, thresholds_G)

    model, batch = tiny_model("qwen3_moe"), token_batch(1, 9)
    engine = Engine(model, clipping=Raises(0.05), method="book_keeping")
    engine.accumulate(batch)
    sums = engine.take()
    for index, group in enumerate(engine.groups):
        own = size({name: value for name, value in sums.items() if engine.group_of(name) == group})
        assert own <= float(engine.thresholds[index]) * (1 + engine.eta)


def test_a_policy_may_lower_contributions_and_below_nothing_is_nothing() -> None:
    model, batch = tiny_model("mixtral"), token_batch(2, 7)
    half = Engine(model, clipping=Own(0.5, lambda n, t: 0.5 * (t[:, None] / n).clamp_max(1.0)))
    half.accumulate(batch)
    expected = {name: 0.5 * value for name, value in clipped(gradients(model, batch), 0.5).items()}
    assert distance(half.take(), expected) <= 5e-5
    negative = Engine(model, clipping=Own(0.5, lambda n, t: -1e9 * torch.ones_like(n)))
    negative.accumulate(batch)
    assert size(negative.take()) == 0.0


def test_factors_above_one_stay_where_the_bound_holds() -> None:
    """AUTO-S enlarges small gradients, to less than the threshold."""
    model, batch = tiny_model("mixtral"), token_batch(1, 7)
    clip = 50 * float(norms(gradients(model, batch))[0])
    engine = Engine(model, clipping=Automatic(clip, gamma=1e-9))
    engine.accumulate(batch)
    assert clip * (1 - 1e-3) <= size(engine.take()) <= engine.sensitivity


REFUSED = {
    "NaN": lambda norms, thresholds: torch.where(torch.arange(norms.shape[1]) == 1, math.nan, 0.5).expand_as(norms),
    "one for all": lambda norms, thresholds: torch.ones(()),
    "one for each record": lambda norms, thresholds: torch.ones(norms.shape[1]),
    "turned": lambda norms, thresholds: torch.ones(norms.shape[::-1]),
    "a number": lambda norms, thresholds: 1.0,
    "a list": lambda norms, thresholds: norms.tolist(),
    "nothing": lambda norms, thresholds: None,
    "complex": lambda norms, thresholds: norms.to(torch.complex128),
    "sparse": lambda norms, thresholds: norms.to_sparse(),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_factor_for_each_record_is_refused_and_adds_nothing(kind: str) -> None:
    engine = Engine(tiny_model("mixtral"), clipping=Own(0.5, REFUSED[kind]), method="book_keeping")
    with pytest.raises(PrivacyError) as caught:
        engine.accumulate(token_batch(3, 7))
    assert caught.value.code == "dp-clipping-factors"
    assert size(engine.take()) == 0.0


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, 1e-40])
def test_thresholds_that_are_no_clip_norm_are_refused_whenever_they_come(bad: float) -> None:
    class Bad(PerLayer):
        def thresholds(self, groups: Sequence[str]) -> Tensor:
            return torch.tensor([1.0] * (len(groups) - 1) + [bad])

    with pytest.raises(PrivacyError) as caught:
        Engine(tiny_model("mixtral"), clipping=Bad(1.0))
    assert caught.value.code == "dp-clip-norm"
    engine = Engine(tiny_model("mixtral"), clipping=Flat(1.0))
    with pytest.raises(PrivacyError, match="clip norm"):
        engine.thresholds = torch.tensor([bad])
    assert engine.thresholds.tolist() == [1.0]


def test_thresholds_of_another_number_than_the_groups_are_refused() -> None:
    class Few(PerLayer):
        def thresholds(self, groups: Sequence[str]) -> Tensor:
            groups.clear()  # type: ignore[attr-defined]
            return torch.ones(1)

    with pytest.raises(PrivacyError, match=r"shape \[1\] for . gradient groups"):
        Engine(tiny_model("mixtral"), clipping=Few(1.0))


def test_thresholds_and_groups_are_those_of_when_the_engine_was_made() -> None:
    kept = torch.ones(1, dtype=torch.float64)

    class Moves(Flat):
        calls = 0

        def thresholds(self, groups: Sequence[str]) -> Tensor:
            return kept

        def group_of(self, name: str) -> str:
            Moves.calls += 1
            return "all" if Moves.calls <= names else f"group {Moves.calls}"

    model = tiny_model("mixtral")
    names = len(list(model.parameters()))
    engine = Engine(model, clipping=Moves(1.0))
    kept.fill_(59.0)
    assert engine.sensitivity == pytest.approx(1 + engine.eta)
    engine.accumulate(token_batch(1, 9))
    assert size(engine.take()) <= engine.sensitivity
    assert {engine.group_of(name) for name in engine.shapes} == {"all"}


def test_adaptive_thresholds_stay_clip_norms() -> None:
    thresholds = torch.tensor([1e-9, 1e30], dtype=torch.float64)
    moved = quantile_update(thresholds, torch.tensor([1.0, 0.0]), rate=5.0)
    assert torch.equal(moved, thresholds)


def test_private_training_holds_the_bound_under_a_policy_that_never_clips(
    tmp_path: Path,
) -> None:
    model = tiny_model("mixtral")
    data = [{name: value[0].tolist() for name, value in token_batch(1, 9, seed=seed).items()} for seed in range(8)]
    session = dp.make_private(
        model, torch.optim.SGD(model.parameters(), 0.1), data, collate_fn=_collate, budget=dp.Budget(8.0, 1e-5),
        clip_norm=1e-3, lot_size=4, epochs=1, physical_batch=4, clipping=Own(1e-3), ledger=tmp_path / "ledger",
    )  # fmt: skip
    engine = session.lot_sums.engine
    engine.accumulate(token_batch(1, 9))
    assert size(engine.take()) <= engine.sensitivity


def _collate(items: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    return {name: torch.tensor([item[name] for item in items]) for name in items[0]}
