"""What the spectrum of a sum says, on sums whose parts are known."""

from __future__ import annotations

import math

import pytest
import torch

from coterie.audit.experts.opened import Spectrum
from coterie.audit.experts.pushes import BFLOAT16_ROUNDING

WIDTH, OUT = 48, 64


def planted(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Independent hidden vectors and gradients."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, WIDTH, generator=generator), torch.randn(rows, OUT, generator=generator)


def test_rows_of_a_sum_lie_inside_its_span_and_others_do_not() -> None:
    hidden, gradients = planted(12)
    others, _ = planted(2000, seed=1)
    spectrum = Spectrum(hidden.T @ gradients)
    assert spectrum.rank == 12
    assert spectrum.outside(hidden).max() < math.log(1e-9)
    # An isotropic vector has (WIDTH - 12) / WIDTH of its square outside 12 directions.
    assert spectrum.outside(others).exp().mean() == pytest.approx((WIDTH - 12) / WIDTH, rel=0.02)


def test_each_of_a_sums_own_outer_products_is_in_it_exactly_once() -> None:
    hidden, gradients = planted(20)
    spectrum = Spectrum(hidden.T @ gradients)
    torch.testing.assert_close(spectrum.matched(hidden, gradients), torch.ones(20), atol=1e-3, rtol=0)
    wrong = spectrum.matched(hidden, gradients.roll(1, 0))
    torch.testing.assert_close(wrong, torch.zeros(20), atol=1e-3, rtol=0)


def test_with_more_rows_than_width_its_own_outer_products_share_the_rank() -> None:
    hidden, gradients = planted(300)
    spectrum = Spectrum(hidden.T @ gradients)
    assert spectrum.rank == WIDTH
    # The trace of pseudo-inverse times sum is the rank, whatever the rows.
    assert float(spectrum.matched(hidden, gradients).sum()) == pytest.approx(WIDTH, rel=1e-3)


def test_with_more_rows_than_width_a_small_direction_still_tells() -> None:
    hidden, gradients = planted(300)
    hidden[:, 0] *= 1e-2
    others, _ = planted(50, seed=1)
    spectrum = Spectrum(hidden.T @ gradients)
    assert spectrum.rank == WIDTH
    assert spectrum.outside(hidden).mean() + 2.0 < spectrum.outside(others).mean()


def test_noise_sets_the_floor_below_which_no_direction_counts() -> None:
    hidden, gradients = planted(5)
    noise = 3.0 * torch.randn(WIDTH, OUT, generator=torch.Generator().manual_seed(2))
    assert Spectrum(hidden.T @ gradients + noise, noise=3.0).rank == 5
    assert Spectrum(noise, noise=3.0).rank == 0
    assert Spectrum(hidden.T @ gradients + noise).rank == WIDTH  # what an attacker without the noise level would see


def test_rounding_to_bfloat16_is_told_from_rows() -> None:
    hidden, gradients = planted(5)
    rounded = (hidden.T @ gradients).bfloat16().float()
    assert Spectrum(rounded, rounding=BFLOAT16_ROUNDING).rank == 5
    assert Spectrum(rounded).rank > 5


def test_a_sum_of_nothing_is_empty() -> None:
    spectrum = Spectrum(torch.zeros(WIDTH, OUT))
    assert spectrum.empty
    assert spectrum.rank == 0
    assert float(spectrum.matched(*planted(1))) == 0.0
