"""Every message that members send each other: one table, and the check that what came is a row of it.

A handler checks a request here before it touches anything; `Gate` checks replies. What depends on the model (which
experts are hosted, how large a part is) is checked where it is known. docs/reference/wire.md shows the table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from coterie.errors import MessageError
from coterie.federation.identity.certificates import COORDINATOR
from coterie.federation.wire.frame import ADDRESS
from coterie.federation.wire.transport import ACK, ERROR, HEARTBEAT, TWIN, Lane, Message

LARGEST = 2**53
"""Of any whole number in a body."""

Role = Literal["party", "coordinator"]


@dataclass(frozen=True)
class Value:
    """What one entry of a body may be.

    Attributes:
        words: for people.
        fits: whether a value read from JSON is one.
    """

    words: str
    fits: Callable[[object], bool]


def _is_whole(value: object) -> bool:
    return type(value) is int and 0 <= value <= LARGEST


def _is_weight(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value <= LARGEST  # type: ignore[operator]  # NaN is not


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _is_hex(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"([0-9a-f]{2}){1,128}", value) is not None


def _are_names(value: object) -> bool:
    return (
        isinstance(value, list)
        and all(isinstance(name, str) and re.fullmatch(r"[a-z][a-z0-9_-]{0,31}", name) for name in value)
        and len(set(value)) == len(value)
    )


def _are_indices(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_whole, value)) and len(set(value)) == len(value)


FLAG = Value("true or false", lambda value: type(value) is bool)
WHOLE = Value("whole number, at most 2^53", _is_whole)
WEIGHT = Value("number, at most 2^53", _is_weight)
HASH = Value("64 of 0-9 a-f", _is_hash)
HEX = Value("at most 256 of 0-9 a-f", _is_hex)
NAMES = Value("list of different names", _are_names)
INDICES = Value("list of different whole numbers", _are_indices)

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BYTES = (torch.uint8,)


@dataclass(frozen=True)
class TensorRule:
    """One tensor of a message: its name, what it may hold, and one letter for each axis; a letter stands for the same
    extent all over a message."""

    name: str
    dtypes: tuple[torch.dtype, ...]
    axes: str
    optional: bool = False


@dataclass(frozen=True)
class Form:
    """What a message of one kind holds.

    Attributes:
        body: its entries, all of them required and no others; None: checked by `directives.decode`.
    """

    kind: str
    body: Mapping[str, Value] | None = None
    tensors: tuple[TensorRule, ...] = ()


@dataclass(frozen=True)
class Row:
    """One request, who may send it to whom, and what may answer it.

    Attributes:
        topic: the exchange it belongs to, or ``rounds``.
        numbers: the numbers of the address that it uses; the others are 0. A reply has those of its request.
    """

    topic: Literal["tokens", "experts", "rounds"]
    lane: Lane
    sender: Role
    receiver: Role
    request: Form
    replies: tuple[Form, ...]
    numbers: tuple[str, ...] = ()


TRANSPORT: Mapping[str, str] = {
    ACK: "the reply where a handler has nothing to say, and to a message that is one-way",
    ERROR: "the reply of a handler that failed: `error` (its class), `code`, `step` (what was asked), `field`",
    HEARTBEAT: "an empty frame of type heartbeat, where nothing else was sent for a while",
    TWIN: "one-way: a second process with the receiver's kit tried to connect and was turned away",
}
"""Kinds between transports, which no handler sees."""

_ATTEMPT = ("round", "attempt")
_CALL = (*_ATTEMPT, "micro_batch", "layer", "call")
_PART = (*_ATTEMPT, "part")
_CHUNK = (*_PART, "chunk")


def _between_parties(
    topic: Literal["tokens", "experts"], lane: Lane, numbers: tuple[str, ...], request: Form, reply: Form
) -> Row:
    return Row(topic, lane, "party", "party", request, (reply,), numbers)


TABLE = (
    _between_parties(
        "tokens",
        Lane.FORWARD,
        _CALL,
        Form(
            "dispatch",
            {"keep": FLAG},
            (
                TensorRule("hidden", FLOATS, "MD"),
                TensorRule("counts", BYTES, "M"),
                TensorRule("ids", (torch.uint8, torch.int32), "P"),
                TensorRule("weights", FLOATS, "P", optional=True),
            ),
        ),
        Form("outputs", {}, (TensorRule("outputs", FLOATS, "RO"),)),
    ),
    _between_parties(
        "tokens",
        Lane.BACKWARD,
        _CALL,
        Form("gradient", {}, (TensorRule("at outputs", FLOATS, "RO"),)),
        Form(
            "gradients",
            {},
            (TensorRule("at hidden", FLOATS, "MD"), TensorRule("at weights", FLOATS, "P", optional=True)),
        ),
    ),
    _between_parties("tokens", Lane.BACKWARD, _ATTEMPT, Form("tokens", {"count": WHOLE}), Form("counted", {})),
    _between_parties(
        "experts",
        Lane.FORWARD,
        _PART,
        Form("weights-offer", {}),
        Form("weights-offer", {"digest": HASH, "size": WHOLE, "received": WHOLE}),
    ),
    _between_parties(
        "experts",
        Lane.FORWARD,
        _CHUNK,
        Form("weights-chunk", {}),
        Form("weights-chunk", {}, (TensorRule("bytes", BYTES, "S"),)),
    ),
    _between_parties(
        "experts",
        Lane.CONTROL,
        _ATTEMPT,
        Form("declare", {"contributes": FLAG, "weight": WEIGHT}),
        Form("declare", {}),
    ),
    _between_parties(
        "experts",
        Lane.CONTROL,
        _ATTEMPT,
        Form(
            "mask-opening",
            {"nonce": HASH, "serial": WHOLE, "grid": HASH, "can_draw": FLAG, "draw": HASH, "drawn_by": NAMES},
        ),
        Form("mask-opening", {}),
    ),
    _between_parties(
        "experts",
        Lane.CONTROL,
        _ATTEMPT,
        Form("mask-key", {"key": HASH, "signature": HEX}),
        Form("mask-key", {}),
    ),
    _between_parties(
        "experts",
        Lane.CONTROL,
        _ATTEMPT,
        Form("mask-digest", {"session": HASH, "digest": HASH}),
        Form("mask-digest", {}),
    ),
    _between_parties(
        "experts",
        Lane.BACKWARD,
        _PART,
        Form("push-begin", {"digest": HASH, "size": WHOLE, "weights": HASH}),
        Form("push-begin", {"missing": INDICES}),
    ),
    _between_parties(
        "experts",
        Lane.BACKWARD,
        _CHUNK,
        Form("push-chunk", {}, (TensorRule("bytes", BYTES, "S"),)),
        Form("push-chunk", {}),
    ),
    _between_parties("experts", Lane.BACKWARD, _PART, Form("push-end", {}), Form("push-end", {})),
    Row("rounds", Lane.CONTROL, "party", "coordinator", Form("report"), (Form("directive"), Form("refused"))),
    Row("rounds", Lane.CONTROL, "coordinator", "party", Form("directive"), ()),
)


def kinds(topic: str) -> frozenset[str]:
    """The requests of one exchange, or of the rounds."""
    return frozenset(row.request.kind for row in TABLE if row.topic == topic)


def role_of(member: str) -> Role:
    """The roster gives every member one role, and the coordinator its name."""
    return "coordinator" if member == COORDINATOR else "party"


def check_request(
    topic: str,
    me: str,
    peer: str,
    lane: Lane,
    message: Message,
    *,
    most: Mapping[str, int] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Row:
    """Make sure that a request is one that ``peer`` may send here.

    Args:
        topic: the exchange that was agreed on, or ``rounds``.
        me: this member's name.
        peer: who sent it, by its certificate.
        lane: where it arrived.
        message: the request.
        most: highest value of numbers of the address, from what was signed; the others are as wide as the header.
        sizes: extent of axes by letter.

    Raises:
        MessageError: ``message-unfit`` with the first field that does not fit.
    """
    for row in TABLE:
        if row.request.kind == message.kind and row.topic == topic and row.receiver == role_of(me):
            break
    else:
        raise unfit(peer, message.kind, "kind", f"is not one that {me} answers in this federation")
    if role_of(peer) != row.sender:
        raise unfit(peer, message.kind, "sender", f"may be sent by a {row.sender} alone")
    if lane != row.lane:
        raise unfit(peer, message.kind, "lane", f"came on lane {lane.name.lower()}")
    for name in ADDRESS:
        number = getattr(message.address, name)
        if name not in row.numbers and number != 0:
            raise unfit(peer, message.kind, name, f"is {number}; this message has none")
        if most is not None and name in most and number > most[name]:
            raise unfit(peer, message.kind, name, f"is {number}; {most[name]} was agreed")
    check_form(row.request, peer, message, dict(sizes or {}))
    return row


def check_reply(row: Row, peer: str, request: Message, reply: Message) -> None:
    """Make sure that a reply is one that may follow a request of ours.

    Raises:
        MessageError: ``message-unfit`` with the first field that does not fit.
    """
    for form in row.replies:
        if form.kind == reply.kind:
            break
    else:
        raise unfit(peer, request.kind, "kind", f"was answered with `{reply.kind}`")
    for name in ADDRESS:
        if getattr(reply.address, name) != getattr(request.address, name):
            raise unfit(peer, reply.kind, name, f"answers another {name}")
    check_form(form, peer, reply, {})


def row_of(request: Message, me: str, peer: str) -> Row | None:
    """The row of a request of ours; None if the table has none (then any reply will do)."""
    for row in TABLE:
        if (row.request.kind, row.sender, row.receiver) == (request.kind, role_of(me), role_of(peer)):
            return row
    return None


def check_form(form: Form, peer: str, message: Message, sizes: dict[str, int]) -> None:
    """Make sure that body and tensors are those of a form.

    Args:
        form: of the message's kind.
        peer: who sent it.
        message: what came.
        sizes: extent of axes by letter; those of the message are added.

    Raises:
        MessageError: ``message-unfit`` with the first field that does not fit.
    """
    if form.body is not None:
        if message.body.keys() != form.body.keys():
            raise unfit(peer, form.kind, "body", f"must have exactly these entries: {', '.join(form.body) or 'none'}")
        for name, value in form.body.items():
            if not value.fits(message.body[name]):
                raise unfit(peer, form.kind, name, f"is not: {value.words}")
    least = sum(not rule.optional for rule in form.tensors)
    if not least <= len(message.tensors) <= len(form.tensors):
        raise unfit(peer, form.kind, "tensors", f"brings {len(message.tensors)} tensors")
    for rule, tensor in zip(form.tensors, message.tensors, strict=False):
        if tensor.dtype not in rule.dtypes or tensor.dim() != len(rule.axes):
            raise unfit(peer, form.kind, rule.name.replace(" ", "_"), f"is {tensor.dtype} with {tensor.dim()} axes")
        for axis, extent in zip(rule.axes, tensor.shape, strict=True):
            if sizes.setdefault(axis, extent) != extent:
                raise unfit(
                    peer, form.kind, rule.name.replace(" ", "_"), f"has {extent} where {sizes[axis]} was agreed"
                )


def unfit(peer: str, kind: str, field: str, problem: str) -> MessageError:
    """The refusal of a message that is no row of the table."""
    return MessageError(
        f"{peer} sent a message that does not fit: `{kind}`, {field.replace('_', ' ')} {problem}.",
        code="message-unfit",
        why="what was not agreed on is neither stored nor computed with",
        fix="see that both sides run the same version of coterie with the same signed settings",
        field=field,
        peer=peer,
    )
