"""From the captured uses of one parameter to its squared norms and its clipped sum.

One use is the common case and costs nothing extra. Several uses (tied embeddings, shared layers, slices) add up
*before* the norm is taken: rows of the same matrix are joined, an embedding tied to an output layer gets the cross
term between looked-up and projected rows, small parameters are added densely, and everything else is added one
record at a time (`Apart`), which is exact for any mixture.

No norm is taken of one tensor while another is added that could cancel differently: either both are the same tensor,
or the slack bounds the rounding of both.

Shape letters: B records, T rows of a record, S looked-up places of a record, I inputs, O outputs, V vocabulary,
D width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from coterie.dp.per_sample.gram import SqNorms, gram_is_cheaper, norm_slack, rounding_factor, square_norms, sum_slack
from coterie.dp.per_sample.gram_kernel import SegmentNorms
from coterie.dp.per_sample.precision import in_full_float32
from coterie.dp.per_sample.scaling import bounded as rows_bounded
from coterie.dp.per_sample.scaling import single
from coterie.dp.per_sample.stacked_terms import StackedOuter
from coterie.dp.per_sample.terms import Dense, Lookup, Outer, Term
from coterie.dp.per_sample.weight_expressions import Kind, Node, Pullback, Root

_DENSE_ELEMENTS = 1 << 24
"""Most float32 entries of [B, *shape] that are formed to add up several uses (64 MiB)."""

Use = tuple[Node, Term]


class Apart:
    """Gradients that are formed one record at a time, for the norm and again, by the same products, for the sum.

    A `Term` at the root, for uses that only add up there and whose sums for all records at once take too much memory.

    Args:
        root: the parameter.
        uses: its simplified uses.
        records: B.
    """

    def __init__(self, root: Root, uses: list[Use], records: int) -> None:
        self._root = root
        self._uses = uses
        self._records = records
        self._pullbacks = [Pullback(node, root) for node, _ in uses]

    def sq_norms(self, precise: bool = False) -> SqNorms:
        value = torch.cat([square_norms(self.gradient(record).unsqueeze(0)) for record in range(self._records)])
        return SqNorms(value, norm_slack(value, self._root.value.shape[-1] if self._root.value.ndim else 1))

    def gradient(self, record: int) -> Tensor:
        total = sum(pull(term.gradient(record)) for pull, (_, term) in zip(self._pullbacks, self._uses, strict=True))
        assert isinstance(total, Tensor)
        return total

    def add_sum(self, out: Tensor, factors_B: Tensor) -> None:
        for record, factor in enumerate(single(factors_B).tolist()):
            if factor != 0.0:
                out.add_(self.gradient(record), alpha=factor)

    def masked(self, keep_B: Tensor) -> Apart:
        """The same: records whose factor is zero are never formed."""
        return self

    def nbytes(self) -> int:
        return sum(term.nbytes() for _, term in self._uses)


@in_full_float32
def simplify(root: Root, records: int) -> list[Use]:
    """The root's captured uses in the fewest and smallest terms that mean the same; `bounded` comes next."""
    uses = _joined_rows(root)
    if len(uses) > 1 and all(isinstance(term, Dense) for _, term in uses):
        return [(root, _dense_total(root, uses))]
    if not uses or (len(uses) == 1 and uses[0][0].kind <= Kind.ISOMETRIC):
        return uses
    uses = [(node, _bounded(term)) for node, term in uses]
    fits = records * root.value.numel() <= _DENSE_ELEMENTS
    if _tied(uses) and _may_multiply(uses):
        return uses if _gram_pays(uses) or not fits else [(root, _filled(root, uses, records))]
    if not fits:
        return apart(root, uses, records)
    node, term = uses[0]
    if len(uses) == 1 and isinstance(term, Dense):
        return [(root, Dense(Pullback(node, root).batched(term.gradients.float())))]
    each = Apart(root, uses, records)
    return [(root, Dense(torch.stack([each.gradient(record) for record in range(records)])))]


@in_full_float32
def bounded(uses: list[Use]) -> list[Use]:
    """A single use in rows whose products float32 holds; cheaper where `segment_norms` of it are taken already."""
    return [(node, _bounded(term)) for node, term in uses] if len(uses) == 1 else uses


