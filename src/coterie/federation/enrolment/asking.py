"""The questions of a party that joins, first at the desk, then, with its certificate, at the party that hands out.

The certificate that the desk shows is pinned before anything is sent, and is what both proofs cover; the same one has
to be shown where parts are handed out. Answers of the desk are used after their proof fits, and not before.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from cryptography import x509

from coterie.errors import CoterieError, IdentityError, TransportError
from coterie.federation.enrolment.codes import CodeKeys, JoinCode, proof, proves
from coterie.federation.enrolment.desk import ENROLMENT, Offer, said, texts
from coterie.federation.enrolment.hand_out import HAND_OUT
from coterie.federation.identity.certificates import (
    cert_pem,
    check_issued,
    fingerprint,
    key_pem,
    member_of,
    parse_certificate,
)
from coterie.federation.identity.kit import Kit
from coterie.federation.wire.frame import CHUNK_BYTES
from coterie.federation.wire.grpc_transport import DIRECT
from coterie.federation.wire.unreachable import past_proxies, presented

_ANSWER_BYTES = 16 << 20
_CALL_S = 20.0
CHUNK_S = 60.0
"""How long one chunk of a file may take; a megabyte comes over 140 kbit/s in that time."""
_AGAIN_S = 0.5


@dataclass(frozen=True)
class Invited:
    """What a code stands for.

    Args:
        member: whom it is for.
        offer: what is agreed.
        authority: the CA's certificate.
    """

    member: str
    offer: Offer
    authority: x509.Certificate


class Desk:
    """The desk of the party that invites, over a connection whose certificate is pinned.

    Args:
        code: as it was read out.

    Raises:
        TransportError: nobody answers there.
    """

    def __init__(self, code: JoinCode) -> None:
        self._endpoint, self._keys = code.endpoint, CodeKeys.of(code.secret)
        shown = presented(code.endpoint)
        if shown is None:
            raise TransportError(
                f"Nobody who invites answers at {code.endpoint}.",
                code="unreachable",
                fix="see whether `coterie invite` runs there and the port is open from here, and compare the address "
                f"in the code{past_proxies()}",
            )
        self.shown = shown

    def invited(self, key: str) -> Invited:
        """What the code stands for.

        Args:
            key: hex SHA-256 of the signing request that was made for it before; empty where there is none yet.

        Raises:
            IdentityError: the code does not count, or the other side cannot prove that it gave it out.
        """
        answer = self._ask("Invitation", {"key": key}, ("ca", "agreement", "federation", "parts_endpoint", "member"))
        authority = parse_certificate(answer["ca"].encode(), "The CA certificate", self._endpoint)
        check_issued(self.shown, authority, "The certificate of the inviter")
        offer = Offer(answer["agreement"].encode(), answer["federation"], answer["parts_endpoint"])
        return Invited(answer["member"], offer, authority)

    def enrol(self, signing_request: bytes) -> x509.Certificate:
        """The certificate for a request; the same again for the same request."""
        key = hashlib.sha256(signing_request).hexdigest()
        answer = self._ask("Enrol", {"key": key, "request": signing_request.decode("ascii")}, ("certificate",))
        return parse_certificate(answer["certificate"].encode(), "The certificate", self._endpoint)

    def _ask(self, method: str, values: Mapping[str, str], needed: Collection[str]) -> dict[str, str]:
        asked = {**values, "what": method, "code": self._keys.name, "once": secrets.token_hex(16)}
        shown = fingerprint(self.shown).encode()
        asked["proof"] = proof(self._keys.joining, *said(asked, shown))
        channel = dial(self._endpoint, self.shown)  # a person may think for long between two questions
        try:
            answer = _answered(call(channel, f"/{ENROLMENT}/{method}", asked, self._endpoint), self._endpoint)
        finally:
            channel.close()
        if not proves(self._keys.inviting, answer.get("proof", ""), *said(asked, shown), *said(answer, shown)):
            raise IdentityError(
                f"Who answers at {self._endpoint} cannot prove that it gave out this code.",
                code="join-not-the-inviter",
                why="somebody else may have taken its place; nothing was made or installed here",
                fix="compare the address in the code with the inviter, by phone, and ask for a new code",
            )
        return _holding(answer, needed, self._endpoint)


class PartsDesk:
    """Where members fetch their parts and sign, over mutual TLS.

    Args:
        endpoint: of it.
        shown: the certificate that it has to show: the desk's.
        kit: this member's.
        patience_s: how long it may be silent before that is an error; it may be started again meanwhile.
    """

    def __init__(self, endpoint: str, shown: x509.Certificate, kit: Kit, *, patience_s: float = 0.0) -> None:
        self.endpoint, self._patience_s = endpoint, patience_s
        self._channel = dial(endpoint, shown, kit)

    def close(self) -> None:
        """Ask nothing more."""
        self._channel.close()

    def manifest(self) -> bytes:
        """manifest.json of the split model."""
        return self._ask("Manifest", {})

    def roster(self) -> tuple[bytes, str]:
        """The roster with the signatures so far, empty while somebody has no certificate; and whom it waits for."""
        answer = _holding(_answered(self._ask("Roster", {}), self.endpoint), ("roster", "waiting"), self.endpoint)
        return answer["roster"].encode(), answer["waiting"]

    def sign(self, roster: bytes) -> None:
        """Hand over a copy that this member signed."""
        self._ask("Sign", {"roster": roster.decode("ascii")})

    def leave(self) -> None:
        """This member has all it needs."""
        self._ask("Leave", {})

    def _ask(self, method: str, values: Mapping[str, str]) -> bytes:
        until = time.monotonic() + self._patience_s
        while True:
            try:
                return call(self._channel, f"/{HAND_OUT}/{method}", values, self.endpoint)
            except TransportError:
                if time.monotonic() >= until:
                    raise
                time.sleep(_AGAIN_S)

    def chunks(self, file: str, first: int) -> Iterator[bytes]:
        """A file's chunks of `CHUNK_BYTES`, from the number ``first`` on.

        Raises:
            TransportError: nothing came for `CHUNK_S`, or the line broke.
        """
        stream = self._channel.unary_stream(f"/{HAND_OUT}/File")(
            json.dumps({"file": file, "chunk": str(first)}).encode(), wait_for_ready=False
        )
        try:
            while chunk := self._next(stream):
                yield chunk
        except grpc.RpcError as error:
            raise why_not(error, self.endpoint) from None
        finally:
            stream.cancel()

    def _next(self, stream: Any) -> bytes:
        """One chunk; empty at the end. gRPC counts the time of a call, which a large file may need much of."""
        late = threading.Event()

        def give_up() -> None:
            late.set()
            stream.cancel()

        timer = threading.Timer(CHUNK_S, give_up)
        timer.daemon = True
        timer.start()
        try:
            return bytes(next(stream, b""))
        except grpc.RpcError:
            if late.is_set():
                raise TransportError(
                    f"The inviter at {self.endpoint} sent nothing for {CHUNK_S:g} s.",
                    code="unreachable",
                    fix="run the same command again, which goes on where it was; if that repeats, ask the inviter",
                ) from None
            raise
        finally:
            timer.cancel()


def _answered(raw: bytes, endpoint: str) -> dict[str, str]:
    """The texts in an answer of the inviter.

    Raises:
        IdentityError: it is something else.
    """
    try:
        return texts(raw)
    except IdentityError:
        raise _not_understood(endpoint) from None


def _holding(answer: dict[str, str], needed: Collection[str], endpoint: str) -> dict[str, str]:
    """The same, if all that is needed is in it; IdentityError otherwise."""
    if not answer.keys() >= set(needed):
        raise _not_understood(endpoint)
    return answer


def _not_understood(endpoint: str) -> IdentityError:
    return IdentityError(
        f"What answers at {endpoint} says nothing that an inviter would say.",
        code="join-answer",
        fix="compare the address in the code with the inviter, and run the same version of coterie at both ends",
    )


def dial(endpoint: str, shown: x509.Certificate, kit: Kit | None = None) -> grpc.Channel:
    """A channel on which only this certificate is trusted; with a kit it shows ours."""
    own = (None, None) if kit is None else (key_pem(kit.key), cert_pem(kit.certificate))
    credentials = grpc.ssl_channel_credentials(cert_pem(shown), *own)
    options = [
        *DIRECT,
        ("grpc.max_receive_message_length", max(_ANSWER_BYTES, CHUNK_BYTES + 1024)),
        ("grpc.ssl_target_name_override", member_of(shown)[0]),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.ping_timeout_ms", 10_000),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 2_000),
    ]
    return grpc.secure_channel(endpoint, credentials, options=options)


def call(channel: grpc.Channel, method: str, asked: Mapping[str, str], endpoint: str) -> bytes:
    """One question and its answer.

    Raises:
        TransportError: nobody answers (code ``unreachable``).
        CoterieError: what the other side said against it.
    """
    try:
        return bytes(channel.unary_unary(method)(json.dumps(dict(asked)).encode(), timeout=_CALL_S))
    except grpc.RpcError as error:
        raise why_not(error, endpoint) from None


def why_not(error: grpc.RpcError, endpoint: str) -> CoterieError:
    """What a failed call to the inviter means for a person."""
    details = error.details() or "" if isinstance(error, grpc.Call) else ""
    status = error.code() if isinstance(error, grpc.Call) else None
    said_no = (
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.INVALID_ARGUMENT,
    )
    if status in said_no:
        known = {each.code: each for each in _refusals(endpoint)}
        return known.get(details) or IdentityError(
            f"The inviter refused: {details[:64] or status}.",
            code="join-refused",
            fix="`coterie explain` says what that code means; see also what `coterie invite` shows there",
        )
    return TransportError(
        f"The inviter at {endpoint} does not answer: {' '.join(details.split())[:160] or status}.",
        code="unreachable",
        fix=f"see whether `coterie invite` runs there and its port is open from here{past_proxies()}",
    )


def _refusals(endpoint: str) -> tuple[IdentityError, ...]:
    where = f"{endpoint}; nothing was installed"
    return (
        IdentityError(
            "The inviter knows no such code.",
            code="join-code-unknown",
            where=where,
            fix="ask the inviter for the code that `coterie invite` shows now; expired ones are replaced there",
        ),
        IdentityError(
            "The code was used already, by another key than this folder's.",
            code="join-code-used",
            where=where,
            why="a code is worth one certificate",
            fix="if you joined in another folder, go on there; if not, tell the inviter: somebody else used it",
        ),
        IdentityError(
            "The code has expired.",
            code="join-code-expired",
            where=where,
            fix="ask the inviter to start `coterie invite` again, which makes a new one",
        ),
        IdentityError(
            "The inviter could not make sure that the code is held here.",
            code="join-code-proof",
            where=where,
            why="somebody between the two may be showing a certificate of its own",
            fix="try from another network, and tell the inviter, who was shown it, too",
        ),
        IdentityError(
            "Too many wrong codes came from this address.",
            code="join-too-many",
            where=where,
            fix="wait a minute, and compare the code with the inviter, group by group",
        ),
        IdentityError(
            "The inviter did not understand the request.",
            code="join-request",
            where=where,
            fix="run the same version of coterie at both ends",
        ),
        IdentityError(
            "The inviter does not hand out that file to this member.",
            code="join-not-yours",
            where=where,
            fix="run the same version of coterie at both ends",
        ),
        IdentityError(
            "The inviter cannot read a file that it is to hand out.",
            code="join-file-missing",
            where=where,
            fix="ask the inviter to put the folder back that `coterie split` wrote; the same command then goes on",
        ),
    )
