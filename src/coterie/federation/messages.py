"""Every message that members send each other: one table, and the check that what came is a line of it.

A handler checks a request here before it touches anything; `Gate` checks replies. What depends on the model (which
experts are hosted, how large a part is) is checked where it is known. docs/reference/messages.md is made from the
table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from coterie.errors import MessageError
from coterie.federation.control import COORDINATOR
from coterie.federation.transport import Lane, Message

NUMBERS = ("round", "attempt", "micro_batch", "layer", "exchange")
"""Header fields that a message can use; one that its line does not name is 0."""

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


def _are_indices(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_whole, value)) and len(set(value)) == len(value)


FLAG = Value("true or false", lambda value: type(value) is bool)
WHOLE = Value("whole number, at most 2^53", _is_whole)
WEIGHT = Value("number, at most 2^53", _is_weight)
HASH = Value("64 of 0-9 a-f", _is_hash)
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
        numbers: the header fields it uses.
        body: its entries, all of them required and no others; None: checked by `control.decode`.
    """

    kind: str
    numbers: tuple[str, ...] = ()
    body: Mapping[str, Value] | None = None
    tensors: tuple[TensorRule, ...] = ()


@dataclass(frozen=True)
class Line:
    """One request, who may send it to whom, and what may answer it.

    Attributes:
        part: the exchange it belongs to, or ``rounds``.
    """

    part: Literal["tokens", "experts", "rounds"]
    lane: Lane
    sender: Role
    receiver: Role
    request: Form
    replies: tuple[Form, ...]


_EXCHANGE = ("round", "attempt", "micro_batch", "layer", "exchange")
_PART = ("round", "layer")


def _between_parties(part: Literal["tokens", "experts"], lane: Lane, request: Form, reply: Form) -> Line:
    return Line(part, lane, "party", "party", request, (reply,))


TABLE = (
    _between_parties(
        "tokens",
        Lane.FORWARD,
        Form(
            "dispatch",
            _EXCHANGE,
            {"keep": FLAG},
            (
                TensorRule("hidden", FLOATS, "MD"),
                TensorRule("counts", BYTES, "M"),
                TensorRule("ids", (torch.uint8, torch.int32), "P"),
                TensorRule("weights", FLOATS, "P", optional=True),
            ),
        ),
        Form("outputs", _EXCHANGE, {}, (TensorRule("outputs", FLOATS, "RO"),)),
    ),
    _between_parties(
        "tokens",
        Lane.BACKWARD,
        Form("gradient", _EXCHANGE, {}, (TensorRule("at outputs", FLOATS, "RO"),)),
        Form(
            "gradients",
            _EXCHANGE,
            {},
            (TensorRule("at hidden", FLOATS, "MD"), TensorRule("at weights", FLOATS, "P", optional=True)),
        ),
    ),
    _between_parties(
        "tokens",
        Lane.BACKWARD,
        Form("tokens", ("round", "attempt"), {"count": WHOLE}),
        Form("counted", ("round", "attempt"), {}),
    ),
    _between_parties(
        "experts",
        Lane.FORWARD,
        Form("weights-offer", _PART, {}),
        Form("weights-offer", _PART, {"digest": HASH, "size": WHOLE, "received": WHOLE}),
    ),
    _between_parties(
        "experts",
        Lane.FORWARD,
        Form("weights-chunk", _PART, {"start": WHOLE, "end": WHOLE}),
        Form("weights-chunk", _PART, {}, (TensorRule("bytes", BYTES, "S"),)),
    ),
    _between_parties(
        "experts",
        Lane.CONTROL,
        Form("declare", ("round",), {"contributes": FLAG, "weight": WEIGHT}),
        Form("declare", ("round",), {}),
    ),
    _between_parties(
        "experts",
        Lane.BACKWARD,
        Form("push-begin", _PART, {"digest": HASH, "size": WHOLE, "weights": HASH}),
        Form("push-begin", _PART, {"missing": INDICES}),
    ),
    _between_parties(
        "experts",
        Lane.BACKWARD,
        Form("push-chunk", (*_PART, "exchange"), {}, (TensorRule("bytes", BYTES, "S"),)),
        Form("push-chunk", (*_PART, "exchange"), {}),
    ),
    _between_parties("experts", Lane.BACKWARD, Form("push-end", _PART, {}), Form("push-end", _PART, {})),
    Line("rounds", Lane.CONTROL, "party", "coordinator", Form("report"), (Form("directive"), Form("refused"))),
    Line("rounds", Lane.CONTROL, "coordinator", "party", Form("directive"), ()),
)


