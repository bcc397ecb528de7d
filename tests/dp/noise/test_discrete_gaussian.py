"""The noise is the discrete Gaussian it is accounted as, secret, and safe against floating-point attacks."""

from __future__ import annotations

import math
import multiprocessing
import os

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats

from coterie.dp import threads
from coterie.dp.noise import discrete_gaussian
from coterie.dp.noise.randomness import Keystream, SeededRandom, SystemRandom, random_source
from coterie.errors import PrivacyError

SOURCE = SeededRandom(20)
NEEDS_NUMBA = pytest.mark.skipif(discrete_gaussian.kernel() is None, reason="needs numba")


def _whole(words: np.ndarray) -> int:
    return int.from_bytes(words.astype(">u8").tobytes(), "big")


def _masses(table: discrete_gaussian.AliasTable) -> list[int]:
    """What the table draws, times 2^224."""
    capacity = 1 << discrete_gaussian._THRESHOLD_BITS
    mass = [0] * discrete_gaussian._COLUMNS
    for column, packed in enumerate(table.packed.tolist()):
        other, high = packed >> discrete_gaussian._FRACTION_BITS, packed & discrete_gaussian._FRACTION
        own = capacity if other == column else (high << discrete_gaussian._TIE_BITS) + _whole(table.low[column])
        mass[column] += own
        mass[other] += capacity - own
    assert sum(mass) == 1 << discrete_gaussian._PROBABILITY_BITS
    return mass


def _probability(size: int) -> mpmath.mpf:
    """Of m, both signs: half-integers weighted by the Gaussian, from its definition."""
    sigma = mpmath.mpf(2) ** 24
    return 2 * mpmath.exp(-((size + mpmath.mpf(0.5)) ** 2) / (2 * sigma**2)) / (sigma * mpmath.sqrt(2 * mpmath.pi))


def test_alias_tables_hold_the_discrete_gaussian_to_many_digits() -> None:
    """Against mpmath with 90 digits. What the integers are rounded by, 2^-224, is below 1e-60 of the likely ones."""
    buckets, rest = (_masses(table) for table in discrete_gaussian.alias_tables())
    with mpmath.workdps(90):
        scale = mpmath.mpf(2) ** discrete_gaussian._PROBABILITY_BITS
        lasts = [
            discrete_gaussian.BUCKET * _probability(discrete_gaussian.BUCKET * (b + 1) - 1)
            for b in range(discrete_gaussian._REST)
        ]
        steps = [
            _probability(discrete_gaussian.BUCKET * b) - _probability(discrete_gaussian.BUCKET * (b + 1) - 1)
            for b in range(discrete_gaussian._REST)
        ]
        whole = mpmath.fsum(steps)
        for b in range(discrete_gaussian._REST):
            assert abs(buckets[b] / scale - lasts[b]) <= 2 / scale
            assert abs(rest[b] / scale - steps[b] / whole) <= discrete_gaussian._COLUMNS / scale
        assert (
            abs(buckets[discrete_gaussian._REST] / scale - (1 - mpmath.fsum(lasts)))
            <= discrete_gaussian._COLUMNS / scale
        )
    assert rest[discrete_gaussian._REST] == 0
    assert 0.00075 < buckets[discrete_gaussian._REST] / 2**discrete_gaussian._PROBABILITY_BITS < 0.00081


def test_the_two_parts_make_up_the_probability_of_every_size() -> None:
    """Bucket and place from the first table, or from the second and then accepted: together the Gaussian's."""
    buckets, rest = (np.array([m / 2**224 for m in _masses(table)]) for table in discrete_gaussian.alias_tables())
    places = np.arange(discrete_gaussian.BUCKET, dtype=np.float64)
    most = discrete_gaussian._most_excess()
    accepted = np.array(
        [np.expm1(discrete_gaussian._energies(b, places)).mean() / most[b] for b in range(discrete_gaussian._REST)]
    )
    tried = float((rest[:-1] * accepted).sum())
    assert tried == pytest.approx(0.5, abs=0.01)
    for size in np.random.default_rng(3).integers(0, 5 * 2**24, 300).tolist():
        b, place = divmod(size, discrete_gaussian.BUCKET)
        accept = np.expm1(discrete_gaussian._energies(b, float(place))) / most[b]
        found = (buckets[b] + buckets[discrete_gaussian._REST] * rest[b] * accept / tried) / discrete_gaussian.BUCKET
        assert found == pytest.approx(float(_probability(size)), rel=1e-10, abs=0.0)


