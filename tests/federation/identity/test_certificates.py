"""Keys, certificates and kits: who is let in, and what is written when somebody is not."""

from __future__ import annotations

import datetime as dt
import os
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from coterie.errors import IdentityError
from coterie.federation.identity import certificates, kit
from coterie.federation.identity.certificates import Authority, Member, Role, members_of
from coterie.federation.identity.kit import new_kit
from coterie.federation.identity.provision import local_kits, provision
from coterie.storage import write_whole

ALDER = Member("alder", Role.PARTY, "alder.example.org:7001")
BIRCH = Member("birch", Role.PARTY, "127.0.0.1:7002")
MEMBERS = (ALDER, BIRCH)


@pytest.fixture
def authority() -> Authority:
    return certificates.new_authority("demo")


def files_under(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def code_of(caught: pytest.ExceptionInfo[IdentityError]) -> str:
    return caught.value.code


# ---- provisioning


def test_provision_makes_a_ca_and_one_kit_per_member_with_a_private_key(tmp_path: Path) -> None:
    members = members_of({"alder": "127.0.0.1:7001", "birch": "127.0.0.1:7002"}, "127.0.0.1:7000")
    provision("demo", members, tmp_path / "kits", config_hash="c", placement_hash="p")
    expected = {"ca", "ca/ca-key.pem", "ca/ca.pem"}
    for name in ("coordinator", "alder", "birch"):
        expected |= {name, *(f"{name}/{file}" for file in ("key.pem", "cert.pem", "ca.pem", "roster.json"))}
    assert files_under(tmp_path / "kits") == expected
    for path in (tmp_path / "kits").rglob("*key.pem"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert {kit.load_kit(tmp_path / "kits" / n).role for n in ("alder", "birch")} == {Role.PARTY}
    assert kit.load_kit(tmp_path / "kits" / "coordinator").role is Role.COORDINATOR


def test_private_keys_are_private_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        local_kits(tmp_path / "kits", ["alder"])
    finally:
        os.umask(old)
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "kits").rglob("*key.pem")} == {0o600}


def test_provision_refuses_a_folder_in_use_and_touches_nothing(tmp_path: Path) -> None:
    (tmp_path / "kits").mkdir()
    (tmp_path / "kits" / "mine").write_text("x")
    with pytest.raises(IdentityError) as caught:
        local_kits(tmp_path / "kits", ["alder"])
    assert code_of(caught) == "identity-exists"
    assert files_under(tmp_path) == {"kits", "kits/mine"}


@pytest.mark.parametrize("name", ["Alder", "localhost", "ca", "coordinator", "a/b", "", "x" * 33, "../up"])
def test_a_name_that_cannot_be_used_is_refused_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(IdentityError) as caught:
        local_kits(tmp_path / "kits", ["birch", name])
    assert code_of(caught) == "identity-name"
    assert files_under(tmp_path) == set()


def test_a_folder_that_fails_halfway_does_not_appear(tmp_path: Path) -> None:
    def fail() -> None:
        with new_kit(tmp_path / "kits") as aside:
            write_whole(aside / "key.pem", b"secret")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert files_under(tmp_path) == set()


def test_a_file_that_fails_halfway_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "cert.pem", b"old")

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        write_whole(tmp_path / "cert.pem", b"new")
    assert (tmp_path / "cert.pem").read_bytes() == b"old"
    assert files_under(tmp_path) == {"cert.pem"}


# ---- certificates


def test_a_certificate_carries_name_role_and_addresses_and_cannot_certify_others(authority: Authority) -> None:
    certificate = authority.issue(ALDER, certificates.new_key().public_key())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["coterie://demo/party/alder"]
    assert names.get_values_for_type(x509.DNSName) == ["alder", "localhost", "alder.example.org"]
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    assert certificates.member_of(certificate) == ("alder", Role.PARTY, "demo")
    assert certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(usage) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    assert dt.timedelta(days=396) < certificate.not_valid_after_utc - dt.datetime.now(dt.UTC) < dt.timedelta(days=398)