def kinds(part: str) -> frozenset[str]:
    """The requests of one exchange, or of the rounds."""
    return frozenset(line.request.kind for line in TABLE if line.part == part)


def role_of(member: str) -> Role:
    """The roster gives every member one role, and the coordinator its name."""
    return "coordinator" if member == COORDINATOR else "party"


def check_request(
    part: str,
    me: str,
    peer: str,
    lane: Lane,
    message: Message,
    *,
    most: Mapping[str, int] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Line:
    """Make sure that a request is one that ``peer`` may send here.

    Args:
        part: the exchange that was agreed on, or ``rounds``.
        most: highest value of header fields, from what was signed; the others are as wide as the header.
        sizes: extent of axes by letter.

    Raises:
        MessageError: ``message-unfit`` with the first field that does not fit.
    """
    for line in TABLE:
        if line.request.kind == message.kind and line.part == part and line.receiver == role_of(me):
            break
    else:
        raise unfit(peer, message.kind, "kind", f"is not one that {me} answers in this federation")
    if role_of(peer) != line.sender:
        raise unfit(peer, message.kind, "sender", f"may be sent by a {line.sender} alone")
    if lane != line.lane:
        raise unfit(peer, message.kind, "lane", f"came on lane {lane.name.lower()}")
    for name, highest in (most or {}).items():
        if getattr(message, name) > highest:
            raise unfit(peer, message.kind, name, f"is {getattr(message, name)}; {highest} was agreed")
    _check_form(line.request, peer, message, dict(sizes or {}))
    return line


def check_reply(line: Line, peer: str, request: Message, reply: Message) -> None:
    """Make sure that a reply is one that may follow a request of ours.

    Raises:
        MessageError: ``message-unfit`` with the first field that does not fit.
    """
    for form in line.replies:
        if form.kind == reply.kind:
            break
    else:
        raise unfit(peer, request.kind, "kind", f"was answered with `{reply.kind}`")
    for name in form.numbers:
        if getattr(reply, name) != getattr(request, name):
            raise unfit(peer, reply.kind, name, f"answers another {name}")
    _check_form(form, peer, reply, {})


def line_of(request: Message, me: str, peer: str) -> Line | None:
    """The line of a request of ours; None if the table has none (then any reply will do)."""
    for line in TABLE:
        if (line.request.kind, line.sender, line.receiver) == (request.kind, role_of(me), role_of(peer)):
            return line
    return None


def _check_form(form: Form, peer: str, message: Message, sizes: dict[str, int]) -> None:
    for name in NUMBERS:
        if name not in form.numbers and getattr(message, name) != 0:
            raise unfit(peer, form.kind, name, f"has a {name}")
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


def answer(
    request: Message, kind: str, body: Mapping[str, object] | None = None, tensors: tuple[torch.Tensor, ...] = ()
) -> Message:
    """A reply with the numbers of its request."""
    return replace(request, kind=kind, body=body or {}, tensors=tensors)


def unfit(peer: str, kind: str, field: str, problem: str) -> MessageError:
    """The refusal of a message that is no line of the table."""
    return MessageError(
        f"{peer} sent a message that does not fit: `{kind}`, {field.replace('_', ' ')} {problem}.",
        code="message-unfit",
        why="what was not agreed on is neither stored nor computed with",
        fix="see that both sides run the same version of coterie with the same signed settings",
        field=field,
        peer=peer,
    )
