"""The bytes of one message: a checked binary head, then raw tensor data, cut into 1 MiB chunks.

::

    header (fixed)  |  one entry per tensor  |  body (JSON)  |  zeros to 64  ||  tensor data, each at a multiple of 64

The head (left of ``||``) lies whole in the first chunk, so the receiver has checked every field before it takes
memory for the data; then it takes one buffer of exactly the announced size and fills it. The tensors of the message
are views of that buffer. `docs/reference/wire.md` has the layout as a table.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coterie.errors import FrameError
from coterie.federation.wire.transport import Address, Lane, Message
from coterie.models.tensors import raw_bytes

MAGIC = b"CTRE"
PROTOCOL_VERSION = 2
CHUNK_BYTES = 1 << 20
ALIGNMENT = 64
MAX_RANK = 8
MAX_TENSORS = 4096
MAX_ELEMENTS = 1 << 40
MAX_BODY_BYTES = 64 << 10
MAX_KIND_BYTES = 24
RUN_BYTES = 16

ADDRESS: Mapping[str, str] = {
    "round": "Q", "attempt": "I", "micro_batch": "I", "layer": "I", "call": "Q", "part": "I", "chunk": "I",
}  # fmt: skip
"""The numbers of an `Address` in the order of the header, each with its `struct` format."""

HEADER: Mapping[str, str] = {
    **{"magic": "4s", "version": "H", "type": "B", "lane": "B", "run": f"{RUN_BYTES}s", "epoch": "I"},
    **ADDRESS,
    **{"correlation": "Q", "kind": f"{MAX_KIND_BYTES}s"},
    **{"body_length": "I", "tensor_count": "H", "reserved": "H", "data_length": "Q"},
}
"""Every field of the header, little-endian and without gaps."""

_HEADER = struct.Struct("<" + "".join(HEADER.values()))
# dtype, rank, reserved, reserved, byte length, extent of every axis (0 beyond the rank)
_ENTRY = struct.Struct(f"<BBHIQ{MAX_RANK}Q")
_KIND = re.compile(rb"[a-z0-9_.-]{1,24}")

DTYPES: Mapping[int, torch.dtype] = {
    1: torch.float32,
    2: torch.bfloat16,
    3: torch.float16,
    4: torch.float64,
    5: torch.int64,
    6: torch.int32,
    7: torch.uint8,
    8: torch.bool,
}
_CODES: Mapping[torch.dtype, int] = {dtype: code for code, dtype in DTYPES.items()}


class FrameType(IntEnum):
    """What the receiver does with a frame."""

    REQUEST = 1  # run the handler, send what it returns
    REPLY = 2
    ERROR = 3  # a reply that carries class, code, step and field
    ONE_WAY = 4  # run the handler, send an empty reply (it gives the sender its slot in the window back)
    HEARTBEAT = 5


@dataclass(frozen=True)
class FrameScope:
    """What every frame of one run under one membership epoch carries.

    Args:
        run: the first 16 bytes of the SHA-256 of the run's name.
        epoch: membership epoch of the roster (u32).
        protocol: version of everything that is said here; a peer of another one is refused.
    """

    run: bytes
    epoch: int
    protocol: int = PROTOCOL_VERSION

    @classmethod
    def of_run(cls, name: str, epoch: int = 0) -> FrameScope:
        """Of a run by its name."""
        return cls(hashlib.sha256(name.encode()).digest()[:RUN_BYTES], epoch)


@dataclass(frozen=True)
class Frame:
    """One message with its transport fields. ``correlation`` ties a reply to its request."""

    type: FrameType
    lane: Lane
    correlation: int
    message: Message
    payload_bytes: int = 0
    tensor_bytes: int = 0


DEFAULT_MAX_DATA: Mapping[Lane, int] = {Lane.CONTROL: 64 << 20, Lane.FORWARD: 4 << 30, Lane.BACKWARD: 4 << 30}
"""Most tensor data one message may carry, in bytes, by lane."""


def _refuse(message: str, field: str) -> FrameError:
    return FrameError(
        message,
        code=f"frame-{field.replace('_', '-')}",
        why="a frame that does not check out is never stored or computed with; the connection is closed",
        field=field,
    )


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


# ---- sending -----------------------------------------------------------------------------------------------------


class Encoded:
    """A frame ready to be cut into chunks.

    Holds views of the caller's tensors, not copies: the one copy is made by `chunks`, chunk by chunk.
    """

    def __init__(self, segments: list[memoryview], tensor_bytes: int) -> None:
        self._segments = segments
        self.tensor_bytes = tensor_bytes
        self.payload_bytes = sum(len(segment) for segment in segments)

    def chunks(self) -> Iterator[bytes]:
        """The frame in pieces of exactly `CHUNK_BYTES`; the last may be shorter."""
        parts: list[memoryview] = []
        room = CHUNK_BYTES
        for segment in self._segments:
            start = 0
            while start < len(segment):
                part = segment[start : start + room]
                parts.append(part)
                start += len(part)
                room -= len(part)
                if room == 0:
                    yield b"".join(parts)
                    parts, room = [], CHUNK_BYTES
        if parts:
            yield b"".join(parts)


def _encode_body(body: Mapping[str, Any]) -> bytes:
    if not body:
        return b""
    try:
        encoded = json.dumps(body, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise _refuse(f"The body of a message must be plain JSON: {error}.", "body") from None
    if len(encoded) > MAX_BODY_BYTES:
        raise _refuse(
            f"The body of a message has {len(encoded)} bytes; {MAX_BODY_BYTES} are allowed (send tensors instead).",
            "body_length",
        )
    return encoded


def encode(
    scope: FrameScope,
    frame_type: FrameType,
    lane: Lane,
    correlation: int,
    message: Message,
    *,
    max_data_bytes: int | None = None,
) -> Encoded:
    """The frame of ``message``.

    Raises:
        FrameError: kind, a number, the body, a dtype, the rank or the size breaks a limit; names the field.
    """
    kind = message.kind.encode("ascii", errors="replace")
    if not _KIND.fullmatch(kind):
        raise _refuse(f"`{message.kind}` is no message kind (1 to 24 of a-z 0-9 _ . -).", "kind")
    if len(message.tensors) > MAX_TENSORS:
        raise _refuse(f"A message has {len(message.tensors)} tensors; {MAX_TENSORS} are allowed.", "tensor_count")
    body = _encode_body(message.body)
    entries: list[bytes] = []
    data: list[memoryview] = []
    offset = tensor_bytes = 0
    for number, tensor in enumerate(message.tensors):
        code = _CODES.get(tensor.dtype)
        if code is None:
            raise _refuse(f"Tensor {number} of `{message.kind}` is {tensor.dtype}, which cannot be sent.", "dtype")
        if tensor.dim() > MAX_RANK:
            raise _refuse(f"Tensor {number} of `{message.kind}` has rank {tensor.dim()}; at most {MAX_RANK}.", "rank")
        contents = raw_bytes(tensor)
        shape = (*tensor.shape, *[0] * (MAX_RANK - tensor.dim()))
        entries.append(_ENTRY.pack(code, tensor.dim(), 0, 0, len(contents), *shape))
        if contents:
            start = _aligned(offset)
            data += [memoryview(bytes(start - offset)), contents]
            offset = start + len(contents)
            tensor_bytes += len(contents)
    limit = DEFAULT_MAX_DATA[lane] if max_data_bytes is None else max_data_bytes
    if offset > limit:
        raise _refuse(
            f"`{message.kind}` carries {offset} bytes of tensors; lane {lane.name.lower()} allows {limit}.",
            "data_length",
        )
    try:
        header = _HEADER.pack(
            *(MAGIC, scope.protocol, frame_type, lane, scope.run, scope.epoch),
            *(getattr(message.address, name) for name in ADDRESS),
            *(correlation, kind, len(body), len(entries), 0, offset),
        )
    except struct.error as error:
        raise _refuse(f"A number in the header of `{message.kind}` is out of range: {error}.", "number") from None
    head = b"".join([header, *entries, body])
    head += bytes(_aligned(len(head)) - len(head))
    return Encoded([memoryview(head), *data], tensor_bytes)


# ---- receiving ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _TensorPlan:
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class _Head:
    frame: Frame
    plans: tuple[_TensorPlan, ...]
    length: int
    data_length: int


class FrameReader:
    """Turns the chunks of one stream back into frames.

    One reader belongs to one stream, is fed in order, and is dead after its first FrameError.

    Args:
        scope: run and epoch every frame must carry.
        lane: the lane of the stream; a frame of another lane is refused.
        max_data_bytes: most tensor data in one message; default by lane.
    """

    def __init__(self, scope: FrameScope, lane: Lane, max_data_bytes: int | None = None) -> None:
        self._scope = scope
        self._lane = lane
        self._limit = DEFAULT_MAX_DATA[lane] if max_data_bytes is None else max_data_bytes
        self._head: _Head | None = None
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._view: np.ndarray = self._buffer.numpy()
        self._filled = 0

    def feed(self, chunk: bytes) -> Frame | None:
        """Take the next chunk; gives the frame it completes, if it does.

        Raises:
            FrameError: the bytes are no frame of this run, epoch and lane; names the field.
        """
        if len(chunk) > CHUNK_BYTES:
            raise _refuse(f"A chunk has {len(chunk)} bytes; {CHUNK_BYTES} are allowed.", "chunk_length")
        part: memoryview = memoryview(chunk)
        if self._head is None:
            head = read_head(chunk, self._scope, self._lane, self._limit)
            self._head = head
            self._take_memory(head.data_length)
            part = part[head.length :]
        head = self._head
        remaining = head.data_length - self._filled
        if len(part) > remaining or (len(chunk) < CHUNK_BYTES and len(part) < remaining):
            raise _refuse(
                f"A frame of {head.length + head.data_length} bytes came in chunks of another total.", "total_length"
            )
        if len(part):
            self._view[self._filled : self._filled + len(part)] = np.frombuffer(part, dtype=np.uint8)
            self._filled += len(part)
        return self._finish() if self._filled == head.data_length else None

    def _take_memory(self, size: int) -> None:
        try:
            self._buffer = torch.empty(size, dtype=torch.uint8)
        except (RuntimeError, MemoryError):
            raise _refuse(f"There is no memory for a message of {size} bytes.", "data_length") from None
        self._view = self._buffer.numpy()
        self._filled = 0

    def _finish(self) -> Frame:
        assert self._head is not None
        head, buffer = self._head, self._buffer
        self._head, self._buffer = None, torch.empty(0, dtype=torch.uint8)
        self._view = self._buffer.numpy()
        tensors: list[Tensor] = []
        for plan in head.plans:
            if plan.nbytes == 0:
                tensors.append(torch.empty(plan.shape, dtype=plan.dtype))
                continue
            raw = buffer[plan.start : plan.start + plan.nbytes]
            if plan.dtype is torch.bool and int(raw.max()) > 1:
                raise _refuse("A bool tensor holds a byte other than 0 and 1.", "dtype")
            tensors.append(raw.view(plan.dtype).view(plan.shape))
        message = replace(head.frame.message, tensors=tuple(tensors))
        return replace(head.frame, message=message)


def read_head(chunk: bytes, scope: FrameScope, lane: Lane, max_data_bytes: int) -> _Head:
    """Check everything in front of the tensor data; takes no memory beyond the first chunk's own size.

    Raises:
        FrameError: names the first field that does not check out.
    """
    if len(chunk) < _HEADER.size:
        raise _refuse(f"A frame starts with {_HEADER.size} bytes of header; {len(chunk)} came.", "header")
    magic, version, type_code, lane_code, run, epoch, *numbers = _HEADER.unpack_from(chunk)
    *numbers, correlation, kind, body_length, count, reserved, data_length = numbers
    if magic != MAGIC:
        raise _refuse("These bytes are no coterie frame (wrong magic number).", "magic")
    if version != scope.protocol:
        raise _refuse(f"The frame has protocol version {version}; this side speaks {scope.protocol}.", "version")
    if type_code not in set(FrameType):
        raise _refuse(f"Frame type {type_code} does not exist.", "type")
    if lane_code != lane:
        raise _refuse(f"A frame of lane {lane_code} came on lane {int(lane)}.", "lane")
    if run != scope.run:
        raise _refuse("The frame belongs to another run.", "run")
    if epoch != scope.epoch:
        raise _refuse(f"The frame has membership epoch {epoch}; this side has {scope.epoch}.", "epoch")
    if reserved != 0:
        raise _refuse("Reserved header bits are set.", "reserved")
    name = kind.rstrip(b"\0")
    if not _KIND.fullmatch(name):
        raise _refuse("The message kind is not 1 to 24 of a-z 0-9 _ . -", "kind")
    if body_length > MAX_BODY_BYTES:
        raise _refuse(f"The body has {body_length} bytes; {MAX_BODY_BYTES} are allowed.", "body_length")
    if count > MAX_TENSORS:
        raise _refuse(f"The frame has {count} tensors; {MAX_TENSORS} are allowed.", "tensor_count")
    if data_length > max_data_bytes:
        raise _refuse(f"The frame carries {data_length} bytes; {max_data_bytes} are allowed.", "data_length")
    body_start = _HEADER.size + count * _ENTRY.size
    length = _aligned(body_start + body_length)
    if len(chunk) < length:
        raise _refuse(f"The head of the frame has {length} bytes; the first chunk has {len(chunk)}.", "header")
    if any(chunk[body_start + body_length : length]):
        raise _refuse("The padding of the head is not zero.", "reserved")
    plans, end = _read_table(chunk, count)
    if end != data_length:
        raise _refuse(f"The tensors need {end} bytes; the frame announces {data_length}.", "data_length")
    body = _decode_body(chunk[body_start : body_start + body_length])
    message = Message(name.decode("ascii"), Address(**dict(zip(ADDRESS, numbers, strict=True))), body)
    tensor_bytes = sum(plan.nbytes for plan in plans)
    frame = Frame(FrameType(type_code), lane, correlation, message, length + data_length, tensor_bytes)
    return _Head(frame, tuple(plans), length, data_length)


def _read_table(chunk: bytes, count: int) -> tuple[list[_TensorPlan], int]:
    """The tensors to make, and where the data of the last one ends."""
    plans: list[_TensorPlan] = []
    end = 0
    for number in range(count):
        code, rank, reserved16, reserved32, nbytes, *extents = _ENTRY.unpack_from(
            chunk, _HEADER.size + number * _ENTRY.size
        )
        dtype = DTYPES.get(code)
        if dtype is None:
            raise _refuse(f"Tensor {number} has dtype code {code}, which does not exist.", "dtype")
        if rank > MAX_RANK:
            raise _refuse(f"Tensor {number} has rank {rank}; at most {MAX_RANK}.", "rank")
        if reserved16 or reserved32 or any(extents[rank:]):
            raise _refuse(f"Reserved bits of tensor {number} are set.", "reserved")
        shape = tuple(extents[:rank])
        # This product ignores zeros: an empty tensor must not smuggle in an extent that overflows later.
        if math.prod(extent for extent in shape if extent) > MAX_ELEMENTS:
            raise _refuse(f"Tensor {number} has more than {MAX_ELEMENTS} elements.", "shape")
        if nbytes != math.prod(shape) * dtype.itemsize:
            raise _refuse(f"Tensor {number} announces {nbytes} bytes; its shape needs another number.", "nbytes")
        start = _aligned(end) if nbytes else end
        plans.append(_TensorPlan(dtype, shape, start, nbytes))
        end = start + nbytes
    return plans, end


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _decode_body(raw: bytes) -> dict[str, Any]:
    if not raw:
        return {}
    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise _refuse("The body of the frame is not JSON.", "body") from None
    if not isinstance(body, dict):
        raise _refuse("The body of the frame is not a JSON object.", "body")
    return body
