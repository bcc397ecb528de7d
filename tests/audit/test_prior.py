"""The prior is the public model's own guess, with the true text before each place and nothing else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from coterie.audit.prior import Unigram, language_prior


class Successor(nn.Module):
    """Expects every token to be followed by the next id, and behind 5 by anything alike but 0."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        logits = nn.functional.one_hot((input_ids + 1) % 6, 6).float() * 3
        logits[input_ids == 5] = torch.tensor([-1.0, 0, 0, 0, 0, 0])
        return SimpleNamespace(logits=logits)


def test_hits_ranks_and_surprise_are_those_of_the_models_own_logits() -> None:
    unigram = Unigram.of(torch.tensor([2, 2, 2, 3, 4]), 6)
    found = language_prior(Successor(), [[2, 3, 5, 0], [1, 2]], unigram)
    # Places: 2 is the commonest; 3 behind 2 is expected; 5 behind 3 is not (4 is); 0 behind 5 is last; 1 is rare
    # (2, 3 and 4 are commoner); 2 behind 1 is expected.
    assert found.guess_P[[0, 1, 2, 4, 5]].tolist() == [2, 3, 4, 2, 2]
    assert found.hits().tolist() == [True, True, False, False, False, True]
    assert found.rank_P.tolist() == [0, 0, 1, 5, 3, 0]
    assert found.hits(2).tolist() == [True, True, True, False, False, True]
    sure = torch.tensor([0.0, 0, 0, 3, 0, 0]).log_softmax(0)
    assert found.surprise_P[1].item() == pytest.approx(-sure[3].item())
    assert found.surprise_P[2].item() == pytest.approx(-torch.tensor([0.0, 0, 0, 0, 3, 0]).log_softmax(0)[5].item())


def test_the_commonest_token_is_that_of_public_text_and_no_id_is_impossible() -> None:
    unigram = Unigram.of(torch.tensor([4, 4, 1]), 6)
    assert unigram.commonest == 4
    assert unigram.log_V.exp().sum().item() == pytest.approx(1)
    assert unigram.log_V.isfinite().all()
    assert unigram.log_V[0] == unigram.log_V[5] < unigram.log_V[1]


def test_places_keep_the_order_of_the_texts_whatever_their_lengths() -> None:
    texts = [[1, 2, 3, 4], [3], [], [2, 3]]
    unigram = Unigram.of(torch.tensor([0]), 6)
    together = language_prior(Successor(), texts, unigram)
    apart = [language_prior(Successor(), [text], unigram).surprise_P for text in texts if text]
    torch.testing.assert_close(together.surprise_P, torch.cat(apart))
