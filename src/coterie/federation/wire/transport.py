"""The narrow interface between coterie and the wire: messages, lanes, counters, remote errors.

Two implementations, `in_process.InProcessHub` and `grpc_transport.GrpcTransport`, pass the same tests
(``tests/contracts/test_transport.py``). Callers use nothing but what stands here.

Rules every implementation keeps:

- Requests of one peer on one lane are handled one at a time, in the order they were sent. Different peers
  and different lanes are handled at the same time. So a handler that waits holds up only that peer on
  that lane.
- When `request_async` or `send` returns, the tensors of the message were copied and may be written again.
- At most `window` requests per peer and lane are unanswered; the next one waits for room until its deadline.
- An error raised by the other side's handler arrives as the same class and code. Its text does not cross.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Protocol

from torch import Tensor

from coterie import errors
from coterie.errors import CoterieError, TransportError
from coterie.federation.cancel import NEVER, CancelToken


class Lane(IntEnum):
    """Independent streams between two parties; large tensors on one do not delay another."""

    CONTROL = 0
    FORWARD = 1
    BACKWARD = 2


ACK, ERROR, HEARTBEAT, TWIN = "ack", "error", "heartbeat", "same-kit"
"""Kinds between transports; see `coterie.federation.wire.messages`."""


@dataclass(frozen=True, kw_only=True)
class Address:
    """What a message is about. A number that its kind does not use is 0; `messages.TABLE` says which it uses.

    Attributes:
        round: a round's number, from 1: the one ``attempt`` is a try at; where that is 0 the last one done, 0 before
            the first (u64).
        attempt: one try at that round, from 1 and never used again; 0: the round is done, and its model is evaluated
            or saved (u32).
        micro_batch: unit in flight within the round, from 0 (u32).
        layer: ordinal of the MoE layer, from 0 (u32).
        call: which experts call of that layer in the micro-batch, from 0; in an evaluation
            it counts on over all batches (u64).
        part: number of a host's share of a layer, see `parts.Part` (u32).
        chunk: which piece of a part's bytes, from 0 (u32).
    """

    round: int = 0
    attempt: int = 0
    micro_batch: int = 0
    layer: int = 0
    call: int = 0
    part: int = 0
    chunk: int = 0

    def __str__(self) -> str:
        """For people: the round, and the other numbers that are not 0."""
        named = {name: number for name, number in vars(self).items() if number or name == "round"}
        return ", ".join(f"{name.replace('_', '-')} {number}" for name, number in named.items())


@dataclass(frozen=True)
class Message:
    """What crosses the wire.

    Args:
        kind: what this is, e.g. ``dispatch``; 1 to 24 characters out of ``a-z 0-9 _ . -``.
        address: what it is about.
        body: a small JSON object, at most 64 KiB encoded. Never text of records, losses or norms.
        tensors: float32, bfloat16, float16, float64, int64, int32, uint8 or bool, any device, rank <= 8.
            On arrival: writable CPU tensors that share one buffer (clone a small one to let the rest go).
    """

    kind: str
    address: Address = Address()
    body: Mapping[str, Any] = field(default_factory=dict)
    tensors: tuple[Tensor, ...] = ()

    def reply(self, kind: str, body: Mapping[str, Any] | None = None, tensors: tuple[Tensor, ...] = ()) -> Message:
        """An answer to this request: about the same."""
        return Message(kind, self.address, body or {}, tensors)


Handler = Callable[[str, Lane, Message], Message | None]
"""Called as ``handler(peer, lane, message)`` on a worker thread; what it returns is the reply."""


@dataclass(frozen=True)
class LaneCounters:
    """Bytes and messages between this party and one peer on one lane.

    Payload is everything handed to the wire (headers, replies, acknowledgements, heartbeats); tensor bytes are
    the raw contents of the tensors in it. TLS and HTTP/2 add their own framing below, which is not counted.
    """

    payload_bytes_sent: int = 0
    payload_bytes_received: int = 0
    tensor_bytes_sent: int = 0
    tensor_bytes_received: int = 0
    messages_sent: int = 0
    messages_received: int = 0

    def __add__(self, other: LaneCounters) -> LaneCounters:
        return LaneCounters(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class Counters:
    """A snapshot of all lanes; `total()` adds them up."""

    lanes: Mapping[tuple[str, Lane], LaneCounters]

    def total(self, peer: str | None = None, lane: Lane | None = None) -> LaneCounters:
        """The sum over all lanes that fit ``peer`` and ``lane``; None means every one."""
        total = LaneCounters()
        for (name, number), counters in self.lanes.items():
            if peer in (None, name) and lane in (None, number):
                total += counters
        return total


class Transport(Protocol):
    """Messages between the parties of one roster, in one run, under one membership epoch."""

    @property
    def me(self) -> str:
        """This party's name."""
        ...

    @property
    def peers(self) -> tuple[str, ...]:
        """Everybody else in roster order."""
        ...

    def start(self, handler: Handler) -> None:
        """Accept and open connections from now on; returns at once."""
        ...

    def connect(self, deadline_s: float, peers: Collection[str] | None = None, cancel: CancelToken = NEVER) -> None:
        """Wait until all (or the named) peers are connected.

        Args:
            deadline_s: seconds until it fails.
            peers: names; default: all of them.
            cancel: asked several times a second; once it is cancelled, the wait ends without an error.

        Raises:
            DeadlineError: names who is missing and what was last seen of them.
        """
        ...

    def connected(self) -> frozenset[str]:
        """Peers with all their lanes open now."""
        ...

    def request(self, peer: str, lane: Lane, message: Message, deadline_s: float) -> Message:
        """Send and wait for the reply.

        Raises:
            DeadlineError: no reply within ``deadline_s`` seconds.
            TransportError: not connected, or the connection broke before the reply came. Whether the other side
                handled the request is then unknown; sending again is the caller's decision.
            FrameError: the message breaks a limit (size, dtype, body).
            CoterieError: the other side's handler raised it; same class and code.
        """
        ...

    def request_async(self, peer: str, lane: Lane, message: Message, deadline_s: float) -> Future[Message]:
        """Send, and give a future of the reply that fails as `request` raises.

        Blocks while more than ``window`` requests are unanswered. A callback added to the future runs on a reader
        thread and must neither compute nor send.
        """
        ...

    def send(self, peer: str, lane: Lane, message: Message) -> None:
        """Send without a reply. Blocks while the queue is full; raises as `request_async` does.

        An error on the other side is logged there and here, and raised nowhere.
        """
        ...

    def counters(self) -> Counters:
        """Bytes and messages per peer and lane since this object was made."""
        ...

    def close(self) -> None:
        """End all connections; unanswered requests fail with TransportError. Can be called twice."""
        ...