def test_a_certificate_of_another_ca_is_refused(authority: Authority) -> None:
    stranger = certificates.new_authority("demo").issue(ALDER, certificates.new_key().public_key())
    with pytest.raises(IdentityError, match="not issued by this federation's CA") as caught:
        certificates.check_issued(stranger, authority.certificate, "The certificate of alder")
    assert code_of(caught) == "identity-other-ca"


@pytest.mark.parametrize(("days_ago", "days", "code"), [(10, 5, "identity-expired"), (-5, 5, "identity-not-yet")])
def test_a_certificate_is_refused_outside_its_time(authority: Authority, days_ago: int, days: int, code: str) -> None:
    then = dt.datetime.now(dt.UTC) - dt.timedelta(days=days_ago)
    certificate = authority.issue(ALDER, certificates.new_key().public_key(), days=days, now=then)
    with pytest.raises(IdentityError) as caught:
        certificates.check_issued(certificate, authority.certificate, "The certificate of alder")
    assert code_of(caught) == code


def test_fingerprints_compare_without_colons_blanks_and_case(authority: Authority) -> None:
    shown = certificates.fingerprint(authority.certificate)
    assert shown == authority.certificate.fingerprint(hashes.SHA256()).hex(":").upper()
    assert certificates.same_fingerprint(shown, shown.lower().replace(":", " "))
    assert not certificates.same_fingerprint(shown, shown[:-1] + ("0" if shown[-1] != "0" else "1"))
    assert not certificates.same_fingerprint("", "")
    assert not certificates.same_fingerprint(shown[:11], shown[:11])


# ---- request, approve, install


def test_a_party_makes_its_own_key_and_comes_by_a_kit_without_sending_it(
    tmp_path: Path, authority: Authority
) -> None:
    asked = kit.request(ALDER, "demo", tmp_path / "alder")
    key = (tmp_path / "alder" / "key.pem").read_bytes()
    assert key not in asked.read_bytes()
    member, certificate = kit.approve(asked.read_bytes(), MEMBERS, authority)
    assert member == ALDER
    kit.install(
        tmp_path / "alder", certificate, authority.certificate, certificates.fingerprint(authority.certificate)
    )
    mine = kit.load_kit(tmp_path / "alder")
    assert (mine.name, mine.role, mine.federation) == ("alder", Role.PARTY, "demo")
    assert (tmp_path / "alder" / "key.pem").read_bytes() == key


def test_install_refuses_a_ca_with_another_fingerprint_and_writes_nothing(
    tmp_path: Path, authority: Authority
) -> None:
    asked = kit.request(ALDER, "demo", tmp_path / "alder")
    between = certificates.new_authority("demo")  # somebody swapped the CA on the way
    _, certificate = kit.approve(asked.read_bytes(), MEMBERS, between)
    before = files_under(tmp_path)
    with pytest.raises(IdentityError, match="not the one whose fingerprint you were given") as caught:
        kit.install(
            tmp_path / "alder", certificate, between.certificate, certificates.fingerprint(authority.certificate)
        )
    assert code_of(caught) == "identity-ca-fingerprint"
    assert files_under(tmp_path) == before


def test_install_refuses_a_certificate_made_for_another_key(tmp_path: Path, authority: Authority) -> None:
    kit.request(ALDER, "demo", tmp_path / "alder")
    other = authority.issue(ALDER, certificates.new_key().public_key())
    before = files_under(tmp_path)
    with pytest.raises(IdentityError) as caught:
        kit.install(tmp_path / "alder", other, authority.certificate, certificates.fingerprint(authority.certificate))
    assert code_of(caught) == "identity-key-mismatch"
    assert files_under(tmp_path) == before


