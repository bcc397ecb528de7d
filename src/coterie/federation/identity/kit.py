"""The kit: the folder a party or the coordinator runs with, and the two ways to come by one.

::

    key.pem      its private key, mode 0600; made where it is used
    cert.pem     its certificate, issued by the federation's CA
    ca.pem       the CA's certificate, compared out of band by its fingerprint
    roster.json  the signed roster (see `roster`)

`provision` makes all kits at once, for one administrator. With `request`, `approve` and `install` each party makes
its own key, which never leaves the machine it was made on.
"""

from __future__ import annotations

import datetime as dt
import os
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from coterie.errors import IdentityError
from coterie.federation.identity.certificates import (
    CERT_DAYS,
    SOON_DAYS,
    Authority,
    Member,
    Role,
    cert_pem,
    check_dates,
    check_issued,
    check_member,
    fingerprint,
    key_pem,
    member_of,
    new_key,
    p256_key,
    parse_certificate,
    same_fingerprint,
    subject_of,
    text_of,
    uri_of,
)
from coterie.storage import PRIVATE, PUBLIC, is_vacant, new_folder, write_whole

KEY_FILE, CERT_FILE, CA_FILE, ROSTER_FILE = "key.pem", "cert.pem", "ca.pem", "roster.json"
CA_KEY_FILE, REQUEST_FILE = "ca-key.pem", "request.csr"
CA_FOLDER = "ca"


@contextmanager
def new_kit(folder: Path) -> Iterator[Path]:
    """A folder to fill that appears, closed to others, when the block ends well, and not at all otherwise.

    Raises:
        IdentityError: ``folder`` exists and is not empty; nothing in it is touched.
    """
    if not is_vacant(folder):
        raise IdentityError(
            f"{folder} exists already and is not empty.",
            code="identity-exists",
            why="keys that are in use would be overwritten",
            fix="name another folder, or move the old one away",
        )
    with new_folder(folder, 0o700) as aside:
        yield aside


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise IdentityError(
            f"{what} is missing.",
            code="identity-missing",
            fix="`coterie request` makes the key, `coterie install` the rest: see docs/how-to/identity.md",
            where=str(path),
        ) from None
    except OSError as error:
        raise IdentityError(
            f"{what} cannot be read: {error.strerror}.",
            code="identity-missing",
            fix="check that you may read it",
            where=str(path),
        ) from (None)


def load_certificate(path: Path, what: str) -> x509.Certificate:
    """The certificate in a PEM file; IdentityError when absent or damaged."""
    return parse_certificate(_read(path, what), what, str(path))


def load_key(path: Path, what: str) -> ec.EllipticCurvePrivateKey:
    """The private key in a PEM file.

    Raises:
        IdentityError: absent, damaged, of another kind, or readable by other users of the machine.
    """
    pem = _read(path, what)
    if _others_can_read(path):
        raise IdentityError(
            f"{what} can be read by other users of this machine.",
            code="identity-key-open",
            where=str(path),
            why="whoever has the key can speak in this party's name",
            fix=f"chmod 600 {path}; where a mounted secret cannot be changed, mount it with mode 0400 or inside a "
            "folder of mode 0700",
        )
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError):
        raise IdentityError(
            f"{what} is not a private key in PEM form.",
            code="identity-damaged",
            fix="restore it from a copy, or begin anew with `coterie request`",
            where=str(path),
        ) from (None)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise IdentityError(
            f"{what} is not an ECDSA P-256 key.",
            code="identity-key-type",
            fix="make a new one with `coterie request`",
            where=str(path),
        )
    return key


