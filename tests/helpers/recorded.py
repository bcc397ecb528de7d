"""What each host of the `experts` exchange received, by kind, place and size."""

from __future__ import annotations

from pathlib import Path

from coterie.federation.wire.transport import Lane, Message
from coterie.training.party.in_process import InProcessFederation
from helpers.federations import experts_of


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

        exchange.host.transcript = record
    federation.join()
    for end in federation.ends.values():
        if isinstance(end, BaseException):
            raise end
    return seen
