"""What two members tell each other before the first frame, and the sentence when it does not fit.

Both sides send a `Hello` and each compares the two by itself, so both print what differs, with both values.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from coterie.errors import CoterieError, RosterError, TransportError
from coterie.federation.wire.frame import PROTOCOL_VERSION
from coterie.federation.wire.transport import Lane

MAX_HELLO_BYTES = 4096


@dataclass(frozen=True)
class Hello:
    """The first message on a stream.

    Args:
        sender, receiver: names in the roster.
        lane: what the stream is for.
        run: name of the run.
        roster: content hash of the sender's roster.
        process: random name of the sender's process: two processes with one kit differ in it alone.
    """

    sender: str
    receiver: str
    lane: int
    federation: str
    membership_epoch: int
    roster: str
    run: str
    protocol: int = PROTOCOL_VERSION
    process: str = ""

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()


def decode_hello(raw: bytes, peer: str) -> Hello:
    """Read the first message of ``peer``.

    Raises:
        TransportError: ``handshake-damaged``. A later protocol may have more fields: they are ignored, so that the
            version can still be compared.
    """
    try:
        if len(raw) > MAX_HELLO_BYTES:
            raise ValueError("too long")
        values = json.loads(raw.decode())
        lane, epoch, protocol = (values[name] for name in ("lane", "membership_epoch", "protocol"))
        if not all(type(number) is int and 0 <= number < 2**32 for number in (lane, epoch, protocol)):
            raise ValueError("not a number")
        text = {name: values[name] for name in ("sender", "receiver", "federation", "roster", "run")}
        text["process"] = values.get("process", "")
        if not all(isinstance(value, str) and value.isprintable() for value in text.values()):
            raise ValueError("not text")
        return Hello(**text, lane=lane, membership_epoch=epoch, protocol=protocol)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise TransportError(
            f"{peer} did not introduce itself in a way this version understands.",
            code="handshake-damaged",
            fix="run the same version of coterie everywhere",
        ) from None


def compare(ours: Hello, theirs: Hello, peer: str) -> CoterieError | None:
    """The reason why two members cannot talk, or None. ``peer`` is who the certificate says it is."""
    where = f"handshake with {peer}, lane {Lane(ours.lane).name.lower()}; no data was sent"
    if theirs.protocol != ours.protocol:
        return TransportError(
            f"{peer} speaks protocol version {theirs.protocol}, we speak {ours.protocol}.",
            code="handshake-protocol",
            where=where,
            fix="install the same coterie version on both sides",
        )
    if theirs.sender != peer or theirs.receiver != ours.sender:
        return TransportError(
            f"{peer} introduced itself as {theirs.sender} to {theirs.receiver}; we are {ours.sender}.",
            code="handshake-name",
            where=where,
            fix="check the endpoints in the roster",
        )
    if theirs.lane != ours.lane:
        return TransportError(
            f"{peer} answered on another lane.",
            code="handshake-lane",
            fix="run the same version of coterie everywhere",
            where=where,
        )
    if (theirs.federation, theirs.membership_epoch) != (ours.federation, ours.membership_epoch):
        return TransportError(
            f"{peer} is in {theirs.federation}, membership epoch {theirs.membership_epoch}; "
            f"we are in {ours.federation}, membership epoch {ours.membership_epoch}.",
            code="handshake-epoch",
            where=where,
            why="under another membership other parties take part and host other experts",
            fix="install the newest signed roster on both sides and start again",
        )
    if theirs.roster != ours.roster:
        return RosterError(
            f"{peer} has roster v{theirs.membership_epoch} ({theirs.roster[:4]}..), "
            f"we have v{ours.membership_epoch} ({ours.roster[:4]}..).",
            code="roster-mismatch",
            where=where,
            why="the two sides disagree on who takes part or who hosts which expert",
            fix="compare `coterie roster show` on both sides; install the roster that all signed",
        )
    if theirs.run != ours.run:
        return TransportError(
            f"{peer} is in run `{theirs.run}`, we are in run `{ours.run}`.",
            code="handshake-run",
            where=where,
            why="gradients of one run must not reach the experts of another",
            fix="start all parties of one run with the same run name",
        )
    return None


def twin(peer: str, me: str) -> TransportError:
    """Why a second process with one kit is turned away while the first one is alive."""
    return TransportError(
        f"another process with {peer}'s kit is connected to {me} and alive.",
        code="identity-in-use",
        where=f"handshake with {peer}; no data was sent",
        why="two processes of one member would undo each other's rounds",
        fix=f"end one of the two; a restart of {peer} is let in as soon as the old process is gone or silent",
    )
