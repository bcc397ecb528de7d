"""Who is who: names and roles, keys, certificates, and the private CA of a federation.

One ECDSA P-256 key per party serves TLS and roster signatures. One key means one file to guard and one thing to
compare: the certificate fingerprint in the roster names the key that signed it. The two uses cannot be confused,
because a roster signature covers text that starts with ``coterie roster`` and TLS signatures cover text that starts
with 64 spaces (RFC 8446, section 4.4.3). P-256 rather than Ed25519, because gRPC's TLS takes it everywhere.

Functions take names and endpoints; only the command line reads federation.yaml.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from coterie.errors import IdentityError

COORDINATOR = "coordinator"
"""The name of the member that keeps the rounds, in the roster and on the wire."""

CA_DAYS = 5 * 365
CERT_DAYS = 397
SOON_DAYS = 30
"""How long before its end a certificate is spoken of."""
_SKEW = dt.timedelta(minutes=5)  # clocks of two organisations differ a little
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_RESERVED = frozenset({"localhost", "ca"})


class Role(StrEnum):
    """What a member of the federation may do."""

    PARTY = "party"
    COORDINATOR = "coordinator"


@dataclass(frozen=True)
class Member:
    """A name to be certified.

    Args:
        name: lower-case, as in federation.yaml.
        endpoint: ``host:port`` where it listens.
    """

    name: str
    role: Role
    endpoint: str


def members_of(parties: Mapping[str, str], coordinator: str | None) -> tuple[Member, ...]:
    """The members in roster order: the coordinator first (everybody dials it), then the parties as given.

    Args:
        parties: name -> ``host:port``.
        coordinator: its ``host:port``, or None for a federation without one.
    """
    first = () if coordinator is None else (Member(COORDINATOR, Role.COORDINATOR, coordinator),)
    return (*first, *[Member(name, Role.PARTY, endpoint) for name, endpoint in parties.items()])


# ---- keys and certificates ---------------------------------------------------------------------------------------


def new_key() -> ec.EllipticCurvePrivateKey:
    """A fresh P-256 key from the operating system's random numbers."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def cert_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of the certificate, as people compare it: ``9F:2C:...``, 32 pairs."""
    return certificate.fingerprint(hashes.SHA256()).hex(":").upper()


def same_fingerprint(first: str, second: str) -> bool:
    """Whether two fingerprints are equal; colons, blanks and case do not count."""

    def plain(text: str) -> str:
        return re.sub(r"[\s:]", "", text).upper()

    return plain(first) == plain(second) and len(plain(first)) == 64


def subject_of(name: str, federation: str) -> x509.Name:
    return x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, federation), x509.NameAttribute(NameOID.COMMON_NAME, name)]
    )


def uri_of(federation: str, member: Member) -> str:
    return f"coterie://{federation}/{member.role}/{member.name}"


def _alternative_names(federation: str, member: Member) -> x509.SubjectAlternativeName:
    """Name and role as URI; name, localhost and the endpoint's host as DNS names or addresses."""
    names: dict[x509.GeneralName, None] = {
        x509.UniformResourceIdentifier(uri_of(federation, member)): None,
        x509.DNSName(member.name): None,
        x509.DNSName("localhost"): None,
        x509.IPAddress(ipaddress.ip_address("127.0.0.1")): None,
    }
    host = member.endpoint.rpartition(":")[0].strip("[]")
    try:
        names[x509.IPAddress(ipaddress.ip_address(host))] = None
    except ValueError:
        names[x509.DNSName(host)] = None
    return x509.SubjectAlternativeName(list(names))


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: dt.datetime, days: float
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + dt.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, certificates: bool) -> x509.KeyUsage:
    off = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only"), False
    )
    return x509.KeyUsage(
        digital_signature=not certificates,
        key_cert_sign=certificates,
        crl_sign=certificates,
        decipher_only=False,
        **off,
    )


