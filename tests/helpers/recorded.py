"""What each host of the `experts` exchange received, by kind, place and size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from coterie.federation.wire.transport import Lane, Message
from coterie.training.party.in_process import InProcessFederation
from helpers.federations import experts_of


def watch(host: Any, record: Callable[[str, Lane, Message], object]) -> None:
    """Show ``record`` every message of another party before a host looks at it."""
    handle = host.handle

    def watching(peer: str, lane: Lane, message: Message, **more: Any) -> Message:
        if peer != host.me:
            record(peer, lane, message)
        reply: Message = handle(peer, lane, message, **more)
        return reply

    host.handle = watching


def recorded_of(config, folder: Path, parts) -> dict[str, list[tuple]]:  # type: ignore[no-untyped-def]
    """The same of given parts."""
    seen: dict[str, list[tuple]] = {}
    federation = InProcessFederation(config, folder / "coordinator")
    federation.coordinate()
    for name, each in parts.items():
        exchange = experts_of(federation.up(each))

        def record(peer: str, lane: Lane, message: Message, host: str = name) -> None:
            sizes = tuple((str(t.dtype), tuple(t.shape)) for t in message.tensors)
            fields = sorted(set(message.body) - {"digest", "weights", "weight"})
            seen.setdefault(f"{peer}->{host} {lane.name}", []).append(
                (lane, message.kind, message.address, fields, sizes)
            )

        watch(exchange.host, record)
    federation.join()
    for end in federation.ends.values():
        if isinstance(end, BaseException):
            raise end
    return seen