def test_draws_follow_the_gaussian_by_chi_square() -> None:
    z = np.concatenate([discrete_gaussian.discrete_gaussian(1 << 20, SOURCE.stream(f"chi{i}")) for i in range(4)])
    edges = stats.norm.ppf(np.linspace(0.002, 0.998, 400)) * discrete_gaussian.GRID_SIGMA
    seen = np.bincount(np.searchsorted(edges, z), minlength=401)
    expected = np.diff(np.concatenate([[0], np.linspace(0.002, 0.998, 400), [1]])) * z.shape[0]
    assert stats.chisquare(seen, expected).pvalue > 1e-4
    # Both signs equally often, and every size in a bucket: a wrong bit somewhere shows here, not in the moments.
    assert stats.binomtest(int((z > 0).sum()), z.shape[0]).pvalue > 1e-4
    places = (np.abs(z).astype(np.int64) % discrete_gaussian.BUCKET) // 512
    assert stats.chisquare(np.bincount(places, minlength=64)).pvalue > 1e-6


def test_draws_of_the_rest_fall_off_within_their_buckets() -> None:
    """Against what the Gaussian is above its value at the end of each bucket, 32 places of each."""
    stream, part = SOURCE.stream("rest"), discrete_gaussian.BUCKET // 32
    z = np.concatenate([discrete_gaussian._tries_of_rest(10_000, stream) for _ in range(40)]) / 2
    starts = np.arange(discrete_gaussian._REST)[:, None] * discrete_gaussian.BUCKET
    middles = (starts + (np.arange(32) + 0.5) * part) / 2**24
    first, last = (starts + 0.5) / 2**24, (starts + discrete_gaussian.BUCKET - 0.5) / 2**24
    above = np.exp(-(middles**2) / 2) - np.exp(-(last**2) / 2)
    tried = np.exp(-(first**2) / 2) - np.exp(-(last**2) / 2)
    assert z.shape[0] == pytest.approx(400_000 * above.mean(1).sum() / tried.sum(), rel=0.01)
    sizes = np.abs(z).astype(np.int64)
    by_place = np.bincount(sizes % discrete_gaussian.BUCKET // part, minlength=32)
    assert stats.chisquare(by_place, above.sum(0) / above.sum() * z.shape[0]).pvalue > 1e-4
    edges = [0, 80, 160, 240, 320, 400, 480, 560, 640, 800, 1000, 1280, discrete_gaussian._REST]
    by_bucket = np.add.reduceat(
        np.bincount(sizes // discrete_gaussian.BUCKET, minlength=discrete_gaussian._REST), edges[:-1]
    )
    expected = np.add.reduceat(above.sum(1), edges[:-1])
    assert stats.chisquare(by_bucket, expected / expected.sum() * z.shape[0]).pvalue > 1e-4


class _Given:
    """A stream of which the next 192 bits are known."""

    def __init__(self, number: int) -> None:
        self._number = number

    def integer(self, bits: int) -> int:
        assert bits == discrete_gaussian._TIE_BITS
        return self._number


def test_a_try_that_doubles_do_not_decide_is_decided_by_256_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    with mpmath.workdps(100):
        for b, place in ((0, 0), (1, 5), (300, 20_000), (8190, 32_766)):
            first, last, here = (
                _probability(discrete_gaussian.BUCKET * b + at) for at in (0, discrete_gaussian.BUCKET - 1, place)
            )
            bits = int(mpmath.floor((here - last) / (first - last) * mpmath.mpf(2) ** 256))
            for change, expected in ((-(10**12), True), (10**12, False)):
                high, low = divmod(min(max(bits + change, 0), 2**256 - 1), 1 << discrete_gaussian._TIE_BITS)
                # At the first place of a bucket every try is accepted.
                wanted = expected or place == 0
                assert discrete_gaussian._accepted_exactly(b, place, high, _Given(low)) == wanted  # type: ignore[arg-type]
    plain = discrete_gaussian._tries_of_rest(500, SeededRandom(5).stream("tries"))
    monkeypatch.setattr(discrete_gaussian, "_UNSURE", 2.0)
    assert discrete_gaussian._tries_of_rest(500, SeededRandom(5).stream("tries")).tolist() == plain.tolist()


def test_noise_has_the_moments_and_tails_of_its_gaussian() -> None:
    z = (
        discrete_gaussian.discrete_gaussian(4_000_000, SOURCE.stream("moments")).astype(np.float64)
        / discrete_gaussian.GRID_SIGMA
    )
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


def test_low_bits_are_uniform() -> None:
    z = discrete_gaussian.discrete_gaussian(400_000, SOURCE.stream("low"))
    assert (z - 0.5 == np.floor(z)).all()
    counts = np.bincount(np.floor(z).astype(np.int64) & 1023, minlength=1024)
    assert stats.chisquare(counts).pvalue > 1e-4


def test_invariant_7_output_lies_on_a_public_grid_whatever_the_sum_is() -> None:
    std = 0.83
    step = std / discrete_gaussian.GRID_SIGMA
    for scale in (1e-6, 1.0):
        sums = {"w": scale * torch.randn(5000, generator=torch.Generator().manual_seed(1))}
        grid = discrete_gaussian.add_noise(sums, std, SOURCE, "grid")["w"].double() / step - 0.5
        # float32 keeps 24 bits; anything below is the rounding of a grid number to float32.
        assert ((grid - grid.round()).abs() <= (grid.abs() + 1) * 2.0**-24).all()


def test_noise_is_added_to_the_rounded_sum_exactly() -> None:
    sums = {"b": torch.linspace(-3, 3, 70_001), "a": torch.ones(3, 5)}
    noised = discrete_gaussian.add_noise(sums, {"a": 2.0, "b": 0.5}, SOURCE, "exact")
    zero = discrete_gaussian.add_noise(
        {name: torch.zeros_like(t) for name, t in sums.items()}, {"a": 2.0, "b": 0.5}, SOURCE, "exact"
    )
    for name, std in (("a", 2.0), ("b", 0.5)):
        step = std / discrete_gaussian.GRID_SIGMA
        assert noised[name].shape == sums[name].shape
        assert noised[name].dtype == torch.float32
        error = noised[name].double() - zero[name].double() - sums[name].double()
        assert error.abs().max() <= step + 2.0**-23 * noised[name].abs().max()
    assert zero["a"].std() > 4 * zero["b"].std() * 0.5


def test_seeded_noise_repeats_and_system_noise_never_does() -> None:
    sums = {"w": torch.zeros(1000)}
    assert not SeededRandom(3).private
    assert SystemRandom().private
    one = discrete_gaussian.add_noise(sums, 1.0, SeededRandom(3), "round 1")["w"]
    assert torch.equal(one, discrete_gaussian.add_noise(sums, 1.0, SeededRandom(3), "round 1")["w"])
    assert not torch.equal(one, discrete_gaussian.add_noise(sums, 1.0, SeededRandom(3), "round 2")["w"])
    assert not torch.equal(one, discrete_gaussian.add_noise(sums, 1.0, SeededRandom(4), "round 1")["w"])
    first, second = (discrete_gaussian.add_noise(sums, 1.0, SystemRandom())["w"] for _ in range(2))
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.2


def test_equal_tensors_get_independent_noise() -> None:
    noised = discrete_gaussian.add_noise({"a": torch.zeros(2000), "b": torch.zeros(2000)}, 1.0, SeededRandom(1), "r")
    assert abs(float(torch.corrcoef(torch.stack([noised["a"], noised["b"]]))[0, 1])) < 0.15


def test_large_and_small_tensors_agree_with_one_thread_or_many(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = {"w": torch.zeros(discrete_gaussian._SLAB * 2 + 77)}
    many = discrete_gaussian.add_noise(sums, 1.0, SeededRandom(1), "r")["w"]
    monkeypatch.setattr(threads, "thread_count", lambda: 1)
    assert torch.equal(many, discrete_gaussian.add_noise(sums, 1.0, SeededRandom(1), "r")["w"])


@NEEDS_NUMBA
def test_the_compiled_pass_gives_the_same_bits_as_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    # Enough values that some of their draws look at more than 32 bits, and a rest that fills no chunk.
    sums = {"w": torch.randn(discrete_gaussian._SLAB * 2 + 77, generator=generator), "b": torch.zeros(5)}
    monkeypatch.setattr(discrete_gaussian, "_WORTH_COMPILING", 1)
    compiled = discrete_gaussian.add_noise(sums, 0.8, SeededRandom(1), "r")
    monkeypatch.setattr(discrete_gaussian, "kernel", lambda: None)
    plain = discrete_gaussian.add_noise(sums, 0.8, SeededRandom(1), "r")
    for name in sums:
        assert torch.equal(compiled[name], plain[name])


def test_a_draw_whose_first_bits_tie_is_decided_by_more_of_them() -> None:
    """Against integers of 192 bits: below the rest of its threshold a draw is its column's own value."""
    table, generator = discrete_gaussian.alias_tables()[0], np.random.default_rng(1)
    column = generator.integers(0, discrete_gaussian._COLUMNS, 3000).astype(np.uint32)
    words = generator.integers(0, 1 << 64, (3000, 3), dtype=np.uint64)
    words[:1000] = table.low[column[:1000]]  # equal: the second value
    words[1000:2000, :2] = table.low[column[1000:2000], :2]  # the last word decides
    expected = [_whole(row) < _whole(low) for row, low in zip(words, table.low[column], strict=True)]
    assert table.own(column, words).tolist() == expected
    assert 500 < sum(expected) < 2500


def test_ties_take_their_words_in_their_order() -> None:
    table, generator = discrete_gaussian.alias_tables()[0], np.random.default_rng(2)
    column = generator.integers(0, discrete_gaussian._COLUMNS, 500).astype(np.uint32)
    fraction = generator.integers(0, 1 << discrete_gaussian._FRACTION_BITS, 500).astype(np.uint32)
    tie = generator.random(500) < 0.3
    threshold = table.packed[column] & np.uint32(discrete_gaussian._FRACTION)
    fraction[tie] = threshold[tie]
    drawn = table.draw(
        (column << np.uint32(discrete_gaussian._FRACTION_BITS)) | fraction, SeededRandom(7).stream("ties")
    )
    words = iter(SeededRandom(7).stream("ties").uint64(3 * int((fraction == threshold).sum())).reshape(-1, 3))
    for i in range(500):
        other = int(table.packed[column[i]]) >> discrete_gaussian._FRACTION_BITS
        own = fraction[i] < threshold[i]
        if fraction[i] == threshold[i]:
            own = _whole(next(words)) < _whole(table.low[column[i]])
        assert drawn[i] == (column[i] if own else other)


@NEEDS_NUMBA
@pytest.mark.parametrize("in_place", [False, True])
def test_the_compiled_pass_leaves_open_what_its_bits_do_not_decide(in_place: bool) -> None:
    """Ties and values of the rest, many of them, in blocks that end anywhere; against numpy's pass."""
    kernel, table, generator = (
        discrete_gaussian.kernel(),
        discrete_gaussian.alias_tables()[0],
        np.random.default_rng(3),
    )
    assert kernel is not None
    for count in (1, 7, 511, 512, 513, 5000):
        word = generator.integers(0, 1 << 32, count, dtype=np.uint32)
        fine = generator.integers(0, 1 << 16, count).astype(np.uint16)
        tie, of_rest = generator.random(count) < 0.05, generator.random(count) < 0.05
        column = word >> np.uint32(discrete_gaussian._FRACTION_BITS)
        word = np.where(
            tie,
            (column << np.uint32(discrete_gaussian._FRACTION_BITS))
            | (table.packed[column] & np.uint32(discrete_gaussian._FRACTION)),
            word,
        )
        word[of_rest] = np.uint32(discrete_gaussian._REST) << np.uint32(discrete_gaussian._FRACTION_BITS)
        value = generator.normal(size=count).astype(np.float32)
        results = []
        for run in (kernel, discrete_gaussian._in_numpy):
            source = value.copy()
            target = source if in_place else np.empty_like(source)
            found = np.zeros(1000, np.int32), np.zeros(1000, np.uint32), np.zeros(1000, np.float32)
            stop = run(word, fine, source, target, 1e-6, 3e-7, 40, *found, 5)
            undecided = found[0][5:stop] - 40
            assert (found[2][5:stop] == value[undecided]).all()
            assert (found[1][5:stop] == word[undecided]).all()
            results.append((undecided.tolist(), np.delete(target, undecided).tolist()))
        assert results[0] == results[1]
        assert count < 5000 or len(results[0][0]) > 300


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=NEEDS_NUMBA)])
def test_more_open_draws_than_sound_random_numbers_ever_leave_are_refused(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discrete_gaussian, "_WORTH_COMPILING", 1 if compiled else 1 << 62)
    word = np.full(discrete_gaussian._CHUNK, discrete_gaussian._REST << discrete_gaussian._FRACTION_BITS, np.uint32)
    monkeypatch.setattr(discrete_gaussian, "_bits", lambda stream, count: (word[:count], np.zeros(count, np.uint16)))
    with pytest.raises(PrivacyError, match="are not random"):
        discrete_gaussian.add_noise({"w": torch.zeros(discrete_gaussian._MOST_OPEN + 1)}, 1.0, SOURCE, "r")


