"""The integers that are masked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.errors import ConfigError, RoundError
from coterie.federation.experts.masking.grid import GridScale, MaskGrid, narrow, signed, widen


@settings(max_examples=25, deadline=None)
@given(width=st.integers(1, 7), seed=st.integers(0, 2**32 - 1))
def test_packed_integers_come_back(width: int, seed: int):
    edge = 2 ** (8 * width - 1)
    values = np.random.default_rng(seed).integers(-edge, edge, 50)
    values[:2] = -edge, edge - 1
    packed = narrow(values, width)
    assert packed.shape == (50 * width,)
    assert [
        int.from_bytes(packed[i * width : (i + 1) * width].tobytes(), "little", signed=True) for i in range(50)
    ] == (values.tolist())
    assert signed(widen(packed, width), width).tolist() == values.tolist()


@pytest.mark.parametrize(("parties", "largest"), [(2, 63), (2, 64), (3, 2**36), (3, 2**37), (6, 2**36)])
def test_the_largest_sum_fits_and_no_byte_is_spare(parties: int, largest: int):
    width = MaskGrid(parties, GridScale(1.0, largest)).width
    assert parties * largest <= 2 ** (8 * width - 1) - 1
    assert parties * largest > 2 ** (8 * (width - 1) - 1) - 1


def test_a_grid_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError) as refused:
        MaskGrid(2, GridScale(1.0, 2**55))
    assert refused.value.code == "mask-too-wide"


def test_what_no_honest_push_holds_is_refused_at_its_owner_and_in_the_sum():
    grid = MaskGrid(3, GridScale(0.5, 100), {"load": GridScale(2.0, 7)})
    grid.check_own("w", torch.tensor([100, -100]), "here")
    assert grid.values("w", torch.tensor([300, -300]), "here").tolist() == [150.0, -150.0]
    assert grid.values("load", torch.tensor([21]), "here").tolist() == [42.0]
    for name, most in (("w", 100), ("load", 7)):
        for sign in (1, -1):
            with pytest.raises(RoundError) as diverged:
                grid.check_own(name, torch.tensor([0, sign * (most + 1)]), "here")
            assert diverged.value.code == "run-diverged"
            with pytest.raises(RoundError) as wild:
                grid.values(name, torch.tensor([sign * (3 * most + 1)]), "here")
            assert wild.value.code == "sum-wild"


def test_grids_that_differ_in_anything_have_other_digests():
    grids = [
        MaskGrid(3, GridScale(0.5, 100)),
        MaskGrid(2, GridScale(0.5, 100)),
        MaskGrid(3, GridScale(0.5 + 2**-50, 100)),
        MaskGrid(3, GridScale(0.5, 101)),
        MaskGrid(3, GridScale(0.5, 100), {"load": GridScale(1.0, 5)}),
    ]
    assert len({grid.digest() for grid in grids}) == len(grids)
    assert grids[0].digest() == MaskGrid(3, GridScale(0.5, 100)).digest()


def test_values_without_noise_are_rounded_to_the_nearest_step():
    grid = MaskGrid(2, GridScale(2.0**-20, 2**30))
    values = torch.tensor([0.0, 2.0**-21 * 1.01, -(2.0**-21) * 1.01, 1 / 3])
    assert grid.round("w", values).tolist() == [0, 1, -1, round(float(values[3]) * 2**20)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, -1e300])
def test_what_no_integer_can_hold_is_refused_like_any_value_beyond_the_grid(value: float):
    grid = MaskGrid(3, GridScale(2.0**-20, 2**30))
    spoilt = grid.round("w", torch.tensor([0.5, value], dtype=torch.float64))
    with pytest.raises(RoundError) as refused:
        grid.check_own("w", spoilt, "here")
    assert refused.value.code == "run-diverged"
