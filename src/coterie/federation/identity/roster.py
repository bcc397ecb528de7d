"""The roster: who is in the federation, signed by every member and checked by every member.

A roster that differs in one letter from what a member signed is refused with one sentence. Its content hash covers
parties, roles, endpoints, certificate fingerprints, and the hashes of federation.yaml and of the expert placement, so
two members with the same roster hash agree on all of these.

At a connection there are two gates: TLS checks that the CA issued the certificate; then `Roster.admit` checks that
the certificate is the very one the roster lists, with the same name and role. A valid certificate outside the roster
(an earlier member's, or a second one for the same name) opens nothing.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from coterie.errors import IdentityError, RosterError
from coterie.federation.identity.certificates import (
    Member,
    Role,
    cert_pem,
    check_issued,
    fingerprint,
    member_of,
    p256_key,
    parse_certificate,
)
from coterie.federation.identity.kit import Kit
from coterie.federation.identity.letters import grouped, of_digest
from coterie.storage import PUBLIC, write_whole

_PREFIX = b"coterie roster v1\n"
_MAX_BYTES = 4 << 20
_READ_OUT = 40
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class RosterEntry:
    """One member. ``cert_fingerprint`` is SHA-256 in the form ``9F:2C:...``."""

    name: str
    role: Role
    endpoint: str
    cert_fingerprint: str


@dataclass(frozen=True)
class Signature:
    """A member's signature over a roster's hash, with the certificate that checks it."""

    certificate: str
    signed_hash: str
    signature: str


@dataclass(frozen=True)
class Roster:
    """The agreed list of members under one membership epoch.

    Args:
        parties: all members in roster order, the coordinator first if there is one; of two members the later dials.
        config_hash: hash of federation.yaml. placement_hash: hash of which party hosts which expert.
        weights: SHA-256 of every file of the split model that the run starts from, by name; empty where the roster
            was made without them.
        membership_epoch: roster period, counted from 1; joins and leaves begin a new one.
    """

    federation: str
    membership_epoch: int
    parties: tuple[RosterEntry, ...]
    config_hash: str
    placement_hash: str
    weights: Mapping[str, str] = field(default_factory=dict)
    signatures: Mapping[str, Signature] = field(default_factory=dict)

    def content(self) -> dict[str, Any]:
        """What is hashed and signed: everything but the signatures."""
        return {
            "federation": self.federation,
            "membership_epoch": self.membership_epoch,
            "parties": [
                {"name": e.name, "role": str(e.role), "endpoint": e.endpoint, "cert_fingerprint": e.cert_fingerprint}
                for e in self.parties
            ],
            "config_hash": self.config_hash,
            "placement_hash": self.placement_hash,
            **({"weights": dict(self.weights)} if self.weights else {}),
        }

    def content_hash(self) -> str:
        """SHA-256 (hex) of the content as canonical JSON: sorted keys, no blanks, ASCII."""
        canonical = json.dumps(self.content(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode("ascii")).hexdigest()

    def fingerprint(self) -> str:
        """The first 200 bits of `content_hash` as eight groups of five letters, to be read out by telephone.

        Whoever issues all certificates chooses what is hashed, at both ends, so twice the bits of a guess are needed.
        """
        return grouped(of_digest(self.content_hash(), _READ_OUT))

    def entry(self, name: str) -> RosterEntry:
        """The entry of ``name``; RosterError if there is none."""
        for entry in self.parties:
            if entry.name == name:
                return entry
        raise RosterError(
            f"{name} is not in the roster of {self.federation}.",
            code="roster-unknown-member",
            fix=f"members: {', '.join(e.name for e in self.parties)}",
        )

    def certificate_of(self, name: str) -> x509.Certificate:
        """The certificate ``name`` signed with; RosterError if it has not signed."""
        signature = self.signatures.get(name)
        if signature is None:
            raise _unsigned(name)
        try:
            return parse_certificate(signature.certificate.encode(), f"The certificate of {name}", "roster")
        except IdentityError as error:
            raise RosterError(
                error.message, code="roster-damaged", fix="ask for the file again, as `coterie roster` wrote it"
            ) from None

    def admit(self, certificate: x509.Certificate, role: Role | None = None) -> RosterEntry:
        """The second gate: which member presents this certificate.

        Args:
            certificate: already checked by TLS to be issued by the CA.
            role: the role it must have, if it matters.

        Raises:
            RosterError: not the certificate the roster lists, or another role.
        """
        name, certified_role, federation = member_of(certificate)
        actual = fingerprint(certificate)
        entry = next((entry for entry in self.parties if entry.cert_fingerprint == actual), None)
        if entry is None or entry.name != name or federation != self.federation:
            raise RosterError(
                f"The certificate {actual[:11]}.. of {name} is valid but not in the roster.",
                code="roster-not-listed",
                where=f"roster v{self.membership_epoch} ({self.content_hash()[:4]}..) of {self.federation}",
                why="only the members that signed the roster take part",
                fix="sign a new roster that lists this certificate, or remove its holder's access",
            )
        if entry.role != certified_role or (role is not None and entry.role != role):
            raise RosterError(
                f"{name} is certified as {certified_role}; the roster lists {entry.role}, needed here is "
                f"{role or entry.role}.",
                code="roster-role",
                fix="use the kit of that role: the coordinator has one of its own, for the name `coordinator`",
                why="a coordinator must not get tensors, and a party must not steer rounds",
            )
        return entry


def _unsigned(name: str) -> RosterError:
    return RosterError(
        f"{name} has not signed the roster.",
        code="roster-unsigned",
        why="a roster counts when every member has agreed to it",
        fix=f"at {name}: coterie roster sign roster.json --kit KIT",
    )


def _digest(content_hash: str) -> bytes:
    return _PREFIX + content_hash.encode("ascii")


def draft(
    federation: str,
    membership_epoch: int,
    members: Iterable[Member],
    certificates: Mapping[str, x509.Certificate],
    *,
    config_hash: str,
    placement_hash: str,
    weights: Mapping[str, str] | None = None,
) -> Roster:
    """An unsigned roster.

    Args:
        federation: its name.
        membership_epoch: rises with every change of members.
        members: parties and the coordinator, in roster order.
        certificates: the approved certificate of every member.
        config_hash: hex SHA-256 of what was agreed (`content_hash`).
        placement_hash: hex SHA-256 of who hosts which expert.
        weights: hex SHA-256 of the start's files, by name.

    Raises:
        RosterError: a certificate is missing or was issued for another name or role.
    """
    entries: list[RosterEntry] = []
    for member in members:
        certificate = certificates.get(member.name)
        if certificate is None:
            raise RosterError(
                f"The certificate of {member.name} is missing.",
                code="roster-incomplete",
                fix="put it into the folder given with --certificates, as `coterie approve` wrote it",
            )
        issued_for = member_of(certificate)
        if issued_for != (member.name, member.role, federation):
            raise RosterError(
                f"The certificate given for {member.name} was issued for {'/'.join(issued_for)}.",
                code="roster-role",
                fix="put the certificate of that member there, under its own name",
            )
        entries.append(RosterEntry(member.name, member.role, member.endpoint, fingerprint(certificate)))
    return Roster(federation, membership_epoch, tuple(entries), config_hash, placement_hash, dict(weights or {}))


def sign(roster: Roster, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> Roster:
    """The roster with this member's signature added.

    Raises:
        RosterError: the certificate is not the one the roster lists.
    """
    entry = roster.admit(certificate)
    content_hash = roster.content_hash()
    raw = key.sign(_digest(content_hash), ec.ECDSA(hashes.SHA256()))
    signature = Signature(cert_pem(certificate).decode("ascii"), content_hash, base64.b64encode(raw).decode("ascii"))
    return replace(roster, signatures={**roster.signatures, entry.name: signature})


def verify(roster: Roster, authority: x509.Certificate) -> None:
    """Check that every member signed exactly this roster with the certificate it lists.

    Raises:
        RosterError: ``roster-changed`` (text differs from what was signed), ``roster-unsigned``,
            ``roster-not-listed``, ``roster-signature`` (the signature itself is false), ``roster-duplicate``.
        IdentityError: a certificate is of another CA or expired.
    """
    names = [entry.name for entry in roster.parties]
    if len(set(names)) != len(names) or not names:
        raise RosterError(
            "The roster lists nobody, or one name twice.",
            code="roster-duplicate",
            fix="make it again from federation.yaml: `coterie roster make`",
        )
    for entry in roster.parties:
        check_signed(roster, entry, authority)
    strangers = sorted(set(roster.signatures) - set(names))
    if strangers:
        raise RosterError(
            f"{', '.join(strangers)} signed the roster but is not in it.",
            code="roster-not-listed",
            fix="make the roster again with all members in federation.yaml, and have everybody sign it",
        )


def check_signed(roster: Roster, entry: RosterEntry, authority: x509.Certificate) -> None:
    """Check that one member signed exactly this roster with the certificate it lists; raises as `verify` does."""
    content_hash = roster.content_hash()
    certificate = roster.certificate_of(entry.name)
    signature = roster.signatures[entry.name]
    check_issued(certificate, authority, f"The certificate of {entry.name}")
    if signature.signed_hash != content_hash:
        raise RosterError(
            f"The roster was changed after {entry.name} signed it.",
            code="roster-changed",
            where=f"it has hash {content_hash[:8]}.., {entry.name} signed {signature.signed_hash[:8]}..",
            why="members would disagree on who takes part, where, or who hosts which expert",
            fix="use the roster as it was signed, or let every member sign the new one",
        )
    listed = roster.admit(certificate)
    if listed != entry:
        raise RosterError(
            f"{entry.name} signed with the certificate of {listed.name}.",
            code="roster-not-listed",
            fix="have everybody sign with the own kit",
        )
    try:
        raw = base64.b64decode(signature.signature, validate=True)
        p256_key(certificate, f"The certificate of {entry.name}").verify(
            raw, _digest(content_hash), ec.ECDSA(hashes.SHA256())
        )
    except (InvalidSignature, binascii.Error):
        raise RosterError(
            f"The signature of {entry.name} under the roster is false.",
            code="roster-signature",
            fix="have that member sign the roster anew with its own kit",
        ) from (None)


def join(rosters: Iterable[Roster]) -> Roster:
    """Copies of one roster that were signed in different places, with all signatures.

    Raises:
        RosterError: the copies differ in content.
    """
    first, *others = rosters
    for other in others:
        one, two = first.content_hash(), other.content_hash()
        if one != two:
            raise RosterError(
                f"The copies are of different rosters ({one[:8]}.. and {two[:8]}..).",
                code="roster-mismatch",
                fix="let everybody sign the same file",
            )
        first = replace(first, signatures={**first.signatures, **other.signatures})
    return first


# ---- as a file ---------------------------------------------------------------------------------------------------


def to_json(roster: Roster) -> bytes:
    """The file form, with the content hash written out for people."""
    signatures = {
        name: {"certificate": s.certificate, "signed_hash": s.signed_hash, "signature": s.signature}
        for name, s in sorted(roster.signatures.items())
    }
    document = {"hash": roster.content_hash(), "roster": roster.content(), "signatures": signatures}
    return (json.dumps(document, indent=2, ensure_ascii=True) + "\n").encode("ascii")


def from_json(raw: bytes, where: str = "roster") -> Roster:
    """Read the file form; signatures are not checked here (see `verify`).

    Raises:
        RosterError: not a roster (a key is missing, unknown or of another type), or not the text its hash is of.
    """
    try:
        if len(raw) > _MAX_BYTES:
            raise ValueError("too long")
        document = _exactly(json.loads(raw), {"hash", "roster", "signatures"})
        roster = _parse(document["roster"], document["signatures"])
        written = _text(document, "hash")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise RosterError(
            f"The file is not a roster: {type(error).__name__} {error}.",
            code="roster-damaged",
            fix="ask for the file again, as `coterie roster` wrote it",
            where=where,
        ) from None
    if written != roster.content_hash():
        raise RosterError(
            "The roster was changed after it was written.",
            code="roster-changed",
            where=f"{where}: it says hash {written[:8]}.., its text has {roster.content_hash()[:8]}..",
            why="members would disagree on who takes part, where, or who hosts which expert",
            fix="use the roster as it was signed, or make a new one and let every member sign it",
        )
    return roster


def _text(values: Mapping[str, Any], key: str) -> str:
    if not isinstance(values[key], str):
        raise TypeError(f"`{key}` is not text")
    return str(values[key])


def _exactly(values: Any, keys: set[str]) -> Mapping[str, Any]:
    if not isinstance(values, dict) or set(values) != keys:
        raise ValueError(f"expected the keys {', '.join(sorted(keys))}")
    return values


def _parse(content: Any, signed: Any) -> Roster:
    keys = {"federation", "membership_epoch", "parties", "config_hash", "placement_hash"}
    weights = content.get("weights", {}) if isinstance(content, dict) else {}
    content = _exactly(content, keys | {"weights"} if weights else keys)
    epoch = content["membership_epoch"]
    if not isinstance(epoch, int) or isinstance(epoch, bool) or not 0 <= epoch < 1 << 32:
        raise ValueError("`membership_epoch` is not a number from 0 to 2^32 - 1")
    entries = []
    for item in content["parties"]:
        item = _exactly(item, {"name", "role", "endpoint", "cert_fingerprint"})
        entries.append(
            RosterEntry(
                _text(item, "name"), Role(item["role"]), _text(item, "endpoint"), _text(item, "cert_fingerprint")
            )
        )
    signatures = {}
    if not isinstance(signed, dict):
        raise TypeError("`signatures` is not a table")
    for name, item in signed.items():
        item = _exactly(item, {"certificate", "signed_hash", "signature"})
        if not _HASH.fullmatch(_text(item, "signed_hash")):
            raise ValueError("`signed_hash` is not a SHA-256")
        signatures[name] = Signature(_text(item, "certificate"), item["signed_hash"], _text(item, "signature"))
    if not isinstance(weights, dict) or not all(_HASH.fullmatch(_text(weights, name)) for name in weights):
        raise ValueError("`weights` is not a table of SHA-256")
    return Roster(
        _text(content, "federation"),
        epoch,
        tuple(entries),
        _text(content, "config_hash"),
        _text(content, "placement_hash"),
        weights,
        signatures,
    )


def save_roster(roster: Roster, path: Path) -> None:
    """Write the roster, whole or not at all."""
    write_whole(path, to_json(roster), PUBLIC)


def read_roster(path: Path) -> Roster:
    """Read a roster file without checking signatures."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise RosterError(
            f"The roster cannot be read: {error.strerror}.",
            code="roster-missing",
            where=str(path),
            fix="coterie install KIT --roster roster.json",
        ) from None
    return from_json(raw, str(path))


def load_roster(kit: Kit) -> Roster:
    """The roster of a kit, checked: every signature, and that this kit is in it.

    Raises:
        RosterError, IdentityError: see `verify`.
    """
    roster = read_roster(kit.roster_path)
    verify(roster, kit.authority)
    roster.admit(kit.certificate, kit.role)
    return roster


def install_roster(kit: Kit, roster: Roster) -> None:
    """Check a roster in full and put it into the kit; writes nothing if it does not fit.

    Raises:
        RosterError, IdentityError: see `verify`; or this kit is not in it.
    """
    verify(roster, kit.authority)
    roster.admit(kit.certificate, kit.role)
    save_roster(roster, kit.roster_path)
