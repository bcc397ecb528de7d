"""Was a known record in a push? The inner product of its clipped gradient with the sums is the best test there is in
Gaussian noise. What other records add to a sum is noise of another kind, and its shape is learned on public text.

In the eigenvectors of an expert's hidden vectors and of the gradients at its output (as in EKFAC, arXiv:1806.03884)
the coordinates of a sum scatter almost independently, and each is divided by its own variance, the noise's included:
directions that all text shares count little, the others fully.

Shape letters as in `coterie.audit.experts.reader`; S records, P pushes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coterie.audit.experts.opened import Opened
from coterie.audit.experts.reader import Reader
from coterie.audit.experts.simulate import SimulatedRows, rows_of

_SHRINK = 0.02
"""Share of the mean eigenvalue that is added to every one: public text does not show every direction."""
_SMOOTH = 0.3
"""Weight of the product of both sides' eigenvalues beside each coordinate's own variance, which is noisier."""

Side = tuple[int, int, int]
"""Layer, expert, projection (0 or 1)."""


def _sides(rows: SimulatedRows) -> Iterator[tuple[Side, Tensor, Tensor, Tensor]]:
    """For each projection of each expert: the records of its rows, what entered and the gradients at the output."""
    for layer, each in enumerate(rows.layers):
        record_R = each.token_R // rows.length
        for expert in torch.unique(each.expert_R).tolist():
            of = (each.expert_R == expert).nonzero()[:, 0]
            yield (layer, expert, 0), record_R[of], each.hidden_RD[of], each.before_RG[of]
            yield (layer, expert, 1), record_R[of], each.inner_RF[of], each.after_RD[of]


@dataclass(frozen=True)
class _Law:
    """How one matrix scatters over lots: eigenvectors of both sides, the variance of each coordinate, the mean."""

    left_II: Tensor
    right_OO: Tensor
    variance_IO: Tensor
    mean_IO: Tensor

    def sized(self, lot: float, noise: float) -> _Law:
        """From the law of one record that of a lot, with noise."""
        return replace(self, variance_IO=lot * self.variance_IO + noise**2, mean_IO=lot * self.mean_IO)


class Metric:
    """The scatter of pushes over lots, learned on public records.

    Args:
        reader: the model.
        public: records of public text.
        lot: records that a push holds, as far as the adversary knows.
        noise: standard deviation of what was added to each value.
        factors: [len(public)], what each record's summed gradient is scaled by before it is added; default 1.

    Attributes:
        noise: as above.
        laws: of the matrices that public text has reached.
    """

    def __init__(
        self,
        reader: Reader,
        public: Sequence[Sequence[int]],
        lot: float,
        noise: float = 0.0,
        factors: Tensor | None = None,
    ) -> None:
        self.noise = noise
        factors = torch.ones(len(public)) if factors is None else factors
        half = len(public) // 2
        turned = {
            side: (_spread(input_II), _spread(output_OO))
            for side, (input_II, output_OO) in _moments(reader, public[:half], factors[:half]).items()
        }
        self._single = _laws(reader, public[half:], factors[half:], turned)
        self.laws = {side: law.sized(lot, noise) for side, law in self._single.items()}

    def sized(self, lot: float, noise: float = 0.0) -> Metric:
        """The same for pushes of another size or other noise, without looking at the public records again."""
        other = copy.copy(self)
        other.noise = noise
        other.laws = {side: law.sized(lot, noise) for side, law in self._single.items()}
        return other

    def __contains__(self, side: Side) -> bool:
        """Whether public text has shown how this matrix scatters."""
        return side in self.laws

    def divided(self, opened: Opened) -> dict[Side, Tensor]:
        """The push less what lots hold on average, in the eigenvectors, every coordinate divided by its variance."""
        found = {}
        for (layer, expert), each in opened.experts.items():
            for number, sum_IO in enumerate((each.first_DG, each.second_FD)):
                law = self.laws.get((layer, expert, number))
                if law is not None:
                    inside_IO = law.left_II.T @ (sum_IO.double() - law.mean_IO) @ law.right_OO
                    found[layer, expert, number] = (inside_IO / law.variance_IO).float()
                elif self.noise:  # public text never came here: only the noise is known
                    found[layer, expert, number] = sum_IO / self.noise**2
        return found

    def turned(self, side: Side, in_RI: Tensor, out_RO: Tensor) -> tuple[Tensor, Tensor]:
        """Rows in the eigenvectors of a matrix."""
        law = self.laws.get(side)
        return (in_RI, out_RO) if law is None else (in_RI @ law.left_II.float(), out_RO @ law.right_OO.float())

    def weights(self, side: Side) -> Tensor:
        """What squares of coordinates are multiplied by, [I, O] or a scalar."""
        law = self.laws.get(side)
        return torch.tensor(self.noise**-2) if law is None else law.variance_IO.reciprocal().float()

    def held(self, side: Side, sum_IO: Tensor, in_RI: Tensor, out_RO: Tensor) -> tuple[Tensor, Tensor]:
        """Single outer products against one matrix of a push.

        Args:
            side: which matrix.
            sum_IO: of `divided`.
            in_RI: what entered.
            out_RO: gradients at the output.

        Returns:
            [R] inner products, and [R] squares of the outer products in this metric.
        """
        in_RI, out_RO = self.turned(side, in_RI, out_RO)
        size_R = ((in_RI.square() @ self.weights(side)) * out_RO.square()).sum(1)
        return ((in_RI @ sum_IO) * out_RO).sum(1), size_R


_Spread = tuple[Tensor, Tensor]
"""Eigenvalues, largest last, and eigenvectors."""


def _moments(reader: Reader, records: Sequence[Sequence[int]], factors: Tensor) -> dict[Side, tuple[Tensor, Tensor]]:
    """Second moments of what enters, and of the gradients at the output, of every projection's rows."""
    found: dict[Side, list[Tensor]] = {}
    for rows in rows_of(reader, records):
        own_B = factors[rows.records_B].float()
        for side, record_R, in_RI, out_RO in _sides(rows):
            out_RO = out_RO * own_B[record_R].unsqueeze(1)
            pair = [in_RI.T @ in_RI, out_RO.T @ out_RO]
            found[side] = [a + b for a, b in zip(found[side], pair, strict=True)] if side in found else pair
    return {side: (pair[0], pair[1]) for side, pair in found.items()}


