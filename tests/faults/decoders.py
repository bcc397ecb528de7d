"""Everything that reads a peer's bytes, as functions of bytes; and something valid for each.

The first byte of an input picks the decoder. Each gives a value or raises an error of coterie; anything else is a
finding. Fuzzed by `fuzz_decoders`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable

import torch

from coterie.errors import CoterieError
from coterie.federation.identity import certificates, roster
from coterie.federation.rounds import directives
from coterie.federation.rounds.state import PartyReport, State
from coterie.federation.wire import handshake
from coterie.federation.wire.frame import FrameReader, FrameScope, FrameType, encode
from coterie.federation.wire.transport import Address, Lane, Message, remote_error

SCOPE = FrameScope(b"r" * 16, 1)


def read_frames(raw: bytes) -> None:
    """One chunk, or two cut in the middle."""
    FrameReader(SCOPE, Lane.FORWARD, 1 << 20).feed(raw)
    reader, half = FrameReader(SCOPE, Lane.FORWARD, 1 << 20), len(raw) // 2
    reader.feed(raw[:half])
    reader.feed(raw[half:])


def read_body(
    kind: type[directives.Call] | type[directives.Directive] | type[directives.Refusal], name: str
) -> Callable:
    def read(raw: bytes) -> None:
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError):
            return
        if isinstance(body, dict):
            directives.decode(Message(name, body=body), kind, "birch")

    return read


def read_error(raw: bytes) -> None:
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        return
    if isinstance(body, dict):
        str(remote_error("birch", Lane.CONTROL, Message("error", body=body)))


DECODERS: tuple[Callable[[bytes], object], ...] = (
    read_frames,
    read_frames,
    lambda raw: handshake.decode_hello(raw, "birch"),
    read_body(directives.Call, "report"),
    read_body(directives.Directive, "directive"),
    read_body(directives.Refusal, "refused"),
    read_error,
    roster.from_json,
    lambda raw: certificates.parse_certificate(raw, "a certificate", "here"),
)


def one_input(data: bytes) -> None:
    if not data:
        return
    with contextlib.suppress(CoterieError):
        DECODERS[data[0] % len(DECODERS)](data[1:])


def seeds() -> list[bytes]:
    """Something valid for every decoder."""
    address = Address(round=3, attempt=1, micro_batch=2, layer=1, call=7)
    message = Message("push", address, {"a": [1]}, (torch.zeros(3, 2), torch.ones(1, dtype=torch.int64)))
    frames = [b"".join(encode(SCOPE, frame_type, Lane.FORWARD, 9, message).chunks()) for frame_type in FrameType]
    hello = handshake.Hello("birch", "alder", 1, "demo", 1, "a" * 64, "b" * 16).encode()
    bodies = [
        directives.encode(body).body
        for body in (
            directives.Call(PartyReport("a1"), "a" * 64),
            directives.Directive("00", State(), 2, ("alder",)),
            directives.Refusal("roster-stranger"),
        )
    ]
    text = [json.dumps(body).encode() for body in (*bodies, {"error": "DataError", "code": "data", "step": "push"})]
    members = certificates.Member("alder", certificates.Role.PARTY, "127.0.0.1:1")
    authority = certificates.new_authority("demo")
    certificate = certificates.cert_pem(authority.issue(members, certificates.new_key().public_key()))
    written = json.dumps({"roster": {}, "content_hash": "a" * 64, "signatures": {}}).encode()
    found = [bytes([0]) + frame for frame in frames]
    return found + [bytes([2 + i]) + each for i, each in enumerate((hello, *text, written, certificate))]
