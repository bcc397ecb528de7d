"""How long a record takes on this machine, by made-up ones: a public number, which no text was looked at for."""

from __future__ import annotations

import time

import torch
from torch import nn

from coterie.config import FederationConfig, PrivacyRules, PrivacySpec
from coterie.dp.losses import Batch
from coterie.dp.per_sample.probe import synthetic_batch
from coterie.dp.plan import ComputeOptions, PrivacyPlan
from coterie.errors import ConfigError
from coterie.models import seam
from coterie.models.zoo.build import build_model

_SHORT = 5
"""Tokens of the record whose keys and types made-up ones take."""


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


def party_seconds(federation: FederationConfig, length: int) -> float:
    """The same for a party of a federation on this machine, with random weights; serving and masks not counted.

    Raises:
        ConfigError: federation.yaml has no budget (code ``plan-records-none``).
        ModelError: the model cannot be built.
    """
    rules = federation.privacy
    if not isinstance(rules, PrivacyRules):
        raise ConfigError(
            "a time for each record was asked for, and federation.yaml has no budget.",
            code="plan-records-none",
            why="lots and noise follow from a budget",
            fix="leave out --sequence-length, or give `privacy` an epsilon and a delta",
        )
    spec = PrivacySpec(**{**rules.model_dump(), "lot_size": 1, "max_lot": None, "sampler": "poisson"})
    model = build_model(federation.model)
    seam.select(model)
    plan = PrivacyPlan.of_settings(spec, model, federation.train.rounds, against_hosts=True)
    ids = torch.zeros(1, _SHORT, dtype=torch.long)
    like = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return seconds_per_record(model, like, plan, ComputeOptions.of_settings(spec), length)
