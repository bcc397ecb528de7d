"""What the choice of experts alone gives away: no vector is looked at, only which experts a token went to.

Shape letters: R rows, E experts that are seen (of one layer, or of several side by side), V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

_HIDDEN = 64


def routed(experts_PK: Tensor, weights_PK: Tensor, num_experts: int) -> Tensor:
    """The routing weight of every expert, 0 where it was not chosen, [P, E]."""
    chosen = torch.zeros(len(experts_PK), num_experts + 1)
    inside = (experts_PK >= 0) & (experts_PK < num_experts)
    return chosen.scatter_(1, experts_PK.where(inside, num_experts), weights_PK)[:, :num_experts]


@dataclass(frozen=True)
class Choices:
    """For each set of experts its commonest token in known text.

    Attributes:
        table: token by set, the set as bytes.
        otherwise: the guess for a set that was never seen.
    """

    table: dict[bytes, int]
    otherwise: int

    @classmethod
    def fit(cls, routed_PE: Tensor, token_P: Tensor, log_prior_V: Tensor) -> Choices:
        """Count tokens by set. Rows without any expert here tell nothing and are left out."""
        seen_P = (routed_PE > 0).any(1)
        sets, index_P = torch.unique((routed_PE[seen_P] > 0).to(torch.uint8), dim=0, return_inverse=True)
        counts = torch.zeros(len(sets), len(log_prior_V))
        counts.index_put_((index_P, token_P[seen_P]), torch.ones(len(index_P)), accumulate=True)
        best = (counts + log_prior_V.exp()).argmax(1)  # of equally common ones the one that is common elsewhere
        table = {each.numpy().tobytes(): int(token) for each, token in zip(sets, best, strict=True)}
        return cls(table, int(log_prior_V.argmax()))

    def guess(self, routed_RE: Tensor) -> Tensor:
        """The likeliest token of each row, [R]."""
        sets = (routed_RE > 0).to(torch.uint8)
        return torch.tensor([self.table.get(each.numpy().tobytes(), self.otherwise) for each in sets])


@dataclass(frozen=True)
class Network:
    """A small network that reads routing weights, of one layer or of several side by side."""

    net: nn.Module

    @classmethod
    def fit(
        cls, routed_PE: Tensor, token_P: Tensor, log_prior_V: Tensor, *, seed: int, epochs: int = 3, batch: int = 512
    ) -> Network:
        """Train it on known text."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            last = nn.Linear(_HIDDEN, len(log_prior_V))
            net = nn.Sequential(nn.Linear(2 * routed_PE.shape[1], _HIDDEN), nn.ReLU(), last)
        with torch.no_grad():
            last.bias.copy_(log_prior_V)
        optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
        generator = torch.Generator().manual_seed(seed)
        seen_PF = _features(routed_PE)
        for _ in range(epochs):
            for rows in torch.split(torch.randperm(len(token_P), generator=generator), batch):
                optimizer.zero_grad()
                torch.autograd.backward(nn.functional.cross_entropy(net(seen_PF[rows]), token_P[rows]))
                optimizer.step()
        return cls(net.requires_grad_(False))

    def guess(self, routed_RE: Tensor) -> Tensor:
        """The likeliest token of each row, [R]."""
        scores: Tensor = self.net(_features(routed_RE))
        return scores.argmax(1)


def _features(routed: Tensor) -> Tensor:
    """Weights, and which experts are chosen at all."""
    return torch.cat([routed, (routed > 0).float()], 1)