def _laws(
    reader: Reader,
    records: Sequence[Sequence[int]],
    factors: Tensor,
    turned: Mapping[Side, tuple[_Spread, _Spread]],
) -> dict[Side, _Law]:
    """The scatter of single records' gradients in given eigenvectors: tokens of one record pull in one direction."""
    squares: dict[Side, Tensor] = {}
    totals: dict[Side, Tensor] = {}
    for rows in rows_of(reader, records):
        own_B = factors[rows.records_B].float()
        for side, record_R, in_RI, out_RO in _sides(rows):
            if side in turned:
                (_, left_II), (_, right_OO) = turned[side]
                out_RO = out_RO * own_B[record_R].unsqueeze(1)
                _, each_BIO = _by_record(record_R, in_RI @ left_II.float(), out_RO @ right_OO.float())
                for found, value in ((squares, each_BIO.square().sum(0)), (totals, in_RI.T @ out_RO)):
                    found[side] = found[side] + value if side in found else value
    laws = {}
    for side, ((in_I, left_II), (out_O, right_OO)) in turned.items():
        product_IO = in_I.unsqueeze(1) * out_O
        if side in squares:
            own_IO = squares[side].double() / len(records)
            smooth_IO = product_IO * (own_IO.sum() / product_IO.sum())
            each_IO = (1 - _SMOOTH) * own_IO + _SMOOTH * smooth_IO
            mean_IO = totals[side].double() / len(records)
        else:  # too rare for the second half: as much as its rows in the first say
            each_IO, mean_IO = product_IO / len(records), torch.zeros_like(product_IO)
        laws[side] = _Law(left_II, right_OO, each_IO, mean_IO)
    return laws


