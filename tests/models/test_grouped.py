"""Grouped products equal one matrix product per expert, for any number of rows per expert."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.models.grouped import GroupedLinear, as_EIO, grouped_mm, grouped_outer, grouped_sum, weight_outer
from coterie.models.seam import RoutedRows, bias_rows

counts = st.lists(st.integers(0, 5), min_size=1, max_size=6)


def example(rows_per_expert: list[int], inputs: int = 3, outputs: int = 4):
    generator = torch.Generator().manual_seed(sum(rows_per_expert))
    total = sum(rows_per_expert)
    x = torch.randn(total, inputs, dtype=torch.float64, generator=generator)
    weight = torch.randn(len(rows_per_expert), inputs, outputs, dtype=torch.float64, generator=generator)
    grad = torch.randn(total, outputs, dtype=torch.float64, generator=generator)
    return x, weight, grad, torch.tensor(rows_per_expert).cumsum(0)


@given(counts)
@settings(deadline=None, max_examples=40)
def test_grouped_products_equal_one_product_per_expert(rows_per_expert):
    x, weight, grad, ends = example(rows_per_expert)
    x_parts, grad_parts = x.split(rows_per_expert), grad.split(rows_per_expert)
    expected = torch.cat([part @ matrix for part, matrix in zip(x_parts, weight, strict=True)])
    torch.testing.assert_close(grouped_mm(x, weight, ends), expected)
    outer = torch.stack([a.T @ g for a, g in zip(x_parts, grad_parts, strict=True)])
    torch.testing.assert_close(grouped_outer(x, grad, ends), outer)
    torch.testing.assert_close(weight_outer(x, grad, ends, False), outer.transpose(1, 2))
    torch.testing.assert_close(grouped_sum(grad, ends), torch.stack([g.sum(0) for g in grad_parts]))
    torch.testing.assert_close(
        bias_rows(weight[:, 0], ends),
        torch.cat([row.expand(count, -1) for row, count in zip(weight[:, 0], rows_per_expert, strict=True)]),
    )


def test_the_closed_form_gradients_pass_gradcheck_in_both_storage_orders():
    x, weight, _, ends = example([2, 0, 3])
    for transposed in (True, False):
        stored = weight if transposed else weight.transpose(1, 2).contiguous()
        assert torch.equal(as_EIO(stored, transposed), weight)
        inputs = (x.clone().requires_grad_(), stored.clone().requires_grad_(), ends, transposed)
        assert torch.autograd.gradcheck(GroupedLinear.apply, inputs)


def test_a_frozen_weight_or_input_gets_no_gradient():
    x, weight, _, ends = example([2, 1])
    out = GroupedLinear.apply(x.requires_grad_(), weight, ends, True)
    out.sum().backward()
    assert x.grad is not None
    assert weight.grad is None


@given(st.integers(0, 9), st.integers(1, 3), st.integers(1, 5))
@settings(deadline=None, max_examples=40)
def test_routed_rows_are_sorted_by_expert_then_token_and_lose_no_pair(tokens, top_k, num_experts):
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-1, num_experts + 1, (tokens, top_k), generator=generator)
    rows = RoutedRows.of(ids, num_experts)
    expert = ids.reshape(-1)[rows.pair_R]
    order = expert * (tokens * top_k + 1) + rows.pair_R
    assert (order[1:] > order[:-1]).all()
    valid = (ids >= 0) & (ids < num_experts)
    assert rows.pair_R.sort().values.tolist() == valid.reshape(-1).nonzero().reshape(-1).tolist()
    assert rows.ends_E.tolist() == [int((ids.clamp(-1)[valid] <= e).sum()) for e in range(num_experts)]
    out = torch.randn(rows.pair_R.shape[0], 2, generator=generator)
    weights = torch.rand(tokens, top_k, generator=generator)
    expected = torch.zeros(tokens, 2)
    for row, pair in enumerate(rows.pair_R.tolist()):
        expected[pair // top_k] += weights.reshape(-1)[pair] * out[row]
    torch.testing.assert_close(rows.combine(out, weights, torch.float32), expected)
