"""Why a member cannot be reached, or cannot listen, in one sentence."""

from __future__ import annotations

import errno
import os
import re
import socket
import ssl
from collections.abc import Mapping, Sequence

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature

from coterie.config.federation import is_endpoint
from coterie.errors import CoterieError, IdentityError, TransportError
from coterie.federation.identity import certificates
from coterie.federation.identity.kit import Kit
from coterie.federation.identity.roster import Roster, RosterEntry

_PROBE_S = 2.0
_NAME_SERVICE = (socket.EAI_AGAIN, socket.EAI_FAIL)
_PROXY_NAMES = ("grpc_proxy", "https_proxy", "http_proxy", "all_proxy", "grpc_address_http_proxy")


def proxies_named() -> tuple[str, ...]:
    """Environment variables that name a proxy. Nothing here uses one: members dial each other directly."""
    named = {name for name, value in os.environ.items() if value and name.lower() in _PROXY_NAMES}
    return tuple(sorted(named))


def past_proxies() -> str:
    """For the end of a sentence about a member that cannot be reached; empty where no proxy is named."""
    named = proxies_named()
    return f" (members are dialled directly, past the proxy that {named[0]} names)" if named else ""


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """Host and port of ``host:port`` or ``[v6]:port``.

    Raises:
        TransportError: it is neither.
    """
    if not is_endpoint(endpoint):
        raise TransportError(
            f"{endpoint!r} is not `host:port` with a port from 1 to 65535.",
            code="endpoint-form",
            fix="write it as in 0.0.0.0:7410, alder.example:7410 or [::1]:7410",
        )
    host, _, port = endpoint.rpartition(":")
    return host.strip("[]"), int(port)


def check_free(me: str, listen: str) -> None:
    """Make sure that ``listen`` could be listened on now.

    Raises:
        TransportError: the port is taken, or the address is another machine's.
    """
    if _try_to_listen(listen):
        raise cannot_listen(me, listen)


def _try_to_listen(listen: str) -> int:
    """The system's error number; 0 when it worked."""
    host, port = split_endpoint(listen)
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            return 0
    except OSError as error:
        return error.errno or errno.EADDRINUSE


def cannot_listen(me: str, listen: str) -> TransportError:
    """The reason why a port could not be opened, found by trying once more with a plain socket."""
    reason = _try_to_listen(listen)
    if reason == errno.EACCES:
        return TransportError(
            f"{me} cannot listen on {listen}: ports below 1024 need an administrator's rights here.",
            code="port-needs-root",
            fix="listen on a higher port with --listen and forward to it, or sign a roster with a higher port",
        )
    if reason in _NAME_SERVICE:
        return _unnamed(listen)
    if reason in (errno.EADDRNOTAVAIL, socket.EAI_NONAME):
        return TransportError(
            f"{me} cannot listen on {listen}: this machine has no such address.",
            code="address-not-here",
            why="the others dial the endpoint in the roster",
            fix="start on the machine the roster names, or give the local address to listen on",
        )
    return TransportError(
        f"{me} cannot listen on {listen}: the port is taken by another process.",
        code="port-taken",
        why="the others dial this endpoint, so it cannot be changed without a new roster",
        fix="end the other process (is this member running already?), or sign a roster with another port",
    )


def _unnamed(endpoint: str) -> TransportError:
    host = split_endpoint(endpoint)[0]
    return TransportError(
        f"The name {host} cannot be resolved: the name service does not answer, or does not know it.",
        code="unreachable",
        where=endpoint,
        fix="see whether other names resolve; otherwise put it into /etc/hosts, or an address into the next roster",
    )


def known(dial: Mapping[str, str], members: Sequence[RosterEntry]) -> Mapping[str, str]:
    """Addresses to dial in place of endpoints, if all are of other members and can be dialled.

    Raises:
        TransportError: a name is no other member's, or an address is not ``host:port``.
    """
    names = {entry.name for entry in members}
    for name, address in dial.items():
        if name not in names:
            raise TransportError(
                f"{name} is to be dialled at {address}, and is no other member.",
                code="dial-unknown-member",
                fix=f"the others are: {', '.join(sorted(names))}",
            )
        if not is_endpoint(address):
            raise TransportError(
                f"{name} is to be dialled at {address!r}, which is not `host:port`.",
                code="dial-address",
                fix=f"write {name}=127.0.0.1:7001, for example",
            )
    return dial


