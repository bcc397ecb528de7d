"""The engine against batches of one, on the user's own model, with made-up records, before training starts.

What training does is looked at: train mode, a physical batch of real size, records of one length and of several up to
the longest of the data, the user's collator and loss. Some of the records beside the compared ones are extreme, so
that a model or a loss that lets records touch each other shows it. Every comparison has to agree.

Randomness must not pass for coupling, nor hide it: draws are replaced by one value for all elements, so that a record
draws the same in every batch; what cannot be replaced so (an order of the records, a choice of tokens) is repeated
with the seed, and a record is compared with itself beside others in a batch of the same shape.

Rounding must not pass for coupling either: a routing decision at a tie may fall differently in another batch. Where a
comparison fails, its record is computed alone once more with coarser rounding. If that moves it as well, the record
decides nothing and others are drawn; if it stands, the model is refused. No other record takes part in that, so a
model that couples records gains nothing by it.

Shape letters: B records, P parameters, S compared records.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from coterie.dp.checks.batches_of_one import in_mode
from coterie.dp.checks.comparison import Comparison, ComparisonReport
from coterie.dp.checks.made_up import FromExample, Source
from coterie.dp.checks.watched import Watched
from coterie.dp.losses import Batch
from coterie.dp.per_sample.engine import Engine
from coterie.dp.refusals import check_batch, check_model

RECORDS = 4
"""Fewest records of a batch that is compared; also where nobody says how many a physical batch has."""


def example_batch() -> dict[str, Tensor]:
    """The keys and types of a causal LM's batch, for a set-up that has seen no batch yet."""
    ids = torch.zeros(1, 2, dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def check(
    engine: Engine, batch: Batch | None = None, source: Source | None = None, records: int = RECORDS
) -> ComparisonReport:
    """Refuse what cannot be private, then compare the engine with batches of one.

    Args:
        engine: with the model as it will be trained. Where expert weights are lent, the model has to be able to
            compute by itself meanwhile (`seam.computed_by`); numbers are then compared with the engine's on batches
            of one.
        batch: an example; only its keys, shapes and types are used. Default: a causal LM's.
        source: of made-up records, as the collator makes batches of them. Default: made like ``batch``, padded on the
            side that it pads, where it has an ``attention_mask``.
        records: of a physical batch.

    Raises:
        NoRuleError: an unsupported use of a parameter; a loss, a model or a collator that couples records; a value of
            the model that changes; norms or sums that disagree; a record that padding changes. The message names the
            parameter or the coupling.
        PrivacyError: the loss is not one number per record, the batch packs records, or the model cannot compute the
            longest record.

    Cost: for a model without randomness, about 26 passes (a forward, most with a backward): 6 of a physical batch of
        records of 11 tokens, 8 of at most 5 records of which one is the longest of the data (12 where the data is
        padded), the rest of one record.
        For one with randomness (dropout), 12 more of a physical batch. No memory beyond a step's on such batches, a
        float32 gradient of the model, and copies of its values up to 2^16 elements each.
    """
    like = example_batch() if batch is None else batch
    check_batch(like, engine.model)
    with in_mode(engine.model, training=True):
        check_model(engine.model)
    records = max(records, RECORDS)
    with _restored(engine.model) as values:
        comparison = Comparison(engine, source or FromExample(engine.model, like), values)
        with in_mode(engine.model, training=True):
            comparison.watch_values(records)
            comparison.prepare(like)
            if comparison.comparable:
                comparison.of_one_length(records)
                comparison.of_several_lengths()
                comparison.padded_before()
            if comparison.random:
                comparison.beside_others(records)
        with in_mode(engine.model, training=False):
            if not comparison.comparable:
                comparison.of_one_length(records)
            comparison.of_several_lengths()
            comparison.padded_before()
            comparison.check_values()
    return comparison.report()


@contextmanager
def _restored(model: nn.Module) -> Iterator[Watched]:
    before = Watched(model)
    try:
        yield before
    finally:
        before.restore()
