"""Gradient terms against gradients written out: random shapes, routings, types, and numbers that cancel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from coterie.dp.per_sample import combine_uses, gram_kernel
from coterie.dp.per_sample.gram import TRUSTED, gram_sq_norms, rounding_factor, taken, worst_excess
from coterie.dp.per_sample.gram_kernel import SegmentNorms, take_all
from coterie.dp.per_sample.stacked_terms import Segments, StackedBias, StackedOuter
from coterie.dp.per_sample.terms import Aligned, Dense, Lookup, Outer, Term

NEEDS_NUMBA = pytest.mark.skipif(gram_kernel.kernel() is None, reason="needs numba")
COMPILED = [False, pytest.param(True, marks=NEEDS_NUMBA)]
SMALL = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(params=COMPILED, ids=["torch", "compiled"])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the compiled pass takes the norms, also of these small terms."""
    monkeypatch.setattr(gram_kernel, "_WORTH_STARTING", 0 if request.param else 1 << 62)
    return bool(request.param)


def assert_term(term: Term, gradients: Tensor, rel: float = 1e-5, added_up: float = 0.0) -> None:
    """The term's norms, single gradients, sums and masks are those of ``gradients`` [B, *shape] float64.

    ``added_up``: most of ``sum_t |a_t| |g_t|``: where rows cancel, a float32 sum is off by some roundings of that.
    """
    records = gradients.shape[0]
    scale = float(gradients.flatten(1).norm(dim=1).max()) + 1e-30
    for precise in (False, True):
        found = term.sq_norms(precise)
        exact = gradients.flatten(1).square().sum(1)
        assert bool((found.value.sqrt() - exact.sqrt()).abs().max() <= rel * scale + 2**-22 * added_up)
        # What is added for a record is covered, and the exact gradient but for the rounding of what is kept of it.
        upper = found.upper.sqrt() * (1 + 1e-6)
        assert bool((_added(term, records, gradients.shape[1:]) <= upper + 1e-6 * scale).all())
        assert bool((exact.sqrt() <= upper + 1e-6 * scale + 2**-22 * added_up).all())
    for record in range(records):
        assert float((term.gradient(record).double() - gradients[record]).abs().max()) <= 1e-4 * scale
    factors = torch.rand(records, generator=torch.Generator().manual_seed(0))
    out = torch.ones(gradients.shape[1:])
    term.add_sum(out, factors)
    expected = 1 + torch.tensordot(factors.double(), gradients, 1)
    assert float((out.double() - expected).abs().max()) <= 1e-4 * scale + 1e-6
    keep = torch.arange(records) % 2 == 0
    masked = term.masked(keep).sq_norms()
    assert bool((masked.value[~keep] == 0).all())


def _added(term: Term, records: int, shape: torch.Size) -> Tensor:
    """[B] norm of each record's own sum."""
    sums = torch.zeros(records, *shape)
    for record, out in enumerate(sums):
        keep = torch.arange(records) == record
        term.masked(keep).add_sum(out, keep.double())
    return sums.double().flatten(1).norm(dim=1)