def _bounded(term: Term) -> Term:
    return term.bounded() if isinstance(term, Outer | StackedOuter) else term


def apart(root: Root, uses: list[Use], records: int) -> list[Use]:
    """The uses as sums that are formed one record at a time, so that norm and sum cannot cancel differently."""
    return [(root, Apart(root, uses, records))]


def _joined_rows(root: Root) -> list[Use]:
    """Uses with the rows of several plain products, and of several look-ups, joined along T."""
    rest: list[Use] = []
    outers: list[Outer] = []
    lookups: list[Lookup] = []
    for node, term in root.captured:
        as_stored = root.value.shape if node.kind == Kind.SAME else root.value.shape[::-1]
        plain = node.kind <= Kind.TRANSPOSED and root.value.ndim == 2 and node.value.shape == as_stored
        if isinstance(term, Outer) and plain and term.a.shape[1] == 1:
            turned = term.flipped != (node.kind == Kind.TRANSPOSED)
            a, g = (term.g, term.a) if turned else (term.a, term.g)
            outers.append(Outer(a, g, root.value.shape))
        elif isinstance(term, Lookup) and node.kind == Kind.SAME and node.value.shape == root.value.shape:
            lookups.append(term)
        else:
            rest.append((node, term))
    if outers:
        a, g = (torch.cat([getattr(o, side) for o in outers], 2) if len(outers) > 1 else getattr(outers[0], side)
                for side in ("a", "g"))  # fmt: skip
        rest.append((root, Outer(a, g, root.value.shape)))
    if lookups:
        ids = torch.cat([term.ids for term in lookups], 1)
        rows = torch.cat([term.g.float() for term in lookups], 1) if len(lookups) > 1 else lookups[0].g
        rest.append((root, Lookup(ids, rows, root.value.shape)))
    return rest


def _dense_total(root: Root, uses: list[Use]) -> Dense:
    parts = []
    for node, term in uses:
        assert isinstance(term, Dense)
        parts.append(Pullback(node, root).batched(term.gradients))
    return Dense(torch.stack(parts).sum(0) if len(parts) > 1 else parts[0])


def _tied(uses: list[Use]) -> bool:
    """An output layer and an embedding that share one matrix, both as it is stored."""
    plain = all(isinstance(node, Root) for node, _ in uses)
    return len(uses) == 2 and plain and {type(term) for _, term in uses} == {Outer, Lookup}


def _parts(uses: list[Use]) -> tuple[Outer, Lookup]:
    outer = next(term for _, term in uses if isinstance(term, Outer))
    return outer, next(term for _, term in uses if isinstance(term, Lookup))


def _may_multiply(uses: list[Use]) -> bool:
    """Whether projected and looked-up rows are of sizes whose products float32 holds."""
    outer, lookup = _parts(uses)
    return rows_bounded(outer.a, lookup.g, outer.a.shape[2])


def _gram_pays(uses: list[Use]) -> bool:
    outer, _ = _parts(uses)
    return gram_is_cheaper(outer.a.shape[2], outer.a.shape[3], outer.g.shape[3])


def _filled(root: Root, uses: list[Use], records: int) -> Dense:
    outer, lookup = _parts(uses)
    total = torch.zeros(records, *root.value.shape, device=root.value.device)
    torch.bmm(outer.g.flatten(1, 2).float().mT, outer.a.flatten(1, 2).float(), out=total)
    for record in range(total.shape[0]):
        lookup.add_record(total[record], record)
    return Dense(total)


@in_full_float32
def condensed(uses: list[Use]) -> list[Use]:
    """A single use in its smallest form, for keeping until its sum is taken."""
    return [
        (node, term.condensed() if len(uses) == 1 and isinstance(term, Outer | StackedOuter) else term)
        for node, term in uses
    ]


def segment_norms(uses_of_roots: Iterable[list[Use]]) -> list[SegmentNorms]:
    """What a compiled pass can take of these roots' norms, before `sq_norms` asks for them."""
    norms = []
    for uses in uses_of_roots:
        if len(uses) == 1 or _tied(uses):
            terms = [term for _, term in uses if isinstance(term, Outer | StackedOuter)]
            norms += [each for term in terms if (each := term.segment_norms) is not None]
    return norms


