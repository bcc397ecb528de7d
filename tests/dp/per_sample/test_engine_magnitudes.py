"""Invariant 2 where float32 underflows and overflows: one record contributes at most C, and its norm is right.

The reference is plain autograd in float64, and sums written out in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.dp.clipping import Flat
from coterie.dp.per_sample import combine_uses, gram_kernel
from coterie.dp.per_sample.engine import Engine
from coterie.dp.per_sample.scaling import balance, bounded, single
from coterie.dp.per_sample.stacked_terms import Segments, StackedBias
from coterie.dp.per_sample.terms import Aligned, Dense, Lookup, Outer
from coterie.models import seam
from coterie.models.zoo.tiny import tiny_model
from helpers.engine_reference import gradients, norms, only, size, token_batch
from helpers.row_sizes import (
    SIZES,
    Biased,
    Convolved,
    Doubled,
    Linear,
    Stacked,
    Tied,
    Twice,
    assert_bounded,
    assert_clipped,
    loss,
    of_sizes,
    sized,
    stacked_outer,
)

METHODS = ("book_keeping", "ghost")
NEEDS_NUMBA = pytest.mark.skipif(gram_kernel.kernel() is None, reason="needs numba")
COMPILED = [False, pytest.param(True, marks=NEEDS_NUMBA)]
MANY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=COMPILED, ids=["torch", "compiled"])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the compiled pass takes the norms, also of these small terms."""
    monkeypatch.setattr(gram_kernel, "_WORTH_STARTING", 0 if request.param else 1 << 62)


# Rows of 2^e with gradients of 2^(total - e): each product is near 2^total, from 1e-38 to 1e38.
pairs = st.lists(st.tuples(st.integers(-120, 120), st.integers(-120, 60)), min_size=1, max_size=4)


