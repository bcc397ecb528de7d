"""The noise is the discrete Gaussian it is accounted as, secret, and safe against floating-point attacks."""

from __future__ import annotations

import math
import multiprocessing
import os

import numpy as np
import pytest
import torch
from scipy import stats

from coterie.dp import noise
from coterie.dp.randomness import Keystream, SeededRandom, SystemRandom, random_source
from coterie.errors import PrivacyError

SOURCE = SeededRandom(20)
NEEDS_NUMBA = pytest.mark.skipif(noise.kernel() is None, reason="needs numba")


def _whole(words: np.ndarray) -> int:
    return int.from_bytes(words.astype(">u8").tobytes(), "big")


def test_alias_table_holds_the_discrete_gaussian_to_many_digits() -> None:
    table, half = noise.alias_table(), 1 << (noise.TABLE_BITS - 1)
    capacity = 1 << noise._COLUMN_BITS
    mass = [0] * (2 * half)
    for column, (other, high) in enumerate(table.both.tolist()):
        own = capacity if other == column else (high << noise._TIE_BITS) + _whole(table.low[column])
        mass[column] += own
        mass[other] += capacity - own
    assert sum(mass) == 1 << noise._PROBABILITY_BITS
    z = np.arange(-half, half)
    expected = -(z.astype(float) ** 2) / (2 * noise.TABLE_SIGMA**2)
    ratio = [math.log(m / mass[half]) if m else -math.inf for m in mass]
    core = np.abs(z) < 12 * noise.TABLE_SIGMA
    np.testing.assert_allclose(np.array(ratio)[core], expected[core], rtol=1e-9, atol=1e-12)
    assert mass[half + 7] == pytest.approx(mass[half - 7], rel=1e-12)


def test_draws_follow_the_table_by_chi_square() -> None:
    out, work = np.empty(noise._CHUNK, np.int16), noise._Work()
    stream, counts = SOURCE.stream("chi"), np.zeros(1 << 16, np.int64)
    for _ in range(30):
        bits, _ = noise._bits(stream, noise._CHUNK)
        for rows in (0, 2):
            undecided = noise.alias_table().draw(bits[rows], bits[rows + 1], out, work)
            decided = np.delete(out, undecided).astype(np.int64)
            counts += np.bincount(decided + (1 << 15), minlength=1 << 16)
    z = np.arange(-(1 << 15), 1 << 15)
    probability = np.exp(-(z.astype(float) ** 2) / (2 * noise.TABLE_SIGMA**2))
    probability /= probability.sum()
    edges = np.concatenate([[0], np.searchsorted(probability.cumsum(), np.linspace(0.002, 0.998, 400)), [1 << 16]])
    seen, expected = np.add.reduceat(counts, edges[:-1]), np.add.reduceat(probability, edges[:-1]) * counts.sum()
    assert stats.chisquare(seen, expected * seen.sum() / expected.sum()).pvalue > 1e-4
    # Odd and even values equally often: a wrong bit somewhere shows here, not in the moments.
    assert stats.binomtest(int(counts[1::2].sum()), int(counts.sum())).pvalue > 1e-4


