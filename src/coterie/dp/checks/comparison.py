"""One model compared with itself: records together and alone, one length and several, these neighbours and others.

`coterie.dp.checks.self_check` says what is compared when, and why a comparison may be drawn again.

Shape letters: B records, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coterie.dp.checks.batches_of_one import FLOOR, BatchesOfOne, Gradient, RecordsAlone, coarsest, tolerance
from coterie.dp.checks.draws import OneDraw, Rounding, generators, repeated
from coterie.dp.checks.made_up import EXTREME, ONE_LABEL, PLAIN, SHORT, Source, SyntheticRecord, config_numbers
from coterie.dp.checks.watched import Watched
from coterie.dp.losses import Batch, checked
from coterie.dp.per_sample.engine import Engine
from coterie.dp.refusals import value_changed
from coterie.errors import CoterieError, NoRuleError, PrivacyError

_DRAWS = 8
"""Most sets of records drawn, where rounding alone moves those before."""

_COARSER = 16.0
"""Roundings of float32 that a compared record has to stand; in half precision one more of its own."""

_ROUNDINGS = 3

_WHERE = "the self-check with made-up records, before training"

_LENGTH_WORDS = ("max_position", "n_positions", "window", "chunk", "block_size", "length", "seq", "extent", "context")


class ComparisonReport(NamedTuple):
    """What the self-check found on a model that passed.

    Attributes:
        errors: parameter name to the largest relative error of its per-sample norms.
        unused: names of trained parameters that no made-up record used.
    """

    errors: dict[str, float]
    unused: list[str]


class _Disagreement(Exception):
    """A comparison failed, for these records; it counts unless rounding alone moves one of them."""

    def __init__(self, error: NoRuleError, *records: SyntheticRecord) -> None:
        super().__init__(error.message)
        self.error = error
        self.records = records


class Comparison:
    """See the module text. The caller sets the model's mode.

    Args:
        engine: with the model.
        source: of made-up records.
        values: how the model was.

    Attributes:
        random: the model or the loss draws random numbers in the mode that `watch_values` saw.
        comparable: these draws can be made the same in batches of different shapes.
    """

    def __init__(self, engine: Engine, source: Source, values: Watched) -> None:
        self.random = False
        self.comparable = True
        self._engine = engine
        self._source = source
        self._values = values
        self._dtype = coarsest(engine.model)
        self._devices = list({p.device for p in engine.parameters.values()}) or [torch.device("cpu")]
        self._allowed = tolerance(self._dtype)
        self._singles = BatchesOfOne(engine, self._allowed, _WHERE)
        self._errors = dict.fromkeys(engine.shapes, 0.0)
        self._used: set[str] = set()

    def report(self) -> ComparisonReport:
        """What was found so far."""
        return ComparisonReport(self._errors, [name for name in self._engine.parameters if name not in self._used])

    def prepare(self, like: Batch) -> None:
        """Let the engine learn the model's dimensions."""
        self._engine.compared = True  # by what follows
        with repeated(0, self._devices):
            self._engine.prepare(self._on_device(like))

    # -- what is compared --------------------------------------------------------------------------------------------

    def watch_values(self, records: int) -> None:
        """Two forwards of different records: nothing in the model may tell of them. Sees whether there are draws.

        Raises:
            NoRuleError: a parameter, a buffer or another tensor of the model changed.
        """
        model = self._engine.model
        for seed in (0, 1):
            batch = self._batch([SyntheticRecord(self._source.base, 100 * seed + i) for i in range(records)])
            assert batch is not None  # records of one length always go together
            with torch.no_grad(), repeated(seed, self._devices):
                before = generators(self._devices)
                checked(self._engine.loss_fn(model, batch), records)
                self.random |= generators(self._devices) != before
            if seed == 0:
                self._values.settle()
        self.check_values()
        if self.random:
            assert batch is not None
            draws = OneDraw()
            with torch.no_grad(), repeated(0, self._devices):
                before = generators(self._devices)[1:]
                with draws:
                    self._engine.loss_fn(model, batch)
                self.comparable = not draws.others and generators(self._devices)[1:] == before

    def check_values(self) -> None:
        """Refuse if the forwards so far changed anything in the model.

        Raises:
            NoRuleError: they did.
        """
        changed = self._values.changed()
        if changed:
            raise value_changed(self._engine.model, changed[0])

    def of_one_length(self, count: int) -> None:
        """Records of one length, beside extreme ones and ones with a single label, against each alone.

        Raises:
            NoRuleError: they disagree.
        """
        records = _kinds(self._source.base, count)
        self._settled(
            lambda shift: self._compare(_shifted(records, shift), sorted({0, 2, count - 1}), self._singles.coupled)
        )

    def of_several_lengths(self) -> None:
        """Short records and ones at every limit of the config beside the longest of the data, against each alone.

        Raises:
            NoRuleError: they disagree.
            PrivacyError: the model cannot compute the longest.
        """
        longest = self._source.longest
        short = min(SHORT, max(longest // 2, 1))
        limits = _limits(getattr(self._engine.model, "config", None), short, longest)
        inner = [*limits.values(), longest // 2] if longest > 2 * SHORT else []
        lengths = [short, longest, *(sorted(set(inner) - {short, longest})[-3:] or [max(short // 2, 1)])]
        kinds = [PLAIN, EXTREME, *([PLAIN] * 3)]
        records = [
            SyntheticRecord(length, 200 + i, kind)
            for i, (length, kind) in enumerate(zip(lengths, kinds, strict=False))
        ]
        rows = [row for row in range(len(records)) if row != 1]

        def padded(what: str, beside: float | None, alone: float | None) -> NoRuleError:
            return _padded(what, beside, alone, longest, limits)

        try:
            self._settled(lambda shift: self._compare(_shifted(records, shift), rows, padded))
        except CoterieError:
            raise
        except (RuntimeError, IndexError, ValueError) as error:
            if longest == self._source.base:
                raise
            raise PrivacyError(
                f"The model cannot compute {len(records)} records of which one is as long as the longest of the "
                f"data, {longest} tokens ({type(error).__name__}).",
                code="dp-length",
                why="the round that draws it would fail, and failing tells that it was drawn",
                fix="shorten the records to what the model takes (max_position_embeddings, memory)",
            ) from error

    def padded_before(self) -> None:
        """Records of several lengths that are all filled up to one, as the data holds them, against each alone.

        Raises:
            NoRuleError: they disagree.
        """
        if self._source.padding is None:
            return
        longest = self._source.longest
        lengths = [max(longest // 2, 1), longest, max(longest // 3, 1), max(longest - 1, 1)]
        records = [SyntheticRecord(length, 300 + i, filled=True) for i, length in enumerate(lengths)]
        self._settled(
            lambda shift: self._compare(_shifted(records, shift), range(len(records)), self._singles.coupled)
        )

    def beside_others(self, count: int) -> None:
        """Records of a batch, and the same ones beside others, with the same random numbers.

        Raises:
            NoRuleError: what a record computes follows the others.
        """
        count = max(count, 6)
        records = _kinds(self._source.base, count)
        for seed in range(4):
            self._settled(lambda shift, seed=seed: self._swap(_shifted(records, shift), seed))  # type: ignore[misc]

    # -- how ---------------------------------------------------------------------------------------------------------

    def _settled(self, compare: Callable[[int], None]) -> None:
        """Run a comparison; draw others while it fails on records that rounding alone moves."""
        for draw in range(_DRAWS):
            try:
                compare(10_000 * draw)
                return
            except _Disagreement as found:
                if draw == _DRAWS - 1 or all(self._stands(record) for record in found.records):
                    raise found.error from None

    def _compare(
        self, records: Sequence[SyntheticRecord], rows: Sequence[int], refusal: Callable[..., NoRuleError]
    ) -> None:
        """Losses, norms and gradients of ``rows`` in one batch with all, against each alone."""
        together = self._batch(records)
        alone = [self._batch([records[row]]) for row in rows]
        if together is None or any(one is None for one in alone):
            return
        losses = self._losses(together, len(records))
        with self._draws():
            squares_PB, names = self._engine.norms_by_parameter(together)
        reference = RecordsAlone(names, len(rows))
        for column, (row, one) in enumerate(zip(rows, alone, strict=True)):
            assert one is not None
            loss, gradient = self._alone(one)
            if not self._singles.same_loss(float(losses[row]), loss):
                raise _Disagreement(refusal("loss", float(losses[row]), loss), records[row])
            reference.add(column, gradient)
        wrong_norm = self._wrong_norm(squares_PB[:, list(rows)], reference.squares_PB, names)
        if wrong_norm is not None:
            column, error = wrong_norm
            row, one = rows[column], alone[column]
            assert one is not None
            coupled = self._gradient_is_coupled(together, row, one)
            raise _Disagreement(refusal("gradient", None, None) if coupled else error, records[row])
        factors_B = torch.zeros(len(records))
        factors_B[list(rows)] = torch.tensor(reference.factors)
        with self._draws():
            sums = self._engine.summed(together, factors_B)
        wrong = self._singles.wrong_sum(sums, reference.total)
        if wrong is not None:
            raise _Disagreement(wrong, *(records[row] for row in rows))

    def _wrong_norm(
        self, squares_PB: Tensor, reference_PB: Tensor, names: list[str]
    ) -> tuple[int, NoRuleError] | None:
        """The record whose norm is furthest off, with the refusal; None where all agree, which is noted."""
        errors = self._singles.norm_errors(squares_PB, reference_PB)
        worst = int(errors.amax(1).argmax())
        if float(errors[worst].max()) > self._allowed:
            error = self._singles.wrong_norm(names[worst], squares_PB[worst], reference_PB[worst])
            return int(errors[worst].argmax()), error
        for name, own in zip(names, errors.amax(1).tolist(), strict=True):
            self._errors[name] = max(self._errors[name], own)
        return None

    def _swap(self, records: Sequence[SyntheticRecord], seed: int) -> None:
        """Every second record replaced by another: the rest may not notice."""
        others = [m._replace(seed=m.seed + 5000) if i % 2 else m for i, m in enumerate(records)]
        others[1], others[-1 if len(records) % 2 == 0 else -2] = others[1]._replace(kind=PLAIN), records[1]
        results = []
        for lot in (records, others):
            batch = self._batch(lot)
            if batch is None:
                return
            with repeated(seed, self._devices, OneDraw(dropout_only=True)), torch.no_grad():
                losses = checked(self._engine.loss_fn(self._engine.model, batch), len(records)).double()[::2]
            squares = None
            if seed < 2:
                with repeated(seed, self._devices, OneDraw(dropout_only=True)):
                    squares = self._engine.norms_by_parameter(batch)[0][:, ::2]
            results.append((losses, squares))
        (losses, squares), (losses_now, squares_now) = results
        moved = ~((losses - losses_now).abs() <= 0.1 * self._allowed * losses.abs().clamp_min(1e-3))
        if bool(moved.any()):
            row = int(moved.int().argmax())
            error = self._singles.coupled("loss", float(losses_now[row]), float(losses[row]), "beside these")
            raise _Disagreement(error, records[2 * row])
        if squares is not None and squares_now is not None:
            norms, now = squares.sqrt(), squares_now.sqrt()
            scale = torch.maximum(norms, FLOOR * norms.square().sum(0).sqrt()).clamp_min(1e-30)
            moved = ~(((norms - now).abs() / scale).amax(0) <= self._allowed)
            if bool(moved.any()):
                raise _Disagreement(self._singles.coupled("gradient"), records[2 * int(moved.int().argmax())])

    def _stands(self, record: SyntheticRecord) -> bool:
        """Whether coarser rounding leaves a record as it is, computed alone: then it is a witness."""
        one = self._batch([record])
        assert one is not None
        factor = _COARSER if self._allowed < 0.01 else 1.0
        loss, gradient = self._alone(one)
        for seed in range(_ROUNDINGS):
            loss_now, now = self._alone(one, Rounding(factor, seed))
            if not self._singles.same_loss(loss_now, loss) or not self._singles.near(now, gradient):
                return False
        return True

    def _gradient_is_coupled(self, together: Batch, row: int, one: Batch) -> bool:
        """Whether plain autograd gives a record's own loss another gradient in the batch than alone."""
        if self._engine.lent_shapes:
            return False
        records = next(value.shape[0] for value in together.values() if isinstance(value, Tensor) and value.ndim)
        with self._draws():
            losses = checked(self._engine.loss_fn(self._engine.model, together), records)
            inside = self._singles.autograd(losses[row])
        return not self._singles.near(inside, self._alone(one)[1])

    # -- passes ------------------------------------------------------------------------------------------------------

    def _batch(self, records: Sequence[SyntheticRecord]) -> Batch | None:
        batch = self._source.batch(records)
        return None if batch is None else self._on_device(batch)

    def _on_device(self, batch: Batch) -> Batch:
        device = self._devices[0]
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}

    @contextmanager
    def _draws(self, *modes: Any) -> Iterator[None]:
        """Random draws that a record makes in every batch alike."""
        frozen = (OneDraw(),) if self.random else ()
        with repeated(0, self._devices, *frozen, *modes) if self.random or modes else nullcontext():
            yield

    def _losses(self, batch: Batch, records: int) -> Tensor:
        with torch.no_grad(), self._draws():
            return checked(self._engine.loss_fn(self._engine.model, batch), records).double()

    def _alone(self, one: Batch, *modes: Any) -> tuple[float, Gradient]:
        """Loss and gradient of a batch of one, with the draws that it makes in every batch."""
        with self._draws(*modes):
            loss, gradient = self._singles.alone(one)
        self._used.update(gradient)
        return loss, gradient


def _kinds(length: int, count: int) -> list[SyntheticRecord]:
    kinds = [PLAIN, EXTREME, ONE_LABEL]
    return [SyntheticRecord(length, i, kinds[i] if i < len(kinds) else PLAIN) for i in range(count)]


def _shifted(records: Sequence[SyntheticRecord], shift: int) -> list[SyntheticRecord]:
    return [record._replace(seed=record.seed + shift) for record in records]


def _limits(config: Any, short: int, longest: int) -> dict[str, int]:
    """Numbers of a config that may be limits of length and lie between two lengths, by name, at most three."""
    numbers = {
        name: value
        for name, value in config_numbers(config).items()
        if short < value < longest and any(word in name for word in _LENGTH_WORDS)
    }
    return dict(sorted(numbers.items(), key=lambda pair: -pair[1])[:3])


def _padded(
    what: str, beside: float | None, alone: float | None, longest: int, limits: Mapping[str, int]
) -> NoRuleError:
    figures = "" if beside is None else f" ({beside:.6f} padded to a longer record beside it, {alone:.6f} alone)"
    between = ", ".join(f"{name} = {value}" for name, value in limits.items())
    return NoRuleError(
        f"A record's {what} changes with its padding{figures}.",
        code="dp-padding",
        where=f"the self-check with made-up records of up to {longest} tokens, before training"
        + (f"; limits of the config between their lengths: {between}" if between else ""),
        why="its gradient then depends on the length of the records beside it, and clipping per record does not "
        "bound what one long record changes",
        fix="mask padding wherever tokens meet (pooling, a loss's mean), pad on the right (padding_side='right') or "
        "give position_ids that count from the first real token, keep records on one side of a limit at which the "
        "model scales positions or noise by the batch's longest, or prepare all records at one fixed length",
    )
