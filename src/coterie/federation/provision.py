"""A whole federation from one hand: the CA, every kit, and a roster signed by all."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from coterie.federation.files import PRIVATE, new_folder, write_whole
from coterie.federation.identity import CERT_DAYS, Member, cert_pem, key_pem, new_authority, new_key
from coterie.federation.kit import CA_FILE, CA_FOLDER, CERT_FILE, KEY_FILE, ROSTER_FILE, save_authority
from coterie.federation.roster import Roster, draft, save_roster, sign, verify


def provision(
    federation: str,
    members: Iterable[Member],
    out: Path,
    *,
    config_hash: str,
    placement_hash: str,
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
        federation, membership_epoch, members, certificates, config_hash=config_hash, placement_hash=placement_hash
    )
    for name, key in keys.items():
        roster = sign(roster, key, certificates[name])
    verify(roster, authority.certificate)
    with new_folder(out) as aside:
        save_authority(authority, aside / CA_FOLDER)
        for name, key in keys.items():
            folder = aside / name
            folder.mkdir(mode=0o700)
            write_whole(folder / KEY_FILE, key_pem(key), PRIVATE)
            write_whole(folder / CERT_FILE, cert_pem(certificates[name]))
            write_whole(folder / CA_FILE, cert_pem(authority.certificate))
            save_roster(roster, folder / ROSTER_FILE)
    return roster
