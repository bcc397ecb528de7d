"""Norms and sums over rows sorted by (expert, record): the gradients of stacked expert weights.

Expert ends are the offsets of grouped products; (expert, record) ends are the segments over which norms are taken.
A record's gradient of expert e is the sum of outer products over one segment, so nothing is padded to the longest
sequence and no per-sample gradient is stored.

Shape letters: R routed rows, E experts, B records, S segments of one bucket, n rows of a segment, I inputs,
O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from coterie.dp.per_sample.gram import (
    SqNorms,
    direct_slack,
    gram_is_cheaper,
    gram_slack,
    gram_sq_norms,
    gram_values,
    norm_slack,
    square_norms,
    taken,
    trusted_share,
)
from coterie.dp.per_sample.gram_kernel import SegmentNorms
from coterie.dp.per_sample.products import add_product, multiply, operand
from coterie.dp.per_sample.scaling import balance, bounded, single
from coterie.dp.per_sample.terms import Scaled
from coterie.models.grouped import as_EIO, grouped_sum

_PADDED_UP_TO = 200
"""Segments of at most this many rows are padded into buckets; larger ones are worth a matrix product each."""

_FEW_ROWS = 4096
"""Below, buckets cost by the number of calls, and they are wide; above, by their padding, and they are narrow."""

_FORMED = 1 << 24
"""Most float32 numbers of products or gradients that are formed at once (64 MiB)."""

_PIECE_BYTES = 1 << 21
"""Rows that are gathered at once on a CPU: they should still be in its cache when their products are taken."""


@dataclass(frozen=True)
class Bucket:
    """Segments of similar length, padded to the longest.

    Attributes:
        segments_S: their numbers, ``expert * B + record``.
        index_Sn: their rows; places beyond a segment's end repeat its first row.
        real_Sn1: 1.0 for rows, 0.0 for padding.
    """

    segments_S: Tensor
    index_Sn: Tensor
    real_Sn1: Tensor

    def pieces(self, inputs: int, outputs: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """``segments_S, index_Sn, real_Sn1``, as many segments at a time as can be worked on together."""
        length = self.index_Sn.shape[1]
        step = _FORMED // (length**2 if gram_is_cheaper(length, inputs, outputs) else inputs * outputs)
        if self.index_Sn.device.type == "cpu":
            step = min(step, _PIECE_BYTES // (4 * length * (inputs + outputs)))
        parts = self.segments_S, self.index_Sn, self.real_Sn1
        return zip(*(torch.split(part, max(1, step)) for part in parts), strict=True)


class Segments:
    """Where each (expert, record) pair's rows are.

    Args:
        record_R: record of each row, ascending within each expert.
        ends_E: cumulative row counts of the experts.
        records: B.
    """

    def __init__(self, record_R: Tensor, ends_E: Tensor, records: int) -> None:
        self.record_R = record_R
        self.ends_E = ends_E
        self.records = records
        self.experts = ends_E.shape[0]

    @cached_property
    def counts(self) -> Tensor:
        """[E * B] rows of each segment."""
        return torch.bincount(self.segment_R, minlength=self.experts * self.records)

    @cached_property
    def segment_R(self) -> Tensor:
        """[R] segment of each row."""
        rows_E = torch.diff(self.ends_E, prepend=self.ends_E.new_zeros(1))
        expert_R = torch.repeat_interleave(torch.arange(self.experts, device=rows_E.device), rows_E)
        return expert_R * self.records + self.record_R

    @cached_property
    def bounds(self) -> list[tuple[int, int]]:
        """[E * B] first row and one past the last of each segment."""
        ends = [0, *self.counts.cumsum(0).tolist()]
        return list(pairwise(ends))

    @cached_property
    def long(self) -> list[int]:
        """Segments that are taken one at a time."""
        return [i for i, (start, end) in enumerate(self.bounds) if end - start > _PADDED_UP_TO]

    @cached_property
    def buckets(self) -> list[Bucket]:
        """Short segments, by similar length."""
        by_step: dict[int, list[int]] = {}
        ratio = 1.5 if self.record_R.shape[0] < _FEW_ROWS else 1.2
        for i, (start, end) in enumerate(self.bounds):
            if 0 < end - start <= _PADDED_UP_TO:
                by_step.setdefault(math.ceil(math.log(end - start, ratio)), []).append(i)
        return [self._bucket(members) for _, members in sorted(by_step.items())]

    def _bucket(self, members: list[int]) -> Bucket:
        device = self.record_R.device
        starts = torch.tensor([self.bounds[i][0] for i in members], device=device).unsqueeze(1)
        lengths = torch.tensor([self.bounds[i][1] - self.bounds[i][0] for i in members], device=device).unsqueeze(1)
        place = torch.arange(int(lengths.max()), device=device)
        real = place < lengths
        # Padding repeats a row of the same segment: a row of another record could bring in its NaN.
        index = starts + torch.where(real, place, 0)
        return Bucket(torch.tensor(members, device=device), index, real.unsqueeze(-1).float())

    def by_record(self, per_segment: Tensor) -> Tensor:
        """[E * B] summed over experts: [B]."""
        return per_segment.view(self.experts, self.records).sum(0)


@dataclass(frozen=True)
class _Formed:
    """Segments whose gradients were formed, because these are no larger than their rows.

    Attributes:
        segments_K: their numbers.
        gradients_K: [K, O, I], or [K, I, O] for transposed storage; float32.
        norms: [E * B] for all segments, zero for the others.
    """

    segments_K: Tensor
    gradients_K: Tensor
    norms: SqNorms

    def masked(self, keep_B: Tensor) -> _Formed:
        keep_K = keep_B[self.segments_K % keep_B.shape[0]].view(-1, 1, 1)
        keep_S = keep_B.repeat(self.norms.value.shape[0] // keep_B.shape[0])
        gradients = torch.where(keep_K, self.gradients_K, self.gradients_K.new_zeros(()))
        zero = self.norms.value.new_zeros(())
        return _Formed(self.segments_K, gradients, SqNorms(*(torch.where(keep_S, part, zero) for part in self.norms)))

    def add_sum(self, out_ELR: Tensor, factors_B: Tensor, fresh: bool) -> set[int]:
        """Add to ``out``; returns the experts that have any."""
        records = factors_B.shape[0]
        by_expert: dict[int, list[int]] = {}
        for place, segment in enumerate(self.segments_K.tolist()):
            by_expert.setdefault(segment // records, []).append(place)
        for expert, places in by_expert.items():
            part = slice(places[0], places[-1] + 1)
            factors = single(factors_B)[self.segments_K[part] % records].unsqueeze(0)
            total = (factors @ self.gradients_K[part].flatten(1)).view(self.gradients_K.shape[1:])
            out_ELR[expert].copy_(total) if fresh else out_ELR[expert].add_(total)
        return set(by_expert)


class StackedOuter:
    """Gradients of ``W [E, O, I]`` (or [E, I, O]; [O, I] for a single expert) from rows sorted by
    (expert, record). A `Term`.

    Args:
        a_RI: rows that entered; with ``gather``, unsorted rows of which row r is ``a[gather[r]]``.
        g_RO: gradients at the output, sorted.
        transposed: storage [E, I, O].
        gather: see ``a_RI``; keeps one copy of a token that went to several experts.
    """

    def __init__(
        self,
        a_RI: Tensor,
        g_RO: Tensor,
        segments: Segments,
        shape: torch.Size,
        transposed: bool,
        gather: Tensor | None = None,
        formed: _Formed | None = None,
    ) -> None:
        self._a = a_RI
        self._g = g_RO
        self._segments = segments
        self._shape = shape
        self._transposed = transposed
        self._gather = gather
        self._formed = formed

    def bounded(self) -> StackedOuter | Scaled:
        """The same; in balanced rows where products of these could underflow or overflow."""
        if self._formed is not None or bounded(self._a, self._g, self._g.shape[0], self.segment_norms):
            return self
        segments = self._segments
        a = self._a if self._gather is None else self._a.index_select(0, self._gather)
        a, g, exponent_B = balance(a, self._g, segments.record_R, segments.records)
        return Scaled(StackedOuter(a, g, segments, self._shape, self._transposed), exponent_B)

    def condensed(self) -> StackedOuter:
        """The same with the gradients of long segments instead of their rows, where that takes less memory.

        Norm and sum then share a product. Rows of other segments would have to be copied, so these must be the fewer,
        and they have to be `bounded`, as the gradients are not scaled.
        """
        segments, inputs, outputs = self._segments, self._a.shape[1], self._g.shape[1]
        row_bytes = outputs * self._g.element_size() + (
            inputs * self._a.element_size() if self._gather is None else 0
        )
        long = segments.counts * row_bytes >= 4 * inputs * outputs
        if self._formed is not None or 2 * int(segments.counts[long].sum()) < self._g.shape[0]:
            return self
        if not bounded(self._a, self._g, self._g.shape[0]):
            return self
        formed = self._form(torch.nonzero(long).flatten())
        rest = torch.nonzero(~long[segments.segment_R]).flatten()
        ends = torch.where(long, 0, segments.counts).view(segments.experts, -1).sum(1).cumsum(0)
        a, gather = (self._a[rest], None) if self._gather is None else (self._a, self._gather[rest])
        fewer = Segments(segments.record_R[rest], ends, segments.records)
        return StackedOuter(a, self._g[rest], fewer, self._shape, self._transposed, gather, formed)

    def _form(self, segments_K: Tensor) -> _Formed:
        gradients = torch.empty(segments_K.shape[0], *self._shape[-2:], device=self._g.device)
        value = torch.zeros(self._segments.counts.shape[0], dtype=torch.float64, device=self._g.device)
        slack = torch.zeros_like(value)
        for place, i in enumerate(segments_K.tolist()):
            a, g = self._rows(slice(*self._segments.bounds[i]))
            left, right = (a, g) if self._transposed else (g, a)
            add_product(gradients[place], left.t(), right, fresh=True)
            value[i] = square_norms(gradients[place : place + 1])[0]
            slack[i] = norm_slack(value[i], self._shape[-1])
        return _Formed(segments_K, gradients, SqNorms(value, slack))

    def _rows(self, part: slice = slice(None)) -> tuple[Tensor, Tensor]:
        a = self._a[part] if self._gather is None else self._a.index_select(0, self._gather[part])
        return operand(a), operand(self._g[part])

    def sq_norms(self, precise: bool = False) -> SqNorms:
        total = self._by_record(self._compiled() or self._cheaply(*self._rows()))
        return self._by_record(self._precisely(*self._rows())) if precise and not total.trusted() else total

    def _by_record(self, per_segment: SqNorms) -> SqNorms:
        value, slack = per_segment
        if self._formed is not None:
            value, slack = value + self._formed.norms.value, slack + self._formed.norms.slack
        return SqNorms(self._segments.by_record(value), self._segments.by_record(slack))

    @cached_property
    def _gram_S(self) -> Tensor:
        """[E * B] bool, segments whose norm is cheaper from dot products, of which half are formed."""
        counts, inputs, outputs = self._segments.counts, self._a.shape[1], self._g.shape[1]
        return (counts > 0) & (counts * (inputs + outputs) < 2 * inputs * outputs)

    @cached_property
    def segment_norms(self) -> SegmentNorms | None:
        """What a compiled pass can take of the norms, from rows where they lie; None where that is little."""
        counts, gram = self._segments.counts, self._gram_S
        if not SegmentNorms.possible(self._a, self._g) or bool(
            ((counts <= _PADDED_UP_TO) & ~gram & (counts > 0)).any()
        ):
            return None
        ends = counts.cumsum(0)
        return SegmentNorms(self._a, self._gather, self._g, (ends - counts)[gram], ends[gram])

    def _compiled(self) -> SqNorms | None:
        """`_cheaply` with a compiled pass; None without one."""
        norms = taken(self.segment_norms, self._a.shape[1], self._g.shape[1])
        if norms is None:
            return None
        counts, gram = self._segments.counts, self._gram_S
        value = torch.zeros(counts.shape[0], dtype=torch.float64)
        slack = torch.zeros_like(value)
        value[gram], slack[gram] = norms
        for i in torch.nonzero((counts > 0) & ~gram).flatten().tolist():
            part = _direct(*(rows[None] for rows in self._rows(slice(*self._segments.bounds[i]))))
            value[i], slack[i] = part.value[0], part.slack[0]
        return SqNorms(value, slack)

    def _cheaply(self, a: Tensor, g: Tensor) -> SqNorms:
        """Per segment, with the slack bounded from the lengths of the rows alone."""
        segments, inputs, outputs = self._segments, a.shape[1], g.shape[1]
        numbers: list[Tensor] = []
        pieces: list[tuple[Tensor, Tensor]] = []
        by_gram: list[bool] = []
        for bucket in segments.buckets:
            cheap = gram_is_cheaper(bucket.index_Sn.shape[1], inputs, outputs)
            for _, index_Sn, real_Sn1 in bucket.pieces(inputs, outputs):
                rows_a, rows_g = _gathered(a, index_Sn), _gathered(g, index_Sn)
                pieces.append(
                    gram_values(rows_a, rows_g, real_Sn1)
                    if cheap
                    else _direct_values(rows_a, rows_g * real_Sn1.to(rows_g))
                )
            numbers.append(bucket.segments_S)
            by_gram += [cheap] * len(bucket.segments_S)
        for i in segments.long:
            rows = slice(*segments.bounds[i])
            cheap = gram_is_cheaper(rows.stop - rows.start, inputs, outputs)
            pieces.append((gram_values if cheap else _direct_values)(a[None, rows], g[None, rows]))
            by_gram.append(cheap)
        value = torch.zeros(segments.experts * segments.records, dtype=torch.float64, device=g.device)
        if not pieces:
            return SqNorms(value, value)
        number_S = torch.cat([*numbers, torch.tensor(segments.long, dtype=torch.int64, device=g.device)])
        value_S, crude_S = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        value_S, rows_S = value_S.clamp_min(0.0), segments.counts[number_S].double()
        slack_S = torch.where(
            torch.tensor(by_gram, dtype=torch.bool, device=g.device),
            gram_slack(value_S, crude_S, rows_S, inputs, outputs),
            direct_slack(value_S, crude_S, rows_S, inputs),
        )
        return SqNorms(value.index_copy(0, number_S, value_S), value.index_copy(0, number_S, slack_S))

    def _precisely(self, a: Tensor, g: Tensor) -> SqNorms:
        """Every segment with the tightest slack there is."""
        inputs, outputs = a.shape[1], g.shape[1]
        segments = self._segments
        value = torch.zeros(segments.experts * segments.records, dtype=torch.float64, device=g.device)
        slack = torch.zeros_like(value)
        for bucket in segments.buckets:
            cheap = gram_is_cheaper(bucket.index_Sn.shape[1], inputs, outputs)
            for segments_S, index_Sn, real_Sn1 in bucket.pieces(inputs, outputs):
                rows_a, rows_g = _gathered(a, index_Sn), _gathered(g, index_Sn)
                part = (
                    gram_sq_norms(rows_a, rows_g, real_Sn1, precise=True)
                    if cheap
                    else _direct(rows_a, rows_g * real_Sn1.to(rows_g))
                )
                value[segments_S], slack[segments_S] = part.value, part.slack
        for i in segments.long:
            rows = slice(*segments.bounds[i])
            rows_a, rows_g = a[None, rows], g[None, rows]
            cheap = gram_is_cheaper(rows_a.shape[1], inputs, outputs)
            part = gram_sq_norms(rows_a, rows_g, None, precise=True) if cheap else _direct(rows_a, rows_g)
            value[i], slack[i] = part.value[0], part.slack[0]
        self._replace_doubtful(a, g, value, slack)
        return SqNorms(value, slack)

    def _replace_doubtful(self, a: Tensor, g: Tensor, value: Tensor, slack: Tensor) -> None:
        """Take the direct form for segments whose slack is a notable part of a record's whole."""
        segments = self._segments
        total = segments.by_record(value)
        if not bool((segments.by_record(slack) > trusted_share() * total).any()):
            return
        doubtful = slack > trusted_share() * total.repeat(segments.experts) / segments.experts
        for i in torch.nonzero(doubtful).flatten().tolist():
            rows = slice(*segments.bounds[i])
            part = _direct(a[None, rows], g[None, rows])
            value[i], slack[i] = part.value[0], part.slack[0]

    def gradient(self, record: int) -> Tensor:
        out = torch.zeros(self._shape, device=self._g.device)
        factors = torch.zeros(self._segments.records, device=self._g.device)
        factors[record] = 1.0
        self.masked(factors > 0).add_sum(out, factors)
        return out

    def add_sum(self, out: Tensor, factors_B: Tensor, fresh: bool = False) -> None:
        factors_R1 = single(factors_B)[self._segments.record_R].unsqueeze(1)
        stored = out if out.ndim == 3 else out.unsqueeze(0)
        out_EIO = as_EIO(stored, self._transposed)
        written = set() if self._formed is None else self._formed.add_sum(stored, factors_B, fresh)
        start = 0
        for expert, end in enumerate(self._segments.ends_E.tolist()):
            target = out_EIO[expert]
            if not self._transposed:  # write along the storage, not across it
                target = target.t()
            if end > start:
                # One expert at a time: its rows are still in the cache when their product is taken.
                left, right = self._rows(slice(start, end))
                if right.shape[1] <= left.shape[1]:
                    right = right * factors_R1[start:end]
                else:
                    left = left * factors_R1[start:end]
                if not self._transposed:
                    left, right = right, left
                add_product(target, left.t(), right, fresh and expert not in written)
            elif fresh and expert not in written:
                target.zero_()
            start = end

    def masked(self, keep_B: Tensor) -> StackedOuter:
        a, g = self._rows()
        keep_R1 = keep_B[self._segments.record_R].unsqueeze(1)
        zero = g.new_zeros(())
        a, g = torch.where(keep_R1, a, zero), torch.where(keep_R1, g, zero)
        formed = None if self._formed is None else self._formed.masked(keep_B)
        return StackedOuter(a, g, self._segments, self._shape, self._transposed, formed=formed)

    def nbytes(self) -> int:
        formed = 0 if self._formed is None else self._formed.gradients_K.nbytes
        return self._g.nbytes + (self._a.nbytes if self._gather is None else 0) + formed


