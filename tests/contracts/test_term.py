"""Every form of a gradient keeps the promises of `Term`; the same tests run over each, against gradients in float64.

Shape letters: B records, T rows of a record, G groups, E experts, I inputs, O outputs, V rows of a table, D width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from coterie.dp.per_sample import combine_uses, scaling, stacked_terms, terms
from coterie.dp.per_sample.combine_uses import Apart
from coterie.dp.per_sample.stacked_terms import Segments, StackedBias, StackedOuter
from coterie.dp.per_sample.terms import Aligned, Dense, Lookup, Outer, Scaled, Term
from coterie.dp.per_sample.weight_expressions import Root

B, T, G, E, I, O, V, D = 4, 6, 2, 3, 5, 7, 9, 4  # noqa: E741


class Case(NamedTuple):
    """A term, and the gradients [B, *shape] in float64 that it stands for."""

    term: Term
    exact: Tensor


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def dense() -> Case:
    gradients = normal(B, O, I)
    return Case(Dense(gradients), gradients.double())


def scalars() -> Case:
    gradients = normal(B)
    return Case(Dense(gradients), gradients.double().unsqueeze(1))


def outer(flipped: bool = False, groups: int = 1) -> Case:
    a, g = normal(B, groups, T, I), normal(B, groups, T, O)
    exact = torch.einsum("bgto,bgti->bgoi", g.double(), a.double())
    exact = exact.mT if flipped else exact
    exact = exact.squeeze(1) if groups == 1 else exact
    return Case(Outer(a, g, exact.shape[1:], flipped), exact)


def condensed() -> Case:
    found = outer()
    assert isinstance(found.term, Outer)
    return Case(found.term.condensed(), found.exact)


def scaled() -> Case:
    """Rows whose squares do not fit float32, with an ordinary gradient."""
    a, g = normal(B, 1, T, I) * 5e17, normal(B, 1, T, O) * 2e-23
    exact = torch.einsum("bgto,bgti->boi", g.double(), a.double())
    term = Outer(a, g, exact.shape[1:]).bounded()
    assert isinstance(term, Scaled)
    return Case(term, exact)


def lookup() -> Case:
    ids = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = -1  # padding: dropped
    g = normal(B, T, D)
    exact = torch.zeros(B, V, D, dtype=torch.float64)
    for record in range(B):
        for place in range(1, T):
            exact[record, ids[record, place]] += g[record, place].double()
    return Case(Lookup(ids, g, torch.Size((V, D))), exact)


def aligned() -> Case:
    g = normal(2 * B, D)
    exact = torch.zeros(B, 2 * B, D, dtype=torch.float64)
    for record in range(B):
        exact[record, 2 * record : 2 * record + 2] = g[2 * record : 2 * record + 2].double()
    return Case(Aligned(g, B), exact)


def routed() -> tuple[Tensor, Tensor, Segments, Tensor]:
    """Rows sorted by (expert, record), their segments, [B, R, E] whose row goes where; expert 1 is unused."""
    expert_N = torch.tensor([0, 2] * (B * T // 2))
    order = torch.sort(expert_N, stable=True).indices
    found = Segments(order // T, torch.bincount(expert_N, minlength=E).cumsum(0), B)
    owner_RB = torch.nn.functional.one_hot(order // T, B).double()
    expert_RE = torch.nn.functional.one_hot(expert_N[order], E).double()
    return normal(B * T, I), normal(B * T, O), found, torch.einsum("rb,re->bre", owner_RB, expert_RE)


def stacked(transposed: bool = False) -> Case:
    x, g, found, chosen = routed()
    exact = torch.einsum("bre,ro,ri->beoi", chosen, g.double(), x.double())
    exact = exact.mT if transposed else exact
    return Case(StackedOuter(x, g, found, exact.shape[1:], transposed), exact)


def stacked_bias() -> Case:
    _, g, found, chosen = routed()
    return Case(StackedBias(g, found), torch.einsum("bre,ro->beo", chosen, g.double()))


def apart() -> Case:
    """Two uses of one parameter that add up a record at a time."""
    one, two = outer(), dense()
    root = Root(value=torch.zeros(O, I), name="weight")
    return Case(Apart(root, [(root, one.term), (root, two.term)], B), one.exact + two.exact)


CASES: dict[str, Callable[[], Case]] = {
    "Dense": dense,
    "Dense, one number a record": scalars,
    "Outer": outer,
    "Outer, flipped": lambda: outer(flipped=True),
    "Outer, groups": lambda: outer(groups=G),
    "Outer, condensed": condensed,
    "Scaled": scaled,
    "Lookup": lookup,
    "Aligned": aligned,
    "StackedOuter": stacked,
    "StackedOuter, transposed": lambda: stacked(transposed=True),
    "StackedBias": stacked_bias,
    "Apart": apart,
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    made: Case = request.param()
    return made


def size(exact: Tensor) -> float:
    return float(exact.flatten(1).norm(dim=1).max())


def factors() -> Tensor:
    return torch.linspace(0.1, 1.0, B)


@pytest.mark.parametrize("precise", [False, True])
def test_squared_norms_are_those_of_the_gradients_and_their_bound_is_above(case: Case, precise: bool) -> None:
    found, exact = case.term.sq_norms(precise), case.exact.flatten(1).square().sum(1)
    assert found.value.shape == (B,)
    assert bool(((found.value.sqrt() - exact.sqrt()).abs() <= 1e-5 * exact.sqrt()).all())
    assert bool((found.upper.sqrt() >= exact.sqrt() * (1 - 1e-6)).all())
    if precise:
        assert found.trusted()


def test_the_gradient_of_one_record_has_the_shape_of_the_value(case: Case) -> None:
    for record in range(B):
        one = case.term.gradient(record)
        assert one.dtype == torch.float32
        assert one.shape == case.exact.shape[1:]
        assert float((one.double() - case.exact[record]).norm()) <= 1e-5 * size(case.exact)


def test_a_sum_is_added_to_what_was_there_whatever_its_strides(case: Case) -> None:
    expected = torch.tensordot(factors().double(), case.exact, 1)
    shape = case.exact.shape[1:]
    plain = torch.full(shape, size(case.exact))
    strided = plain.transpose(0, -1).clone().contiguous().transpose(0, -1)
    before = plain.double()
    for out in (plain, strided):
        case.term.add_sum(out, factors())
        assert float((out.double() - before - expected).norm()) <= 1e-5 * size(case.exact) * B


def test_a_masked_record_leaves_nothing_where_its_factor_is_zero_and_the_others_are_as_they_were(case: Case) -> None:
    keep = torch.tensor([True, False, True, False])
    masked = case.term.masked(keep)
    out = torch.zeros(case.exact.shape[1:])
    masked.add_sum(out, keep.float())
    assert float((out.double() - case.exact[keep].sum(0)).norm()) <= 1e-5 * size(case.exact) * B
    before, after = case.term.sq_norms().value, masked.sq_norms().value
    assert torch.allclose(before[keep], after[keep], rtol=1e-6)


def test_factors_too_small_for_float32_count_as_zero(case: Case) -> None:
    out = torch.zeros(case.exact.shape[1:])
    case.term.add_sum(out, torch.full((B,), 1e-39, dtype=torch.float64))
    assert float(out.abs().max()) <= 1e-39 * size(case.exact)


def test_a_term_says_how_much_it_holds(case: Case) -> None:
    assert case.term.nbytes() >= B * 4


def test_every_form_is_tried_here() -> None:
    classes = {
        name
        for module in (terms, stacked_terms, combine_uses, scaling)
        for name, found in vars(module).items()
        if inspect.isclass(found)
        and found is not Term
        and all(hasattr(found, each) for each in ("sq_norms", "add_sum"))
    }
    assert {name for name in classes if not name.startswith("_")} == {name.partition(",")[0] for name in CASES}
