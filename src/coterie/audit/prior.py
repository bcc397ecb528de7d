"""What could be guessed of a text without receiving anything: the public model's guess, and the commonest token.

An attack is worth what it finds beyond this, on the same places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_BATCH = 16


@dataclass(frozen=True)
class Unigram:
    """How often each token occurs in public text.

    Attributes:
        log_V: log of the smoothed shares, float32; ids that never occur share the weight of one token of each.
    """

    log_V: Tensor

    @classmethod
    def of(cls, public_ids: Tensor, vocabulary: int) -> Unigram:
        """Counted in public text."""
        counts_V = torch.bincount(public_ids, minlength=vocabulary).double() + 1.0 / vocabulary
        return cls((counts_V / counts_V.sum()).log().float())

    @property
    def commonest(self) -> int:
        """The guess of somebody who knows nothing of a place."""
        return int(self.log_V.argmax())


@dataclass(frozen=True)
class LanguagePrior:
    """The public model's guesses at the places of some texts, each given the true text before it.

    Attributes:
        guess_P: the likeliest token; at a text's first place the commonest token of public text.
        rank_P: the rank of the true token among the model's guesses, from 0; at a first place by public frequency.
        surprise_P: minus log likelihood of the true token, nats.
    """

    guess_P: Tensor
    rank_P: Tensor
    surprise_P: Tensor

    def hits(self, best: int = 1) -> Tensor:
        """Bool [P]: the truth is among the ``best`` first guesses."""
        return self.rank_P < best


@torch.no_grad()
def language_prior(model: nn.Module, texts: Sequence[Sequence[int]], unigram: Unigram) -> LanguagePrior:
    """Ask the public model for each place of some texts.

    Args:
        model: a causal language model, ``model(input_ids=..., attention_mask=...).logits``; its mode is put back.
        texts: token ids; places count through them in order.
        unigram: for first places, before which there is nothing.

    Raises:
        IndexError: an id is not in the vocabulary.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    found: list[tuple[Tensor, Tensor, Tensor]] = [(torch.empty(0), torch.empty(0), torch.empty(0))] * len(texts)
    order = sorted((number for number, text in enumerate(texts) if text), key=lambda number: len(texts[number]))
    try:
        for start in range(0, len(order), _BATCH):
            some = order[start : start + _BATCH]
            ids_BT = torch.nn.utils.rnn.pad_sequence([torch.tensor(texts[number]) for number in some], True)
            lengths = [len(texts[number]) for number in some]
            mask_BT = torch.arange(ids_BT.shape[1]) < torch.tensor(lengths)[:, None]
            logits_BTV = model(input_ids=ids_BT.to(device), attention_mask=mask_BT.long().to(device)).logits.cpu()
            for row, number in enumerate(some):
                log_TV = logits_BTV[row, : lengths[row] - 1].float().log_softmax(-1)
                found[number] = _guesses(torch.cat([unigram.log_V[None, : log_TV.shape[1]], log_TV]), ids_BT[row])
    finally:
        model.train(training)
    guess, rank, surprise = zip(*found, strict=True) if found else ((), (), ())
    return LanguagePrior(torch.cat(guess).long(), torch.cat(rank).long(), torch.cat(surprise).float())


def _guesses(log_TV: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    true_T1 = log_TV.gather(1, ids[: len(log_TV), None])
    return log_TV.argmax(1), (log_TV > true_T1).sum(1), -true_T1.squeeze(1)
