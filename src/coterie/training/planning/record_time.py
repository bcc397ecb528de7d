"""How long a record takes on this machine, by made-up ones: a public number, which no text was looked at for."""

from __future__ import annotations

import time

from torch import nn

from coterie.dp.losses import Batch
from coterie.dp.per_sample.probe import synthetic_batch
from coterie.dp.plan import ComputeOptions, PrivacyPlan


def seconds_per_record(
    model: nn.Module, like: Batch, plan: PrivacyPlan, options: ComputeOptions, length: int
) -> float:
    """How long a made-up record of full length takes, clipped sum included: the second of two batches.

    Args:
        model: on the device that it is measured on.
        like: a batch with the keys and types of the run's.
        plan: says whether records are computed alone.
        options: how many are computed at once otherwise.
        length: tokens.
    """
    engine = options.engine(plan, model, None)
    rows = 1 if plan.isolation == "exact" else options.physical_batch
    device = next(model.parameters()).device
    batch = {name: value.to(device) for name, value in synthetic_batch(model, like, rows, length).items()}
    model.train()
    engine.prepare(batch)
    began = 0.0
    for _ in range(2):
        began = time.monotonic()
        engine.accumulate(batch)
        engine.take()
    return (time.monotonic() - began) / rows