def test_approve_refuses_a_name_that_is_no_member(tmp_path: Path, authority: Authority) -> None:
    asked = kit.request(Member("mallory", Role.PARTY, "127.0.0.1:1"), "demo", tmp_path / "m")
    with pytest.raises(IdentityError, match="`mallory` asks for a certificate but is no member of demo") as caught:
        kit.approve(asked.read_bytes(), MEMBERS, authority)
    assert code_of(caught) == "identity-unknown-member"


def test_approve_takes_role_and_address_from_the_agreed_list_and_not_from_the_request(
    tmp_path: Path, authority: Authority
) -> None:
    asked = kit.request(Member("alder", Role.PARTY, "evil.example.org:7001"), "demo", tmp_path / "alder")
    _, certificate = kit.approve(asked.read_bytes(), MEMBERS, authority)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "evil.example.org" not in names.get_values_for_type(x509.DNSName)


def test_approve_refuses_another_federation_a_damaged_request_and_another_key_type(
    tmp_path: Path, authority: Authority
) -> None:
    other = kit.request(ALDER, "elsewhere", tmp_path / "alder").read_bytes()
    subject = x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "demo"), x509.NameAttribute(NameOID.COMMON_NAME, "alder")]
    )
    edwards = (
        x509.CertificateSigningRequestBuilder().subject_name(subject).sign(ed25519.Ed25519PrivateKey.generate(), None)
    )
    for asked, code in [
        (other, "identity-other-federation"),
        (b"-----BEGIN", "identity-damaged"),
        (edwards.public_bytes(serialization.Encoding.PEM), "identity-key-type"),
    ]:
        with pytest.raises(IdentityError) as caught:
            kit.approve(asked, MEMBERS, authority)
        assert code_of(caught) == code


def test_a_request_signed_with_another_key_than_it_asks_for_is_refused(tmp_path: Path, authority: Authority) -> None:
    pem = kit.request(ALDER, "demo", tmp_path / "alder").read_bytes()
    der = x509.load_pem_x509_csr(pem).public_bytes(serialization.Encoding.DER)
    own = (
        x509.load_pem_x509_csr(pem)
        .public_key()
        .public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    )
    foreign = (
        certificates.new_key()
        .public_key()
        .public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    )
    forged = x509.load_der_x509_csr(der.replace(own, foreign)).public_bytes(serialization.Encoding.PEM)
    with pytest.raises(IdentityError) as caught:
        kit.approve(forged, MEMBERS, authority)
    assert code_of(caught) == "identity-request-signature"


def test_request_never_overwrites_a_key(tmp_path: Path) -> None:
    kit.request(ALDER, "demo", tmp_path / "alder")
    key = (tmp_path / "alder" / "key.pem").read_bytes()
    with pytest.raises(IdentityError) as caught:
        kit.request(ALDER, "demo", tmp_path / "alder")
    assert code_of(caught) == "identity-exists"
    assert (tmp_path / "alder" / "key.pem").read_bytes() == key


# ---- loading a kit


def test_a_kit_that_does_not_fit_together_is_refused_with_the_reason(tmp_path: Path) -> None:
    kits = local_kits(tmp_path / "kits", ["alder", "birch"])
    alder, birch = kits["alder"].folder, kits["birch"].folder
    other = local_kits(tmp_path / "other", ["alder"])["alder"].folder
    spare = {name: (alder / name).read_bytes() for name in ("key.pem", "cert.pem", "ca.pem")}

    def expect(code: str) -> None:
        with pytest.raises(IdentityError) as caught:
            kit.load_kit(alder)
        assert code_of(caught) == code
        for name, content in spare.items():
            write_whole(alder / name, content, 0o600)

    (alder / "cert.pem").write_bytes((birch / "cert.pem").read_bytes())
    expect("identity-key-mismatch")
    (alder / "ca.pem").write_bytes((other / "ca.pem").read_bytes())
    expect("identity-other-ca")
    (alder / "key.pem").chmod(0o644)
    expect("identity-key-open")
    (alder / "key.pem").write_bytes(b"nothing")
    expect("identity-damaged")
    (alder / "cert.pem").write_bytes(b"nothing")
    expect("identity-damaged")
    (alder / "cert.pem").unlink()
    expect("identity-missing")
    p384 = ec.generate_private_key(ec.SECP384R1())
    (alder / "key.pem").write_bytes(certificates.key_pem(p384))
    expect("identity-key-type")
    assert kit.load_kit(alder).name == "alder"
    with pytest.raises(IdentityError, match="no kit folder"):
        kit.load_kit(tmp_path / "nowhere")


