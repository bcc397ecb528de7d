"""A transcript is somebody else's: whatever stands in it, reading it ends in values or in one clear error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from coterie.audit.experts.pushes import by_round, served
from coterie.audit.tokens.rows import table
from coterie.audit.transcript import Transcript
from coterie.errors import CheckpointError, CoterieError
from coterie.federation.experts.parts import digest_of
from coterie.federation.wire.frame import FrameType
from coterie.federation.wire.frame_log import FrameLog
from coterie.federation.wire.transport import Address, Lane, Message

Sent = tuple[FrameType, Message]
AT = Address(round=1, attempt=1)
REQUEST, REPLY = FrameType.REQUEST, FrameType.REPLY
HEAD: dict[str, Any] = {
    "kind": "transcript", "party": "birch", "run": "r1", "agreement": "a1", "federation": "grove",
    "parties": ["alder", "birch"], "exchange": "tokens", "placement": [[0, 1, 1]], "parts": [], "rounds": None,
    "push_dtype": "float32", "weights_dtype": "bfloat16",
}  # fmt: skip
PARTS = [
    {"number": 0, "host": "alder", "layer": -1, "experts": [], "shapes": [["norm", [3]]], "trained": True},
    {"number": 1, "host": "birch", "layer": 0, "experts": [1, 2], "shapes": [["up", [2, 4]]], "trained": True},
]
HOSTILE: tuple[Any, ...] = (None, -1, 10**30, 0.5, "x", [], {}, [[10**9]], [{}], [["a"]], True)


def bytes_of(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)


def of_tokens() -> list[Sent]:
    rows = (torch.arange(12.0).view(3, 4), bytes_of(1, 2, 1), bytes_of(1, 1, 2, 2), torch.ones(4))
    calls = [replace(AT, call=1), replace(AT, attempt=0)]
    return [
        (REQUEST, Message("dispatch", AT, {"keep": True}, rows)),
        (REQUEST, Message("gradient", AT, {}, (torch.ones(3, 4),))),
        *((REQUEST, Message("dispatch", at, {"keep": False}, rows)) for at in calls),
        (REQUEST, Message("tokens", AT, {"count": 3})),
    ]


def of_experts() -> list[Sent]:
    sums, weights = torch.arange(8.0).view(torch.uint8), torch.ones(3, dtype=torch.bfloat16).view(torch.uint8)
    at = replace(AT, part=1)
    offer = {"digest": digest_of(weights), "size": 6, "received": 6}
    return [
        (REPLY, Message("weights-offer", AT, offer)),
        (REPLY, Message("weights-chunk", AT, {}, (weights,))),
        (REQUEST, Message("declare", AT, {"contributes": True, "weight": 1})),
        (REQUEST, Message("push-begin", at, {"digest": digest_of(sums), "size": 32, "weights": "0" * 64})),
        (REQUEST, Message("push-chunk", at, {}, (sums,))),
        (REQUEST, Message("push-end", at)),
    ]


def written(folder: Path, head: dict[str, Any], sent: list[Sent]) -> Path:
    log = FrameLog(folder, head, ["alder", "birch"], 1 << 20)
    for kind, message in sent:
        log.append("alder", kind, Lane.FORWARD, message)
    log.close()
    return folder


def everything(folder: Path) -> tuple[int, int, int]:
    """All that attacks read: rows, whole sums, parts that were served."""
    found = Transcript.read(folder, "alder")
    if found.exchange == "tokens":
        rows = table({"birch": found.dispatches()}, [len(layer) for layer in found.placement], None)
        return sum(map(len, rows.layers.values())), 0, 0
    pushed, offered = by_round([found]), found.weights(1, 1)
    assert {number for _, parts in served([found]) for number in parts} >= set(offered)
    found.check()
    return 0, sum(map(len, pushed.values())), len(offered)


def heads(head: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for name in sorted(head.keys() - {"kind", "agreement", "federation"}):
        if name != "run":  # nobody can write it
            yield {key: value for key, value in head.items() if key != name}
        for bad in HOSTILE:
            yield head | {name: bad}
    for number, part in enumerate(head["parts"]):
        for name in part:
            for bad in (*HOSTILE, [["up", [2, 10**15]]], [["up", []]], [["up", [2, 4]], ["up", [2, 4]]]):
                others = [*head["parts"]]
                others[number] = part | {name: bad}
                yield head | {"parts": others}


def messages(message: Message) -> Iterator[Message]:
    yield replace(message, kind="hello")
    yield replace(message, body={**message.body, "more": 1})
    for name in message.body:
        yield replace(message, body={key: value for key, value in message.body.items() if key != name})
        for bad in HOSTILE:
            yield replace(message, body={**message.body, name: bad})
    for name, most in (("round", 2**64 - 1), ("layer", 2**32 - 1), ("part", 9), ("chunk", 9), ("call", 2**64 - 1)):
        yield replace(message, address=replace(message.address, **{name: most}))
    for number, tensor in enumerate(message.tensors):
        bent = [
            tensor[:0],
            tensor[:-1],
            tensor.unsqueeze(0),
            tensor.double(),
            tensor.to(torch.int32),
            tensor * 0 + 255,
        ]
        if tensor.is_floating_point():
            bent += [tensor * torch.nan, tensor.double() * 1e300]
        for bad in bent:
            yield replace(message, tensors=(*message.tensors[:number], bad, *message.tensors[number + 1 :]))
        yield replace(message, tensors=message.tensors[:number])


EXCHANGES = {
    "tokens": (HEAD, of_tokens(), (9, 0, 0)),
    "experts": (HEAD | {"exchange": "experts", "parts": PARTS}, of_experts(), (0, 1, 1)),
}


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_whatever_is_changed_it_is_read_or_refused(exchange: str, tmp_path: Path) -> None:
    head, sent, whole = EXCHANGES[exchange]
    assert everything(written(tmp_path / "whole", head, sent)) == whole
    changed = [(bad, sent) for bad in heads(head)]
    for number, (kind, message) in enumerate(sent):
        changed += [(head, [*sent[:number], (kind, bad), *sent[number + 1 :]]) for bad in messages(message)]
        changed += [(head, sent[:number] + sent[number + 1 :])]
    refused = 0
    for number, (bad_head, bad_sent) in enumerate(changed):
        with suppress(CoterieError):
            everything(written(tmp_path / str(number), bad_head, bad_sent))
            continue
        refused += 1
    assert refused > len(changed) // 2


@pytest.mark.parametrize("at", [0, 1])
def test_what_does_not_fit_is_damaged_and_never_makes_room(at: int, tmp_path: Path) -> None:
    huge = [PARTS[0], PARTS[1] | {"shapes": [["up", [2, 2**48]]]}]
    head = HEAD | {"exchange": "experts", "parts": huge}
    begin = Message("push-begin", replace(AT, part=1), {"digest": "0" * 64, "size": 2**51, "weights": "0" * 64})
    wrong = replace(begin, body={**begin.body, "size": 2**50})
    folder = written(tmp_path, head, [(REQUEST, (begin, wrong)[at])])
    if at == 0:
        assert everything(folder) == (0, 0, 0)
    else:
        with pytest.raises(CheckpointError) as caught:
            everything(folder)
        assert caught.value.code == "transcript-damaged"
