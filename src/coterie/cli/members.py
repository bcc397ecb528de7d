"""What the identity commands read from federation.yaml."""

from __future__ import annotations

from pathlib import Path

from coterie.config import FederationConfig
from coterie.federation.identity.certificates import Member, members_of


def members(config: FederationConfig) -> tuple[Member, ...]:
    """All members in roster order: the coordinator, then the parties as the file lists them."""
    parties = {name: address.endpoint for name, address in config.parties.items()}
    return members_of(parties, config.coordinator.endpoint)


def placement_hash(config: FederationConfig) -> str:
    """Hash of which party hosts which expert. Builds the model without weights; an invalid placement is an error."""
    from coterie.models.split.placement import Placement
    from coterie.models.zoo.build import build_model

    model = build_model(config.model, meta=True)
    return Placement.of_spec(config.placement, list(config.parties), model).content_hash()


def weights_of(folder: Path | None) -> dict[str, str]:
    """SHA-256 of every file of a split model, by name, for the roster; every file that is there is read.

    Raises:
        ModelError: ``folder`` is not what `coterie split` wrote, or a file in it changed since.
    """
    if folder is None:
        return {}
    from coterie.models.split.shards import check_digests

    return {name: str(entry["sha256"]) for name, entry in check_digests(folder)["files"].items()}
