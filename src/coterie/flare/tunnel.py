"""TCP connections carried by messages: between processes here and those of other sites, byte by byte.

What is carried is the members' mutual TLS, so nobody on the way can read or change it. A message can open a
connection to a process that this site has named, and to nothing else. Pieces are numbered: one that comes again is
not handed on again, and where one is missing the connection ends, as TCP's would; its members dial anew.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from coterie.federation.wire.seldom import Seldom
from coterie.federation.wire.transport import Lane

log = logging.getLogger(__name__)

OPEN, DATA, CLOSE = "open", "data", "close"
PIECE = (1 << 20) - (64 << 10)
"""Most bytes of one message: with what FLARE writes around them, one of its chunks of 1 MiB."""
STREAMS = 64
"""Connections with one other site that are always allowed: what dials once more, or only looks who is there."""
TAKEN_S = 30
"""Seconds in which a process here takes what has come for it: who is frozen holds up its own connections alone."""
LOOPBACK = "127.0.0.1"

Send = Callable[[str, Mapping[str, Any]], None]
"""Called as ``send(site, body)``; returns when the other site's `Tunnel.handle` has, raises OSError if it did not."""


@dataclass
class _Stream:
    """A connection's end here, how many pieces it was handed, and whether the other side has said that it ended."""

    site: str
    name: str
    end: socket.socket
    taken: int = 0
    ended: bool = False
    taking: threading.Lock = field(default_factory=threading.Lock)


class Tunnel:
    """One site's end of all connections.

    Args:
        here: member to the address that its process listens on.
        elsewhere: member to the site that runs it.
        send: delivers a message to another site, in order.
    """

    def __init__(self, here: Mapping[str, str], elsewhere: Mapping[str, str], send: Send) -> None:
        self._here, self._elsewhere, self._send = dict(here), dict(elsewhere), send
        self._streams: dict[tuple[str, str], _Stream] = {}
        self._listeners: dict[str, socket.socket] = {}
        self._guard = threading.Lock()
        self._seldom = Seldom(log)
        self._closed = False

    def room(self, site: str) -> int:
        """Most connections with another site: each pair of members may hold every lane twice, when it dials anew."""
        pairs = len(self._here) * sum(other == site for other in self._elsewhere.values())
        return STREAMS + 2 * len(Lane) * pairs

    def start(self) -> dict[str, str]:
        """Listen on loopback for those who dial members elsewhere.

        Returns:
            Member to the address to dial it at.
        """
        for member in self._elsewhere:
            listener = socket.create_server((LOOPBACK, 0))
            self._listeners[member] = listener
            threading.Thread(target=self._accept, args=(member, listener), name=f"to-{member}", daemon=True).start()
        ports = {member: listener.getsockname()[1] for member, listener in self._listeners.items()}
        return {member: f"{LOOPBACK}:{port}" for member, port in ports.items()}

    def handle(self, site: str, body: Mapping[str, Any]) -> None:
        """Do what a message of another site says.

        Args:
            site: who sent it, as the carrier knows.
            body: ``op``, ``stream``, and ``member``, or ``data`` with its ``number`` from 0.

        Raises:
            OSError: it cannot be done; the other side closes its end then.
        """
        op, name = body.get("op"), body.get("stream")
        if not isinstance(name, str) or len(name) > 64:
            raise OSError("a message without a stream")
        if op == OPEN:
            self._open(site, name, str(body.get("member")))
            return
        stream = self._streams.get((site, name))
        if op == CLOSE:
            if stream is not None:
                stream.ended = True
                self._drop(stream)
            return
        data, number = body.get("data"), body.get("number")
        if op != DATA or stream is None or not isinstance(data, bytes) or not isinstance(number, int):
            raise OSError("no such connection")
        try:
            self._take(stream, number, data)
        except OSError:
            self._drop(stream)
            raise

    @staticmethod
    def _take(stream: _Stream, number: int, data: bytes) -> None:
        with stream.taking:
            if number > stream.taken:
                raise OSError(f"piece {stream.taken} is missing")
            if number == stream.taken:
                stream.end.sendall(data)
                stream.taken += 1

    def close(self) -> None:
        """End all connections and listen no more. Can be called twice."""
        with self._guard:
            self._closed = True
            streams = list(self._streams.values())
        for listener in self._listeners.values():
            listener.close()
        for stream in streams:
            self._drop(stream)

    def _accept(self, member: str, listener: socket.socket) -> None:
        while True:
            try:
                end, _ = listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._carry, args=(member, end), name=f"from-{member}", daemon=True).start()

    def _carry(self, member: str, end: socket.socket) -> None:
        """From somebody here who dialled a member elsewhere."""
        stream = _Stream(self._elsewhere[member], secrets.token_hex(16), end)
        try:
            self._keep(stream)
            self._send(stream.site, {"op": OPEN, "stream": stream.name, "member": member})
        except OSError as error:
            log.info("no connection to %s at %s: %s", member, stream.site, error)
            self._drop(stream)
            return
        self._pump(stream)

    def _open(self, site: str, name: str, member: str) -> None:
        """From somebody elsewhere who dialled a member here."""
        address = self._here.get(member)
        if address is None:
            raise OSError("no such member here")
        host, _, port = address.rpartition(":")
        stream = _Stream(site, name, socket.create_connection((host, int(port)), timeout=10))
        try:
            self._keep(stream)
        except OSError:
            stream.end.close()
            raise
        threading.Thread(target=self._pump, args=(stream,), name=f"for-{member}", daemon=True).start()

    def _keep(self, stream: _Stream) -> None:
        stream.end.settimeout(None)
        stream.end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", TAKEN_S, 0))
        with self._guard:
            taken = sum(site == stream.site for site, _ in self._streams)
            if (
                not self._closed
                and taken < self.room(stream.site)
                and (stream.site, stream.name) not in self._streams
            ):
                self._streams[stream.site, stream.name] = stream
                return
        self._seldom.log(
            stream.site, logging.WARNING, f"no room for another connection with {stream.site}: {taken} are open"
        )
        raise OSError("no room for another connection")

    def _pump(self, stream: _Stream) -> None:
        """Carry what comes from the process here, until either side ends."""
        number = 0
        try:
            while data := stream.end.recv(PIECE):
                self._send(stream.site, {"op": DATA, "stream": stream.name, "number": number, "data": data})
                number += 1
        except OSError as error:
            log.info("a connection with %s ended: %s", stream.site, error)
        self._drop(stream)
        if not stream.ended and not self._closed:
            try:
                self._send(stream.site, {"op": CLOSE, "stream": stream.name})
            except OSError:
                log.info("%s did not hear that a connection ended", stream.site)

    def _drop(self, stream: _Stream) -> None:
        with self._guard:
            self._streams.pop((stream.site, stream.name), None)
        with contextlib.suppress(OSError):  # the other end is gone already
            stream.end.shutdown(socket.SHUT_RDWR)
        stream.end.close()
