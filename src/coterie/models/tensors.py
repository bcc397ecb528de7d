"""What several places ask of a tensor: its bytes, its place in a file, and the dtype of a product."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""What a file is going to hold: {name: (dtype, shape)}."""


def raw_bytes(tensor: Tensor) -> memoryview:
    """The raw little-endian contents; no copy if the tensor is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def tensor_file_layout(shapes: Shapes, metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """How tensors lie in a safetensors file.

    Returns:
        What the file begins with, where each tensor starts, and the size of the file, in bytes.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    starts, end = {}, 0
    # Widest types first, so that every tensor starts at a multiple of its item size, as readers assume.
    for name in sorted(shapes, key=lambda name: (-shapes[name][0].itemsize, name)):
        dtype, shape = shapes[name]
        start, end = end, end + dtype.itemsize * int(torch.Size(shape).numel())
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        starts[name] = start
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = struct.pack("<Q", len(text)) + text
    return begin, {name: len(begin) + start for name, start in starts.items()}, len(begin) + end


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """What autocast would compute the product of both in, also of a kind that is not on its list; the weight's own
    dtype where it is off."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return weight.dtype
