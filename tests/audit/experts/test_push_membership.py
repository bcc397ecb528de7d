"""Membership in a sum, clipped gradients and Bayes weights, against plain autograd and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from push_world import every_expert, small_model, small_reader, texts
from torch.nn import functional as F

from coterie.audit.experts import bayes
from coterie.audit.experts.bayes import Blank, candidates_of, filled, weights
from coterie.audit.experts.clipped import factors
from coterie.audit.experts.membership import Metric, RecordScores, products, score
from coterie.audit.experts.opened import ExpertSum, Opened
from coterie.audit.experts.reader import Reader
from coterie.audit.experts.simulate import rows_of, summed
from coterie.audit.metrics import Scores, auc
from coterie.models.grouped import as_EIO
from coterie.models.zoo.tiny import VOCAB

LENGTH = 10


@pytest.fixture(scope="module")
def reader() -> Reader:
    return small_reader()


def noise_like(opened: Opened, std: float, seed: int) -> Opened:
    generator = torch.Generator().manual_seed(seed)
    return Opened(
        {
            key: ExpertSum(
                std * torch.randn(each.first_DG.shape, generator=generator),
                std * torch.randn(each.second_FD.shape, generator=generator),
                std,
            )
            for key, each in opened.experts.items()
        },
        noise=std,
    )


def added(one: Opened, other: Opened, noise: float) -> Opened:
    return Opened(
        {
            key: ExpertSum(
                each.first_DG + other.experts[key].first_DG, each.second_FD + other.experts[key].second_FD, noise
            )
            for key, each in one.experts.items()
        },
        noise=noise,
    )


def own_gradient(record: tuple[int, ...], mean: bool) -> dict[str, torch.Tensor]:
    """A batch of one through the plain model."""
    model = small_model()
    ids = torch.tensor([record])
    logits = model(input_ids=ids, use_cache=False).logits
    F.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="mean" if mean else "sum").backward()
    return {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


def test_where_noise_is_all_there_is_the_score_is_the_inner_product_with_the_clipped_gradient(
    reader: Reader,
) -> None:
    records = texts(3, LENGTH, VOCAB, 1)
    push = noise_like(summed(rows_of(reader, records), every_expert(reader)), 1e3, 0)
    metric = Metric(reader, texts(8, LENGTH, VOCAB, 2), 4, 1e3)
    scale = torch.tensor([0.5, 1.0, 2.0])
    found = score(reader, records, [push], metric, scale)
    for number, record in enumerate(records):
        gradient, product, size = own_gradient(record, mean=False), 0.0, 0.0
        for layer in reader.layers:
            for name, side in ((layer.layout.up_name, "first_DG"), ("down_proj", "second_FD")):
                own = as_EIO(gradient[f"{layer.name}.{name}"], layer.layout.is_transposed) * scale[number]
                for expert in range(layer.num_experts):
                    sums = getattr(push.experts[layer.index, expert], side)
                    product += float((own[expert].double() * sums.double()).sum()) / 1e6
                    size += float(own[expert].double().square().sum()) / 1e6
        assert float(found.product_SP[number, 0]) == pytest.approx(product, rel=1e-2, abs=1e-4)
        assert float(found.size_S[number]) == pytest.approx(size, rel=1e-3)


def test_the_factor_is_that_of_the_clipped_mean_over_the_records_tokens(reader: Reader) -> None:
    records = [*texts(2, LENGTH, VOCAB, 1), *texts(1, 4, VOCAB, 2), (5,)]
    found = factors(reader.model, records, clip_norm=0.5)
    for record, factor in zip(records[:3], found.tolist(), strict=False):
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in own_gradient(record, mean=True).values()))
        assert factor == pytest.approx(min(1.0, 0.5 / norm) / (len(record) - 1), rel=1e-4)
    assert found[3] == 0.0
    assert factors(reader.model, records[:1], clip_norm=1e6)[0] == pytest.approx(1 / (LENGTH - 1))


def test_members_of_a_push_score_above_others(reader: Reader) -> None:
    private = texts(60, LENGTH, VOCAB, 3)
    opened = summed(rows_of(reader, private[:12]), every_expert(reader))
    metric = Metric(reader, texts(60, LENGTH, VOCAB, 4), 12)
    ratio = score(reader, private, [opened], metric).log_ratio()
    found = auc(Scores.of(ratio[:12], ratio[12:]))
    assert found.value > 0.95


def test_in_noise_alone_members_score_as_others_do(reader: Reader) -> None:
    private = texts(120, LENGTH, VOCAB, 3)
    opened = noise_like(summed(rows_of(reader, private[:2]), every_expert(reader)), 1.0, 1)
    metric = Metric(reader, texts(40, LENGTH, VOCAB, 4), 12, 1.0)
    ratio = score(reader, private, [opened], metric).log_ratio()
    found = auc(Scores.of(ratio[:60], ratio[60:]))
    assert found.low <= 0.5 <= found.high


def test_a_record_in_gaussian_noise_is_found_as_often_as_the_trade_off_of_two_gaussians_says(reader: Reader) -> None:
    """The score of a member of the push is shifted by its own square: AUC = Phi(|g| / (sigma sqrt 2))."""
    (record,) = texts(1, LENGTH, VOCAB, 5)
    own = summed(rows_of(reader, [record]), every_expert(reader))
    length = math.sqrt(
        sum(float(e.first_DG.square().sum() + e.second_FD.square().sum()) for e in own.experts.values())
    )
    std = length / 1.5
    metric = Metric(reader, texts(8, LENGTH, VOCAB, 2), 1e-9, std)
    with_it = [added(own, noise_like(own, std, seed), std) for seed in range(100)]
    without_it = [noise_like(own, std, seed) for seed in range(100, 200)]
    value_P = score(reader, [record], [*with_it, *without_it], metric).product_SP[0]
    found = auc(Scores.of(value_P[:100], value_P[100:]))
    exact = 0.5 * (1 + math.erf(1.5 / math.sqrt(2) / math.sqrt(2)))
    assert found.low <= exact <= found.high


def test_a_lot_that_may_hold_the_record_is_a_mixture() -> None:
    scored = RecordScores(torch.tensor([[3.0, -1.0]], dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64))
    assert float(scored.log_ratio()) == pytest.approx(3.0 - 1.0 - 1.0 - 1.0)
    mixed = math.log(0.75 + 0.25 * math.exp(2.0)) + math.log(0.75 + 0.25 * math.exp(-2.0))
    assert float(scored.log_ratio(0.25)) == pytest.approx(mixed)


def test_with_little_noise_the_missing_token_is_found_and_with_much_the_language_model_decides(
    reader: Reader,
) -> None:
    private = texts(8, LENGTH, VOCAB, 6)
    scale = factors(reader.model, private, 1.0)
    blanks = [
        Blank(record, place, float(factor))
        for record, place, factor in zip(private, range(1, 1 + len(private)), scale, strict=True)
        if place < LENGTH
    ]
    public = texts(32, LENGTH, VOCAB, 7)
    other_scale = factors(reader.model, public, 1.0)
    sums = summed(rows_of(reader, private), every_expert(reader), scale)
    for noise, gained in ((1e-4, True), (30.0, False)):
        push = added(sums, noise_like(sums, noise, 3), noise)
        metric = Metric(reader, public, len(private), noise, other_scale)
        right, prior = filled(reader, blanks, [push], metric, 1.0)
        if gained:
            assert right.float().mean() >= prior.float().mean() + 0.5
        else:
            assert torch.equal(right, prior)


@pytest.mark.parametrize(("noise", "rate"), [(1e-3, 1.0), (0.02, 0.2), (30.0, 1.0)])
def test_the_likeliest_token_is_the_one_that_weighing_every_candidate_gives(
    reader: Reader, monkeypatch: pytest.MonkeyPatch, noise: float, rate: float
) -> None:
    private, public = texts(3, LENGTH, VOCAB, 6), texts(24, LENGTH, VOCAB, 7)
    scale = factors(reader.model, private, 1.0)
    sums = summed(rows_of(reader, private), every_expert(reader), scale)
    push = added(sums, noise_like(sums, noise, 3), noise)
    metric = Metric(reader, public, 3, noise, factors(reader.model, public, 1.0))
    for record, place in ((private[0], 2), (private[1], 7)):
        blank = Blank(record, place, float(scale[0]))
        tokens, before = candidates_of(reader, blank)
        # A language model with a strong opinion, so that leaving it out would be seen.
        monkeypatch.setattr(bayes, "candidates_of", lambda *_, t=tokens, b=before: (t, b + 9.0 * (t % 7 == 3)))
        whole = before.double() + 9.0 * (tokens % 7 == 3) + weights(reader, blank, tokens, [push], metric, rate)
        best, worst = (int(tokens[at]) for at in (whole.argmax(), whole.argmin()))
        for token in (best, worst):
            told = Blank((*record[:place], token, *record[place + 1 :]), place, blank.factor)
            right, _ = filled(reader, [told], [push], metric, rate)
            assert right.tolist() == [token == best]


def test_a_candidate_that_looks_worse_at_first_still_comes_first(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = torch.arange(10, 30)

    def weighed(_: Reader, __: Blank, some: torch.Tensor, *___: object) -> torch.Tensor:
        return torch.where(some < 17, -9.0, 0.0).double()  # squares take most from the seven likeliest

    monkeypatch.setattr(bayes, "candidates_of", lambda *_: (tokens, -(tokens - 10) / 10))
    monkeypatch.setattr(bayes, "products", lambda *_: torch.zeros(len(tokens), 1, dtype=torch.float64))
    monkeypatch.setattr(bayes, "weights", weighed)
    metric = Metric(reader, texts(8, LENGTH, VOCAB, 2), 4, 1.0)
    right, prior = filled(reader, [Blank((5, 17, 6), 1), Blank((5, 10, 6), 1)], [], metric, 1.0)
    assert (right.tolist(), prior.tolist()) == ([True, False], [False, True])


def test_products_are_those_of_the_whole_score(reader: Reader) -> None:
    private = texts(5, LENGTH, VOCAB, 6)
    push = summed(rows_of(reader, private[:3]), every_expert(reader)[::2])
    metric = Metric(reader, texts(24, LENGTH, VOCAB, 7), 3, 0.01)
    scale = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0])
    found = products(reader, private, [push, push], metric, scale)
    assert torch.allclose(found, score(reader, private, [push, push], metric, scale).product_SP, rtol=1e-4)


def test_candidates_hold_the_truth_and_never_tell_it_by_their_order(reader: Reader) -> None:
    (record,) = texts(1, LENGTH, VOCAB, 8)
    tokens, before = candidates_of(reader, Blank(record, 4), 10)
    assert record[4] in tokens.tolist()
    assert tokens.tolist() == sorted(tokens.tolist())
    whole = torch.tensor([record])
    log = torch.log_softmax(reader.model(input_ids=whole).logits[0, :-1].float(), -1)
    exact = float(log.gather(1, whole[0, 1:, None]).sum())
    assert float(before[tokens.tolist().index(record[4])]) == pytest.approx(exact, rel=1e-4)


def test_no_push_no_weight(reader: Reader) -> None:
    (record,) = texts(1, LENGTH, VOCAB, 8)
    metric = Metric(reader, texts(8, LENGTH, VOCAB, 2), 4, 1.0)
    tokens, _ = candidates_of(reader, Blank(record, 4), 6)
    empty = Opened({}, noise=1.0)
    assert weights(reader, Blank(record, 4), tokens, [empty], metric, 0.3).abs().max() == 0.0
