"""What a member can make others take, in numbers that follow from the signed federation.yaml and the model alone."""

from __future__ import annotations

import math
from collections.abc import Callable

from transformers import PreTrainedModel

from coterie.config import FederationConfig, PrivacyRules
from coterie.config.privacy import RELEASED_LOADS
from coterie.dp.noise.bands import NoiseBands
from coterie.dp.noise.joint_noise import LOAD
from coterie.federation.experts.host import ExpertsHostLimits
from coterie.federation.tokens.host import TokensHostLimits
from coterie.federation.wire.messages import LARGEST
from coterie.models import seam

_DEVIATIONS = 16.0
_ROUNDING = 1.05
"""Over the bounds below for everything that the mechanism adds for rounding (eta, the noise's grid)."""


def largest_noise(federation: FederationConfig) -> float:
    """Largest noise multiplier that a party may use: what the agreed budget needs if every round uses every record.

    Infinite where no budget was agreed on.

    Sampling only ever lowers what is needed. By zero-concentrated DP (Bun and Steinke 2016, arXiv:1605.02065):
    T rounds cost rho = T / (2 sigma^2), and epsilon = rho + 2 sqrt(rho ln(1 / delta)).
    """
    rules = federation.privacy
    if not isinstance(rules, PrivacyRules):
        return math.inf
    tail = math.log(1 / rules.delta)
    root_rho = math.sqrt(tail + rules.epsilon) - math.sqrt(tail)
    return math.sqrt(federation.train.rounds / 2) / root_rho


def party_noise_limit(federation: FederationConfig) -> float:
    """Noise multiplier beyond which a party's sums are nonsense to others; none where all signed the number."""
    return math.inf if federation.noise_multiplier is not None else largest_noise(federation)


def noised_limits(
    federation: FederationConfig, rules: PrivacyRules, model: PreTrainedModel
) -> Callable[[str], float]:
    """Largest size of a value in one party's noised sum, by tensor name: a whole lot pulling one way, and 16 standard
    deviations of the largest noise. An honest value lies beyond it less than once in 10^30."""
    expected = federation.largest_lot
    lot = rules.max_lot or expected + _DEVIATIONS * (math.sqrt(expected) + 1)
    bands = NoiseBands.of(rules.noise_bands, federation.train.rounds, federation.optim.added_momentum)
    # Noise that takes back earlier noise is larger in every single round.
    noise_multiplier = largest_noise(federation) * (
        1.0 if bands is None else bands.step_noise(federation.train.rounds)
    )
    share = rules.load_share if rules.balance in RELEASED_LOADS else 0.0
    load_bound = math.sqrt(len(seam.expert_layers(model)))
    gradients = _ROUNDING * rules.clip_norm * (lot + _DEVIATIONS * noise_multiplier / math.sqrt(1 - share**2))
    loads = _ROUNDING * load_bound * (lot + _DEVIATIONS * noise_multiplier / share) if share else 0.0
    plain = federation.value_limit * expected  # of parties that were allowed to train without privacy beside others

    def limit(name: str) -> float:
        noised = loads if name == LOAD else gradients
        return max(noised, plain) if federation.mixed_privacy else noised

    return limit


def experts_limits(federation: FederationConfig, model: PreTrainedModel) -> ExpertsHostLimits:
    """Bounds of the `experts` exchange."""
    rules, rounds = federation.privacy, federation.train.rounds
    if not isinstance(rules, PrivacyRules):
        return ExpertsHostLimits(rounds, _most_tokens(federation, model), federation.value_limit)
    weight = max(federation.largest_lot, federation.train.batch_size)
    return ExpertsHostLimits(rounds, weight, federation.value_limit, noised_limits(federation, rules, model))


def tokens_limits(federation: FederationConfig, model: PreTrainedModel) -> TokensHostLimits:
    """Bounds of the `tokens` exchange."""
    train = federation.train
    return TokensHostLimits(
        begin_s=federation.deadline_s,
        rounds=train.rounds,
        micro_batches=-(-train.batch_size // train.micro_batch),
        tokens=_most_tokens(federation, model),
        value=federation.value_limit,
    )


def _most_tokens(federation: FederationConfig, model: PreTrainedModel) -> int:
    """Of one party in one round: its sequences at the longest that the model can read."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return federation.train.batch_size * longest if isinstance(longest, int) else LARGEST
