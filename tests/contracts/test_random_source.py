"""Every source of secret draws keeps the rules of `RandomSource`; the same tests run over each of them."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from coterie.dp.noise.randomness import RandomSource, SeededRandom, SystemRandom, random_source
from coterie.errors import PrivacyError

SOURCES: dict[str, Callable[[], RandomSource]] = {
    "system": SystemRandom,
    "seeded": lambda: SeededRandom(7),
    "settings without a seed": lambda: random_source(None),
    "settings with a seed": lambda: random_source(7),
}


@pytest.fixture(params=SOURCES.values(), ids=SOURCES.keys())
def source(request: pytest.FixtureRequest) -> RandomSource:
    made: RandomSource = request.param()
    return made


def drawn(source: RandomSource, purpose: str, count: int = 64) -> bytes:
    return source.stream(purpose).read(count).tobytes()


def test_a_source_is_private_exactly_if_it_never_gives_a_stream_twice(source: RandomSource) -> None:
    repeats = drawn(source, "lot 1") == drawn(source, "lot 1")
    assert source.private is not repeats


def test_two_sources_of_one_kind_repeat_each_other_only_if_they_are_not_private(
    request: pytest.FixtureRequest, source: RandomSource
) -> None:
    other = SOURCES[request.node.callspec.id]()
    assert source.private is not (drawn(source, "noise 1") == drawn(other, "noise 1"))


def test_streams_of_different_purposes_have_nothing_in_common(source: RandomSource) -> None:
    streams = [np.frombuffer(drawn(source, purpose, 4096), np.uint8) for purpose in ("lot 1", "lot 2", "noise 1")]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        agree = int((streams[first] == streams[second]).sum())
        assert agree < 4096 / 256 + 10 * 4  # 16 expected, standard deviation 4


def test_a_stream_goes_on_where_it_was(source: RandomSource) -> None:
    stream = source.stream("noise 1")
    parts = [stream.read(count).tobytes() for count in (1, 15, 16, 17, 1 << 20)]
    assert len({part[:16] for part in parts[2:]}) == 3
    values = np.frombuffer(parts[-1], np.uint8)
    assert abs(float(values.mean()) - 127.5) < 6 * 73.9 / 2**10  # six standard deviations of the mean


def test_integers_and_words_fill_their_range(source: RandomSource) -> None:
    stream = source.stream("lot 1")
    words = stream.uint64(4096)
    assert words.dtype == np.uint64
    assert int(words.max()) > 2**63 > int(words.min())
    assert {stream.integer(8) for _ in range(4096)} == set(range(256))
    assert 0 <= stream.integer(64) < 2**64


def test_global_generators_neither_decide_a_stream_nor_are_moved_by_it(source: RandomSource) -> None:
    def seeded() -> bytes:
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        return drawn(source, "dropout 1")

    assert source.private is (seeded() != seeded())
    assert random.random() == random.Random(0).random()
    assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(0)))
    assert float(np.random.rand()) == float(np.random.RandomState(0).rand())


def test_a_stream_does_not_run_in_a_forked_process(source: RandomSource, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = source.stream("noise 1")
    parent = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: parent + 1)
    with pytest.raises(PrivacyError) as refused:
        stream.read(1)
    assert refused.value.code == "dp-forked-stream"