@MANY
@given(
    pairs, st.integers(1, 3), st.integers(1, 40), st.sampled_from([(3, 2), (24, 20)]), st.integers(1, 2),
    st.booleans(), st.integers(0, 1000),
)  # fmt: skip
def test_outer_products_of_any_size(
    compiled: None, exponents: list[tuple[int, int]], records: int, rows: int, shape: tuple[int, int], groups: int,
    flipped: bool, seed: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    count = records * groups * rows
    a = sized(generator, count, shape[0], [e for e, _ in exponents]).view(records, groups, rows, -1)
    other = [max(-120, min(120, total - e)) for e, total in exponents]
    g = sized(generator, count, shape[1], other).view(records, groups, rows, -1)
    exact = torch.einsum("bgto,bgti->bgoi", g.double(), a.double())
    exact = exact.mT if flipped else exact
    term = Outer(a, g, exact.shape[1:], flipped).bounded()
    assert_bounded(term, exact)


@MANY
@given(pairs, st.integers(1, 3), st.integers(1, 12), st.booleans(), st.booleans(), st.integers(0, 1000))
def test_experts_rows_of_any_size(
    compiled: None, exponents: list[tuple[int, int]], records: int, tokens: int, transposed: bool, gathered: bool,
    seed: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    expert_N = torch.randint(0, 3, (records * tokens,), generator=generator)
    x = sized(generator, records * tokens, 5, [e for e, _ in exponents])
    g = sized(generator, records * tokens, 4, [max(-120, min(120, total - e)) for e, total in exponents])
    term, exact = stacked_outer(x, g, expert_N, records, transposed, gathered)
    assert_bounded(term.bounded(), exact)


@MANY
@given(st.lists(st.integers(-140, 120), min_size=1, max_size=4), st.integers(1, 3), st.integers(0, 1000))
def test_gradients_of_any_size(exponents: list[int], records: int, seed: int) -> None:
    """Terms that multiply nothing: only squares of their numbers can underflow or overflow."""
    generator = torch.Generator().manual_seed(seed)
    g = sized(generator, records * 6, 4, exponents)
    exact = g.double().view(records, 6, 4)
    assert_bounded(Dense(g.view(records, 6, 4)), exact)
    apart = torch.zeros(records, records * 6, 4, dtype=torch.float64)
    for record in range(records):
        apart[record, 6 * record : 6 * record + 6] = exact[record]
    assert_bounded(Aligned(g, records), apart)
    ids = torch.randint(0, 5, (records, 6), generator=generator)
    table = torch.zeros(records, 5, 4, dtype=torch.float64)
    for record in range(records):
        table[record].index_add_(0, ids[record], exact[record])
    assert_bounded(Lookup(ids, g.view(records, 6, 4), torch.Size((5, 4))), table)
    segments = Segments(torch.arange(records).repeat_interleave(6), torch.tensor([records * 6]), records)
    assert_bounded(StackedBias(g, segments), exact.sum(1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_balanced_rows_have_the_same_products_and_lose_no_digit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a = sized(generator, 6, 3, [100, -90, 0]).to(dtype)
    g = sized(generator, 6, 2, [-110, 70, 5]).to(dtype)
    record_R = torch.tensor([0, 0, 0, 1, 1, 1])
    new_a, new_g, exponent_B = balance(a, g, record_R, 2)
    before = g.double().unsqueeze(2) * a.double().unsqueeze(1)
    after = (
        new_g.double().unsqueeze(2) * new_a.double().unsqueeze(1) * (2.0 ** exponent_B.double())[record_R, None, None]
    )
    assert torch.allclose(before, after, rtol=0 if dtype != torch.float64 else 1e-6, atol=0)
    assert max(float(new_a.abs().max()), float(new_g.abs().max())) <= 1


def test_rows_that_are_nothing_or_not_finite_stay_so_and_alone() -> None:
    a, g = torch.ones(3, 2) * 1e30, torch.ones(3, 2) * 1e-30
    a[1], g[2, 0] = 0.0, float("inf")
    _, new_g, _ = balance(a, g, torch.arange(3), 3)
    assert torch.equal(new_g[1], torch.zeros(2))
    squares = Outer(a.view(3, 1, 1, 2), g.view(3, 1, 1, 2), torch.Size((2, 2))).bounded().sq_norms().value
    assert float(squares[0]) == pytest.approx(4.0, rel=1e-5)
    assert float(squares[1]) == 0.0
    assert not bool(torch.isfinite(squares[2]))


def test_only_rows_that_need_it_are_scaled() -> None:
    a, g = torch.randn(4, 1, 512, 256), 1e-6 * torch.randn(4, 1, 512, 1024)
    term = Outer(a, g, torch.Size((1024, 256)))
    assert term.bounded() is term
    assert not bounded(1e12 * a, g, 512)
    assert not bounded(a, g * float("nan"), 512)


def test_factors_below_float32_become_zero_and_never_larger() -> None:
    factors = torch.tensor([1.0, 2.0**-126, 1.4 * 2.0**-149, 1e-300], dtype=torch.float64)
    assert single(factors).tolist() == [1.0, 2.0**-126, 0.0, 0.0]


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", [Linear, Stacked, Doubled, Twice, Biased, Convolved, Tied])
def test_invariant_2_no_size_of_rows_hides_a_record(
    compiled: None, kind: type[nn.Module], sizes: tuple[float, float], mixed: bool
) -> None:
    for method in METHODS:
        for tokens in (4, 40):
            assert_clipped(kind(), of_sizes(tokens, *sizes, mixed), loss, method)


@pytest.mark.parametrize("kind", [Linear, Doubled, Twice, Tied])
def test_invariant_2_also_where_gradients_are_formed_one_record_at_a_time(
    kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(combine_uses, "_DENSE_ELEMENTS", 0)
    for method in METHODS:
        for sizes in SIZES:
            assert_clipped(kind(), of_sizes(40, *sizes, True), loss, method)


@pytest.fixture
def flushed() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush subnormal numbers")
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("kind", [Linear, Stacked, Twice, Tied])
def test_invariant_2_also_where_subnormal_numbers_are_flushed(
    compiled: None, flushed: None, kind: type[nn.Module]
) -> None:
    for method in METHODS:
        for sizes in ((5e17, 2.4e-23), (1e30, 3e-38), (2.0**-100, 2.0**90)):
            assert_clipped(kind(), of_sizes(40, *sizes, True), loss, method)


@pytest.mark.parametrize("sizes", [(3e38, 1e-38), (1e38, 1e38), (3e38, 3e38)])
def test_invariant_2_beyond_float32_a_record_contributes_at_most_c(sizes: tuple[float, float]) -> None:
    for kind in (Linear, Twice, Biased, Convolved, Tied):
        for method in METHODS:
            engine = Engine(kind(), loss, Flat(1.0), method=method)  # type: ignore[arg-type]
            engine.accumulate(of_sizes(40, *sizes, False))
            assert all(bool(torch.isfinite(value).all()) for value in engine.take().values())
            engine.accumulate(only(of_sizes(40, *sizes, False), 0))
            assert size(engine.take()) <= 1 + engine.eta


def rescaled_experts(model: nn.Module, power: float) -> nn.Module:
    """What a host may serve: rows of any size enter router and experts, and come out ordinary."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "post_attention_layernorm" in name:
                parameter *= power
            elif "mlp.gate.weight" in name or "gate_up_proj" in name:
                parameter /= power
            elif "down_proj" in name:
                parameter *= 2.0**20 / power if power > 1 else 1.0
    return model


@pytest.mark.parametrize("power", [2.0**60, 2.0**-60, 2.0**90])
@pytest.mark.parametrize("method", METHODS)
def test_invariant_2_experts_whose_weights_are_chosen_by_an_enemy(compiled: None, method: Any, power: float) -> None:
    from coterie.dp.losses import default_loss

    model = rescaled_experts(tiny_model("qwen3_moe"), power)
    exact_model = copy.deepcopy(model).double()
    exact_model.set_experts_implementation("eager")
    batch = token_batch(2, 40)
    exact = norms(gradients(exact_model, batch))
    engine = Engine(model, default_loss, Flat(0.1), method=method)
    figures = engine.accumulate(batch)
    assert torch.allclose(figures.norms, exact, rtol=1e-4)
    engine.take()
    for record in range(2):
        engine.accumulate(only(batch, record))
        assert 0.1 * (1 - 1e-3) <= size(engine.take()) <= 0.1 * (1 + engine.eta)


@pytest.mark.parametrize("method", METHODS)
def test_invariant_2_lent_experts_whose_weights_are_chosen_by_an_enemy(method: Any) -> None:
    from contextlib import nullcontext

    model, batch = rescaled_experts(tiny_model("qwen3_moe"), 2.0**60), token_batch(2, 40)
    exact_model = copy.deepcopy(model).double()
    exact_model.set_experts_implementation("eager")
    exact = norms(gradients(exact_model, batch))
    layers = seam.expert_layers(model)
    held = [{name: p.detach().clone() for name, p in layer.parameters().items()} for layer in layers]
    shapes = {f"{layer.name}.{name}": p.shape for layer in layers for name, p in layer.parameters().items()}
    for layer in layers:
        layer.module.to("meta")
        layer.module.requires_grad_(False)

    class Source:
        def layer(self, index: int) -> Any:
            return nullcontext(held[index])

    engine = Engine(model, None, Flat(0.1), method, expert_weights=Source(), expert_shapes=shapes)  # type: ignore[arg-type]
    assert torch.allclose(engine.accumulate(batch).norms, exact, rtol=1e-4)
    engine.take()
    engine.accumulate(only(batch, 0))
    assert size(engine.take()) <= 0.1 * (1 + engine.eta)


@pytest.mark.parametrize("sizes", SIZES)
def test_invariant_2_users_of_any_size(sizes: tuple[float, float]) -> None:
    batch = of_sizes(40, *sizes, True)
    for kind in (Linear, Twice, Biased, Tied):
        model = kind()
        whole = gradients(
            copy.deepcopy(model).double(), {name: value.double() for name, value in batch.items()}, loss
        )
        exact = sum(float(sum(one[name] for one in whole).square().sum()) for name in whole[0]) ** 0.5  # type: ignore[union-attr]
        engine = Engine(model, loss, Flat(1.0))
        figures = engine.accumulate_user([only(batch, 0), only(batch, 1)])
        assert not bool(figures.masked[0])
        assert float(figures.norms[0]) == pytest.approx(exact, rel=1e-4, abs=1e-8)
        assert size(engine.take()) == pytest.approx(min(1.0, exact), rel=1e-3, abs=1e-8)


# Uses that cancel: the norm that is taken is of what is added.


class Projects(nn.Module):
    """A table that projects ``x`` and looks ``ids`` up."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(24, 16))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        projected = F.linear(batch["x"], self.weight) * batch["c"]
        return projected.flatten(1).sum(1) + (F.embedding(batch["ids"], self.weight) * batch["e"]).flatten(1).sum(1)


@pytest.mark.parametrize("dense_elements", [0, 1 << 24])
@pytest.mark.parametrize("method", METHODS)
def test_invariant_2_tied_uses_that_cancel(method: Any, dense_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Projected and looked-up rows that cancel to nothing, and would not quite with a factor each."""
    monkeypatch.setattr(combine_uses, "_DENSE_ELEMENTS", dense_elements)
    worst = 0.0
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        row = torch.randint(-7, 8, (16,), generator=generator).float() * 2.0**14
        one, two = torch.randint(1, 501, (2,), generator=generator).tolist()
        c = torch.zeros(1, 3, 24)
        c[0, 0, 0], c[0, 1, 0], c[0, 2, 1] = one, two, 3.0
        batch = {
            "x": torch.stack([row, row, torch.eye(16)[0]])[None], "c": c,
            "ids": torch.zeros(1, 1, dtype=torch.long), "e": -(one + two) * row.view(1, 1, 16),
        }  # fmt: skip
        engine = Engine(Projects(), lambda model, batch: model(batch), Flat(1.0), method=method)
        engine.accumulate(batch)
        worst = max(worst, size(engine.take()))
    assert 0.99 <= worst <= 1 + engine.eta


@pytest.mark.parametrize("method", METHODS)
def test_invariant_2_uses_that_cancel_one_record_at_a_time(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The expression of `test_engine_invariants` beyond the memory for all records: the norm is of what is added."""
    monkeypatch.setattr(combine_uses, "_DENSE_ELEMENTS", 0)
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(-7, 8, (16,), generator=generator).float() * 2.0**14
    one, two = (torch.randint(-500, 501, (16,), generator=generator).float() for _ in range(2))
    unit = torch.eye(16)
    batch = {
        "x": torch.stack([row, row, row, unit[0]])[None],
        "c": torch.stack([one, two, -(one + two), 3.0 * unit[1]])[None],
    }
    for kind in (Doubled, Twice):
        engine = Engine(kind(), loss, Flat(1.0), method=method)
        engine.accumulate(batch)
        assert 0.9 <= size(engine.take()) <= 1 + engine.eta


def test_invariant_2_users_whose_records_cancel() -> None:
    generator = torch.Generator().manual_seed(0)
    x, c = (1e5 * torch.randn(1, 9, 16, generator=generator) for _ in range(2))
    batches = [{"x": x, "c": c}, {"x": x.flip(1), "c": -c.flip(1)}, {"x": x[:, :1], "c": 1e-9 * c[:, :1]}]
    for kind in (Linear, Twice, Biased, Tied):
        engine = Engine(kind(), loss, Flat(1.0))
        engine.accumulate_user(batches)
        assert size(engine.take()) <= 1 + engine.eta
