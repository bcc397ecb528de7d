"""What one use of a parameter adds to every record's gradient, kept in the form in which it is cheapest.

Every `Term` is the gradient at a `Node`'s value for each of B records. Terms answer three questions: squared norms,
the gradient of one record, and the sum over records with a factor each (the clipped sum). Norm and sum use the same
captured tensors.

Shape letters: B records, T rows of a record, G groups of a stacked matrix (1 for a plain one), I inputs, O outputs,
V vocabulary, D width.
"""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from coterie.dp.per_sample.gram import (
    SqNorms,
    direct_slack,
    gram_is_cheaper,
    gram_sq_norms,
    norm_slack,
    square_norms,
    taken,
)
from coterie.dp.per_sample.gram_kernel import SegmentNorms
from coterie.dp.per_sample.products import add_product, multiply, operand
from coterie.dp.per_sample.scaling import balance, bounded, power_of_two, single
from coterie.models.grouped import grouped_sum

_CHUNK_ELEMENTS = 1 << 24
"""Most float32 entries of a temporary per-sample gradient (64 MiB)."""


class Term(Protocol):
    """Gradients of B records at one value; see the module text."""

    def sq_norms(self, precise: bool = False) -> SqNorms:
        """Squared norms; with ``precise``, the slack is brought down to `trusted_share` of them where possible."""
        ...

    def gradient(self, record: int) -> Tensor:
        """The gradient of one record, float32, shaped like the value."""
        ...

    def add_sum(self, out: Tensor, factors_B: Tensor) -> None:
        """``out += sum_b factors_B[b] * gradient_b``; ``out`` is float32, any strides.

        Terms that also take ``fresh=True`` then write ``out`` without reading it.
        """
        ...

    def masked(self, keep_B: Tensor) -> Term:
        """The same with every number of the other records replaced by zero, NaN and infinity too."""
        ...

    def nbytes(self) -> int: ...


class Scaled:
    """A `Term` of balanced rows: record b's gradient is ``2^exponent_b`` times the inner term's.

    Args:
        term: of the balanced rows.
        exponent_B: int64.
    """

    def __init__(self, term: Term, exponent_B: Tensor) -> None:
        self._term = term
        self._exponent = exponent_B

    @property
    def _scale(self) -> Tensor:
        return power_of_two(self._exponent)

    def sq_norms(self, precise: bool = False) -> SqNorms:
        scale = self._scale
        return SqNorms(*(part * scale * scale for part in self._term.sq_norms(precise)))

    def gradient(self, record: int) -> Tensor:
        return (self._term.gradient(record).double() * self._scale[record]).float()

    def add_sum(self, out: Tensor, factors_B: Tensor) -> None:
        self._term.add_sum(out, factors_B.double() * self._scale)

    def masked(self, keep_B: Tensor) -> Scaled:
        return Scaled(self._term.masked(keep_B), self._exponent)

    def nbytes(self) -> int:
        return self._term.nbytes()


def _keep_rows(rows: Tensor, keep_B: Tensor) -> Tensor:
    return torch.where(keep_B.view(-1, *(1,) * (rows.ndim - 1)), rows, rows.new_zeros(()))


class Dense:
    """Gradients stored as they are, [B, *shape]; for small parameters, or where the direct form was needed."""

    def __init__(self, gradients_B: Tensor) -> None:
        self.gradients = gradients_B if gradients_B.ndim > 1 else gradients_B.unsqueeze(1)

    def sq_norms(self, precise: bool = False) -> SqNorms:
        value = square_norms(self.gradients)
        return SqNorms(value, norm_slack(value, self.gradients.shape[-1]))

    def gradient(self, record: int) -> Tensor:
        return self.gradients[record].float()

    def add_sum(self, out: Tensor, factors_B: Tensor) -> None:
        flat = single(factors_B) @ self.gradients.float().flatten(1)
        out += flat.view(out.shape)

    def masked(self, keep_B: Tensor) -> Dense:
        return Dense(_keep_rows(self.gradients, keep_B))

    def nbytes(self) -> int:
        return self.gradients.nbytes


