"""The enrolment desk: the one door that opens without a client certificate, while invited members are missing.

Two questions, each answered only to somebody who proves to hold a code: what is agreed (`Invitation`), and a
certificate for a key that was made elsewhere (`Enrol`). What a caller sends is looked at no further before its proof
fits. The proofs cover the certificate that this side shows, so they fit on no connection that somebody else opened.

A code cannot be guessed; the count of wrong tries keeps strangers from filling the log.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import grpc

from coterie.errors import CoterieError, IdentityError
from coterie.federation.enrolment.codes import CodeKeys, proof, proves
from coterie.federation.enrolment.invitations import Invitation, Invitations
from coterie.federation.identity.certificates import Authority, Member, cert_pem, fingerprint, key_pem
from coterie.federation.identity.kit import Kit, approve
from coterie.federation.wire.grpc_transport import DIRECT
from coterie.federation.wire.newcomers import NEWCOMERS, Newcomers, parse_peer
from coterie.federation.wire.unreachable import cannot_listen
from coterie.storage import json_object

ENROLMENT = "coterie.Enrolment"
REQUEST_BYTES = 16 << 10
"""A signing request takes less than one."""
WRONG_TRIES, PER_S = 5, 60.0
"""How many wrong proofs an address may show in how many seconds."""
_ADDRESSES = 4096
PATIENCE_S = 10.0
"""How long a connection to the desk may stand."""

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Offer:
    """What a code's holder is shown before it agrees.

    Args:
        agreement: federation.yaml, as it lies at the inviter.
        federation: its name.
        parts_endpoint: where members fetch their parts and the roster.
    """

    agreement: bytes
    federation: str
    parts_endpoint: str


class TryLimit:
    """Counts wrong tries by address, of the latest addresses alone."""

    def __init__(self) -> None:
        self._wrong: OrderedDict[str, deque[float]] = OrderedDict()
        self._lock = threading.Lock()

    def reached(self, host: str, now: float) -> bool:
        """Whether this address has to wait."""
        with self._lock:
            recent = self._wrong.get(host, ())
            return sum(1 for at in recent if now - at < PER_S) >= WRONG_TRIES

    def wrong(self, host: str, now: float) -> None:
        """Count one."""
        with self._lock:
            self._wrong.setdefault(host, deque(maxlen=WRONG_TRIES)).append(now)
            self._wrong.move_to_end(host)
            if len(self._wrong) > _ADDRESSES:
                self._wrong.popitem(last=False)


class EnrolmentDesk:
    """Listens from the start of the block to its end.

    Args:
        listen: ``host:port``.
        kit: the inviter's; its certificate is shown.
        authority: issues.
        members: of the agreement.
        invitations: that count.
        offer: what is agreed.
        tell: shows the inviter what happens, a line each.
    """

    def __init__(
        self,
        listen: str,
        kit: Kit,
        authority: Authority,
        members: tuple[Member, ...],
        invitations: Invitations,
        offer: Offer,
        tell: Tell,
    ) -> None:
        self._listen, self._kit, self._authority = listen, kit, authority
        self._members, self._invitations = members, invitations
        self._offer, self._tell = offer, tell
        self._shown = fingerprint(kit.certificate).encode()
        self._tries = TryLimit()
        self._server: grpc.Server | None = None
        self._strangers: Newcomers | None = None

    def open(self) -> None:
        """Begin to listen; TransportError where that cannot be."""
        credentials = grpc.ssl_server_credentials([(key_pem(self._kit.key), cert_pem(self._kit.certificate))])
        methods = {"Invitation": self._invitation, "Enrol": self._enrol}
        self._server, port = serve(
            self._kit.name,
            self._listen,
            credentials,
            {
                ENROLMENT: {
                    name: grpc.unary_unary_rpc_method_handler(partial(self._answer, method))
                    for name, method in methods.items()
                }
            },
            workers=2 * NEWCOMERS,  # who opens a call and says no more holds one, until it is cut
            connections=2 * NEWCOMERS,
            largest=REQUEST_BYTES,
        )
        self._strangers = Newcomers(port, PATIENCE_S)

    def look(self) -> None:
        """End connections that stand too long; to be called a few times a second."""
        if self._strangers is not None:
            self._strangers.look(time.monotonic())

    def close(self) -> None:
        """Answer what is being asked, and listen no more."""
        if self._server is not None:
            self._server.stop(grace=1.0).wait()

    def _answer(
        self,
        method: Callable[[Invitation, CodeKeys, Mapping[str, str]], dict[str, str]],
        raw: bytes,
        context: grpc.ServicerContext,
    ) -> bytes:
        try:
            asked = texts(raw)
            invitation, keys = self._known(asked, parse_peer(context.peer())[0])
            return json.dumps(method(invitation, keys, asked)).encode()
        except CoterieError as error:
            end_call(context, grpc.StatusCode.PERMISSION_DENIED, error.code)

    def _known(self, asked: Mapping[str, str], host: str) -> tuple[Invitation, CodeKeys]:
        """Whose code the caller holds, once it has proved that; what is wrong is counted.

        Several may come from one address, so who holds a code gets in however often others there guessed.
        """
        invitation = self._invitations.by_code(asked.get("code", ""))
        keys = CodeKeys.of("" if invitation is None else invitation.secret)
        if invitation is None or not proves(keys.joining, asked.get("proof", ""), *said(asked, self._shown)):
            raise self._wrong(invitation, host)
        if invitation.expired(dt.datetime.now(dt.UTC)):
            raise _refused("join-code-expired")
        if invitation.request and invitation.request != asked.get("key", ""):
            self._tell(f"{host} came with the code of {invitation.name}, which was used already")
            raise _refused("join-code-used")
        return invitation, keys

    def _wrong(self, invitation: Invitation | None, host: str) -> IdentityError:
        """Count a wrong try, and tell of it while there are not too many."""
        now = time.monotonic()
        if self._tries.reached(host, now):
            return _refused("join-too-many")
        self._tries.wrong(host, now)
        if invitation is None:
            self._tell(f"{host} tried a code that is not one of these")
            return _refused("join-code-unknown")
        self._tell(
            f"{host} knows of the code of {invitation.name} and could not prove that it holds it: "
            "somebody may stand between you; nothing was given"
        )
        return _refused("join-code-proof")

    def _invitation(self, invitation: Invitation, keys: CodeKeys, asked: Mapping[str, str]) -> dict[str, str]:
        offer = {
            "member": invitation.name,
            "federation": self._offer.federation,
            "agreement": self._offer.agreement.decode(),
            "parts_endpoint": self._offer.parts_endpoint,
            "ca": cert_pem(self._authority.certificate).decode(),
        }
        return self._proved(offer, keys, asked)

    def _enrol(self, invitation: Invitation, keys: CodeKeys, asked: Mapping[str, str]) -> dict[str, str]:
        signing_request = asked.get("request", "").encode()
        if hashlib.sha256(signing_request).hexdigest() != asked.get("key", ""):
            raise _refused("join-request")
        if not invitation.request:
            member, certificate = approve(signing_request, self._members, self._authority)
            if member.name != invitation.name:
                raise _refused("join-request")
            issued = cert_pem(certificate).decode()
            invitation = self._invitations.use(invitation.name, asked["key"], issued)
            if invitation.request != asked["key"]:  # two at once
                raise _refused("join-code-used")
            self._tell(f"{invitation.name} has its certificate, {fingerprint(certificate)[:23]}..")
        return self._proved({"certificate": invitation.certificate}, keys, asked)

    def _proved(self, answer: dict[str, str], keys: CodeKeys, asked: Mapping[str, str]) -> dict[str, str]:
        return {**answer, "proof": proof(keys.inviting, *said(asked, self._shown), *said(answer, self._shown))}


def said(values: Mapping[str, str], shown: bytes) -> tuple[bytes, ...]:
    """What a proof covers: the fingerprint of the certificate at the desk's end, and all values but the proof."""
    body = {name: value for name, value in values.items() if name != "proof"}
    return shown, json.dumps(body, sort_keys=True, ensure_ascii=True).encode()