def why_refused(peer: str, endpoint: str, roster: Roster, kit: Kit, error: grpc.RpcError) -> CoterieError:
    """What a failed call to ``peer`` means for a person.

    A certificate of ours that ended meanwhile comes first: the other side drops the connection without a word then.

    Codes that start with ``peer-`` or come from the peer's own check are definite; ``unreachable`` may pass.
    """
    try:
        kit.check_dates()
    except IdentityError as expired:
        return expired
    details = error.details() or "" if isinstance(error, grpc.Call) else ""
    status = error.code() if isinstance(error, grpc.Call) else None
    if status in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return TransportError(
            f"{peer} refused our connection: {_REFUSALS.get(details, 'see its log')}.",
            code=details if re.fullmatch(r"[a-z-]{1,64}", details) else "peer-refused",
            where=f"{peer} at {endpoint}; no data was sent",
            fix=f"compare `coterie roster show` here and at {peer}",
        )
    if "CERTIFICATE_VERIFY_FAILED" in details or "Hostname Verification" in details:
        return _other_certificate(peer, endpoint, roster, kit.authority)
    if "DNS resolution failed" in details or "name resolution" in details:
        return _unnamed(endpoint)
    if "Connection refused" in details:
        return TransportError(
            f"{endpoint} refuses connections; {peer} is not running there.",
            code="unreachable",
            fix="start it there, or correct the endpoint in a new roster; it is dialled again",
        )
    if "handshake" in details.lower() or "ALERT" in details:
        return TransportError(
            f"{peer} at {endpoint} ended the TLS handshake; it may not accept our certificate.",
            code="unreachable",
            fix=f"check at {peer} that both kits come from the same CA and that no certificate has expired",
        )
    reason = re.sub(r"\s+", " ", details)[:160] or str(status)
    return TransportError(
        f"{peer} cannot be reached at {endpoint}: {reason}.",
        code="unreachable",
        fix=f"see whether {peer} runs and its port is open from here{past_proxies()}",
    )


_REFUSALS = {
    "roster-not-listed": "our certificate is valid but not in its roster",
    "roster-role": "our certificate has another role than its roster lists",
    "identity-no-name": "our certificate names no member of a federation",
    "handshake-direction": "it expects to dial us, so the two rosters have another order",
    "handshake-lane": "it has no such lane to us",
    "handshake-busy": "we open more streams to it than there are lanes",
    "identity-tls-version": "it accepts TLS 1.3 alone",
    "identity-in-use": "another process with our kit is connected to it, and alive",
    "handshake-damaged": "it did not understand our first message",
}


def _other_certificate(peer: str, endpoint: str, roster: Roster, authority: x509.Certificate) -> IdentityError:
    """Look at the certificate the endpoint shows, without trusting it, and say what is wrong with it."""
    entry = roster.entry(peer)
    where = f"{peer} at {endpoint}; no data was sent"
    why = "whoever answers there is not the member that signed the roster"
    shown = presented(endpoint)
    if shown is None:
        return IdentityError(
            f"The certificate shown at {endpoint} is not {peer}'s.",
            code="peer-certificate",
            fix="see what listens there: another program, another member, or a proxy that opens TLS",
            where=where,
            why=why,
        )
    try:
        certificates.check_issued(shown, authority, f"The certificate shown by {peer}")
    except IdentityError as error:
        return IdentityError(error.message, code=f"peer-{error.code}", where=where, why=why, fix=error.fix)
    return IdentityError(
        f"The certificate shown at {endpoint} is valid, but it is not the one the roster lists for {peer}.",
        code="peer-certificate",
        where=f"{where}; shown {certificates.fingerprint(shown)[:11]}.., listed {entry.cert_fingerprint[:11]}..",
        why=why,
        fix=f"ask {peer} which certificate it uses; sign a new roster if it was renewed",
    )


def look_at(peer: str, roster: Roster, authority: x509.Certificate) -> CoterieError | None:
    """What keeps a member from being reached now; None if it shows the listed certificate. Sends nothing."""
    endpoint = roster.entry(peer).endpoint
    try:
        socket.create_connection(split_endpoint(endpoint), timeout=_PROBE_S).close()
    except socket.gaierror:
        return _unnamed(endpoint)
    except OSError as error:
        return TransportError(
            f"{endpoint} cannot be reached: {error.strerror or error}.",
            code="unreachable",
            fix=f"start {peer}; if it runs, open the port in its firewall, or correct the endpoint in a new roster"
            + past_proxies(),
        )
    shown = presented(endpoint)
    if shown is not None and certificates.fingerprint(shown) == roster.entry(peer).cert_fingerprint:
        return None
    return _other_certificate(peer, endpoint, roster, authority)


def presented(endpoint: str) -> x509.Certificate | None:
    """The certificate that an endpoint shows, trusted by nobody yet; None where it shows none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # only looked at; nothing is sent
    try:
        with (
            socket.create_connection(split_endpoint(endpoint), timeout=_PROBE_S) as plain,
            context.wrap_socket(plain) as secured,
        ):
            der = secured.getpeercert(binary_form=True)
            return x509.load_der_x509_certificate(der) if der else None
    except (OSError, ValueError, InvalidSignature):
        return None