@SMALL
@example(1, 28, 1, 1, 1, False, torch.float32, 28)  # 28 numbers that all but cancel
@given(
    st.integers(1, 5), st.integers(1, 70), st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.booleans(),
    st.sampled_from(DTYPES), st.integers(0, 1000),
)  # fmt: skip
def test_outer_is_exact(
    compiled: bool, records: int, rows: int, inputs: int, outputs: int, groups: int, flipped: bool,
    dtype: torch.dtype, seed: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(records, groups, rows, inputs, generator=generator).to(dtype)
    g = torch.randn(records, groups, rows, outputs, generator=generator).to(dtype)
    gradients = torch.einsum("bgto,bgti->bgoi", g.double(), a.double())
    if flipped:
        gradients = gradients.mT
    term = Outer(a, g, gradients.shape[1:], flipped)
    added_up = float((a.double().norm(dim=3) * g.double().norm(dim=3)).sum((1, 2)).max())
    assert_term(term, gradients, added_up=added_up)
    assert_term(term.condensed(), gradients, added_up=added_up)
    out = torch.empty(gradients.shape[1:])
    term.add_sum(out, torch.ones(records), fresh=True)
    assert torch.allclose(out.double(), gradients.sum(0), atol=1e-3)


@st.composite
def routings(draw: st.DrawFn) -> tuple[list[int], int, int, int]:
    """Expert of each (token, choice) pair: spread, all to one expert, or one expert without any."""
    records, tokens, experts = draw(st.integers(1, 4)), draw(st.integers(1, 30)), draw(st.integers(2, 5))
    kind = draw(st.sampled_from(["spread", "one", "unused"]))
    top = {"spread": experts, "one": 1, "unused": experts - 1}[kind]
    ids = draw(st.lists(st.integers(0, top - 1), min_size=records * tokens, max_size=records * tokens))
    return ids, records, tokens, experts


@SMALL
@example(([0] * 28, 1, 28, 2), 1, 1, False, False, False, torch.float32)  # 28 numbers that all but cancel
@given(
    routings(), st.integers(1, 8), st.integers(1, 40), st.booleans(), st.booleans(), st.booleans(),
    st.sampled_from(DTYPES),
)  # fmt: skip
def test_stacked_experts_are_exact_for_every_routing(
    compiled: bool, routing: tuple[list[int], int, int, int], inputs: int, outputs: int, transposed: bool,
    gathered: bool, condensed: bool, dtype: torch.dtype,
) -> None:  # fmt: skip
    ids, records, tokens, experts = routing
    expert_N = torch.tensor(ids)
    generator = torch.Generator().manual_seed(len(ids))
    x_NI = torch.randn(records * tokens, inputs, generator=generator).to(dtype)
    g_NO = torch.randn(records * tokens, outputs, generator=generator).to(dtype)
    order = torch.sort(expert_N, stable=True).indices
    ends = torch.bincount(expert_N, minlength=experts).cumsum(0)
    segments = Segments(order // tokens, ends, records)
    chosen = torch.nn.functional.one_hot(expert_N, experts).double().view(records, tokens, experts)
    x, g = x_NI.double().view(records, tokens, -1), g_NO.double().view(records, tokens, -1)
    gradients = torch.einsum("bte,bto,bti->beoi", chosen, g, x)
    if transposed:
        gradients = gradients.mT
    shape = gradients.shape[1:]
    if gathered:
        term = StackedOuter(x_NI, g_NO[order], segments, shape, transposed, order)
    else:
        term = StackedOuter(x_NI[order], g_NO[order], segments, shape, transposed)
    term = term.condensed() if condensed else term
    assert_term(term, gradients, added_up=float((x.norm(dim=2) * g.norm(dim=2)).sum(1).max()))
    out = torch.full(shape, 7.0)
    term.add_sum(out, torch.ones(records), fresh=True)
    assert torch.allclose(out.double(), gradients.sum(0), atol=1e-3)
    assert_term(StackedBias(g_NO[order], segments), torch.einsum("bte,bto->beo", chosen, g))


@SMALL
@given(st.integers(1, 4), st.integers(1, 20), st.integers(2, 8), st.integers(1, 5), st.integers(0, 1000))
def test_lookups_are_exact_with_repeated_and_dropped_ids(
    records: int, places: int, table: int, width: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, table, (records, places), generator=generator)
    g = torch.randn(records, places, width, generator=generator)
    gradients = torch.zeros(records, table + 1, width, dtype=torch.float64)
    for record in range(records):
        gradients[record].index_add_(0, ids[record] % (table + 1), g[record].double())
    assert_term(Lookup(ids, g, torch.Size((table, width))), gradients[:, :table])


def test_plain_terms_are_exact() -> None:
    gradients = torch.randn(3, 4, 5)
    assert_term(Dense(gradients), gradients.double())
    rows = torch.randn(6, 4)
    apart = torch.zeros(3, 6, 4, dtype=torch.float64)
    for record in range(3):
        apart[record, 2 * record : 2 * record + 2] = rows[2 * record : 2 * record + 2].double()
    assert_term(Aligned(rows, 3), apart)


@pytest.mark.parametrize("common", [0.0, 1.0, 1e3])
@pytest.mark.parametrize("rows", [12, 40, 130])
def test_invariant_2_slack_covers_the_rounding_of_cancelling_sums(common: float, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    a = common * torch.randn(1, 1, 64, generator=generator) + torch.randn(4, rows, 64, generator=generator)
    g = torch.randn(4, rows, 256, generator=generator)
    g -= g.mean(1, keepdim=True)
    exact = torch.einsum("bto,bti->boi", g.double(), a.double()).flatten(1).square().sum(1)
    for precise in (False, True):
        found = gram_sq_norms(a, g, None, precise)
        assert bool((exact <= found.value + found.slack).all())
        assert bool((found.value <= exact + found.slack).all())
    direct = Outer(a.unsqueeze(1), g.unsqueeze(1), torch.Size((256, 64))).sq_norms(precise=True)
    assert bool(((direct.value - exact).abs() <= direct.slack).all())
    # With a common part of 1e3 even the entries of the gradient cancel, and the slack rightly stays.
    assert direct.trusted() == (common < 1e3)


def test_a_cheap_gram_norm_is_not_trusted_where_it_cancels() -> None:
    a = 1e4 * torch.ones(1, 32, 128) + torch.randn(1, 32, 128)
    g = torch.randn(1, 32, 128)
    g -= g.mean(1, keepdim=True)
    assert not gram_sq_norms(a, g).trusted()


def test_long_dot_products_are_taken_in_pieces() -> None:
    a, g = torch.randn(2, 5, 3), torch.randn(2, 5, 9000)
    exact = torch.einsum("bto,bti->boi", g.double(), a.double()).flatten(1).square().sum(1)
    assert torch.allclose(gram_sq_norms(a, g).value, exact, rtol=1e-5)


def test_neither_padding_nor_the_compiled_pass_brings_in_another_records_nan(compiled: bool) -> None:
    record_R = torch.tensor([0, 0, 1, 1, 1])
    a, g = torch.randn(5, 6), torch.randn(5, 6)
    a[0] = float("nan")
    value = (
        StackedOuter(a, g, Segments(record_R, torch.tensor([5]), 2), torch.Size((1, 6, 6)), False).sq_norms().value
    )
    assert torch.isnan(value[0])
    assert torch.isfinite(value[1])


@NEEDS_NUMBA
@pytest.mark.parametrize("common", [0.0, 1.0, 1e3])
@pytest.mark.parametrize("outputs", [70, 1300])
def test_invariant_2_slack_of_the_compiled_pass_covers_cancelling_sums(
    common: float, outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Segments of 1 to 60 rows, rows used several times, against double precision."""
    monkeypatch.setattr(gram_kernel, "_WORTH_STARTING", 0)
    generator = torch.Generator().manual_seed(outputs)
    stop = torch.arange(1, 61).cumsum(0)
    rows = int(stop[-1])
    row_R = torch.randint(0, 50, (rows,), generator=generator)
    a = common * torch.randn(1, 33, generator=generator) + torch.randn(50, 33, generator=generator)
    g = torch.randn(rows, outputs, generator=generator)
    for end, size in zip(stop.tolist(), range(1, 61), strict=True):
        g[end - size : end] -= g[end - size : end].mean(0) * (size > 1)
    norms = SegmentNorms(a, row_R, g, stop - torch.arange(1, 61), stop)
    take_all([norms])
    found = taken(norms, 33, outputs)
    assert found is not None
    for segment, (end, size) in enumerate(zip(stop.tolist(), range(1, 61), strict=True)):
        part = slice(end - size, end)
        exact = (g[part].double().T @ a[row_R[part]].double()).square().sum()
        assert abs(float(found.value[segment] - exact)) <= float(found.slack[segment])
    lengths = (g.double().norm(dim=1) * a.double().norm(dim=1)[row_R]).cumsum(0)[stop - 1]
    assert norms.crude_S is not None
    assert torch.allclose(norms.crude_S, torch.diff(lengths, prepend=torch.zeros(1)), rtol=1e-6)
    # The bound of dot products of 33 and of 512 terms, however wide the rows are, and of the clipped sum over rows.
    factor = 2.0**-24 * (8 + 33**0.5 + min(outputs, 512) ** 0.5)
    off = 2.0**-24 * (4 + torch.arange(1, 61).double().sqrt()) * norms.crude_S
    expected = factor * norms.crude_S.square() + 2 * off * found.value.sqrt() + off.square()
    assert torch.allclose(found.slack, expected, rtol=1e-9)


@NEEDS_NUMBA
def test_the_compiled_pass_runs_once_for_all_and_only_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    a, g = torch.randn(40, 8), torch.randn(40, 8)

    def norms() -> SegmentNorms:
        return SegmentNorms(a, None, g, torch.tensor([0, 20]), torch.tensor([20, 40]))

    monkeypatch.setattr(gram_kernel, "_WORTH_STARTING", 1 << 62)
    few = [norms(), norms()]
    take_all(few)
    assert all(each.value_S is None for each in few)
    monkeypatch.setattr(gram_kernel, "_WORTH_STARTING", 3 * int(norms().work_S().sum()))
    monkeypatch.setattr(gram_kernel, "_SHARE", 100)
    several = [norms() for _ in range(3)]
    take_all(several[:2])
    assert several[0].value_S is None
    take_all(several)
    exact = [(g[part].T @ a[part]).square().sum() for part in (slice(0, 20), slice(20, 40))]
    for each in several:
        assert each.value_S is not None
        assert torch.allclose(each.value_S.float(), torch.stack(exact), rtol=1e-5)


def test_long_segments_are_kept_as_gradients_where_that_is_smaller(compiled: bool) -> None:
    """Rows of 300 tokens of one expert beside a few of another: the long ones' rows are let go."""
    lengths = torch.tensor([300, 280, 0, 7, 3, 290])  # 2 experts of 3 records
    records, inputs, outputs = 3, 64, 96
    segment_R = torch.arange(6).repeat_interleave(lengths)
    a, g = torch.randn(880, inputs), torch.randn(880, outputs)
    gradients = torch.zeros(records, 2, outputs, inputs, dtype=torch.float64)
    for segment in range(6):
        rows = segment_R == segment
        gradients[segment % 3, segment // 3] = g[rows].double().T @ a[rows].double()
    segments = Segments(segment_R % records, torch.tensor([580, 880]), records)
    plain = StackedOuter(a, g, segments, gradients.shape[1:], False)
    condensed = plain.condensed()
    assert condensed.nbytes() < 0.6 * plain.nbytes()
    assert condensed.condensed() is condensed
    assert_term(plain, gradients)
    assert_term(condensed, gradients)
    out = torch.full(gradients.shape[1:], 7.0)
    condensed.add_sum(out, torch.ones(records), fresh=True)
    assert torch.allclose(out.double(), gradients.sum(0), atol=1e-2)
    a[0] = float("nan")  # of record 0
    broken = StackedOuter(a, g, segments, gradients.shape[1:], False).condensed()
    assert torch.isnan(broken.sq_norms().value).tolist() == [True, False, False]
    out.zero_()
    broken.masked(torch.tensor([False, True, True])).add_sum(out, torch.ones(records))
    assert torch.allclose(out.double(), gradients[1:].sum(0), atol=1e-2)


@pytest.mark.parametrize("lowered", ["autocast", "medium"])
def test_kept_gradients_are_formed_in_full_float32(lowered: str) -> None:
    a, g = torch.randn(2, 1, 400, 32), torch.randn(2, 1, 400, 48)
    gradients = torch.einsum("bgto,bgti->boi", g.double(), a.double())
    segments = Segments(torch.tensor([0, 1]).repeat_interleave(400), torch.tensor([800]), 2)
    outer = Outer(a, g, torch.Size((48, 32)))
    stacked = StackedOuter(a.flatten(0, 2), g.flatten(0, 2), segments, torch.Size((48, 32)), False)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium" if lowered == "medium" else before)
        with torch.autocast("cpu", torch.bfloat16, enabled=lowered == "autocast"):
            kept = [combine_uses.condensed([(None, term)])[0][1] for term in (outer, stacked)]  # type: ignore[list-item]
    finally:
        torch.set_float32_matmul_precision(before)
    for whole, term in zip((outer, stacked), kept, strict=True):
        assert term.nbytes() < whole.nbytes()
        assert_term(term, gradients)


def test_long_segments_beside_many_short_ones_keep_their_rows(compiled: bool) -> None:
    """Of 800 rows 300 are one segment: too few to copy the others for. Its norm is taken from its gradient."""
    lengths = torch.tensor([100, 300, 100, 90, 110, 100])
    segment_R = torch.arange(6).repeat_interleave(lengths)
    a, g = torch.randn(800, 256), torch.randn(800, 200)
    segments = Segments(segment_R % 3, torch.tensor([500, 800]), 3)
    term = StackedOuter(a, g, segments, torch.Size((2, 200, 256)), False)
    assert term.condensed() is term
    gradients = torch.zeros(3, 2, 200, 256, dtype=torch.float64)
    for segment in range(6):
        rows = segment_R == segment
        gradients[segment % 3, segment // 3] = g[rows].double().T @ a[rows].double()
    assert_term(term, gradients)


def test_rounding_bounds_grow_with_length_as_stated() -> None:
    assert rounding_factor(10_000) == pytest.approx(2.0**-24 * 104)
    assert worst_excess(2_500) == pytest.approx(0.5 * TRUSTED * 49)
    assert worst_excess(200_000) <= 0.0033  # long dot products are taken in pieces


@NEEDS_NUMBA
def test_what_was_compiled_ahead_is_what_segments_take(monkeypatch: pytest.MonkeyPatch) -> None:
    gram_kernel.compile_now()
    compiled = gram_kernel.kernel()
    assert compiled is not None
    ahead = list(compiled.signatures)  # type: ignore[attr-defined]
    monkeypatch.setattr(gram_kernel, "_WORTH_STARTING", 0)
    for rows in (torch.arange(8), None):
        one = SegmentNorms(torch.randn(8, 3), rows, torch.randn(8, 2), torch.tensor([0, 4]), torch.tensor([4, 8]))
        take_all([one])
        assert one.value_S is not None
    assert len(ahead) == 1
    assert list(compiled.signatures) == ahead  # type: ignore[attr-defined]
