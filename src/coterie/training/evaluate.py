"""Held-out loss, sequence by sequence, and whether one model is better than another beyond chance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from coterie.errors import DataError
from coterie.ranks.ranks import Alone, Ranks
from coterie.storage import replacing, writing
from coterie.training.data.packing import Sequences
from coterie.training.loop import sequence_losses, to_device


@dataclass(frozen=True)
class Evaluation:
    """Losses on held-out text.

    Attributes:
        loss_S: summed cross-entropy of each sequence in nats, float64.
        tokens_S: predicted tokens of each sequence.
        right_S: bool, whether the likeliest class is the sequence's, where classes are learnt by label words.
    """

    loss_S: Tensor
    tokens_S: Tensor
    right_S: Tensor | None = None

    @property
    def accuracy(self) -> float | None:
        """Share of sequences whose class is found; None where there are no classes."""
        return None if self.right_S is None else float(self.right_S.double().mean())

    @property
    def loss(self) -> float:
        """Mean per token, nats: long sequences weigh more."""
        return float(self.loss_S.sum() / self.tokens_S.sum())

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def tokens(self) -> int:
        return int(self.tokens_S.sum())

    def save(self, path: Path) -> None:
        """Keep the losses of all sequences, for later comparison.

        Raises:
            CheckpointError: the disk is full or broken.
        """
        with writing(path), replacing(path) as aside:
            right = {} if self.right_S is None else {"right": self.right_S}
            save_file({"loss": self.loss_S, "tokens": self.tokens_S, **right}, aside)

    @classmethod
    def load(cls, path: Path) -> Evaluation:
        """What `save` wrote.

        Raises:
            DataError: there is no such file.
        """
        if not path.is_file():
            raise DataError(
                f"There is no evaluation {path}.",
                code="data-no-evaluation",
                fix="the run has not finished, or has no data.test: see `coterie eval`",
            )
        saved = load_file(path)
        return cls(saved["loss"], saved["tokens"], saved.get("right"))


@torch.no_grad()
def evaluate(
    model: nn.Module, sequences: Sequences, *, batch_size: int = 8, ranks: Ranks | None = None
) -> Evaluation:
    """Loss of every sequence, with dropout off. The model is put back into the mode it was in.

    Args:
        model: computes them.
        sequences: all of them.
        batch_size: sequences that are computed together.
        ranks: share the batches, and all call this; None: this process alone.

    Raises:
        RankError: a rank is gone.
    """
    ranks = ranks or Alone()
    device = next(model.parameters()).device
    was_training = model.training
    words = sequences.words
    batches = batches_of(len(sequences), batch_size)

    def own() -> list[tuple[list[float], list[int], list[bool]]]:
        found = []
        for first in range(0, len(batches), ranks.world):
            # Experts may be spread over ranks: whoever has no batch left computes the last one, for the others' sake.
            rows = batches[min(first + ranks.rank, len(batches) - 1)]
            batch = to_device(sequences.batch(rows), device)
            loss_B, tokens_B = sequence_losses(model, batch, words)
            right = [] if words is None else (words.scores(model, batch).argmax(1) == words.classes(batch)).tolist()
            found.append((loss_B.double().cpu().tolist(), tokens_B.cpu().tolist(), right))
        return found

    model.eval()
    try:
        by_rank = ranks.together("evaluation", own)
    finally:
        model.train(was_training)
    in_order = [by_rank[number % ranks.world][number // ranks.world] for number in range(len(batches))]
    losses, tokens, right = ([value for batch in in_order for value in batch[part]] for part in (0, 1, 2))
    return Evaluation(
        torch.tensor(losses, dtype=torch.float64),
        torch.tensor(tokens, dtype=torch.int64),
        None if words is None else torch.tensor(right, dtype=torch.bool),
    )


def batches_of(sequences: int, batch_size: int) -> list[range]:
    """Which sequences an evaluation computes together, in its order."""
    return [range(start, min(start + batch_size, sequences)) for start in range(0, sequences, batch_size)]


@dataclass(frozen=True)
class Difference:
    """How much lower one model's loss is, with its 95 % interval.

    Attributes:
        mean: loss of a minus loss of b, nats per token; negative: a is better.
        low, high: bounds of the interval.
    """

    mean: float
    low: float
    high: float

    @property
    def is_tie(self) -> bool:
        """Zero lies inside the interval."""
        return self.low <= 0.0 <= self.high


def paired_bootstrap(a: Evaluation, b: Evaluation, *, resamples: int = 2000, seed: int = 0) -> Difference:
    """Compare two models on the same sequences.

    Sequences are resampled with replacement, the same ones for both models, and the difference of the token-level
    losses is taken each time; the interval is the middle 95 % (Efron's percentile method).

    Raises:
        DataError: the two were not measured on the same sequences.
    """
    if a.tokens_S.shape != b.tokens_S.shape or not torch.equal(a.tokens_S, b.tokens_S):
        raise DataError(
            f"The two evaluations cover different text ({a.tokens} and {b.tokens} tokens).",
            code="data-unpaired",
            why="a paired interval needs both models measured on the same sequences",
            fix="evaluate both with the same test files, tokenizer and sequence length",
        )
    difference_S, weight_S = a.loss_S - b.loss_S, a.tokens_S.double()
    size = difference_S.shape[0]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.empty(resamples, dtype=torch.float64)
    for index in range(resamples):
        rows = torch.randint(size, (size,), generator=generator)
        drawn[index] = difference_S[rows].sum() / weight_S[rows].sum()
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Difference(float(difference_S.sum() / weight_S.sum()), low, high)