def _others_can_read(path: Path) -> bool:
    """Whether a key is open to group or others.

    Where its mode can be changed, it has to be closed. A mounted secret cannot be; there it counts whether anybody
    else could really read it: its mode allows that, and no folder above it keeps them out.
    """
    real = path.resolve()
    mode = real.stat().st_mode
    if not mode & 0o077:
        return False
    if real.stat().st_uid == os.geteuid() and not os.statvfs(real).f_flag & os.ST_RDONLY:
        return True
    above = [folder.stat().st_mode for folder in real.parents]
    group = mode & stat.S_IRGRP and all(each & (stat.S_IXGRP | stat.S_IXOTH) for each in above)
    others = mode & stat.S_IROTH and all(each & stat.S_IXOTH for each in above)
    return bool(group or others)


@dataclass(frozen=True)
class Kit:
    """What one member runs with. `folder` also holds the roster, which `roster.load_roster` reads."""

    folder: Path
    name: str
    role: Role
    federation: str
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate
    authority: x509.Certificate

    @property
    def roster_path(self) -> Path:
        return self.folder / ROSTER_FILE

    def check_dates(self, *, now: dt.datetime | None = None) -> None:
        """Make sure that neither certificate has run out since the kit was loaded; IdentityError names the file."""
        for certificate, name, file in self._certificates():
            check_dates(certificate, name, now=now, where=str(self.folder / file))

    def first_to_end(self) -> tuple[dt.datetime, str]:
        """When this member can no longer connect, and which file ends then."""
        ends = [
            (cert.not_valid_after_utc, f"{name} ({self.folder / file})") for cert, name, file in self._certificates()
        ]
        return min(ends)

    def ends_soon(self, *, now: dt.datetime | None = None) -> str:
        """One sentence from `SOON_DAYS` before the end on; empty earlier."""
        end, what = self.first_to_end()
        left = (end - (now or dt.datetime.now(dt.UTC))).days
        return f"{what} ends on {end:%Y-%m-%d %H:%M} UTC, in {left} days" if left < SOON_DAYS else ""

    def _certificates(self) -> tuple[tuple[x509.Certificate, str, str], ...]:
        mine = (self.certificate, f"The certificate of {self.name}", CERT_FILE)
        return mine, (self.authority, "The CA certificate", CA_FILE)


def load_kit(folder: Path, *, now: dt.datetime | None = None) -> Kit:
    """Read and check a kit folder.

    Raises:
        IdentityError: a file is missing or damaged, the key is open to others or belongs to another certificate, the
            certificate is of another CA or expired.
    """
    if not folder.is_dir():
        raise IdentityError(
            f"There is no kit folder {folder}.",
            code="identity-missing",
            fix="coterie provision federation.yaml, or coterie request and coterie install",
        )
    key = load_key(folder / KEY_FILE, "The private key of the kit")
    certificate = load_certificate(folder / CERT_FILE, "The certificate of the kit")
    authority = load_certificate(folder / CA_FILE, "The CA certificate of the kit")
    name, role, federation = member_of(certificate)
    if key.public_key() != certificate.public_key():
        raise IdentityError(
            f"The private key and the certificate of {name} do not belong together.",
            code="identity-key-mismatch",
            where=str(folder),
            fix="install the certificate that was approved for this key's request",
        )
    check_issued(certificate, authority, f"The certificate of {name}", now=now)
    return Kit(folder, name, role, federation, key, certificate, authority)


# ---- each party makes its own key: request, approve, install -----------------------------------------------------


def save_authority(authority: Authority, folder: Path) -> None:
    """Write the CA's key (mode 0600) and certificate into a new folder."""
    with new_kit(folder) as aside:
        _write_authority(authority, aside)


def _write_authority(authority: Authority, folder: Path) -> None:
    write_whole(folder / CA_KEY_FILE, key_pem(authority.key), PRIVATE)
    write_whole(folder / CA_FILE, cert_pem(authority.certificate), PUBLIC)


def load_authority(folder: Path) -> Authority:
    """The CA in a folder written by `save_authority` or `provision`."""
    return Authority(
        load_key(folder / CA_KEY_FILE, "The key of the CA"), load_certificate(folder / CA_FILE, "The CA certificate")
    )


