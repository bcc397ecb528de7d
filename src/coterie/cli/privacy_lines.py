"""What `coterie up` says about privacy: what others can learn, what is promised, and when the budget is spent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from coterie.dp.accounting.digits import epsilon_digits

if TYPE_CHECKING:
    from coterie.config import FederationConfig, PartyConfig


def opening_lines(config: PartyConfig, federation: FederationConfig) -> list[str]:
    """What a party should know before it joins.

    Raises:
        ConfigError: its privacy settings do not fit the federation's.
    """
    from coterie.config.federation import party_privacy
    from coterie.dp.accounting.ledger import default_root
    from coterie.training.planning import exposure

    recorded = _recorded(federation)
    if federation.exchange == "tokens":
        return [*_warning(exposure.of_tokens(federation)), *recorded]
    spec = party_privacy(federation, config)
    if spec is None:
        most = federation.train.batch_size * config.data.sequence_length
        reach = exposure.Reach.of_federation(federation)
        return [*_warning(exposure.of_pushes(federation, reach, most)), *recorded]
    lines = [
        f"budget: epsilon {spec.epsilon:g} at delta {spec.delta:g} for {federation.train.rounds} rounds; the ledger "
        f"is in {spec.ledger or default_root(config.run_dir)}"
    ]
    if spec.seeded:
        lines.append("NOT PRIVATE: `seeded` draws lots and noise from the seed; nothing of this run may be released")
    return [*lines, *recorded]


def _warning(lines: list[str]) -> list[str]:
    return [f"WARNING: {lines[0]}", *lines[1:]]


def _recorded(federation: FederationConfig) -> list[str]:
    spec = federation.transcript
    if spec is None:
        return []
    rounds = "all rounds" if spec.rounds == "all" else f"the first {spec.rounds} rounds"
    lines = [
        f"recorded for an audit, as all parties agreed: every party keeps what others send it in {rounds}, and this "
        "one keeps token ids of its own text beside it; `coterie purge` removes both"
    ]
    if federation.aggregation == "masked":
        lines.append(
            "masks of recorded rounds are kept, too: this party's own recording with one host's opens its sums on "
            "what that host stores, and so do the recordings of all other parties together"
        )
    return lines


def spent_note(privacy: Mapping[str, Any] | None) -> str:
    """Epsilon so far, for the line of a round."""
    if privacy is None or privacy["epsilon"] is None or not math.isfinite(privacy["epsilon"]):
        return ""
    return f"epsilon {epsilon_digits(privacy['epsilon'])}"


def stopped_contributing(privacy: Mapping[str, Any] | None) -> str:
    """Why a party adds nothing any more; empty while it does."""
    if privacy is None or privacy["contributing"]:
        return ""
    if privacy["rounds_left"]:
        return (
            "fewer parties than masked pushes need have budget left, so nobody adds anything of its text from here "
            f"on; {privacy['rounds_left']} rounds of this party's budget are left"
        )
    return (
        f"the privacy budget is spent: {privacy['rounds']} rounds are released and none is left; from here on this "
        "party adds nothing of its text and goes on hosting"
    )


def revealed_so_far(privacy: Mapping[str, Any] | None) -> str:
    """What a party has let others see, whom, and at what epsilon and delta."""
    if privacy is None:
        return ""
    epsilon = "no bound" if privacy["epsilon"] is None else f"epsilon {epsilon_digits(privacy['epsilon'])}"
    hosting = "" if privacy.get("contributing", True) else "; the budget is spent, it only hosts"
    return (
        f"{privacy['revealed']} of {privacy['rounds']} rounds ({privacy['rounds_left']} left) to "
        f"{', '.join(privacy['revealed_to'])}: {epsilon} at delta {privacy['delta']:.3g}{hosting}"
    )