# ---- errors across the wire --------------------------------------------------------------------------------------

_CODE = re.compile(r"[a-z0-9-]{1,64}")
_FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,63}")
_CLASSES: Mapping[str, type[CoterieError]] = {
    name: value for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, CoterieError)
}
_UNKNOWN_FAILURE = "remote-failure"


def error_message(error: BaseException, request: Message) -> Message:
    """The reply that tells a peer its request failed: class, code, step and field name, and nothing else.

    Anything that is not a `CoterieError` is a bug of ours and becomes ``remote-failure`` without its class name: the
    text of a Python exception may quote the data it choked on.
    """
    name, code, field = "TransportError", _UNKNOWN_FAILURE, None
    if isinstance(error, CoterieError):
        known = next((c for c in type(error).__mro__ if _CLASSES.get(c.__name__) is c), TransportError)
        name = known.__name__
        code = error.code if _CODE.fullmatch(error.code) else known.code
        field = error.field if error.field is not None and _FIELD.fullmatch(error.field) else None
    body = {"error": name, "code": code, "step": request.kind, "field": field}
    return request.reply(ERROR, body)


def remote_error(peer: str, lane: Lane, reply: Message) -> CoterieError:
    """The exception to raise here for an error reply of ``peer``; an unknown class becomes TransportError."""

    def text(key: str, pattern: re.Pattern[str]) -> str | None:
        value = reply.body.get(key)
        return value if isinstance(value, str) and pattern.fullmatch(value) else None

    kind = _CLASSES.get(str(reply.body.get("error")), TransportError)
    code = text("code", _CODE) or _UNKNOWN_FAILURE
    step = text("step", re.compile(r"[a-z0-9_.-]{1,24}")) or "a request"
    named = text("field", _FIELD)
    about = f", field `{named}`" if named else ""
    return kind(
        f"{peer} answered `{step}` with error `{code}`{about}.",
        code=code,
        where=f"{peer}, lane {lane.name.lower()}, {reply.address}",
        fix=f"the full reason is in {peer}'s own log; only the code may cross between parties",
        field=named,
    )