class Outer:
    """Gradients of a matrix as sums of outer products of rows: ``W [G, O, I]``, or [O, I] when G is 1 and plain.

    Args:
        a_BGTI: rows that entered.
        g_BGTO: gradients at the output.
        shape: shape of the value; [.., O, I], or [.., I, O] if ``flipped``.
    """

    def __init__(self, a_BGTI: Tensor, g_BGTO: Tensor, shape: torch.Size, flipped: bool = False) -> None:
        self.a = a_BGTI
        self.g = g_BGTO
        self.shape = shape
        self.flipped = flipped

    def bounded(self) -> Outer | Scaled:
        """The same; in balanced rows where products of these could underflow or overflow."""
        if bounded(self.a, self.g, self.a.shape[2], self.segment_norms):
            return self
        batch, groups, rows = self.a.shape[:3]
        record_R = torch.arange(batch, device=self.g.device).repeat_interleave(groups * rows)
        a, g, exponent_B = balance(self.a.flatten(0, 2), self.g.flatten(0, 2), record_R, batch)
        return Scaled(Outer(a.view(self.a.shape), g.view(self.g.shape), self.shape, self.flipped), exponent_B)

    def sq_norms(self, precise: bool = False) -> SqNorms:
        if not self._gram:
            return self.direct()
        batch, groups = self.a.shape[:2]
        each = taken(self.segment_norms, self.a.shape[3], self.g.shape[3])
        if each is None or (precise and not each.trusted()):
            each = gram_sq_norms(operand(self.a.flatten(0, 1)), operand(self.g.flatten(0, 1)), precise=precise)
        result = SqNorms(*(part.view(batch, groups).sum(1) for part in each))
        return self.direct() if precise and not result.trusted() else result

    @property
    def _gram(self) -> bool:
        return gram_is_cheaper(self.a.shape[2], self.a.shape[3], self.g.shape[3])

    @cached_property
    def segment_norms(self) -> SegmentNorms | None:
        """What a compiled pass can take: every record's rows of every group are a segment."""
        if not self._gram or not SegmentNorms.possible(self.a, self.g):
            return None
        a, g = self.a.flatten(0, 2), self.g.flatten(0, 2)
        start = torch.arange(0, g.shape[0], self.a.shape[2])
        return SegmentNorms(a, None, g, start, start + self.a.shape[2])

    def direct(self) -> SqNorms:
        batch = self.a.shape[0]
        step = max(1, _CHUNK_ELEMENTS // max(self.shape.numel(), 1))
        value = torch.cat([square_norms(self._gradients(i, i + step)) for i in range(0, batch, step)])
        return SqNorms(value, direct_slack(value, self.crude().double(), self.a.shape[2], self.shape[-1]))

    def crude(self) -> Tensor:
        """[B] ``sum_t |a_t| |g_t|``: an upper bound of the norm."""
        a_length: Tensor = torch.linalg.vector_norm(self.a, dim=-1, dtype=torch.float32)
        g_length: Tensor = torch.linalg.vector_norm(self.g, dim=-1, dtype=torch.float32)
        return (a_length * g_length).flatten(1).sum(1)

    def condensed(self) -> Term:
        """The same as `Dense` if that is no larger than ``g`` and the rows are `bounded`; norm and sum then share one
        product."""
        rows, inputs = self.a.shape[2], self.a.shape[3]
        if inputs * 4 > self.g.element_size() * rows or not bounded(self.a, self.g, rows):
            return self
        return Dense(self._gradients(0, self.a.shape[0]))

    def _gradients(self, start: int, stop: int) -> Tensor:
        """[b, *shape] float32 for the records start..stop."""
        a, g = operand(self.a[start:stop]), operand(self.g[start:stop])
        product = multiply(a.mT, g) if self.flipped else multiply(g.mT, a)
        return product.view(-1, *self.shape)

    def gradient(self, record: int) -> Tensor:
        return self._gradients(record, record + 1)[0]

    def add_sum(self, out: Tensor, factors_B: Tensor, fresh: bool = False) -> None:
        left, right = (self.a, self.g) if self.flipped else (self.g, self.a)
        factors = single(factors_B).view(-1, 1, 1, 1)
        if left.shape[-1] <= right.shape[-1]:
            left, right = left.float() * factors, operand(right)
        else:
            left, right = operand(left), right.float() * factors
        if out.ndim == 2:
            add_product(out, left.flatten(0, 2).t(), right.flatten(0, 2), fresh)
        else:
            add_product(out, _by_group(left).mT, _by_group(right), fresh)

    def masked(self, keep_B: Tensor) -> Outer:
        return Outer(_keep_rows(self.a, keep_B), _keep_rows(self.g, keep_B), self.shape, self.flipped)

    def nbytes(self) -> int:
        return self.a.nbytes + self.g.nbytes


def _by_group(rows_BGTX: Tensor) -> Tensor:
    return rows_BGTX.transpose(0, 1).flatten(1, 2)


class Lookup:
    """Gradients of a table whose rows were looked up by id: an embedding, or a bias chosen by index.

    Args:
        ids_BT: int64 rows of the table; -1 marks a place whose gradient is dropped (``padding_idx``).
        g_BTD: gradients at the places; D is 1 for a one-dimensional table.
        shape: shape of the table, [V, ...].
    """

    def __init__(self, ids_BT: Tensor, g_BTD: Tensor, shape: torch.Size) -> None:
        self.ids = ids_BT
        self.g = g_BTD
        self.shape = shape

    def sq_norms(self, precise: bool = False) -> SqNorms:
        batch = self.ids.shape[0]
        offset = torch.arange(batch, device=self.ids.device).unsqueeze(1) * self.shape[0]
        keys, order = torch.sort(torch.where(self.ids < 0, batch * self.shape[0], self.ids + offset).flatten())
        groups, counts = torch.unique_consecutive(keys, return_counts=True)
        sums = grouped_sum(self.g.flatten(0, 1)[order].float(), counts.cumsum(0))
        squares = square_norms(sums)
        value = squares.new_zeros(batch + 1).index_add_(0, groups // self.shape[0], squares)[:batch]
        return SqNorms(value, direct_slack(value, self.crude(), self.ids.shape[1], self.g.shape[-1]))

    def crude(self) -> Tensor:
        """[B] float64, the norm if no two rows were added up."""
        lengths: Tensor = torch.linalg.vector_norm(self.g, dim=-1, dtype=torch.float64)
        return lengths.sum(1)

    def gradient(self, record: int) -> Tensor:
        out = torch.zeros(self.shape, device=self.g.device)
        self.add_record(out, record)
        return out

    def add_record(self, out: Tensor, record: int) -> None:
        """Add one record's gradient to ``out``, float32 of the table's shape."""
        self._add(out, self.ids[record], self.g[record].float())

    def add_sum(self, out: Tensor, factors_B: Tensor) -> None:
        self._add(out, self.ids.flatten(), (self.g.float() * single(factors_B).view(-1, 1, 1)).flatten(0, 1))

    @staticmethod
    def _add(out: Tensor, ids: Tensor, rows: Tensor) -> None:
        known = ids >= 0
        if not bool(known.all()):
            ids, rows = ids[known], rows[known]
        # Accumulating index_put sorts on CUDA, so equal ids are added in a fixed order.
        out.index_put_((ids,), rows.view(-1, *out.shape[1:]), accumulate=True)

    def masked(self, keep_B: Tensor) -> Lookup:
        return Lookup(self.ids, _keep_rows(self.g, keep_B), self.shape)

    def nbytes(self) -> int:
        return self.g.nbytes


class Aligned:
    """Gradients at a value that already has the records along its first dimension: record b owns its rows b.

    Such a value is a parameter that was repeated over the batch; its gradient for record b is zero in all other rows.
    """

    def __init__(self, g: Tensor, records: int) -> None:
        self.g = g
        self._records = records

    def sq_norms(self, precise: bool = False) -> SqNorms:
        value = square_norms(self.g.reshape(self._records, -1))
        return SqNorms(value, norm_slack(value, self.g[0].numel() * self._each))

    def gradient(self, record: int) -> Tensor:
        out = torch.zeros_like(self.g, dtype=torch.float32)
        rows = slice(record * self._each, (record + 1) * self._each)
        out[rows] = self.g[rows].float()
        return out

    @property
    def _each(self) -> int:
        return self.g.shape[0] // self._records

    def add_sum(self, out: Tensor, factors_B: Tensor) -> None:
        factors = single(factors_B).repeat_interleave(self._each)
        out += self.g.float() * factors.view(-1, *(1,) * (self.g.ndim - 1))

    def masked(self, keep_B: Tensor) -> Aligned:
        return Aligned(_keep_rows(self.g, keep_B.repeat_interleave(self._each)), self._records)

    def nbytes(self) -> int:
        return self.g.nbytes
