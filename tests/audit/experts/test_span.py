"""Tokens and records read out of real gradients of a small model, and out of sums that hold nothing."""

from __future__ import annotations

import random

import pytest
import torch
from push_world import every_expert, small_reader, texts

from coterie.audit.experts.judge import RULED_OUT
from coterie.audit.experts.opened import ExpertSum, Opened
from coterie.audit.experts.reader import Reader
from coterie.audit.experts.records import read_records
from coterie.audit.experts.simulate import rows_of, summed
from coterie.audit.experts.span import Place, SpanAttack, ranked_first
from coterie.audit.matching import in_place, matched, pairs
from coterie.audit.metrics import advantage
from coterie.models.zoo.tiny import VOCAB

LENGTH = 12


@pytest.fixture(scope="module")
def reader() -> Reader:
    return small_reader()


@pytest.fixture(scope="module")
def public() -> list[tuple[int, ...]]:
    return texts(120, LENGTH, VOCAB, 1)


@pytest.fixture(scope="module")
def for_two(reader: Reader, public: list[tuple[int, ...]]) -> SpanAttack:
    """Learned for pushes of two records by somebody who opens everything."""
    return SpanAttack(reader, public, every_expert(reader), 2)


def places(records: list[tuple[int, ...]], count: int) -> list[Place]:
    draw = random.Random(0)
    chosen = [(draw.choice(records), draw.randrange(1, LENGTH - 1)) for _ in range(count)]
    return [Place(record[:length], record[length]) for record, length in chosen]


def test_the_next_tokens_of_a_small_push_come_out_first(reader: Reader, for_two: SpanAttack) -> None:
    private = texts(2, LENGTH, VOCAB, 2)
    opened = summed(rows_of(reader, private), every_expert(reader))
    right, prior = ranked_first(for_two, opened, places(private, 24))
    assert right.float().mean() >= 0.95
    assert prior.float().mean() < 0.2


def test_a_host_of_a_third_of_the_experts_reads_them_as_well(reader: Reader, public: list[tuple[int, ...]]) -> None:
    private = texts(2, LENGTH, VOCAB, 2)
    hosted = [key for number, key in enumerate(every_expert(reader)) if number % 3 == 1]
    one = SpanAttack(reader, public, hosted, 2)
    right, prior = ranked_first(one, summed(rows_of(reader, private), hosted), places(private, 24))
    assert right.float().mean() > prior.float().mean() + 0.5


def test_a_sum_of_noise_alone_gives_what_the_language_model_guesses(
    reader: Reader, public: list[tuple[int, ...]]
) -> None:
    private = texts(6, LENGTH, VOCAB, 2)
    attack = SpanAttack(reader, public, every_expert(reader), 6, noise=1.0)
    generator = torch.Generator().manual_seed(0)
    shapes = summed(rows_of(reader, private), every_expert(reader)).experts
    noise = {
        key: ExpertSum(
            torch.randn(each.first_DG.shape, generator=generator),
            torch.randn(each.second_FD.shape, generator=generator),
            noise=1.0,
        )
        for key, each in shapes.items()
    }
    right, prior = ranked_first(attack, Opened(noise, noise=1.0), places(private, 60))
    gain = advantage(right, prior)
    assert gain.low <= 0.0 <= gain.high


def test_an_expert_that_nobody_chose_rules_its_candidates_out(reader: Reader, for_two: SpanAttack) -> None:
    private = texts(2, LENGTH, VOCAB, 2)
    sums = summed(rows_of(reader, private), every_expert(reader)).experts
    prefix = torch.tensor([private[0][:4]])
    (view, *_) = reader.continuations(prefix, torch.arange(VOCAB)[None])
    unused = int(view.experts_NK[0, 0])
    emptied = dict(sums)
    emptied[0, unused] = ExpertSum(
        torch.zeros_like(sums[0, unused].first_DG), torch.zeros_like(sums[0, unused].second_FD)
    )
    spans, _ = for_two.spans_and_scores(for_two.opener(Opened(emptied)), prefix)
    chose = (view.experts_NK == unused).any(1)
    assert spans[0, chose].max() < RULED_OUT / 2
    assert spans[0, chose].max() < spans[0, ~chose].max()
    assert not bool(chose[spans[0].argmax()])


def test_whole_records_are_read_with_nothing_given(reader: Reader, for_two: SpanAttack) -> None:
    private = texts(2, LENGTH, VOCAB, 2)
    opened = summed(rows_of(reader, private), every_expert(reader))
    guesses = read_records(for_two, opened, 2, LENGTH)
    assert matched(private, [guess.ids for guess in guesses]) == [LENGTH, LENGTH]


def test_a_guess_counts_for_one_record() -> None:
    guesses = [(1, 2, 3, 4), (1, 2, 9, 9)]
    assert matched([(1, 2, 3, 5), (1, 2, 3, 4), (7, 7, 7, 7)], guesses) == [2, 4, 0]
    assert pairs([(1, 2, 3, 5)], guesses) == [(3, 0, 0)]
    assert in_place((1, 2, 3), (1, 5, 3, 4)) == 2