def test_noise_has_the_moments_and_tails_of_its_gaussian() -> None:
    z = noise.discrete_gaussian(4_000_000, SOURCE.stream("moments")).astype(np.float64) / noise.GRID_SIGMA
    n = z.shape[0]
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs(stats.skew(z)) < 5 * math.sqrt(6 / n)
    assert abs(stats.kurtosis(z)) < 5 * math.sqrt(24 / n)
    assert stats.kstest(z[:1_000_000], "norm").pvalue > 1e-4
    for k in (2.0, 3.0, 4.0):
        outside = int((np.abs(z) > k).sum())
        assert stats.binomtest(outside, n, 2 * stats.norm.sf(k)).pvalue > 1e-4
    assert abs(np.corrcoef(z[:-1], z[1:])[0, 1]) < 5 / math.sqrt(n)
    assert abs(np.corrcoef(z[: n // 2], z[n // 2 :])[0, 1]) < 5 / math.sqrt(n / 2)


def test_low_bits_of_the_sum_are_uniform() -> None:
    z = noise.discrete_gaussian(400_000, SOURCE.stream("low"))
    counts = np.bincount(z & 1023, minlength=1024)
    assert stats.chisquare(counts).pvalue > 1e-4


def test_invariant_7_output_lies_on_a_public_grid_whatever_the_sum_is() -> None:
    std = 0.83
    step = std / noise.GRID_SIGMA
    for scale in (1e-6, 1.0):
        sums = {"w": scale * torch.randn(5000, generator=torch.Generator().manual_seed(1))}
        grid = noise.add_noise(sums, std, SOURCE, "grid")["w"].double() / step
        # float32 keeps 24 bits; anything below is the rounding of a grid number to float32.
        assert ((grid - grid.round()).abs() <= grid.abs() * 2.0**-24).all()


def test_noise_is_added_to_the_rounded_sum_exactly() -> None:
    sums = {"b": torch.linspace(-3, 3, 70_001), "a": torch.ones(3, 5)}
    noised = noise.add_noise(sums, {"a": 2.0, "b": 0.5}, SOURCE, "exact")
    zero = noise.add_noise(
        {name: torch.zeros_like(t) for name, t in sums.items()}, {"a": 2.0, "b": 0.5}, SOURCE, "exact"
    )
    for name, std in (("a", 2.0), ("b", 0.5)):
        step = std / noise.GRID_SIGMA
        assert noised[name].shape == sums[name].shape
        assert noised[name].dtype == torch.float32
        error = noised[name].double() - zero[name].double() - sums[name].double()
        assert error.abs().max() <= step + 2.0**-23 * noised[name].abs().max()
    assert zero["a"].std() > 4 * zero["b"].std() * 0.5


def test_seeded_noise_repeats_and_system_noise_never_does() -> None:
    sums = {"w": torch.zeros(1000)}
    assert not SeededRandom(3).private
    assert SystemRandom().private
    one = noise.add_noise(sums, 1.0, SeededRandom(3), "round 1")["w"]
    assert torch.equal(one, noise.add_noise(sums, 1.0, SeededRandom(3), "round 1")["w"])
    assert not torch.equal(one, noise.add_noise(sums, 1.0, SeededRandom(3), "round 2")["w"])
    assert not torch.equal(one, noise.add_noise(sums, 1.0, SeededRandom(4), "round 1")["w"])
    first, second = (noise.add_noise(sums, 1.0, SystemRandom())["w"] for _ in range(2))
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.2


def test_equal_tensors_get_independent_noise() -> None:
    noised = noise.add_noise({"a": torch.zeros(2000), "b": torch.zeros(2000)}, 1.0, SeededRandom(1), "r")
    assert abs(float(torch.corrcoef(torch.stack([noised["a"], noised["b"]]))[0, 1])) < 0.15


def test_large_and_small_tensors_agree_with_one_thread_or_many(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = {"w": torch.zeros(noise._SLAB * 2 + 77)}
    many = noise.add_noise(sums, 1.0, SeededRandom(1), "r")["w"]
    monkeypatch.setattr(noise, "_threads", lambda: 1)
    assert torch.equal(many, noise.add_noise(sums, 1.0, SeededRandom(1), "r")["w"])


@NEEDS_NUMBA
def test_the_compiled_pass_gives_the_same_bits_as_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    # Enough values that some of their draws look at more than 32 bits, and a rest that fills no chunk.
    sums = {"w": torch.randn(noise._SLAB * 2 + 77, generator=generator), "b": torch.zeros(5)}
    monkeypatch.setattr(noise, "_WORTH_COMPILING", 1)
    compiled = noise.add_noise(sums, 0.8, SeededRandom(1), "r")
    monkeypatch.setattr(noise, "kernel", lambda: None)
    plain = noise.add_noise(sums, 0.8, SeededRandom(1), "r")
    for name in sums:
        assert torch.equal(compiled[name], plain[name])


def test_a_draw_whose_first_bits_tie_is_decided_by_more_of_them() -> None:
    """Against integers of 192 bits: below the rest of its threshold a draw is its column's own value."""
    table, generator = noise.alias_table(), np.random.default_rng(1)
    column = generator.integers(0, 1 << 16, 3000).astype(np.uint16)
    words = generator.integers(0, 1 << 64, (3000, 3), dtype=np.uint64)
    words[:1000] = table.low[column[:1000]]  # equal: the second value
    words[1000:2000, :2] = table.low[column[1000:2000], :2]  # the last word decides
    expected = [_whole(row) < _whole(low) for row, low in zip(words, table.low[column], strict=True)]
    assert table.own(column, words).tolist() == expected
    assert 500 < sum(expected) < 2500


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=NEEDS_NUMBA)])
def test_ties_take_their_words_in_the_order_of_their_places(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream in which many draws tie, with extreme words, against a loop written out by hand."""
    table, count = noise.alias_table(), 5000
    generator = np.random.default_rng(2)
    bits = generator.integers(0, 1 << 16, (4, count)).astype(np.uint16)
    places = np.sort(generator.choice(count, 30, replace=False))
    for row in (0, 2):
        some = places if row == 0 else places[::2]
        bits[row + 1, some] = table.both[bits[row, some], 1]
    spare = np.where(generator.random((noise._TIES, 1)) < 0.5, 0, (1 << 64) - 1).astype(np.uint64).repeat(3, 1)
    monkeypatch.setattr(noise, "_bits", lambda stream, count: (bits, spare))
    value = generator.normal(size=count).astype(np.float32) * 1e-3
    out, step, used = np.empty_like(value), 1.0 / noise.GRID_SIGMA, 0
    if compiled:
        kernel = noise.kernel()
        assert kernel is not None
        assert noise._fused(kernel, value, out, step, step / 3, SOURCE.stream("x"))
    else:
        assert noise._in_numpy(value, out, step, step / 3, SOURCE.stream("x"))
    for place in range(count):
        total = 0
        for row, factor in ((0, 1), (2, noise.COARSE)):
            column, fraction = int(bits[row, place]), int(bits[row + 1, place])
            other, threshold = table.both[column].tolist()
            own = fraction < threshold
            if fraction == threshold:
                own, used = bool(spare[used, 0] == 0), used + 1
            total += factor * ((column if own else other) - (1 << 15))
        assert out[place] == np.float32((np.rint(np.float64(value[place]) * (1.0 / step)) + total) * (step / 3))
    assert used >= 45


def test_more_ties_than_sound_random_numbers_ever_make_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    table = noise.alias_table()
    bits = np.zeros((4, 1000), np.uint16)
    bits[0::2], bits[1::2] = 40000, table.both[40000, 1]
    monkeypatch.setattr(noise, "_bits", lambda stream, count: (bits[:, :count], np.zeros((64, 3), np.uint64)))
    with pytest.raises(PrivacyError, match="are not random"):
        noise.add_noise({"w": torch.zeros(1000)}, 1.0, SOURCE, "r")
    if noise.kernel() is not None:
        monkeypatch.setattr(noise, "_WORTH_COMPILING", 1)
        with pytest.raises(PrivacyError, match="are not random"):
            noise.add_noise({"w": torch.zeros(1000)}, 1.0, SOURCE, "r")


def test_a_divisor_scales_the_noised_sum() -> None:
    sums = {"w": torch.randn(70_000, generator=torch.Generator().manual_seed(4))}
    whole = noise.add_noise(sums, 0.7, SeededRandom(1), "r")["w"]
    tenth = noise.add_noise(sums, 0.7, SeededRandom(1), "r", divisor=10.0)["w"]
    torch.testing.assert_close(tenth, whole / 10, rtol=3e-7, atol=0.0)


def test_sums_are_left_alone_unless_noise_is_added_in_place() -> None:
    sums = {"w": torch.ones(300, 4), "turned": torch.ones(4, 300).t(), "wide": torch.ones(3, dtype=torch.float64)}
    apart = noise.add_noise(sums, 1.0, SeededRandom(1), "r")
    assert all(bool((tensor == 1).all()) for tensor in sums.values())
    within = noise.add_noise(sums, 1.0, SeededRandom(1), "r", in_place=True)
    for name in sums:
        assert torch.equal(apart[name], within[name])
    assert within["w"].data_ptr() == sums["w"].data_ptr()


@NEEDS_NUMBA
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_the_compiled_pass_refuses_what_noise_cannot_hide(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "_WORTH_COMPILING", 1)
    with pytest.raises(PrivacyError, match="`w` is not finite or far above"):
        noise.add_noise({"w": torch.tensor([0.0, bad, 0.0])}, 1e-3, SOURCE)


def _draw(queue: multiprocessing.Queue) -> None:
    queue.put(noise.discrete_gaussian(64, SystemRandom().stream("noise")).tolist())


def _read(stream: Keystream, queue: multiprocessing.Queue) -> None:
    try:
        queue.put(stream.read(4).tolist())
    except PrivacyError as error:
        queue.put(error.code)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_invariant_7_two_processes_never_share_a_stream() -> None:
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue = context.Queue()
    noise.alias_table()
    processes = [context.Process(target=_draw, args=(queue,)) for _ in range(2)]
    for process in processes:
        process.start()
    drawn = [queue.get(timeout=60) for _ in processes] + [
        noise.discrete_gaussian(64, SystemRandom().stream("")).tolist()
    ]
    for process in processes:
        process.join()
    assert len({tuple(sample) for sample in drawn}) == 3
    child = context.Process(target=_read, args=(SystemRandom().stream("noise"), queue))
    child.start()
    assert queue.get(timeout=60) == "dp-forked-stream"
    child.join()


def test_random_source_is_secret_unless_seeded() -> None:
    assert random_source(None).private
    assert not random_source(0).private


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_a_sum_that_noise_cannot_hide_is_refused(bad: float) -> None:
    with pytest.raises(PrivacyError, match="`w` is not finite or far above"):
        noise.add_noise({"w": torch.tensor([0.0, bad])}, 1e-3, SOURCE)


@pytest.mark.parametrize("std", [0.0, -1.0, math.nan, math.inf])
def test_missing_noise_is_refused(std: float) -> None:
    with pytest.raises(PrivacyError, match="standard deviation"):
        noise.add_noise({"w": torch.zeros(2)}, std, SOURCE)


def test_calibration_pays_for_rounding_to_the_grid() -> None:
    sigma, clip, size = 0.9, 1.5, 10_000_000
    std = noise.calibrate(sigma, clip, size)
    step = std / noise.GRID_SIGMA
    assert std >= sigma * (clip + math.sqrt(size) * step)
    assert std <= sigma * clip * 1.01
    with pytest.raises(PrivacyError, match="too many for the noise grid"):
        noise.calibrate(sigma, clip, 10**12)


def test_rounding_moves_two_neighbouring_sums_apart_by_at_most_what_is_paid() -> None:
    generator = torch.Generator().manual_seed(5)
    size, std = 20_000, 1.0
    step = std / noise.GRID_SIGMA
    for scale in (1e-9, 1e-7, 1e-4, 1.0):
        x = torch.randn(size, generator=generator)
        record = torch.randn(size, generator=generator)
        record *= scale / record.norm()
        together = x.double() + record.double()
        moved = torch.round(together / step) - torch.round(x.double() / step)
        assert moved.norm() * step <= scale + math.sqrt(size) * step
