"""Parties that train together in one process, against the same training written out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from coterie.models.seam import expert_layers
from coterie.training.in_process import run_in_process
from coterie.training.party_parts import trunk_tensors
from federation_tools import (
    PARTIES,
    full_models,
    make_parts,
    relative,
    settings,
    train_by_hand,
)


def assert_same(federation, models, tolerance: float = 1e-5) -> None:  # type: ignore[no-untyped-def]
    """Trunks and hosted experts of a federation against whole models."""
    first = expert_layers(models[PARTIES[0]])
    for name in PARTIES:
        work = federation.runs[name].work
        whole = dict(models[name].named_parameters())
        for key, value in trunk_tensors(work.parts.model).items():
            if key in whole:
                assert relative(value, whole[key]) < tolerance, (name, key)
        for key, value in work.host.state_dict().items():
            if "/" not in key:
                _, layer, _, expert, parameter = key.split(".")
                expected = first[int(layer)].parameters()[parameter][int(expert)]
                assert relative(value, expected) < tolerance, (name, key)


@pytest.mark.parametrize("in_flight", [1, 2])
def test_three_parties_train_as_the_same_loop_by_hand(tmp_path: Path, in_flight: int):
    config = settings(train__in_flight=in_flight)
    models = full_models()
    parts = make_parts(config, models, tmp_path)
    federation, results = run_in_process(config, list(parts.values()), tmp_path / "coordinator")
    train_by_hand(config, models, parts)
    assert_same(federation, models)
    assert all(result.finished and result.rounds == 4 for result in results.values())
    assert all(result.loss is not None for result in results.values())