def _gathered(rows_RX: Tensor, index_Sn: Tensor) -> Tensor:
    return rows_RX.index_select(0, index_Sn.flatten()).view(*index_Sn.shape, -1)


def _direct(a_SnI: Tensor, g_SnO: Tensor) -> SqNorms:
    value, crude = _direct_values(a_SnI, g_SnO)
    return SqNorms(value, direct_slack(value, crude, *a_SnI.shape[1:]))


def _direct_values(a_SnI: Tensor, g_SnO: Tensor) -> tuple[Tensor, Tensor]:
    """[S] squared norms from the gradients themselves, and ``sum_t |a_t| |g_t|``."""
    a_length, g_length = (torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32) for x in (a_SnI, g_SnO))
    return square_norms(multiply(g_SnO.mT, a_SnI)), (a_length * g_length).sum(1).double()


class StackedBias:
    """Gradients of a stacked bias [E, O] from rows sorted by
    (expert, record). A `Term`."""

    def __init__(self, g_RO: Tensor, segments: Segments) -> None:
        self._g = g_RO
        self._segments = segments

    def sq_norms(self, precise: bool = False) -> SqNorms:
        sums = grouped_sum(self._g.float(), self._segments.counts.cumsum(0))
        value = self._segments.by_record(square_norms(sums))
        lengths = torch.linalg.vector_norm(self._g, dim=-1, dtype=torch.float64)
        crude = value.new_zeros(value.shape).index_add_(0, self._segments.record_R, lengths)
        return SqNorms(value, direct_slack(value, crude, *self._g.shape))

    def gradient(self, record: int) -> Tensor:
        rows = torch.where((self._segments.record_R == record).unsqueeze(1), self._g.float(), 0.0)
        sums = grouped_sum(rows, self._segments.ends_E)
        return sums if self._segments.experts > 1 else sums[0]

    def add_sum(self, out: Tensor, factors_B: Tensor) -> None:
        factors_R = single(factors_B)[self._segments.record_R].unsqueeze(1)
        out += grouped_sum(self._g.float() * factors_R, self._segments.ends_E).view(out.shape)

    def masked(self, keep_B: Tensor) -> StackedBias:
        keep_R1 = keep_B[self._segments.record_R].unsqueeze(1)
        return StackedBias(torch.where(keep_R1, self._g, self._g.new_zeros(())), self._segments)

    def nbytes(self) -> int:
        return self._g.nbytes
