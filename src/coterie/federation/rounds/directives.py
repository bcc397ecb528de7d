"""Reports, directives and refusals: what control messages between parties and coordinator carry, as checked JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from coterie.errors import MessageError
from coterie.federation.rounds.state import Code, Complaint, Count, Name, PartyReport, Saved, State, Strict, Token
from coterie.federation.wire.transport import Message


@dataclass(frozen=True)
class Call(Strict):
    """Party to coordinator: a heartbeat with everything the party reports.

    Attributes:
        agreement: hash of the signed agreement the party works under.
        run: the run it has been in, empty for a party that is new to it.
    """

    report: PartyReport
    agreement: Token
    run: Token = ""


@dataclass(frozen=True)
class Directive(Strict):
    """Coordinator to party: the newest state. Sent when it changes, and as the answer to every call.

    Attributes:
        run: random name of the run; checkpoints carry it.
        newest: rounds behind the newest published checkpoint; older ones may be removed.
        missing: who is being waited for.
        cut: pairs of parties that have no connection to each other.
    """

    run: Token
    state: State
    newest: Count = 0
    missing: tuple[Name, ...] = ()
    cut: tuple[tuple[Name, Name], ...] = ()


@dataclass(frozen=True)
class Refusal(Strict):
    """Coordinator to party: you cannot take part. Codes and hashes only."""

    code: Code
    here: Token = ""


_Body = TypeVar("_Body", Call, Directive, Refusal)
_KINDS: Mapping[type, tuple[str, TypeAdapter[Any]]] = {
    Call: ("report", TypeAdapter(Call)),
    Directive: ("directive", TypeAdapter(Directive)),
    Refusal: ("refused", TypeAdapter(Refusal)),
}


_BODIES = (Call, Complaint, Directive, Refusal, PartyReport, State, Saved)
_FIELDS = frozenset(field.name for kind in _BODIES for field in fields(kind))


def encode(body: Call | Directive | Refusal) -> Message:
    """The control message for one of the three bodies."""
    kind, adapter = _KINDS[type(body)]
    return Message(kind, body=adapter.dump_python(body, mode="json"))


def is_kind(message: Message, kind: type) -> bool:
    """Whether a message carries this body."""
    return message.kind == _KINDS[kind][0]


def decode(message: Message, kind: type[_Body], peer: str) -> _Body:
    """The body of a control message that ``peer`` sent.

    Raises:
        MessageError: another kind of message, or a field that does not fit; the value is not repeated.
    """
    name, adapter = _KINDS[kind]
    if message.kind != name:
        raise MessageError(f"{peer} sent `{message.kind}` for `{name}`.", code="control-kind", peer=peer)
    try:
        value: _Body = adapter.validate_json(json.dumps(dict(message.body)), strict=True)
    except ValidationError as error:
        # The names of an unknown or nested key are the sender's own words: only ours are repeated.
        field = next((str(part) for part in error.errors()[0]["loc"] if part in _FIELDS), "body")
        raise MessageError(
            f"{peer} sent `{name}` with a bad field `{field}`.", code="control-body", field=field, peer=peer
        ) from None
    return value