def test_small_sums_share_a_slab_and_large_ones_are_split() -> None:
    sizes = {"a": 5, "b": discrete_gaussian._SLAB + 3, "c": 7, "d": discrete_gaussian._SLAB, "e": 2, "f": 9}
    steps = {"a": 1.0, "b": 1.0, "c": 2.0, "d": 1.0, "e": 1.0, "f": 2.0}
    arrays = {name: np.zeros(size, np.float32) for name, size in sizes.items()}
    pieces = [
        discrete_gaussian._Slice(
            name,
            a[start : start + discrete_gaussian._SLAB],
            a[start : start + discrete_gaussian._SLAB],
            steps[name],
            steps[name],
            min(discrete_gaussian._SLAB, a.shape[0] - start),
            None,
        )
        for name, a in arrays.items()
        for start in range(0, a.shape[0], discrete_gaussian._SLAB)
    ]
    slabs = discrete_gaussian._slabs(pieces)
    assert all(sum(piece.value.shape[0] for piece in slab) <= discrete_gaussian._SLAB for slab in slabs)
    assert all(len({piece.step for piece in slab}) == 1 for slab in slabs)
    assert [[piece.name for piece in slab] for slab in slabs] == [["a"], ["b"], ["b"], ["c", "f"], ["d"], ["e"]]


