"""How far a planted secret stands out among all that it could have been, and whether the model writes it by itself.

Shape letters: A alternatives, S sequences.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coterie.audit.metrics import Estimate
from coterie.audit.model.canaries import Canary, code
from coterie.audit.model.scoring import score_tokens
from coterie.errors import AuditError

ABSENT = 1 / math.log(2)
"""Exposure, in bits, that a secret has on average which the model never saw: 1.44."""
TRIES = 1000
"""Samples that an attacker is given to see a secret once."""


def exposure(rank: float, alternatives: int) -> float:
    """log2 of the number of codes compared over the secret's rank among them (Carlini et al. 2019), bits.

    Between 0 and log2(alternatives + 1). Of a secret that the model never saw the rank is uniform, and the exposure
    averages log2(e) = 1.44.

    Raises:
        AuditError: a rank outside 1 to ``alternatives`` + 1.
    """
    if not 1 <= rank <= alternatives + 1:
        raise AuditError(
            f"Rank {rank} among {alternatives} alternatives is none.",
            code="audit-counts",
            fix="count ranks from 1, to one more than there are alternatives",
        )
    return math.log2(alternatives + 1) - math.log2(rank)


def rank_of(secret_loss: float, loss_A: Tensor) -> float:
    """1 for a secret likelier than every alternative; ties count half, so that a model that knows nothing ranks none
    first."""
    return 1 + float((loss_A < secret_loss).sum()) + float((loss_A == secret_loss).sum()) / 2


@dataclass(frozen=True)
class Exposed:
    """What a model gives away of one secret.

    Attributes:
        copies: how often it was trained on in a pass.
        bits: its exposure.
        first: it is likelier than every alternative.
        greedy: the model writes it after the prefix, always taking the likeliest token.
        chance: that one sample at temperature 1 after the prefix begins with it.
    """

    copies: int
    bits: float
    first: bool
    greedy: bool
    chance: float

    @property
    def sampled(self) -> float:
        """Chance that `TRIES` samples show it at least once."""
        return -math.expm1(TRIES * math.log1p(-min(self.chance, 1 - 1e-15)))


def expose(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    secrets: Sequence[Canary],
    *,
    alternatives: int,
    seed: int,
) -> list[Exposed]:
    """Rank every secret among codes drawn as it was.

    What a model would write is read from the probabilities that it gives to the secret itself: greedily it is written
    exactly when each of its tokens is the likeliest after those before it, so nothing need be generated.
    """
    draw = random.Random(seed)
    found = []
    sequences: list[list[int]] = []
    for canary in secrets:
        others: dict[str, None] = {}
        while len(others) < alternatives:
            drawn = code(draw)
            if drawn != canary.secret:
                others[drawn] = None
        texts = [canary.text, *(canary.prefix + other for other in others)]
        sequences += tokenizer(texts, add_special_tokens=True, verbose=False)["input_ids"]
    scores = score_tokens(model, sequences)
    block = alternatives + 1
    for number, canary in enumerate(secrets):
        own = range(number * block, (number + 1) * block)
        shared = _shared([sequences[row] for row in own])
        loss_A = torch.tensor([-float(scores.log_p_P[scores.of(row)][shared - 1 :].sum()) for row in own])
        first_P = scores.first_P[scores.of(own[0])][shared - 1 :]
        rank = rank_of(float(loss_A[0]), loss_A[1:])
        found.append(
            Exposed(
                canary.copies,
                exposure(rank, alternatives),
                rank == 1,
                bool(first_P.all()),
                math.exp(-float(loss_A[0])),
            )
        )
    return found


def _shared(sequences: Sequence[Sequence[int]]) -> int:
    """Tokens that all begin with, at least one."""
    length = min(map(len, sequences)) - 1
    first = sequences[0]
    return next(
        (place for place in range(1, length) if any(ids[place] != first[place] for ids in sequences)), max(1, length)
    )


def mean_bits(found: Sequence[Exposed], alternatives: int) -> Estimate:
    """Mean exposure with the interval of Student's t, inside what an exposure can be.

    Raises:
        AuditError: fewer than two secrets.
    """
    values = [one.bits for one in found]
    if len(values) < 2:
        raise AuditError(f"{len(values)} secrets have no mean exposure.", code="audit-too-few", fix="plant 5 or more")
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
    reach = float(stats.t.ppf(0.975, len(values) - 1)) * spread
    ceiling = math.log2(alternatives + 1)
    return Estimate(mean, max(0.0, mean - reach), min(ceiling, mean + reach), len(values))


def chance_of(found: Sequence[Exposed]) -> float:
    """Chance of so much exposure together where the model saw none of the secrets.

    The rank of an unseen secret is uniform, so its exposure is exponential with mean 1 / ln 2, and the sum of n has a
    gamma law; the grid of ranks only makes large values rarer.
    """
    return float(stats.gamma.sf(sum(one.bits for one in found) * math.log(2), len(found)))