@dataclass(frozen=True)
class Authority:
    """The private CA of one federation: whoever holds its key says who is a member."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def federation(self) -> str:
        return text_of(self.certificate.subject, NameOID.ORGANIZATION_NAME)

    def issue(
        self,
        member: Member,
        key: ec.EllipticCurvePublicKey,
        *,
        days: float = CERT_DAYS,
        now: dt.datetime | None = None,
    ) -> x509.Certificate:
        """A certificate for ``member``, as TLS server and client, valid for ``days`` but never longer than the CA.

        Raises:
            IdentityError: the CA itself has expired, or the member's name or endpoint is unusable.
        """
        check_member(member)
        now = now or dt.datetime.now(dt.UTC)
        issuer = self.certificate
        if now > issuer.not_valid_after_utc:
            check_dates(issuer, "The CA certificate", now=now)
        days = min(days, (issuer.not_valid_after_utc - now) / dt.timedelta(days=1))
        return (
            _builder(subject_of(member.name, self.federation), issuer.subject, key, now, days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(certificates=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(_alternative_names(self.federation, member), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(p256_key(issuer, "the CA certificate")),
                critical=False,
            )
            .sign(self.key, hashes.SHA256())
        )


def new_authority(federation: str, *, days: float = CA_DAYS, now: dt.datetime | None = None) -> Authority:
    """A self-signed CA that can certify members and no further CA."""
    key, subject = new_key(), subject_of(f"coterie CA of {federation}", federation)
    certificate = (
        _builder(subject, subject, key.public_key(), now or dt.datetime.now(dt.UTC), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    return Authority(key, certificate)


def member_of(certificate: x509.Certificate) -> tuple[str, Role, str]:
    """Name, role and federation a certificate was issued for.

    Raises:
        IdentityError: it carries no coterie name.
    """
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        for uri in names.get_values_for_type(x509.UniformResourceIdentifier):
            match = re.fullmatch(r"coterie://([^/]+)/(party|coordinator)/([^/]+)", uri)
            if match is not None:
                return match[3], Role(match[2]), match[1]
    except (x509.ExtensionNotFound, ValueError):
        pass
    raise IdentityError(
        "The certificate names no member of a coterie federation.",
        code="identity-no-name",
        fix="use a certificate that `coterie approve` or `coterie provision` made",
    )


def check_issued(
    certificate: x509.Certificate, authority: x509.Certificate, whose: str, *, now: dt.datetime | None = None
) -> None:
    """Check that ``authority`` issued ``certificate`` and that it is valid today.

    Raises:
        IdentityError: codes ``identity-other-ca``, ``identity-expired``, ``identity-not-yet``.
    """
    now = now or dt.datetime.now(dt.UTC)
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        raise IdentityError(
            f"{whose} was not issued by this federation's CA.",
            code="identity-other-ca",
            where=f"certificate {fingerprint(certificate)[:11]}.., CA {fingerprint(authority)[:11]}..",
            why="anybody can make a certificate; only the CA's signature says that it belongs to a member",
            fix="ask the CA's keeper to approve your request, and compare the CA fingerprint by phone",
        ) from None
    check_dates(certificate, whose, now=now)
    check_dates(authority, "The CA certificate", now=now)


def check_dates(
    certificate: x509.Certificate, whose: str, *, now: dt.datetime | None = None, where: str | None = None
) -> None:
    """Check that a certificate is valid today.

    Raises:
        IdentityError: codes ``identity-expired``, ``identity-not-yet``.
    """
    now = now or dt.datetime.now(dt.UTC)
    if now > certificate.not_valid_after_utc:
        raise IdentityError(
            f"{whose} expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC.",
            code="identity-expired",
            where=where,
            fix="renew it (docs/how-to/identity.md, Renewing), then sign a new roster",
        )
    if now < certificate.not_valid_before_utc:
        raise IdentityError(
            f"{whose} is valid only from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC.",
            code="identity-not-yet",
            where=where,
            fix="check this machine's clock",
        )


def text_of(name: x509.Name, oid: x509.ObjectIdentifier) -> str:
    values = name.get_attributes_for_oid(oid)
    return str(values[0].value) if values else ""


def p256_key(holder: x509.Certificate | x509.CertificateSigningRequest, whose: str) -> ec.EllipticCurvePublicKey:
    """The P-256 key of a certificate or request; IdentityError for any other kind."""
    key = holder.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise IdentityError(
            f"{whose} has no ECDSA P-256 key.",
            code="identity-key-type",
            fix="make key and request anew with `coterie request`",
        )
    return key


def check_member(member: Member) -> None:
    reserved = _RESERVED if member.role is Role.COORDINATOR else _RESERVED | {COORDINATOR}
    if not _NAME.fullmatch(member.name) or member.name in reserved:
        raise IdentityError(
            f"`{member.name}` cannot be the name of a {member.role}.",
            code="identity-name",
            fix="a lower-case letter, then up to 31 of a-z 0-9 _ -; not localhost, ca or coordinator",
        )
    host, _, port = member.endpoint.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise IdentityError(
            f"`{member.endpoint}` of {member.name} is not `host:port`.",
            code="identity-endpoint",
            fix="write it as in `alder.example:7410`, with a port from 1 to 65535",
            field="endpoint",
        )


def parse_certificate(pem: bytes, what: str, where: str) -> x509.Certificate:
    """A certificate in PEM form; IdentityError when damaged."""
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError:
        raise IdentityError(
            f"{what} is not a certificate in PEM form.",
            code="identity-damaged",
            fix="copy the file again from where `coterie approve` wrote it, as it is",
            where=where,
        ) from None
