"""What federation.yaml says about rounds, heartbeats and connections."""

from __future__ import annotations

from dataclasses import replace

from coterie.config import FederationConfig
from coterie.federation.rounds.state import RoundPlan
from coterie.federation.wire.base_transport import Settings


def plan_of(config: FederationConfig) -> RoundPlan:
    """What federation.yaml says about rounds.

    A party is lost after half the time it may keep another one waiting, but never before two seconds; one that has
    no connection after four seconds at most.
    """
    return RoundPlan(
        parties=tuple(config.parties),
        rounds=config.train.rounds,
        evaluate_every=config.train.eval_every,
        checkpoint_every=config.train.checkpoint_every,
        deadline_s=config.round_deadline_s,
        lease_s=lease_s(config),
        join_s=config.join_deadline_s,
        max_attempts=config.max_attempts,
        max_refusals=config.max_refusals,
        lost_party=config.lost_party,
    )


def lease_s(config: FederationConfig) -> float:
    """Silence after which a party counts as lost."""
    return max(2.0, config.deadline_s / 2)


def heartbeat_s(config: FederationConfig) -> float:
    """Time between a party's heartbeats: five in a lease, at most half a second."""
    return min(0.5, lease_s(config) / 5)


def transport_settings(config: FederationConfig, *, carried: bool = False) -> Settings:
    """Transport times that fit the federation's deadline: a frozen peer is noticed within it.

    Args:
        config: what all agreed on.
        carried: something else carries the connections, and may take seconds for a message.
    """
    silence = lease_s(config)
    settings = Settings(send_deadline_s=config.deadline_s, heartbeat_s=silence / 5, silence_s=silence)
    return replace(settings, dial_s=_CARRIED_S, handshake_s=_CARRIED_S, ping_s=_CARRIED_S) if carried else settings


_CARRIED_S = 60.0
