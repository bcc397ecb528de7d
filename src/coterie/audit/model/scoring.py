"""How well a causal model predicts every token of some sequences: one pass, all that membership scores are made of.

Shape letters: S sequences, P predicted tokens of all sequences, one sequence after the other, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

_TOKENS, _LOGITS = 4096, 1 << 25
"""Most tokens, and most logits, of one forward pass; a single sequence may have more."""
_LEAST_DEVIATION = 1e-6


@dataclass(frozen=True)
class TokenScores:
    """What a model says of each token that it predicts, in float32.

    Attributes:
        log_p_P: log-probability of the token that came, nats.
        surprise_P: the same, less the mean and over the standard deviation of the log-probability of a token drawn
            from the prediction.
        first_P: bool, whether it was the model's first choice.
        starts: [S + 1], where each sequence begins and the last ends.
    """

    log_p_P: Tensor
    surprise_P: Tensor
    first_P: Tensor
    starts: Tensor

    @property
    def counts_S(self) -> Tensor:
        """Predicted tokens of each sequence: one less than it has."""
        return torch.diff(self.starts)

    def of(self, sequence: int) -> slice:
        """The places of one sequence."""
        return slice(int(self.starts[sequence]), int(self.starts[sequence + 1]))

    def loss_S(self) -> Tensor:
        """Summed cross-entropy of each sequence, nats, float64."""
        owner_P = torch.repeat_interleave(torch.arange(len(self.counts_S)), self.counts_S)
        return torch.zeros(len(self.counts_S), dtype=torch.float64).index_add_(0, owner_P, -self.log_p_P.double())

    def front(self, sequences: int) -> TokenScores:
        """The first so many sequences."""
        starts = self.starts[: sequences + 1]
        end = int(starts[-1])
        return TokenScores(self.log_p_P[:end], self.surprise_P[:end], self.first_P[:end], starts)


@torch.no_grad()
def score_tokens(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> TokenScores:
    """Score every token but the first of each sequence, with dropout off.

    A sequence's values do not depend on the others, up to rounding.

    Args:
        model: a causal language model, on any device; put back into the mode it was in.
        sequences: token ids, at least two each.
    """
    counts_S = torch.tensor([len(ids) - 1 for ids in sequences], dtype=torch.int64)
    starts = torch.cat([counts_S.new_zeros(1), counts_S.cumsum(0)])
    size = int(starts[-1])
    log_p_P, surprise_P = (torch.zeros(size) for _ in range(2))
    first_P = torch.zeros(size, dtype=torch.bool)
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    try:
        for rows in _batches(counts_S + 1, int(model.config.get_text_config().vocab_size)):
            lengths_B = counts_S[rows] + 1
            ids_BT = torch.nn.utils.rnn.pad_sequence([torch.tensor(sequences[row]) for row in rows], batch_first=True)
            mask_BT = torch.arange(ids_BT.shape[1]) < lengths_B[:, None]
            logits = model(
                input_ids=ids_BT.to(device), attention_mask=mask_BT.long().to(device), use_cache=False
            ).logits
            kept_BT = mask_BT[:, 1:]
            # Row-major order of the mask is sequence by sequence.
            places = torch.cat([torch.arange(int(starts[row]), int(starts[row + 1])) for row in rows])
            found = token_statistics(logits[:, :-1][kept_BT.to(device)], ids_BT[:, 1:][kept_BT].to(device))
            for store, values in zip((log_p_P, surprise_P, first_P), found, strict=True):
                store[places] = values.to("cpu", store.dtype)
    finally:
        model.train(was_training)
    return TokenScores(log_p_P, surprise_P, first_P, starts)


def token_statistics(logits_PV: Tensor, ids_P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability, standardised log-probability (Zhang et al. 2024, arXiv:2404.02936) and whether it was ranked
    first, of the tokens that came: float32 [P] twice, bool [P].

    A prediction without any doubt has no spread; its token then scores as if the spread were 1e-6.
    """
    log_p_PV = torch.log_softmax(logits_PV.float(), -1)
    p_PV = log_p_PV.exp()
    weighted_PV = (p_PV * log_p_PV).nan_to_num_(0.0)  # 0 log 0
    mean_P = weighted_PV.sum(-1)
    variance_P = (weighted_PV * log_p_PV.clamp_min(-1e6)).sum(-1) - mean_P**2
    log_p_P = log_p_PV.gather(-1, ids_P[:, None])[:, 0]
    deviation_P = variance_P.clamp_min(0).sqrt().clamp_min(_LEAST_DEVIATION)
    return log_p_P, (log_p_P - mean_P) / deviation_P, log_p_PV.argmax(-1) == ids_P


def _batches(lengths_S: Tensor, vocabulary: int) -> Iterator[list[int]]:
    """Sequences of about the same length together, as many as fit."""
    limit = max(1, min(_TOKENS, _LOGITS // vocabulary))
    batch: list[int] = []
    for row in torch.argsort(lengths_S, stable=True).tolist():
        if batch and (len(batch) + 1) * int(lengths_S[row]) > limit:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
