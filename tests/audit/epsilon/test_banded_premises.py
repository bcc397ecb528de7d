"""The premises of a run whose noise is in bands: what has to be independent is the matrix times the noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from coterie.audit.epsilon import premises
from coterie.audit.epsilon.subject import Subject
from coterie.dp.accounting import lots
from coterie.dp.noise.past_noise import PastNoise
from helpers.epsilon_world import alarms
from helpers.epsilon_world import bench as bench

BANDS = 3


@pytest.fixture(scope="module")
def subject(bench: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject.of_settings(bench.small(tmp_path_factory.mktemp("settings"), noise_bands=BANDS))


def measured(subject: Subject) -> premises.MeasuredPremises:
    return premises.measure(subject, seed=0, budget_s=1.0)


@pytest.mark.parametrize("isolation", ["fast", "exact"])
def test_premises_of_an_honest_run_in_bands_are_quiet(bench: ModuleType, tmp_path: Path, isolation: str) -> None:
    subject = Subject.of_settings(bench.small(tmp_path, noise_bands=BANDS, isolation=isolation))
    assert (subject.claim.mechanism.bands, len(subject.claim.bands)) == (BANDS, BANDS)
    found = measured(subject)
    assert not alarms(found)
    assert 0.9 * subject.claim.epsilon < found.epsilon(subject) <= subject.claim.epsilon


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise that takes nothing back: independent, of another size."""
    mix = PastNoise.mix
    monkeypatch.setattr(PastNoise, "mix", lambda self, slabs, numbers, turn: mix(self, slabs, numbers, -7))


def test_noise_that_takes_nothing_back_is_seen(subject: Subject, forgotten: None) -> None:
    assert {"noise", "noise between rounds"} <= alarms(measured(subject))


def test_coefficients_that_the_ledger_does_not_name_are_seen(subject: Subject) -> None:
    first, *rest, last = subject.claim.bands
    claim = replace(subject.claim, bands=(first, *rest, -last))
    assert "noise between rounds" in alarms(measured(replace(subject, claim=claim)))


def test_records_drawn_when_it_is_not_their_blocks_turn_are_seen(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lots, "block_of", lambda units, bands: np.arange(units) % bands)
    assert "turns of blocks" in alarms(measured(subject))