@in_full_float32
def sq_norms(root: Root, uses: list[Use], records: int, precise: bool = False) -> SqNorms:
    """Squared norm of the root's gradient for every record, [B]; ``precise`` as in `Term.sq_norms`."""
    if not uses:
        return SqNorms.zeros(records, root.value.device if not root.value.is_meta else torch.device("cpu"))
    if _tied(uses):
        return _tied_sq_norms(uses, precise)
    ((_, term),) = uses
    return term.sq_norms(precise)


def precise_sq_norms(root: Root, uses: list[Use], records: int) -> tuple[list[Use], SqNorms]:
    """The most careful norms, and the uses that the sum then has to be taken of: others where two uses cancel."""
    norms = sq_norms(root, uses, records, precise=True)
    if not _tied(uses) or norms.trusted():
        return uses, norms
    uses = apart(root, uses, records)
    return uses, sq_norms(root, uses, records, precise=True)


def _tied_sq_norms(uses: list[Use], precise: bool) -> SqNorms:
    """Norms of an output layer and an embedding that share one matrix, with their cross term.

    The matrix gradient is ``sum_t outer(g_t, a_t)`` plus row ``id_s`` getting ``e_s``; their inner product is
    ``sum_{t,s} g_t[id_s] (a_t . e_s)``.
    """
    outer, lookup = _parts(uses)
    own, looked = outer.sq_norms(precise), lookup.sq_norms()
    a_BTD, g_BTV = outer.a.flatten(1, 2).float(), outer.g.flatten(1, 2)
    known = (lookup.ids >= 0).unsqueeze(1)
    ids_BTS = lookup.ids.clamp_min(0).unsqueeze(1).expand(-1, g_BTV.shape[1], -1)
    picked_BTS = torch.where(known, g_BTV.gather(2, ids_BTS).float(), 0.0)
    products_BTS = torch.bmm(a_BTD, lookup.g.float().mT)
    cross = (picked_BTS * products_BTS).sum(2).double().sum(1)
    a_length = torch.linalg.vector_norm(a_BTD, dim=-1).unsqueeze(2)
    e_length = torch.linalg.vector_norm(lookup.g, dim=-1, dtype=torch.float32).unsqueeze(1)
    crude = (picked_BTS.abs() * a_length * e_length).flatten(1).sum(1).double()
    factor = rounding_factor(a_BTD.shape[2]) + rounding_factor(lookup.ids.shape[1])
    value = (own.value + looked.value + 2.0 * cross).clamp_min(0.0)
    # In the sum all rows of both uses are added up in the same entries.
    rows, added_up = a_BTD.shape[1] + lookup.ids.shape[1], outer.crude().double() + lookup.crude()
    return SqNorms(value, own.slack + looked.slack + 2.0 * factor * crude + sum_slack(value, added_up, rows))


@in_full_float32
def add_sum(root: Root, uses: list[Use], out: Tensor, factors_B: Tensor, fresh: bool = False) -> None:
    """``out += sum_b factors_B[b] * gradient_b`` for a root.

    Args:
        root: the parameter.
        uses: its simplified uses.
        out: float32 of its shape.
        factors_B: one factor a record.
        fresh: ``out`` was allocated but never written, and counts as zero. The common single use then writes it
            once, instead of clearing, reading and writing it.
    """
    if fresh and len(uses) == 1:
        node, only = uses[0]
        if node.kind <= Kind.TRANSPOSED and isinstance(only, Outer | StackedOuter):
            only.add_sum(out.view(node.value.shape) if node.kind == Kind.SAME else out.t(), factors_B, fresh=True)
            return
    if fresh:
        out.zero_()
    for node, term in uses:
        if node.kind == Kind.SAME:
            term.add_sum(out.view(node.value.shape), factors_B)
        elif node.kind == Kind.TRANSPOSED:
            term.add_sum(out.t(), factors_B)
        else:
            at_node = torch.zeros(node.value.shape, device=out.device)
            term.add_sum(at_node, factors_B)
            out += Pullback(node, root)(at_node).to(out.device)
