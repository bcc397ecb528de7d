"""Norms and sums from TF32 products of parts: exact parts, certain slack, and no record beyond C.

Tensor cores are emulated on the processor, see `helpers.tensor_core`; the reference is float64.
"""

from __future__ import annotations

import copy
import struct
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.dp.clipping import Flat
from coterie.dp.per_sample import products
from coterie.dp.per_sample.engine import Engine
from coterie.dp.per_sample.gram import TRUSTED, UNIT, rounding_factor, rounding_factors, trusted_share
from coterie.dp.per_sample.terms import Outer
from coterie.models.zoo.tiny import tiny_model
from helpers.engine_reference import gradients_in_batch, norms, only, size, token_batch
from helpers.row_sizes import (
    SIZES,
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
from helpers.tensor_core import emulated, tf32_product

METHODS = ("book_keeping", "ghost")
MANY = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TAKEN = 0.5 * 1e-2 + 1e-3
"""What certain slack may take from a contribution."""


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with emulated(monkeypatch):
        yield


@pytest.fixture
def one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second parts are dropped: a float32 number enters one product, as plain TF32 has it."""
    kept = products.parts
    monkeypatch.setattr(products, "parts", lambda x, count: kept(x, 1))


# Parts.


def number(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64))
def test_three_parts_are_the_number_and_two_all_but_a_few_units(bits: list[int]) -> None:
    values = [number(each) for each in bits]
    x = torch.tensor(values, dtype=torch.float64).float()
    found = products.parts(x, 3)
    for part in found:
        assert bool((part.view(torch.int32) % (1 << 13) == 0).all())  # 10 stored digits
    first, second, third = (part.double() for part in found)
    whole, finite = x.double(), torch.isfinite(x)
    assert not bool(torch.isfinite(first + second + third)[~finite].any())
    held = finite & ((x == 0) | (x.abs() >= 2.0**-113))
    assert torch.equal((first + second + third)[held], whole[held])
    assert bool(((first + second + third - whole).abs()[finite] < 2.0**-136).all())
    assert bool(((first + second - whole).abs() <= 2.0**-21 * whole.abs() + 2.0**-136)[finite].all())
    for part in (first, second, third):
        assert bool((part * whole >= 0)[finite].all())  # so the parts' sizes add up to the number's, too


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_of_half_precision_are_one_part(cores: None, dtype: torch.dtype) -> None:
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[torch.isfinite(every)]
    assert torch.equal(products.parts(every.float(), 1)[0], every.float())
    assert products.operand(every) is every
    assert products.operand(every.double()).dtype == torch.float32


def test_a_processor_multiplies_in_float32_and_reads_nothing_twice() -> None:
    narrow = torch.randn(3, 4).bfloat16()
    with products.law(tensor_cores=True):
        assert products.certain()
        assert products.operand(narrow).dtype == torch.float32
        assert torch.equal(products.multiply(narrow.float(), narrow.float().t()), narrow.float() @ narrow.float().t())
    assert not products.certain()
    assert trusted_share() == TRUSTED


# Products, and the bound that slack is made of.


def test_the_emulation_cuts_off_as_the_published_arithmetic_does() -> None:
    small = 0.9375 * 2.0**-24  # four of them are 3.75 units of the sum, each alone is cut off beside it
    assert float(tf32_product(torch.ones(1, 4), torch.full((4, 1), small), torch.ones(1, 1))) == 1.0
    assert float(tf32_product(torch.ones(1, 4), torch.full((4, 1), -small), torch.zeros(1, 1))) == -4 * small
    assert float(tf32_product(torch.ones(1, 1), torch.full((1, 1), 1 + 2.0**-11), torch.zeros(1, 1))) == 1.0
    left, right = torch.randint(-9, 10, (5, 30)).float(), torch.randint(-9, 10, (30, 7)).float()
    assert torch.equal(tf32_product(left, right, torch.ones(5, 7)), 1 + left @ right)


def test_the_law_of_roundings_that_go_both_ways_does_not_hold_on_tensor_cores() -> None:
    """Which is why slack has to be certain there: sums of numbers of one sign lose at every step."""
    root = rounding_factor(2048)
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.rand(4, 2048, generator=generator).bfloat16().float() for _ in range(2))
    exact = left.double() @ right.double().t()
    off = ((exact - tf32_product(left, right.t(), torch.zeros(4, 4)).double()) / exact).max()
    with products.law(tensor_cores=True):
        assert 4 * root < float(off) <= rounding_factor(2048)
        assert rounding_factor(2048) == pytest.approx(UNIT * (2 * 2048 + 64))
        assert rounding_factors(torch.tensor([2048]))[0] == pytest.approx(rounding_factor(2048))


def largest_error(left: Tensor, right: Tensor, onto: bool) -> float:
    """Of the engine's product, in units of what slack allows."""
    operands = products.operand(left), products.operand(right)
    if onto:
        found = torch.full((left.shape[0], right.shape[1]), torch.nan)
        products.add_product(found, *operands, fresh=True)
    else:
        found = products.multiply(*operands)
    exact, most = left.double() @ right.double(), left.double().abs() @ right.double().abs()
    return float(((found.double() - exact).abs() / (rounding_factor(left.shape[1]) * most + 1e-300)).max())


def operands(
    terms: int, exponents: list[int], one_sign: bool, cancel: bool, narrow: tuple[bool, bool], seed: int
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sides = []
    for width, half in zip((3, 2), narrow, strict=True):
        rows = sized(generator, terms, width, exponents)
        rows = rows.abs() if one_sign else rows
        sides.append(rows.bfloat16() if half else rows)
    left, right = sides
    if cancel:  # pairs of terms that are each other's negative, far apart
        left, right = torch.cat([left, -left]), torch.cat([right, right])
    return left.t(), right


cases = (
    st.integers(1, 90), st.lists(st.integers(-30, 30), min_size=1, max_size=4), st.booleans(), st.booleans(),
    st.tuples(st.booleans(), st.booleans()), st.booleans(), st.integers(0, 1000),
)  # fmt: skip


@MANY
@given(*cases)
def test_products_of_parts_are_within_the_bound(
    cores: None, terms: int, exponents: list[int], one_sign: bool, cancel: bool, narrow: tuple[bool, bool],
    onto: bool, seed: int,
) -> None:  # fmt: skip
    left, right = operands(terms, exponents, one_sign, cancel, narrow, seed)
    assert largest_error(left, right, onto) <= 1.0


@pytest.mark.parametrize("narrow", [(False, False), (True, False), (False, True)])
def test_products_without_the_second_parts_are_not(cores: None, one_part: None, narrow: tuple[bool, bool]) -> None:
    assert largest_error(*operands(8, [0], True, False, narrow, 0), onto=True) > 10.0


# Terms of any size: the tests of `test_engine_magnitudes`.

pairs = st.lists(st.tuples(st.integers(-120, 120), st.integers(-120, 60)), min_size=1, max_size=4)


@MANY
@given(
    pairs, st.integers(1, 3), st.integers(1, 40), st.sampled_from([(3, 2), (24, 20)]), st.integers(1, 2),
    st.booleans(), st.booleans(), st.integers(0, 1000),
)  # fmt: skip
def test_outer_products_of_any_size(
    cores: None, exponents: list[tuple[int, int]], records: int, rows: int, shape: tuple[int, int], groups: int,
    flipped: bool, narrow: bool, seed: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    count = records * groups * rows
    a = sized(generator, count, shape[0], [e for e, _ in exponents]).view(records, groups, rows, -1)
    other = [max(-120, min(120, total - e)) for e, total in exponents]
    g = sized(generator, count, shape[1], other).view(records, groups, rows, -1)
    a, g = (a.bfloat16(), g.bfloat16()) if narrow else (a, g)
    exact = torch.einsum("bgto,bgti->bgoi", g.double(), a.double())
    exact = exact.mT if flipped else exact
    assert_bounded(Outer(a, g, exact.shape[1:], flipped).bounded(), exact, rel=TAKEN)


@MANY
@given(
    pairs, st.integers(1, 3), st.integers(1, 12), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 1000)
)
def test_experts_rows_of_any_size(
    cores: None, exponents: list[tuple[int, int]], records: int, tokens: int, transposed: bool, gathered: bool,
    narrow: bool, seed: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    expert_N = torch.randint(0, 3, (records * tokens,), generator=generator)
    x = sized(generator, records * tokens, 5, [e for e, _ in exponents])
    g = sized(generator, records * tokens, 4, [max(-120, min(120, total - e)) for e, total in exponents])
    x, g = (x.bfloat16(), g.bfloat16()) if narrow else (x, g)
    term, exact = stacked_outer(x, g, expert_N, records, transposed, gathered)
    assert_bounded(term.bounded(), exact, rel=TAKEN)


# The whole engine.


@pytest.mark.parametrize("kind", [Linear, Stacked, Doubled, Twice, Tied])
def test_invariant_2_no_size_of_rows_hides_a_record(cores: None, kind: type[nn.Module]) -> None:
    for method in METHODS:
        for sizes in SIZES[::3]:
            assert_clipped(kind(), of_sizes(40, *sizes, True), loss, method, rel=TAKEN)


class Cancelling(nn.Module):
    """Rows with a large common part, and gradients that sum to zero over them: every lost digit shows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(64, 64))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return (F.linear(batch["x"], self.weight) * batch["c"]).flatten(1).sum(1)


def largest_contribution(method: Any, dtype: torch.dtype) -> float:
    """Over C (1 + eta), of single records whose rows all but cancel."""
    model, worst = Cancelling().to(dtype), 0.0
    engine = Engine(model, lambda model, batch: model(batch), Flat(1.0), method=method)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(1, 16, 64, generator=generator) + 30 * torch.randn(1, 1, 64, generator=generator)
        c = torch.randn(1, 16, 64, generator=generator)
        engine.accumulate({"x": x.to(dtype), "c": (c - c.mean(1, keepdim=True)).to(dtype)})
        worst = max(worst, size(engine.take()))
    return worst / (1 + engine.eta)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_invariant_2_rows_that_cancel(cores: None, method: Any, dtype: torch.dtype) -> None:
    assert 0.98 <= largest_contribution(method, dtype) <= 1.0


def contribution_of_rows_that_cancel_exactly(method: Any) -> float:
    """Over C (1 + eta): whole numbers that cancel as they are, and would not quite with a factor each."""
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(-7, 8, (16,), generator=generator).float() * 2.0**14
    one, two = (torch.randint(-500, 501, (16,), generator=generator).float() for _ in range(2))
    unit = torch.eye(16)
    engine = Engine(Linear(), loss, Flat(1.0), method=method)
    x = torch.stack([row, row, row, unit[0]])[None]
    engine.accumulate({"x": x, "c": torch.stack([one, two, -(one + two), 3.0 * unit[1]])[None]})
    return size(engine.take()) / (1 + engine.eta)


@pytest.mark.parametrize("method", METHODS)
def test_invariant_2_rows_that_cancel_exactly(cores: None, method: Any) -> None:
    assert 0.0 < contribution_of_rows_that_cancel_exactly(method) <= 1.0


@pytest.mark.parametrize("method", METHODS)
def test_invariant_2_a_part_that_is_missing_shows(cores: None, one_part: None, method: Any) -> None:
    assert contribution_of_rows_that_cancel_exactly(method) > 2.0


@pytest.mark.parametrize(("method", "dtype"), [("ghost", torch.float32), ("book_keeping", torch.bfloat16)])
def test_invariant_2_experts_in_float32_and_bfloat16(cores: None, method: Any, dtype: torch.dtype) -> None:
    model, batch = tiny_model("qwen3_moe").to(dtype), token_batch(2, 12)
    exact = norms(gradients_in_batch(copy.deepcopy(model), batch))
    engine = Engine(model, clipping=Flat(0.1), method=method)
    engine.compared = True  # with batches of one, by other tests
    found = engine.accumulate(batch).norms
    assert torch.allclose(found, exact, rtol=1e-4 if dtype == torch.float32 else 0.05)
    engine.take()
    for record in range(2):
        engine.accumulate(only(batch, record))
        assert 0.1 * (1 - TAKEN) <= size(engine.take()) <= 0.1 * (1 + engine.eta)