def test_an_expired_kit_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    folder = local_kits(tmp_path / "kits", ["alder"])["alder"].folder
    with pytest.raises(IdentityError, match="The certificate of alder expired on") as caught:
        kit.load_kit(folder, now=dt.datetime.now(dt.UTC) + dt.timedelta(days=400))
    assert code_of(caught) == "identity-expired"


def test_nothing_the_ca_issues_outlives_it() -> None:
    authority = certificates.new_authority("demo", days=20)
    certificate = authority.issue(ALDER, certificates.new_key().public_key(), days=400)
    assert certificate.not_valid_after_utc == authority.certificate.not_valid_after_utc
    later = dt.datetime.now(dt.UTC) + dt.timedelta(days=21)
    with pytest.raises(IdentityError, match="The CA certificate expired on"):
        authority.issue(ALDER, certificates.new_key().public_key(), days=3, now=later)


@pytest.mark.parametrize(("ca_days", "days", "file"), [(1000, 20, "cert.pem"), (20, 400, "ca.pem"), (1000, 400, "")])
def test_the_first_of_two_dates_is_the_one_that_is_told(tmp_path: Path, ca_days: int, days: int, file: str) -> None:
    authority, key = certificates.new_authority("demo", days=ca_days), certificates.new_key()
    certificate = authority.issue(ALDER, key.public_key(), days=days)
    mine = kit.Kit(tmp_path, "alder", Role.PARTY, "demo", key, certificate, authority.certificate)
    if file == "ca.pem":  # issued by an earlier version, beyond its CA's end
        object.__setattr__(mine, "certificate", certificates.new_authority("x", days=400).certificate)
    assert (str(tmp_path / file) in mine.ends_soon()) if file else mine.ends_soon() == ""
    if file:
        assert "in 19 days" in mine.ends_soon()
        with pytest.raises(IdentityError, match="expired on") as caught:
            mine.check_dates(now=dt.datetime.now(dt.UTC) + dt.timedelta(days=30))
        assert caught.value.where == str(tmp_path / file)


@pytest.mark.parametrize(
    ("key", "folder", "fixed", "open_to_others"),
    [(0o600, 0o755, False, False), (0o440, 0o700, False, True), (0o622, 0o755, False, True),
     (0o400, 0o755, True, False),
     (0o440, 0o700, True, False), (0o444, 0o700, True, False), (0o444, 0o755, True, True), (0o440, 0o711, True, True),
     (0o622, 0o755, True, False)],
)  # fmt: skip
def test_a_key_whose_mode_cannot_be_changed_is_open_when_others_can_really_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: int, folder: int, fixed: bool, open_to_others: bool
) -> None:
    for place in (tmp_path, *[each for each in tmp_path.parents if not each.stat().st_mode & 0o077]):
        place.chmod(0o755)
    if fixed:  # a secret that is mounted read-only
        monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=os.ST_RDONLY))
    kept = tmp_path / "kit"
    kept.mkdir()
    (kept / "key.pem").write_bytes(certificates.key_pem(certificates.new_key()))
    (kept / "key.pem").chmod(key)
    kept.chmod(folder)
    if open_to_others:
        with pytest.raises(IdentityError) as caught:
            kit.load_key(kept / "key.pem", "The key")
        assert code_of(caught) == "identity-key-open"
    else:
        kit.load_key(kept / "key.pem", "The key")
