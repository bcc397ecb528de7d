"""What federation.yaml and the split model mean for a roster: the draft of one, and the look at it before signing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cryptography import x509

from coterie.config import FederationConfig
from coterie.errors import RosterError
from coterie.federation.identity.certificates import Member, members_of
from coterie.federation.identity.roster import Roster, draft


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


def draft_agreed(
    config: FederationConfig, certificates: Mapping[str, x509.Certificate], weights: Path | None, *, epoch: int
) -> Roster:
    """The unsigned roster of an agreement.

    Args:
        config: federation.yaml.
        certificates: of every member, by name.
        weights: folder of the split model whose digests all are to sign; None: they sign none.
        epoch: membership epoch.

    Raises:
        RosterError, ModelError, PlacementError: a certificate is missing or another's, or the parts do not fit.
    """
    return draft(
        *(config.name, epoch, members(config), certificates),
        config_hash=config.content_hash(),
        placement_hash=placement_hash(config),
        weights=weights_of(weights),
    )


def check_weights(given: Roster, folder: Path) -> None:
    """Before signing: the roster is for the split model in ``folder``; RosterError otherwise."""
    if weights_of(folder) != dict(given.weights):
        raise RosterError(
            f"The roster is not for the split model in {folder}; it was not signed.",
            code="roster-other-weights",
            why="your signature says that the run starts from exactly those files",
            fix="ask who made the roster for the files and the manifest.json that it was made from",
        )


def check_agreed(given: Roster, config: FederationConfig, settings: Path) -> None:
    """Before signing: the roster is for ``config``, which was read from ``settings``; RosterError otherwise."""
    listed = [(entry.name, entry.role, entry.endpoint) for entry in given.parties]
    agreed = [(member.name, member.role, member.endpoint) for member in members(config)]
    differs = next(
        (
            what
            for what, same in (
                ("the federation's name", given.federation == config.name),
                ("the members or their endpoints", listed == agreed),
                ("the settings", given.config_hash == config.content_hash()),
                ("who hosts which expert", given.placement_hash == placement_hash(config)),
            )
            if not same
        ),
        None,
    )
    if differs is not None:
        raise RosterError(
            f"The roster and {settings} differ in {differs}; it was not signed.",
            code="roster-other-config",
            why="your signature says that you agree to all of it",
            fix="ask who made the roster for the federation.yaml it was made from",
        )
