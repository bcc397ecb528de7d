"""A hub that keeps what it forwards between sites; Python imports this by itself in the hub's process.

In the folder READING_HUB: ``carried`` has everything, ``pieces.jsonl`` a line about each request of a tunnel.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any


class ReadingHub:
    """What was forwarded."""

    def __init__(self, folder: Path) -> None:
        self._carried = (folder / "carried").open("ab")
        self._pieces = (folder / "pieces.jsonl").open("a")
        self._guard = threading.Lock()

    def keep(self, origin: str, destination: str, payload: bytes) -> None:
        """Keep one message from one site's job to another's."""
        from nvflare.fuel.utils import fobs

        with self._guard:
            self._carried.write(payload)
            self._carried.flush()
            if b"tie.request" not in payload or (body := fobs.loads(payload).get("coterie")) is None:
                return  # FLARE's own answers
            data = body.get("data", b"")
            told = {key: value for key, value in body.items() if key != "data"}
            line = {"ends": [origin, destination], "told": told, "size": len(data), "begins": data[:3].hex()}
            self._pieces.write(json.dumps(line) + "\n")
            self._pieces.flush()


def _settle(folder: Path) -> None:
    from nvflare.fuel.f3.cellnet.core_cell import CoreCell

    forwards = CoreCell._forward
    hub = ReadingHub(folder)

    def forward(cell: Any, endpoint: Any, origin: str, destination: str, msg_type: str, message: Any) -> None:
        hub.keep(origin, destination, bytes(message.payload or b""))
        forwards(cell, endpoint, origin, destination, msg_type, message)

    CoreCell._forward = forward


if "READING_HUB" in os.environ and any("server_train" in word for word in sys.orig_argv):
    _settle(Path(os.environ["READING_HUB"]))
