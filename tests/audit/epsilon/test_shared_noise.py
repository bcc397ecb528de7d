"""The premises of a party that adds a share of the noise: its own is that share, and the claim is of all together."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from coterie.audit.epsilon import one_run, premises
from coterie.audit.epsilon.subject import Subject
from coterie.dp.noise.pooled import PooledNoise
from helpers.epsilon_world import alarms
from helpers.epsilon_world import bench as bench
from helpers.epsilon_world import subject as subject

SHARED = PooledNoise(parties=3, colluding=1)


def shared(subject: Subject, plan: PooledNoise | None, claim: PooledNoise | None) -> Subject:
    return replace(subject, plan=replace(subject.plan, pooled=plan), claim=replace(subject.claim, pooled=claim))


def test_a_share_of_the_noise_is_measured_against_the_share(subject: Subject) -> None:
    honest = shared(subject, SHARED, SHARED)
    assert honest.claim.own_noise == pytest.approx(subject.claim.mechanism.noise_multiplier / math.sqrt(2))
    measured = premises.measure(honest, seed=0, budget_s=1.0)
    assert not alarms(measured)
    assert measured.contribution == pytest.approx(1.0, abs=1e-3)
    assert any("any 1 may know theirs" in each.sentence for each in measured.premises)


@pytest.mark.parametrize(
    ("plan", "claim"), [(SHARED, None), (PooledNoise(3, None), SHARED), (SHARED, PooledNoise(3, 2))]
)
def test_another_share_than_the_ledger_names_is_seen(
    subject: Subject, plan: PooledNoise | None, claim: PooledNoise | None
) -> None:
    assert "noise" in alarms(premises.measure(shared(subject, plan, claim), seed=0, budget_s=1.0))


def test_canaries_of_a_party_with_agreed_noise_have_a_claim_and_noise_of_their_own(subject: Subject) -> None:
    """The audit's own small claim needs more noise than was agreed, and nobody else adds any."""
    agreed = replace(subject, plan=replace(subject.plan, agreed_noise=0.5, pooled=SHARED))
    runs, _ = one_run.audit(agreed, canaries=8, seed=0)
    assert runs
    assert all(each.claimed <= one_run.CLAIM for each in runs)
