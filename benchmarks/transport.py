"""How long 8 MiB of bfloat16 take there and back: over gRPC with mutual TLS, and over a bare TCP socket.

    python benchmarks/transport.py --json transport.json

The other side runs in a process of its own for both. The two are measured in turn, so that other work on the machine
slows both alike; the figure to look at is the ratio of the medians.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from coterie.federation.identity.kit import load_kit
from coterie.federation.identity.provision import local_kits
from coterie.federation.identity.roster import load_roster
from coterie.federation.wire.frame import FrameScope, FrameType, encode
from coterie.federation.wire.grpc_transport import GrpcTransport
from coterie.federation.wire.transport import Lane, Message

SIZE = 8 << 20


def _receive(connection: socket.socket, buffer: memoryview) -> bool:
    filled = 0
    while filled < len(buffer):
        count = connection.recv_into(buffer[filled:])
        if count == 0:
            return False
        filled += count
    return True


def serve_plain() -> None:
    """Send every `SIZE` bytes back over a plain socket; prints its port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        print(server.getsockname()[1], flush=True)
        connection, _ = server.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        buffer = memoryview(bytearray(SIZE))
        while _receive(connection, buffer):
            connection.sendall(buffer)


def serve_transport(kit_folder: Path) -> None:
    """Send every message back over the transport until standard input ends."""
    kit = load_kit(kit_folder)
    transport = GrpcTransport(kit.name, load_roster(kit), kit)
    transport.start(lambda peer, lane, message: message)
    print("ready", flush=True)
    sys.stdin.read()
    transport.close()


def _child(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _line(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def measure(repeats: int, work: Path) -> dict[str, float]:
    """Medians in milliseconds, their ratio, and bytes on the wire over tensor bytes."""
    kits = local_kits(work / "kits", ["alder", "birch"])
    children = [_child("--plain"), _child("--kit", str(kits["alder"].folder))]
    try:
        plain = socket.create_connection(("127.0.0.1", int(_line(children[0]))))
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _line(children[1])
        birch = GrpcTransport("birch", load_roster(kits["birch"]), kits["birch"])
        birch.start(lambda peer, lane, message: None)
        birch.connect(20.0)
        tensor = torch.randn(SIZE // 2).to(torch.bfloat16)
        raw = bytearray(SIZE)
        back = memoryview(bytearray(SIZE))

        def over_socket() -> None:
            plain.sendall(raw)
            _receive(plain, back)

        def over_transport() -> None:
            birch.request("alder", Lane.FORWARD, Message("dispatch", tensors=(tensor,)), 30.0)

        def small() -> None:
            birch.request("alder", Lane.CONTROL, Message("hello"), 30.0)

        seconds: dict[str, list[float]] = {"socket": [], "transport": [], "small": []}
        ways: list[tuple[str, Callable[[], None]]] = [
            ("socket", over_socket),
            ("transport", over_transport),
            ("small", small),
        ]
        for repeat in range(repeats + 3):
            for name, way in ways:
                start = time.perf_counter()
                way()
                if repeat >= 3:
                    seconds[name].append(time.perf_counter() - start)
        plain.close()
        birch.close()
    finally:
        for child in children:
            assert child.stdin is not None
            child.stdin.close()
            child.wait(20)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    encoded = encode(
        FrameScope(bytes(16), 1), FrameType.REQUEST, Lane.FORWARD, 1, Message("dispatch", tensors=(tensor,))
    )
    return {
        "socket_ms": 1e3 * medians["socket"],
        "transport_ms": 1e3 * medians["transport"],
        "ratio": medians["transport"] / medians["socket"],
        "empty_message_ms": 1e3 * medians["small"],
        "payload_over_tensor_bytes": encoded.payload_bytes / encoded.tensor_bytes,
        "repeats": repeats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--kit", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.plain:
        return serve_plain()
    if given.kit is not None:
        return serve_transport(given.kit)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(given.repeats, Path(folder))
    for name, value in figures.items():
        print(f"{name:<28}{value:10.3f}")
    if given.json is not None:
        given.json.write_text(json.dumps(figures, indent=2) + "\n")
    return None


if __name__ == "__main__":
    main()