def test_of_sums_that_share_a_slab_the_one_at_fault_is_named() -> None:
    sums = {"a": torch.zeros(3), "b": torch.tensor([0.0, math.nan]), "c": torch.zeros(4)}
    with pytest.raises(PrivacyError, match="`b` is not finite"):
        discrete_gaussian.add_noise(sums, 1.0, SOURCE, "r")


def test_a_divisor_scales_the_noised_sum() -> None:
    sums = {"w": torch.randn(70_000, generator=torch.Generator().manual_seed(4))}
    whole = discrete_gaussian.add_noise(sums, 0.7, SeededRandom(1), "r")["w"]
    tenth = discrete_gaussian.add_noise(sums, 0.7, SeededRandom(1), "r", divisor=10.0)["w"]
    torch.testing.assert_close(tenth, whole / 10, rtol=3e-7, atol=0.0)


def test_sums_are_left_alone_unless_noise_is_added_in_place() -> None:
    sums = {"w": torch.ones(300, 4), "turned": torch.ones(4, 300).t(), "wide": torch.ones(3, dtype=torch.float64)}
    apart = discrete_gaussian.add_noise(sums, 1.0, SeededRandom(1), "r")
    assert all(bool((tensor == 1).all()) for tensor in sums.values())
    within = discrete_gaussian.add_noise(sums, 1.0, SeededRandom(1), "r", in_place=True)
    for name in sums:
        assert torch.equal(apart[name], within[name])
    assert within["w"].data_ptr() == sums["w"].data_ptr()


