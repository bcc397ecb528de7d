"""A member who means harm: its messages changed in every field, and a transport that does so in a run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from coterie.federation.cancel import NEVER, CancelToken
from coterie.federation.wire.transport import Counters, Handler, Lane, Message, Transport

_BITS = {"round": 64, "attempt": 32, "micro_batch": 32, "layer": 32, "call": 64, "part": 32, "chunk": 32}
_WRONG: tuple[Any, ...] = (
    *(None, True, -1, 0.5, 2**31, 2**53 + 1, 2**63, 10**4000, 1e308, float("inf"), float("nan")),
    *("", "garbage", "x" * 1_000_000, [], [[]], [-1], [0, 0], [2**63], {}, {"keep": True}),
)


def mutations(message: Message) -> Iterator[tuple[str, Message]]:
    """A message changed in one place after the other, each with a few words that name the change."""
    for kind in ("surprise", "dispatch", "tokens", "push-end", "declare", "directive", "report", "error", "ack"):
        if kind != message.kind:
            yield f"kind {kind}", replace(message, kind=kind)
    for name, bits in _BITS.items():
        for value in {1, getattr(message.address, name) + 1, 2**31, 2**bits - 1}:
            yield f"{name} {value}", replace(message, address=replace(message.address, **{name: value}))
    for name in message.body:
        yield f"without {name}", replace(message, body={k: v for k, v in message.body.items() if k != name})
        for value in _WRONG:
            if value != message.body[name] or type(value) is not type(message.body[name]):
                yield (
                    f"{name} {type(value)!s} {repr(value)[:12] if value != 10**4000 else ''}",
                    replace(message, body={**message.body, name: value}),
                )
    yield "one entry more", replace(message, body={**message.body, "more": 1})
    yield from _tensor_mutations(message)


def _tensor_mutations(message: Message) -> Iterator[tuple[str, Message]]:
    tensors = message.tensors
    yield "one tensor more", replace(message, tensors=(*tensors, torch.zeros(1)))
    if not tensors:
        return
    yield "no tensors", replace(message, tensors=())
    yield "tensors twice", replace(message, tensors=tensors + tensors)
    yield "tensors reversed", replace(message, tensors=tensors[::-1] if len(tensors) > 1 else ())
    for index, tensor in enumerate(tensors):

        def put(changed: Tensor, index: int = index) -> Message:
            return replace(message, tensors=(*tensors[:index], changed, *tensors[index + 1 :]))

        yield f"without tensor {index}", replace(message, tensors=tensors[:index] + tensors[index + 1 :])
        for dtype in (torch.int64, torch.bool, torch.float64, torch.uint8):
            if dtype is not tensor.dtype:
                yield f"tensor {index} as {dtype}", put(tensor.to(dtype))
        yield f"tensor {index} empty", put(tensor[:0]) if tensor.dim() and len(tensor) else put(torch.zeros(0, 0, 0))
        yield f"tensor {index} scalar", put(tensor.new_zeros(()))
        yield f"tensor {index} of rank 8", put(tensor.reshape(*[1] * (8 - tensor.dim()), *tensor.shape))
        yield f"tensor {index} twice as long", put(torch.cat([tensor, tensor]) if tensor.dim() else tensor[None])
        if tensor.is_floating_point() and tensor.numel():
            for value in POISON:
                yield f"tensor {index} with {value}", put(poisoned(tensor, value))
        elif tensor.dtype is not torch.bool and tensor.numel():
            yield f"tensor {index} at its end of range", put(torch.full_like(tensor, torch.iinfo(tensor.dtype).max))


POISON = (float("nan"), float("inf"), -float("inf"), 1e30)


def poisoned(tensor: Tensor, value: float) -> Tensor:
    """The tensor with one value replaced; the last one, where a check of the first would not see it."""
    spoilt = tensor.clone()
    spoilt.view(-1)[-1] = value
    return spoilt


Spoil = Callable[[Message], Message]


class Sabotage:
    """A `Transport` that changes what an otherwise honest member sends: requests, and replies to others' requests."""

    def __init__(
        self, transport: Transport, request: Spoil = lambda message: message, reply: Spoil = lambda message: message
    ) -> None:
        self._transport, self._request, self._reply = transport, request, reply

    @property
    def me(self) -> str:
        return self._transport.me

    @property
    def peers(self) -> tuple[str, ...]:
        return self._transport.peers

    def start(self, handler: Handler) -> None:
        def spoilt(peer: str, lane: Lane, message: Message) -> Message | None:
            reply = handler(peer, lane, message)
            return None if reply is None else self._reply(reply)

        self._transport.start(spoilt)

    def connect(self, deadline_s: float, peers: Collection[str] | None = None, cancel: CancelToken = NEVER) -> None:
        self._transport.connect(deadline_s, peers, cancel)

    def connected(self) -> frozenset[str]:
        return self._transport.connected()

    def request(self, peer: str, lane: Lane, message: Message, deadline_s: float) -> Message:
        return self.request_async(peer, lane, message, deadline_s).result()

    def request_async(self, peer: str, lane: Lane, message: Message, deadline_s: float) -> Future[Message]:
        return self._transport.request_async(peer, lane, self._request(message), deadline_s)

    def send(self, peer: str, lane: Lane, message: Message) -> None:
        self._transport.send(peer, lane, message)

    def counters(self) -> Counters:
        return self._transport.counters()

    def close(self) -> None:
        self._transport.close()


def only(kinds: Collection[str], spoil: Spoil) -> Spoil:
    """Spoil messages of these kinds, and leave the others alone."""
    return lambda message: spoil(message) if message.kind in kinds else message
