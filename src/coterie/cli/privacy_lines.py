"""What `coterie up` says about privacy: what others can learn, what is promised, and when the budget is spent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coterie.config import FederationConfig, PartyConfig


def opening_lines(config: PartyConfig, federation: FederationConfig) -> list[str]:
    """What a party should know before it joins.

    Raises:
        ConfigError: its privacy settings do not fit the federation's.
    """
    from coterie.config.federation import party_privacy
    from coterie.dp.accounting.ledger import default_root

    if federation.exchange == "tokens":
        return [
            "WARNING: `exchange: tokens`. The parties that host experts can read this party's text from the hidden "
            "vectors they receive; take part only if you trust them with it"
        ]
    spec = party_privacy(federation, config)
    if spec is None:
        others = ", ".join(name for name in federation.parties if name != config.party)
        return [
            f"WARNING: `privacy: none`. Expert hosts ({others}) can learn about single records of this party's text "
            "from the sums it pushes, and everybody who fetches weights can learn about them from how the weights "
            "change; nothing bounds it"
        ]
    lines = [
        f"budget: epsilon {spec.epsilon:g} at delta {spec.delta:g} for {federation.train.rounds} rounds; the ledger "
        f"is in {spec.ledger or default_root(config.run_dir)}"
    ]
    if spec.seeded:
        lines.append("NOT PRIVATE: `seeded` draws lots and noise from the seed; nothing of this run may be released")
    return lines


def spent_note(privacy: Mapping[str, Any] | None) -> str:
    """Epsilon so far, for the line of a round."""
    if privacy is None or privacy["epsilon"] is None or not math.isfinite(privacy["epsilon"]):
        return ""
    return f"epsilon {privacy['epsilon']:.3f}"


def stopped_contributing(privacy: Mapping[str, Any] | None) -> str:
    """Why a party adds nothing any more; empty while it does."""
    if privacy is None or privacy["contributing"]:
        return ""
    return (
        f"the privacy budget is spent: {privacy['rounds']} rounds are released and none is left; from here on this "
        "party adds nothing of its text and goes on hosting"
    )


def revealed_so_far(privacy: Mapping[str, Any] | None) -> str:
    """What a party has let others see, whom, and at what epsilon and delta."""
    if privacy is None:
        return ""
    epsilon = "no bound" if privacy["epsilon"] is None else f"epsilon {privacy['epsilon']:.3f}"
    hosting = "" if privacy.get("contributing", True) else "; the budget is spent, it only hosts"
    return (
        f"{privacy['revealed']} of {privacy['rounds']} rounds ({privacy['rounds_left']} left) to "
        f"{', '.join(privacy['revealed_to'])}: {epsilon} at delta {privacy['delta']:.3g}{hosting}"
    )