@NEEDS_NUMBA
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_the_compiled_pass_refuses_what_noise_cannot_hide(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discrete_gaussian, "_WORTH_COMPILING", 1)
    with pytest.raises(PrivacyError, match="`w` is not finite or far above"):
        discrete_gaussian.add_noise({"w": torch.tensor([0.0, bad, 0.0])}, 1e-3, SOURCE)


def test_an_error_of_one_job_is_raised_when_all_are_done() -> None:
    done: list[int] = []

    def work(job: int) -> None:
        if job == 1:
            raise PrivacyError("job 1 failed", code="dp-noise")
        done.append(job)

    with pytest.raises(PrivacyError, match="job 1"):
        threads.run_in_threads(work, range(50))
    assert sorted(done) == [0, *range(2, 50)]


def test_a_large_sum_that_noise_cannot_hide_is_refused_from_its_thread() -> None:
    bad = torch.zeros(3 * discrete_gaussian._SLAB)
    bad[-1] = math.nan
    with pytest.raises(PrivacyError, match="`w` is not finite"):
        discrete_gaussian.add_noise({"v": torch.zeros(5), "w": bad}, 1e-3, SOURCE)


def _draw(queue: multiprocessing.Queue) -> None:
    queue.put(discrete_gaussian.discrete_gaussian(64, SystemRandom().stream("noise")).tolist())


