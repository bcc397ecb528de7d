"""Files of the first version, as its processes wrote them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

FIRST = Path(__file__).parents[1] / "formats"


def tensor_file(path: Path, metadata: dict[str, str] | None, **tensors: list[float]) -> Path:
    """A safetensors file as the first version wrote it: header, spaces up to eight bytes, little-endian floats."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name, values in tensors.items():
        start, end = end, end + 4 * len(values)
        header[name] = {"dtype": "F32", "shape": [len(values)], "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    body = b"".join(struct.pack(f"<{len(values)}f", *values) for values in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def first_spool(folder: Path, **header: str) -> Path:
    folder.mkdir()
    (folder / "lot.json").write_bytes((FIRST / "lot.json").read_bytes())
    metadata = {"draw": "0", "round": "2", "pins": '{"weights": "w"}', **header}
    return tensor_file(folder / "release-00000002-0.safetensors", metadata, a=[1.0, -2.0])