def texts(raw: bytes) -> dict[str, str]:
    """The texts by name that a message holds; IdentityError for anything else."""
    try:
        values: dict[str, Any] = json_object(raw)
        if not all(isinstance(value, str) for value in values.values()):
            raise ValueError("not texts")
        json.dumps(values, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except ValueError:
        raise _refused("join-request") from None
    return values


def end_call(context: grpc.ServicerContext, status: grpc.StatusCode, code: str) -> NoReturn:
    """Refuse a call, with a code for its reason."""
    context.abort(status, code)
    raise RuntimeError("gRPC's abort came back")


def _refused(code: str) -> IdentityError:
    """What crosses is the code alone; `coterie.federation.enrolment.asking` has the sentence for it."""
    return IdentityError(code, code=code)


def serve(
    me: str,
    listen: str,
    credentials: grpc.ServerCredentials,
    services: Mapping[str, Mapping[str, grpc.RpcMethodHandler]],
    *,
    workers: int,
    connections: int,
    largest: int,
) -> tuple[grpc.Server, int]:
    """A server that runs, and its port.

    Args:
        me: who says so where it cannot listen.
        listen: ``host:port``.
        credentials: of TLS.
        services: methods by name, by service.
        workers: calls at once.
        connections: that may stand at once.
        largest: bytes of a request.

    Raises:
        TransportError: it cannot listen there.
    """
    server = grpc.server(
        ThreadPoolExecutor(workers, thread_name_prefix=f"{me}-enrolment"),
        options=[
            *DIRECT,
            ("grpc.max_receive_message_length", largest),
            ("grpc.server_handshake_timeout_ms", int(PATIENCE_S * 1000)),
            ("grpc.max_allowed_incoming_connections", connections),
            ("grpc.max_concurrent_streams", 1),
        ],
        maximum_concurrent_rpcs=workers,
    )
    for name, methods in services.items():
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, dict(methods)),))
    try:
        port = server.add_secure_port(listen, credentials)
    except RuntimeError:
        port = 0
    if port == 0:
        raise cannot_listen(me, listen)
    server.start()
    return server, port