def _read(stream: Keystream, queue: multiprocessing.Queue) -> None:
    try:
        queue.put(stream.read(4).tolist())
    except PrivacyError as error:
        queue.put(error.code)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_invariant_7_two_processes_never_share_a_stream() -> None:
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue = context.Queue()
    discrete_gaussian.alias_tables()
    processes = [context.Process(target=_draw, args=(queue,)) for _ in range(2)]
    for process in processes:
        process.start()
    drawn = [queue.get(timeout=60) for _ in processes] + [
        discrete_gaussian.discrete_gaussian(64, SystemRandom().stream("")).tolist()
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
        discrete_gaussian.add_noise({"w": torch.tensor([0.0, bad])}, 1e-3, SOURCE)


@pytest.mark.parametrize("std", [0.0, -1.0, math.nan, math.inf])
def test_missing_noise_is_refused(std: float) -> None:
    with pytest.raises(PrivacyError, match="standard deviation"):
        discrete_gaussian.add_noise({"w": torch.zeros(2)}, std, SOURCE)


def test_calibration_pays_for_rounding_to_the_grid() -> None:
    sigma, clip, size = 0.9, 1.5, 10_000_000
    std = discrete_gaussian.calibrate(sigma, clip, size)
    step = std / discrete_gaussian.GRID_SIGMA
    assert std >= sigma * (clip + math.sqrt(size) * step)
    assert std <= sigma * clip * 1.01
    with pytest.raises(PrivacyError, match="too many for the noise grid"):
        discrete_gaussian.calibrate(sigma, clip, 10**13)


def test_rounding_moves_two_neighbouring_sums_apart_by_at_most_what_is_paid() -> None:
    generator = torch.Generator().manual_seed(5)
    size, std = 20_000, 1.0
    step = std / discrete_gaussian.GRID_SIGMA
    for scale in (1e-9, 1e-7, 1e-4, 1.0):
        x = torch.randn(size, generator=generator)
        record = torch.randn(size, generator=generator)
        record *= scale / record.norm()
        together = x.double() + record.double()
        moved = torch.round(together / step) - torch.round(x.double() / step)
        assert moved.norm() * step <= scale + math.sqrt(size) * step


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [pytest.param(True, marks=NEEDS_NUMBA), False])
@pytest.mark.parametrize("counted", [False, True])
def test_noised_integers_are_the_exact_numbers_that_the_float32_ones_round(
    monkeypatch: pytest.MonkeyPatch, compiled: bool, counted: bool
) -> None:
    """Twice the grid's number, whole: from the same bits, and with nothing lost where float32 would lose it."""
    monkeypatch.setattr(discrete_gaussian, "_WORTH_COMPILING", 0)
    if not compiled:
        monkeypatch.setattr(discrete_gaussian, "kernel", lambda: None)
    std, step = {"a": 0.7, "b": 3.0}, {name: value / 2**24 for name, value in (("a", 0.7), ("b", 3.0))}
    values = {"a": torch.linspace(-900, 900, 5000), "b": torch.linspace(-2, 2, 700).view(7, 100)}
    if counted:
        values = {name: torch.round(each.double() / step[name]).long() for name, each in values.items()}
    plain = discrete_gaussian.add_noise(values, std, SOURCE, "same")
    whole = discrete_gaussian.add_noise(values, std, SOURCE, "same", as_integers=True)
    for name, each in whole.items():
        assert each.dtype == torch.int64
        assert each.shape == values[name].shape
        assert bool((each % 2 == 1).all())  # the noise lies halfway between the grid's numbers
        assert torch.equal((0.5 * each.double() * step[name]).float(), plain[name])
    assert int(whole["a"].abs().max()) > 2**34  # float32 keeps 24 bits of them
