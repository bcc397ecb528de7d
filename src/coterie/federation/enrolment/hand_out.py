"""What members fetch from the party that invited them, over mutual TLS: their parts, and the roster to sign.

Two gates, as everywhere: the CA issued the certificate, and it is the very one that this member's invitation got.
A member gets its own shard and nobody else's; the coordinator gets no tensor at all.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path

import grpc

from coterie.errors import CoterieError, IdentityError, RosterError
from coterie.federation.enrolment.desk import Tell, end_call, serve, texts
from coterie.federation.enrolment.invitations import Invitations
from coterie.federation.identity.certificates import (
    COORDINATOR,
    cert_pem,
    fingerprint,
    key_pem,
    parse_certificate,
)
from coterie.federation.identity.kit import Kit
from coterie.federation.identity.roster import Roster, check_signed, from_json, join, to_json
from coterie.federation.wire.frame import CHUNK_BYTES
from coterie.federation.wire.grpc_transport import peer_certificate
from coterie.models.split.shards import MANIFEST_FILE, MODEL_FOLDER, TRUNK_FILE, shard_file

HAND_OUT = "coterie.HandOut"
_BESIDE = 8
_ROSTER_BYTES = 4 << 20


def parts_of(member: str, files: Collection[str]) -> list[str]:
    """Which files of a split model a member is given."""
    if member == COORDINATOR:
        return []
    own = {TRUNK_FILE, shard_file(member)}
    return sorted(name for name in files if name in own or name.startswith(f"{MODEL_FOLDER}/"))


class RosterTable:
    """The draft, once everybody has a certificate, and the signatures under it.

    Args:
        kit: by whose CA signatures are checked.
    """

    def __init__(self, kit: Kit) -> None:
        self._kit = kit
        self._roster: Roster | None = None
        self._settled = False
        self._lock = threading.Lock()

    def lay_out(self, roster: Roster) -> None:
        """Everybody can sign this from now on."""
        with self._lock:
            self._roster = roster

    def read(self) -> Roster | None:
        """With the signatures so far."""
        with self._lock:
            return self._roster

    def unsigned(self) -> list[str]:
        """Who has not signed; empty while there is nothing to sign."""
        roster = self.read()
        return [] if roster is None else [e.name for e in roster.parties if e.name not in roster.signatures]

    def settle(self) -> None:
        """The inviter has what all signed on its disk; started again, it needs nobody for it."""
        with self._lock:
            self._settled = True

    def waiting(self) -> list[str]:
        """Whom members wait for before they have the roster: who has not signed, then the inviter's disk."""
        return self.unsigned() or ([] if self._settled else [self._kit.name])

    def sign(self, name: str, signed: Roster) -> None:
        """Take a member's signature.

        Raises:
            RosterError, IdentityError: it is not one under this roster, or not that member's.
        """
        with self._lock:
            if self._roster is None or signed.content_hash() != self._roster.content_hash():
                raise RosterError("Another roster was signed.", code="roster-mismatch", fix="sign the one laid out")
            check_signed(signed, self._roster.entry(name), self._kit.authority)
            only = {name: signed.signatures[name]}
            self._roster = join([self._roster, Roster(**{**vars(signed), "signatures": only})])


