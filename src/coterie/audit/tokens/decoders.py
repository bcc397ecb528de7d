"""From a vector to a token: decoders that are fitted on public text and then shown what a host received.

`Gaussian` is linear discriminant analysis with what it does not know put in: the mean of a rare class is uncertain,
and that of an unseen one wide open. So a rare token is neither ignored nor guessed everywhere, and rows that say
nothing give the prior exactly. `Softmax` is a linear classifier begun there. `Nearest` is a dictionary of vectors.

Shape letters: P rows for fitting, R rows to read, D their width, C discriminant directions, V classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

_FLOOR = 1e-6
"""Smallest spread of a direction, as a share of the mean one: directions without any carry nothing."""
_ROWS = 4096


class Decoder(Protocol):
    """Reads rows."""

    def log_posterior(self, rows_RD: Tensor) -> Tensor:
        """Log of each class's probability, [R, V], float32; every row sums to one."""
        ...


def guesses(decoder: Decoder, rows_RD: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest class of each row, and how likely it is."""
    found = [decoder.log_posterior(part).max(1) for part in torch.split(rows_RD, _ROWS)]
    if not found:
        return torch.empty(0, dtype=torch.int64), torch.empty(0)
    return torch.cat([each.indices for each in found]), torch.cat([each.values for each in found]).exp()


def directions(rows_RD: Tensor) -> Tensor:
    """Rows of length one. The length of a gradient tells how wrong the model was, its direction about what."""
    length_R1 = torch.linalg.vector_norm(rows_RD, dim=1, keepdim=True)
    turned_RD: Tensor = rows_RD / length_R1.clamp_min(1e-30)
    return turned_RD


@dataclass(frozen=True)
class Gaussian:
    """Classes as normal clouds of one shape, each around a mean that is itself uncertain.

    Attributes:
        center_D, to_C: rows become ``(row - center) @ to_C``, where a class has spread one in every direction.
        mean_VC: expected place of each class.
        doubt_VC: variance of that expectation; 0 would be certain.
        log_prior_V: how often classes occur.
        count_V: rows of each class that it was fitted on.
        between_C: variance of the classes' means.
    """

    center_D: Tensor
    to_C: Tensor
    mean_VC: Tensor
    doubt_VC: Tensor
    log_prior_V: Tensor
    count_V: Tensor
    between_C: Tensor

    @classmethod
    def fit(cls, rows_PD: Tensor, class_P: Tensor, log_prior_V: Tensor) -> Gaussian:
        """By sums over the rows; takes a few matrix products.

        Args:
            rows_PD: known rows.
            class_P: their classes, in [0, V).
            log_prior_V: how often classes occur.
        """
        classes, rows = len(log_prior_V), rows_PD.double()
        center = rows.mean(0)
        count_V = torch.bincount(class_P, minlength=classes).double()
        mean_VD = _class_sums(rows - center, class_P, classes) / count_V.clamp_min(1)[:, None]
        within = rows - center - mean_VD[class_P]
        freedom = max(1.0, len(rows) - float((count_V > 0).sum()))
        whiten = whitening(within.T @ within / freedom, len(rows))
        mean_VD = mean_VD @ whiten
        between = (mean_VD * count_V[:, None]).T @ mean_VD - (count_V > 0).sum() * torch.eye(rows.shape[1]).double()
        spread_C, turn = torch.linalg.eigh(between / count_V.sum())
        # A direction in which means differ no more than chance makes them says nothing of the class.
        chance = float((count_V > 0).sum() / count_V.sum())
        told = spread_C > chance * _beyond_chance(rows.shape[1], int((count_V > 0).sum()))
        told &= spread_C > 0
        return cls._posterior(
            center, whiten @ turn[:, told], mean_VD @ turn[:, told], spread_C[told], count_V, log_prior_V
        )

    @classmethod
    def _posterior(
        cls, center: Tensor, to: Tensor, mean_VC: Tensor, between_C: Tensor, count_V: Tensor, log_prior_V: Tensor
    ) -> Gaussian:
        counts = count_V[:, None]
        return cls(
            center.float(),
            to.float(),
            (mean_VC * counts * between_C / (1 + counts * between_C)).float(),
            (between_C / (1 + counts * between_C)).float(),
            log_prior_V.float(),
            count_V.float(),
            between_C.float(),
        )

    def place(self, rows_RD: Tensor) -> Tensor:
        """Rows in the space of discriminant directions, [R, C]."""
        return (rows_RD.float() - self.center_D) @ self.to_C

    def log_posterior(self, rows_RD: Tensor) -> Tensor:
        """See `Decoder`."""
        return self.log_joint(rows_RD).log_softmax(1)

    def log_joint(self, rows_RD: Tensor) -> Tensor:
        """Log of prior times density, [R, V], up to a constant that all rows share."""
        at_RC, sharp_VC = self.place(rows_RD), 1 / (1 + self.doubt_VC)
        scaled_VC = self.mean_VC * sharp_VC
        constant_V = self.log_prior_V + 0.5 * (sharp_VC.log() - self.mean_VC * scaled_VC).sum(1)
        return constant_V + at_RC @ scaled_VC.T - 0.5 * at_RC.square() @ sharp_VC.T

    def adapted(self, rows_RD: Tensor, *, steps: int = 3, sure: float = 0.9, stiffness: float = 20.0) -> Gaussian:
        """Follow an owner whose trunk has moved on, by its own rows alone (self-training).

        In each step confident guesses are taken for true; see `taught`.

        Args:
            rows_RD: unlabelled rows of one time.
            steps: rounds of guessing.
            sure: least posterior of a guess that is taken for true.
            stiffness: rows that the map's staying as it was counts for, per direction; also of each class's place.
        """
        now = self
        for _ in range(steps):
            guess_R, sure_R = guesses(now, rows_RD)
            chosen = sure_R > sure
            if int(chosen.sum()) < 2 * self.to_C.shape[1]:
                break
            now = self.taught(rows_RD[chosen], guess_R[chosen], stiffness=stiffness)
        return now

    def taught(self, rows_RD: Tensor, class_R: Tensor, *, stiffness: float = 20.0) -> Gaussian:
        """Moved to where some rows of known classes are.

        A linear map of the classes' places is fitted to them, so that all classes move; then each class's place by
        its own rows; then the common shape.

        Args:
            rows_RD: of the time that the reader is for.
            class_R: their classes, known or guessed.
            stiffness: see `adapted`.
        """
        at = self.place(rows_RD).double()
        ones = torch.ones(len(self.mean_VC), 1, dtype=torch.float64)
        old = torch.cat([self.mean_VC.double(), ones], 1)
        keep = torch.eye(old.shape[1], dtype=torch.float64) * stiffness
        aim = old[class_R].T @ (at - old[class_R, :-1])
        moved = old[:, :-1] + old @ torch.linalg.solve(old[class_R].T @ old[class_R] + keep, aim)
        counts = torch.bincount(class_R, minlength=len(moved)).double()[:, None]
        weight = stiffness / 4
        mean = (weight * moved + _class_sums(at, class_R, len(moved))) / (weight + counts)
        freedom = max(1.0, len(at) - float((counts > 0).sum()))
        spread = ((at - mean[class_R]).square().sum(0) / freedom).sqrt()
        spread = ((len(at) * spread + stiffness) / (len(at) + stiffness)).clamp_min(0.5)
        return replace(
            self,
            to_C=(self.to_C.double() / spread).float(),
            mean_VC=(mean / spread).float(),
            doubt_VC=(self.doubt_VC.double() * weight / (weight + counts) / spread.square()).float(),
        )


@dataclass(frozen=True)
class Softmax:
    """A linear classifier on the discriminant directions of a `Gaussian`, trained by its cross-entropy.

    Attributes:
        base: gives the directions.
        weight_VC, bias_V: of the classifier.
    """

    base: Gaussian
    weight_VC: Tensor
    bias_V: Tensor

    @classmethod
    def fit(
        cls, base: Gaussian, rows_PD: Tensor, class_P: Tensor, *, seed: int, epochs: int = 2, batch: int = 256
    ) -> Softmax:
        """Begin where ``base`` stands, as a linear classifier, and go through the rows a few times."""
        at_PC = base.place(rows_PD)
        weight = nn.Parameter(base.mean_VC.clone())
        bias = nn.Parameter(base.log_prior_V - 0.5 * base.mean_VC.square().sum(1))
        optimizer = torch.optim.Adam([weight, bias], lr=0.02)
        generator = torch.Generator().manual_seed(seed)
        steps = max(1, epochs * -(-len(at_PC) // batch))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        for _ in range(epochs):
            for rows in torch.split(torch.randperm(len(at_PC), generator=generator), batch):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(at_PC[rows] @ weight.T + bias, class_P[rows])
                torch.autograd.backward(loss)
                optimizer.step()
                schedule.step()
        return cls(base, weight.detach(), bias.detach())

    def log_posterior(self, rows_RD: Tensor) -> Tensor:
        """See `Decoder`."""
        return (self.base.place(rows_RD) @ self.weight_VC.T + self.bias_V).log_softmax(1)


@dataclass(frozen=True)
class Nearest:
    """A dictionary: every known vector with its token. Read by the smallest distance.

    Attributes:
        rows_PD, class_P: the entries.
    """

    rows_PD: Tensor
    class_P: Tensor

    def look_up(self, rows_RD: Tensor) -> tuple[Tensor, Tensor]:
        """The class of the nearest entry, and its distance over the entry's length; 0 is the very vector."""
        found = []
        for part in torch.split(rows_RD.float(), _ROWS // 4):
            nearest = torch.cdist(part, self.rows_PD.float()).min(1)
            length = self.rows_PD[nearest.indices].norm(dim=1).clamp_min(1e-30)
            found.append((self.class_P[nearest.indices], nearest.values / length))
        if not found:
            return torch.empty(0, dtype=torch.int64), torch.empty(0)
        classes, distances = zip(*found, strict=True)
        return torch.cat(classes), torch.cat(distances)


def _class_sums(rows: Tensor, class_P: Tensor, classes: int) -> Tensor:
    return torch.zeros(classes, rows.shape[1], dtype=rows.dtype).index_add_(0, class_P, rows)


def whitening(covariance: Tensor, rows: int) -> Tensor:
    """Rows of this covariance, times it, have spread one everywhere; directions that hardly vary are not blown up.

    From few rows correlations are taken for partly chance: each coordinate keeps its own scale.
    """
    scales = covariance.diagonal()
    shrink = min(1.0, len(scales) / max(1, rows))
    spread, turn = torch.linalg.eigh((1 - shrink) * covariance + shrink * torch.diag(scales))
    least = _FLOOR * float(scales.mean().clamp_min(1e-300))
    to_DD: Tensor = turn / spread.clamp_min(least).sqrt()
    return to_DD


def _beyond_chance(width: int, classes: int) -> float:
    """Largest spread of means that chance alone gives, over the mean one, less one (Marchenko and Pastur's edge)."""
    ratio = width / max(1, classes)
    return float((1 + ratio**0.5) ** 2 - 1)