def request(member: Member, federation: str, kit: Path) -> Path:
    """Party side: make a key that never leaves ``kit`` and a signing request that may.

    Returns:
        The path of the request, to be sent to the CA's keeper.
    """
    check_member(member)
    key = new_key()
    signed = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(subject_of(member.name, federation))
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri_of(federation, member))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    with new_kit(kit) as aside:
        write_whole(aside / KEY_FILE, key_pem(key), PRIVATE)
        write_whole(aside / REQUEST_FILE, signed.public_bytes(serialization.Encoding.PEM), PUBLIC)
    return kit / REQUEST_FILE


def approve(
    signing_request: bytes, members: Collection[Member], authority: Authority, *, days: float = CERT_DAYS
) -> tuple[Member, x509.Certificate]:
    """CA side: check a request against the list of members and certify its key.

    Endpoint and role come from ``members``, not from the request: a party cannot ask for more than was agreed.

    Raises:
        IdentityError: damaged, signed with another key, for another federation, or a name nobody agreed on.
    """
    try:
        csr = x509.load_pem_x509_csr(signing_request)
    except ValueError:
        raise IdentityError(
            "The request is not a signing request in PEM form.",
            code="identity-damaged",
            fix="ask for request.csr again, as `coterie request` wrote it",
        ) from None
    if not csr.is_signature_valid:
        raise IdentityError(
            "The request is not signed with the key it asks for.",
            code="identity-request-signature",
            fix="ask the party for the file again, and compare by phone what it is",
        )
    name, federation = (text_of(csr.subject, oid) for oid in (NameOID.COMMON_NAME, NameOID.ORGANIZATION_NAME))
    if federation != authority.federation:
        raise IdentityError(
            f"The request is for federation `{federation}`; this CA belongs to `{authority.federation}`.",
            code="identity-other-federation",
            fix="name that federation's CA folder with --ca, or ask for a request made with this federation.yaml",
        )
    member = next((member for member in members if member.name == name), None)
    if member is None:
        raise IdentityError(
            f"`{name}` asks for a certificate but is no member of {federation}.",
            code="identity-unknown-member",
            why="a certificate lets its holder connect to every party",
            fix=f"members in federation.yaml: {', '.join(m.name for m in members)}",
        )
    return member, authority.issue(member, p256_key(csr, "The request"), days=days)


def install(
    kit: Path, certificate: x509.Certificate, authority: x509.Certificate, expected_ca_fingerprint: str
) -> Kit:
    """Party side: put the approved certificate and the CA's beside the key that was requested.

    Args:
        kit: folder in which `request` left the key.
        certificate: the approved certificate.
        authority: certificate of the federation's CA.
        expected_ca_fingerprint: read to you by the CA's keeper over another channel (telephone, in person).

    Raises:
        IdentityError: the fingerprint differs (somebody may have swapped the CA on the way), or the certificate was
            not made for the key in ``kit``. Nothing is written then.
    """
    actual = fingerprint(authority)
    if not same_fingerprint(actual, expected_ca_fingerprint):
        raise IdentityError(
            "The CA certificate is not the one whose fingerprint you were given.",
            code="identity-ca-fingerprint",
            where=f"it has {actual}, you gave {expected_ca_fingerprint}",
            why="with another CA, somebody else decides whom your party talks to",
            fix="ask the CA's keeper for the fingerprint again, by phone; nothing was installed",
        )
    name, role, federation = member_of(certificate)
    key = load_key(kit / KEY_FILE, "The private key of the kit")
    if key.public_key() != certificate.public_key():
        raise IdentityError(
            f"The certificate of {name} was not made for the key in {kit}.",
            code="identity-key-mismatch",
            fix="install the certificate approved for this kit's request.csr; nothing was installed",
        )
    check_issued(certificate, authority, f"The certificate of {name}")
    write_whole(kit / CA_FILE, cert_pem(authority), PUBLIC)
    write_whole(kit / CERT_FILE, cert_pem(certificate), PUBLIC)
    return Kit(kit, name, role, federation, key, certificate, authority)