class HandOut:
    """Listens from `open` to `close`.

    Args:
        listen: ``host:port``.
        kit: the inviter's.
        parts: folder of the split model.
        files: names in its manifest.
        invitations: with the certificates that they got; who has left is written down there.
        table: the roster.
        tell: shows the inviter what happens.
    """

    def __init__(
        self,
        listen: str,
        kit: Kit,
        parts: Path,
        files: Collection[str],
        invitations: Invitations,
        table: RosterTable,
        tell: Tell,
    ) -> None:
        self._listen, self._kit, self._parts, self._files = listen, kit, parts, files
        self._invitations, self._table, self._tell = invitations, table, tell
        self._server: grpc.Server | None = None

    def open(self, members: int) -> None:
        """Begin to listen, for so many members; TransportError where that cannot be."""
        credentials = grpc.ssl_server_credentials(
            [(key_pem(self._kit.key), cert_pem(self._kit.certificate))],
            root_certificates=cert_pem(self._kit.authority),
            require_client_auth=True,
        )
        unary = {"Manifest": self._manifest, "Roster": self._roster, "Sign": self._sign, "Leave": self._leave}
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(partial(self._answer, method)) for name, method in unary.items()
        }
        handlers["File"] = grpc.unary_stream_rpc_method_handler(self._file)
        workers = 4 * members + _BESIDE
        self._server, _ = serve(
            *(self._kit.name, self._listen, credentials, {HAND_OUT: handlers}),
            workers=workers,
            connections=4 * workers,
            largest=_ROSTER_BYTES,
        )

    def close(self) -> None:
        """Answer what is being asked, and listen no more."""
        if self._server is not None:
            self._server.stop(grace=1.0).wait()

    def _answer(
        self, method: Callable[[str, Mapping[str, str]], bytes], raw: bytes, context: grpc.ServicerContext
    ) -> bytes:
        try:
            return method(self._caller(context), texts(raw))
        except CoterieError as error:
            end_call(context, grpc.StatusCode.PERMISSION_DENIED, error.code)

    def _caller(self, context: grpc.ServicerContext) -> str:
        shown = fingerprint(peer_certificate(context))
        for each in self._invitations.all():
            if each.certificate and _fingerprint(each.certificate) == shown:
                return each.name
        raise IdentityError(
            "No invitation got this certificate.",
            code="roster-not-listed",
            fix="join with the code, and use the kit that this makes",
        )

    def _manifest(self, name: str, asked: Mapping[str, str]) -> bytes:
        try:
            return (self._parts / MANIFEST_FILE).read_bytes()
        except OSError as error:
            self._tell(f"{MANIFEST_FILE} cannot be read, and {name} needs it: {error.strerror}")
            raise IdentityError(
                f"{MANIFEST_FILE} cannot be read.",
                code="join-file-missing",
                fix="put the folder back that `coterie split` wrote",
            ) from None

    def _roster(self, name: str, asked: Mapping[str, str]) -> bytes:
        roster = self._table.read()
        missing = [each.name for each in self._invitations.all() if not each.certificate]
        waiting = missing if roster is None else self._table.waiting()
        drafted = "" if roster is None else to_json(roster).decode("ascii")
        return json.dumps({"roster": drafted, "waiting": ", ".join(waiting)}).encode()

    def _sign(self, name: str, asked: Mapping[str, str]) -> bytes:
        self._table.sign(name, from_json(asked.get("roster", "").encode()))
        self._tell(f"{name} has its parts, and signed the roster")
        return b"{}"

    def _leave(self, name: str, asked: Mapping[str, str]) -> bytes:
        if self._invitations.leave(name):
            self._tell(f"{name} has the roster that all signed")
        return b"{}"

    def _file(self, raw: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        """The chunks of a file, from the one that was asked for on."""
        try:
            name, asked = self._caller(context), texts(raw)
            file, first = asked.get("file", ""), int(asked.get("chunk", "0"))
            if file not in parts_of(name, self._files) or first < 0:
                raise IdentityError(
                    f"{file} is not for {name}.",
                    code="join-not-yours",
                    fix="a member fetches the trunk, the folder `model` and its own shard",
                )
        except CoterieError as error:
            end_call(context, grpc.StatusCode.PERMISSION_DENIED, error.code)
        except ValueError:
            end_call(context, grpc.StatusCode.INVALID_ARGUMENT, "join-request")
        try:
            with (self._parts / file).open("rb") as source:
                source.seek(first * CHUNK_BYTES)
                while chunk := source.read(CHUNK_BYTES):
                    yield chunk
        except OSError as error:
            self._tell(f"{file} cannot be read, and {name} needs it: {error.strerror}")
            end_call(context, grpc.StatusCode.PERMISSION_DENIED, "join-file-missing")


def _fingerprint(pem: str) -> str:
    return fingerprint(parse_certificate(pem.encode(), "A certificate", "invitations"))
