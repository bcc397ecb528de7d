"""What a member can make others take."""

from __future__ import annotations

import math

from coterie.training.party.agreed_limits import party_noise_limit
from helpers.private_settings import private_settings


def test_noise_that_all_signed_is_never_too_much_for_the_others():
    """They cannot look at one party's sum then, and the bound on everybody's follows from that number."""
    plain = private_settings()
    limit = party_noise_limit(plain)
    assert 1 < limit < 100
    agreed = private_settings(aggregation="masked", noise_multiplier=2 * limit)
    assert party_noise_limit(agreed) == math.inf