def _by_record(record_R: Tensor, in_RI: Tensor, out_RO: Tensor) -> tuple[Tensor, Tensor]:
    """Which records the rows are of, and each one's gradient [B, I, O]. Rows of a record stand together."""
    present, count = torch.unique_consecutive(record_R, return_counts=True)
    ends = count.cumsum(0).tolist()
    pieces = [in_RI[a:b].T @ out_RO[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    return present, torch.stack(pieces)


def _spread(moment: Tensor) -> _Spread:
    floor = max(_SHRINK * float(moment.trace()) / len(moment), 1e-30)
    values, vectors = torch.linalg.eigh(moment.double() + floor * torch.eye(len(moment), dtype=torch.float64))
    return values, vectors


@dataclass(frozen=True)
class RecordScores:
    """How records and pushes meet.

    Attributes:
        product_SP: inner product of each record's gradient with each push, float64.
        size_S: square of the gradient over the sums that are open, float64; both in the metric.
    """

    product_SP: Tensor
    size_S: Tensor

    def log_ratio(self, rate: float = 1.0) -> Tensor:
        """[S] log likelihood ratio of a record of the dataset over one that is not, all pushes together.

        Args:
            rate: the chance that a record of the dataset is in a push.
        """
        each_SP = self.product_SP - self.size_S.unsqueeze(1) / 2
        if rate >= 1.0:
            return each_SP.sum(1)
        return torch.logaddexp(each_SP + math.log(rate), torch.full_like(each_SP, math.log1p(-rate))).sum(1)


def products(
    reader: Reader,
    records: Sequence[Sequence[int]],
    pushes: Sequence[Opened],
    metric: Metric,
    factors: Tensor | None = None,
) -> Tensor:
    """[S, P] inner product of each record's gradient with each push, float64: a tenth of the work of `score`."""
    product_SP = torch.zeros(len(records), len(pushes), dtype=torch.float64)
    divided = [metric.divided(push) for push in pushes]
    for rows in rows_of(reader, records):
        numbers = torch.tensor(rows.records_B)
        for side, record_R, in_RI, out_RO in _sides(rows):
            turned_RI, turned_RO = metric.turned(side, in_RI, out_RO)
            for push, sums in enumerate(divided):
                if side in sums:
                    product_R = ((turned_RI @ sums[side]) * turned_RO).sum(1)
                    product_SP[:, push].index_add_(0, numbers[record_R], product_R.double())
    return product_SP if factors is None else product_SP * factors.double().unsqueeze(1)


def score(
    reader: Reader,
    records: Sequence[Sequence[int]],
    pushes: Sequence[Opened],
    metric: Metric,
    factors: Tensor | None = None,
) -> RecordScores:
    """Hold records against pushes that were made with one model.

    Args:
        reader: the model.
        records: candidates; one of a single token predicts nothing and scores 0.
        pushes: of which one adversary opens the same experts.
        metric: of such pushes.
        factors: [S], as of `Metric`.
    """
    divided = [metric.divided(push) for push in pushes]
    product_SP = torch.zeros(len(records), len(pushes), dtype=torch.float64)
    size_S = torch.zeros(len(records), dtype=torch.float64)
    for rows in rows_of(reader, records):
        numbers = torch.tensor(rows.records_B)
        for side, record_R, in_RI, out_RO in _sides(rows):
            if all(side not in each for each in divided):
                continue
            present, each_BIO = _by_record(record_R, *metric.turned(side, in_RI, out_RO))
            size_B = (each_BIO.square() * metric.weights(side)).sum((1, 2))
            size_S.index_add_(0, numbers[present], size_B.double())
            for push, sums in enumerate(divided):
                if side in sums:
                    product_B = (each_BIO * sums[side]).sum((1, 2))
                    product_SP[:, push].index_add_(0, numbers[present], product_B.double())
    if factors is not None:
        product_SP, size_S = product_SP * factors.double().unsqueeze(1), size_S * factors.double().square()
    return RecordScores(product_SP, size_S)
