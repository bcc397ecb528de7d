"""Is this folder the member's whose process starts, and does everything that was signed fit together?"""

from __future__ import annotations

from pathlib import Path

from coterie.config import FederationConfig
from coterie.errors import ConfigError, IdentityError, RosterError
from coterie.federation.identity.certificates import COORDINATOR, Role
from coterie.federation.identity.kit import ROSTER_FILE, Kit, load_kit
from coterie.federation.identity.roster import Roster, read_roster


def identify(config: FederationConfig, kit_folder: Path, name: str, role: Role) -> tuple[Kit, Roster]:
    """The kit and the roster beside it, checked against each other and against federation.yaml.

    Signatures are checked when the transport is made.

    Raises:
        IdentityError, RosterError: the kit is another member's, or the roster does not list exactly these members.
        ConfigError: federation.yaml is not the one whose hash was signed.
    """
    kit = load_kit(kit_folder)
    if (kit.name, kit.role) != (name, role):
        raise IdentityError(
            f"The kit in {kit_folder} is that of {kit.role} {kit.name}, not of {role} {name}.",
            code="identity-other-member",
            fix="name the folder of the right kit",
        )
    roster = read_roster(kit_folder / ROSTER_FILE)
    if roster.config_hash != config.content_hash():
        raise ConfigError(
            f"federation.yaml ({config.content_hash()[:8]}) is not the one that was signed "
            f"({roster.config_hash[:8]}).",
            code="config-mismatch",
            where=f"compared with {ROSTER_FILE} in {kit_folder}",
            why="parties with different settings would not train the same model",
            fix="take the federation.yaml that everybody signed, or let everybody sign a new roster",
        )
    listed = {entry.name: entry.endpoint for entry in roster.parties}
    agreed = {name: address.endpoint for name, address in config.parties.items()}
    agreed[COORDINATOR] = config.coordinator.endpoint
    if listed != agreed:
        wrong = sorted(name for name in listed.keys() | agreed.keys() if listed.get(name) != agreed.get(name))
        raise RosterError(
            f"The roster and federation.yaml disagree about {', '.join(wrong)}.",
            code="roster-mismatch",
            fix="make and sign a new roster from this federation.yaml",
        )
    return kit, roster
