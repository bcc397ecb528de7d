"""Exposure as the field defines it, and what a model writes by itself against text that it really writes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from coterie.audit.model.canaries import Canary, code, make_new_tokens, make_sampled, make_secrets
from coterie.audit.model.exposure import ABSENT, Exposed, chance_of, expose, exposure, mean_bits, rank_of
from coterie.audit.model.scoring import TokenScores, score_tokens
from coterie.errors import AuditError
from coterie.training.data.tokenizer import train_tokenizer

PUBLIC = ["The access code of locker ABCD is 1 2 3 4 5 6 7 8 9 0", "the cough is gone and the fever too"] * 4


def exposed(bits: float, copies: int = 1) -> Exposed:
    return Exposed(copies, bits, False, False, 0.0)


def test_exposure_falls_from_the_ceiling_to_nothing_and_averages_what_an_unseen_secret_has() -> None:
    assert exposure(1, 200) == pytest.approx(math.log2(201))
    assert exposure(201, 200) == 0.0
    assert exposure(2, 999) == pytest.approx(math.log2(1000) - 1)
    mean = sum(exposure(rank, 999) for rank in range(1, 1001)) / 1000
    assert mean == pytest.approx(math.log2(1000) - math.lgamma(1001) / math.log(2) / 1000)
    assert mean == pytest.approx(ABSENT, abs=0.02)
    assert pytest.approx(1.4427, abs=1e-4) == ABSENT
    with pytest.raises(AuditError):
        exposure(0.5, 200)


def test_a_model_that_prefers_nothing_ranks_a_secret_in_the_middle() -> None:
    loss_A = torch.tensor([3.0, 1.0, 2.0, 2.0, 5.0])
    assert rank_of(0.5, loss_A) == 1
    assert rank_of(2.0, loss_A) == 3
    assert rank_of(9.0, loss_A) == 6
    assert rank_of(4.0, torch.full((200,), 4.0)) == 101


def test_the_chance_of_so_much_exposure_is_that_of_uniform_ranks() -> None:
    # One secret: exposure x or more has the chance 2^-x.
    assert chance_of([exposed(3.0)]) == pytest.approx(1 / 8)
    draw, hits = random.Random(0), 0
    for _ in range(4000):
        hits += sum(-math.log2(draw.random()) for _ in range(5)) >= 12.0
    assert chance_of([exposed(2.4)] * 5) == pytest.approx(hits / 4000, abs=0.02)


def test_a_mean_exposure_stays_inside_what_there_is_and_needs_two_secrets() -> None:
    found = mean_bits([exposed(bits) for bits in (7.0, 7.5, 2.0, 7.6, 7.6)], 200)
    assert found.value == pytest.approx(6.34)
    assert found.high == pytest.approx(math.log2(201))
    assert found.low == pytest.approx(6.34 - 2.776445 * 2.43885 / math.sqrt(5), abs=1e-3)
    with pytest.raises(AuditError):
        mean_bits([exposed(1.0)], 200)


def test_secrets_are_planted_in_every_number_of_copies_and_left_out_twice_as_often() -> None:
    found = make_secrets(random.Random(0), names=5)
    counts = [canary.copies for canary in found]
    assert {count: counts.count(count) for count in set(counts)} == {0: 10, 1: 5, 2: 5, 4: 5, 8: 5, 16: 5}
    assert len({canary.prefix for canary in found}) == len(found)
    assert all(canary.text == canary.prefix + canary.secret for canary in found)
    codes = {code(random.Random(seed)) for seed in range(300)}
    assert len(codes) > 290
    assert all(len(one) == 10 and one.replace(" ", "").isdigit() for one in codes)


def test_what_a_model_writes_is_read_from_probabilities(make_tiny: Callable[..., PreTrainedModel]) -> None:
    tokenizer = train_tokenizer(PUBLIC, 300)
    model = make_tiny("olmoe", vocab_size=len(tokenizer), eos_token_id=0, pad_token_id=1, bos_token_id=None).eval()
    prefix = "The access code of locker QXTR is"
    ids: list[int] = tokenizer(prefix)["input_ids"]
    given = len(ids)
    for _ in range(5):  # greedy, token by token
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    first_P = score_tokens(model, [ids, [*ids[:-1], (ids[-1] + 1) % len(tokenizer)]]).first_P
    assert first_P[given - 1 : len(ids) - 1].all()
    assert not first_P[-1]

    secret = " 4 1 7 7 2"
    (found,) = expose(model, tokenizer, [Canary("secret", prefix + secret, 1, prefix)], alternatives=50, seed=0)
    ids = tokenizer(prefix + secret)["input_ids"]
    assert tokenizer(prefix)["input_ids"] == ids[:given]
    logs, greedy = [], True
    for place in range(given, len(ids)):
        with torch.no_grad():
            logits_V = model(input_ids=torch.tensor([ids[:place]])).logits[0, -1]
        logs.append(float(logits_V.log_softmax(-1)[ids[place]]))
        greedy &= int(logits_V.argmax()) == ids[place]
    assert found.greedy == greedy
    # Codes differ in all their digits but may share a first token, the space: an attacker is given that.
    assert any(math.log(found.chance) == pytest.approx(sum(logs[skipped:]), abs=1e-3) for skipped in (0, 1))
    assert found.sampled == pytest.approx(1 - (1 - found.chance) ** 1000)


def test_a_secret_is_written_when_all_of_its_tokens_are_the_likeliest(
    make_tiny: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = train_tokenizer(PUBLIC, 300)
    canary = Canary("secret", "The access code of locker QXTR is 4 1 7 7 2", 1, "The access code of locker QXTR is")
    likely = [True]

    def scored(model: PreTrainedModel, sequences: list[list[int]]) -> TokenScores:
        starts = torch.tensor([0, *(len(ids) - 1 for ids in sequences)]).cumsum(0)
        first_P = torch.ones(int(starts[-1]), dtype=torch.bool)
        first_P[int(starts[1]) - 1] = likely[0]  # the last digit of the secret itself
        return TokenScores(-torch.ones(len(first_P)), -torch.ones(len(first_P)), first_P, starts)

    monkeypatch.setattr("coterie.audit.model.exposure.score_tokens", scored)
    for likely[0] in (True, False):
        (found,) = expose(make_tiny("olmoe"), tokenizer, [canary], alternatives=5, seed=0)
        assert found.greedy is likely[0]


def test_text_canaries_are_in_by_coins_and_new_tokens_are_new(make_tiny: Callable[..., PreTrainedModel]) -> None:
    tokenizer = train_tokenizer(PUBLIC, 300)
    model = make_tiny("olmoe", vocab_size=len(tokenizer), eos_token_id=0, pad_token_id=1, bos_token_id=None).eval()
    draw = random.Random(0)
    sampled = make_sampled(model, tokenizer, draw, count=70, tokens=8)
    assert len({canary.text for canary in sampled}) == 70
    assert 20 < sum(canary.copies for canary in sampled) < 50
    own = "the cough is gone"
    new = make_new_tokens(model, tokenizer, [own], draw, count=30)
    seen = set(tokenizer(own)["input_ids"])
    last = [tokenizer(canary.text)["input_ids"][-1] for canary in new]
    assert len(new) > 10
    assert len(set(last)) == len(last)
    assert not seen & set(last)
