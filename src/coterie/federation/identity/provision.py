"""A whole federation from one hand: the CA, every kit, and a roster signed by all."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

from coterie.federation.identity.certificates import (
    CERT_DAYS,
    Member,
    cert_pem,
    key_pem,
    members_of,
    new_authority,
    new_key,
)
from coterie.federation.identity.kit import (
    CA_FILE,
    CA_FOLDER,
    CERT_FILE,
    KEY_FILE,
    ROSTER_FILE,
    Kit,
    load_kit,
    new_kit,
    save_authority,
)
from coterie.federation.identity.roster import Roster, draft, save_roster, sign, verify
from coterie.storage import PRIVATE, PUBLIC, write_whole


def provision(
    federation: str,
    members: Iterable[Member],
    out: Path,
    *,
    config_hash: str,
    placement_hash: str,
    weights: Mapping[str, str] | None = None,
    membership_epoch: int = 1,
    days: float = CERT_DAYS,
) -> Roster:
    """A CA and one kit folder per member under ``out``, with a roster signed by all.

    For one administrator, or one machine: all keys are made in one place. Otherwise let every party make its own
    (`kit.request`, `approve`, `install`).

    Raises:
        IdentityError: ``out`` is not empty, or a name or endpoint is unusable. Nothing is written then.
    """
    members = tuple(members)
    authority = new_authority(federation)
    keys = {member.name: new_key() for member in members}
    certificates = {m.name: authority.issue(m, keys[m.name].public_key(), days=days) for m in members}
    roster = draft(
        *(federation, membership_epoch, members, certificates),
        config_hash=config_hash,
        placement_hash=placement_hash,
        weights=weights,
    )
    for name, key in keys.items():
        roster = sign(roster, key, certificates[name])
    verify(roster, authority.certificate)
    with new_kit(out) as aside:
        save_authority(authority, aside / CA_FOLDER)
        for name, key in keys.items():
            folder = aside / name
            folder.mkdir(mode=0o700)
            write_whole(folder / KEY_FILE, key_pem(key), PRIVATE)
            write_whole(folder / CERT_FILE, cert_pem(certificates[name]), PUBLIC)
            write_whole(folder / CA_FILE, cert_pem(authority.certificate), PUBLIC)
            save_roster(roster, folder / ROSTER_FILE)
    return roster


def free_endpoints(count: int) -> list[str]:
    """Different ``127.0.0.1:port`` that were free a moment ago; another process may still be quicker."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]


def local_kits(
    folder: Path,
    parties: Iterable[str],
    *,
    coordinator: bool = False,
    federation: str = "local",
    config_hash: str = "",
    placement_hash: str = "",
    membership_epoch: int = 1,
) -> dict[str, Kit]:
    """A federation on this machine with free ports, provisioned under ``folder``; kits by name, in roster order."""
    parties = tuple(parties)
    endpoints = free_endpoints(len(parties) + coordinator)
    members = members_of(dict(zip(parties, endpoints, strict=False)), endpoints[-1] if coordinator else None)
    provision(
        *(federation, members, folder),
        config_hash=config_hash,
        placement_hash=placement_hash,
        membership_epoch=membership_epoch,
    )
    return {member.name: load_kit(folder / member.name) for member in members}
