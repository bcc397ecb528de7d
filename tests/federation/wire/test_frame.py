"""Frames: what goes in comes out, and bytes that are no frame give FrameError and nothing worse."""

from __future__ import annotations

import struct
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.errors import FrameError
from coterie.federation.wire.frame import (
    ADDRESS,
    ALIGNMENT,
    CHUNK_BYTES,
    HEADER,
    MAGIC,
    Frame,
    FrameReader,
    FrameScope,
    FrameType,
    encode,
)
from coterie.federation.wire.transport import Address, Lane, Message

SCOPE = FrameScope(b"0123456789abcdef", 3)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8]
HEADER_BYTES = 112  # docs/reference/wire.md
ENTRY_BYTES = 80


def chunks_of(message: Message, lane: Lane = Lane.FORWARD, **options: int) -> list[bytes]:
    return list(encode(SCOPE, FrameType.REQUEST, lane, 77, message, **options).chunks())


def read(chunks: list[bytes], lane: Lane = Lane.FORWARD, scope: FrameScope = SCOPE, **options: int) -> Frame:
    reader = FrameReader(scope, lane, **options)
    *others, last = [reader.feed(chunk) for chunk in chunks]
    assert others == [None] * len(others)
    assert last is not None
    return last


def example() -> bytes:
    tensors = (torch.arange(6.0).view(2, 3), torch.tensor([True, False]))
    (chunk,) = chunks_of(
        Message(
            "dispatch",
            Address(round=5, attempt=1, micro_batch=2, layer=3, call=4, part=6, chunk=7),
            body={"rows": 2},
            tensors=tensors,
        )
    )
    return chunk


def patched(chunk: bytes, offset: int, form: str, *values: object) -> bytes:
    changed = bytearray(chunk)
    struct.pack_into(form, changed, offset, *values)
    return bytes(changed)


tensors_st = st.builds(
    lambda dtype, shape: (torch.arange(torch.Size(shape).numel()) % 100).to(dtype).view(shape),
    st.sampled_from([*DTYPES, torch.bool]),
    st.lists(st.integers(0, 4), max_size=8).map(tuple),
)
json_st = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
addresses_st = st.builds(Address, round=U64, attempt=U32, micro_batch=U32, layer=U32, call=U64, part=U32, chunk=U32)
messages_st = st.builds(
    Message,
    st.from_regex(r"[a-z0-9_.-]{1,24}", fullmatch=True),
    addresses_st,
    st.dictionaries(st.text(max_size=8), json_st, max_size=4),
    st.lists(tensors_st, max_size=4).map(tuple),
)


@settings(max_examples=150, deadline=None)
@given(messages_st, st.sampled_from([*FrameType]), st.sampled_from([*Lane]), st.integers(0, 2**64 - 1))
def test_any_message_comes_back_as_it_was(
    message: Message, frame_type: FrameType, lane: Lane, correlation: int
) -> None:
    encoded = encode(SCOPE, frame_type, lane, correlation, message)
    frame = read(list(encoded.chunks()), lane)
    assert (frame.type, frame.lane, frame.correlation) == (frame_type, lane, correlation)
    assert (frame.payload_bytes, frame.tensor_bytes) == (encoded.payload_bytes, encoded.tensor_bytes)
    came = frame.message
    assert (came.kind, came.address, came.body) == (message.kind, message.address, message.body)
    assert len(came.tensors) == len(message.tensors)
    for sent, arrived in zip(message.tensors, came.tensors, strict=True):
        assert (arrived.dtype, arrived.shape) == (sent.dtype, sent.shape)
        assert torch.equal(arrived, sent)


@pytest.mark.parametrize("elements", [CHUNK_BYTES // 4 - 100, CHUNK_BYTES // 4, 3 * CHUNK_BYTES // 4 + 1])
def test_chunks_are_one_mebibyte_and_the_last_is_the_rest(elements: int) -> None:
    tensor = torch.arange(elements, dtype=torch.int32)
    chunks = chunks_of(Message("dispatch", tensors=(tensor, tensor[:5])))
    assert all(len(chunk) == CHUNK_BYTES for chunk in chunks[:-1])
    assert 0 < len(chunks[-1]) <= CHUNK_BYTES
    came = read(chunks).message.tensors
    assert torch.equal(came[0], tensor)
    assert torch.equal(came[1], tensor[:5])


def test_one_reader_takes_many_frames_and_each_has_memory_of_its_own() -> None:
    reader = FrameReader(SCOPE, Lane.FORWARD)
    (chunk,) = chunks_of(Message("a", tensors=(torch.ones(3),)))
    first, second = reader.feed(chunk), reader.feed(chunk)
    assert first is not None
    assert second is not None
    first.message.tensors[0].zero_()
    assert second.message.tensors[0].tolist() == [1.0, 1.0, 1.0]


def test_tensors_are_aligned_views_of_one_buffer() -> None:
    frame = read(chunks_of(Message("a", tensors=(torch.ones(3), torch.ones(5, dtype=torch.uint8), torch.ones(7)))))
    storages = {tensor.untyped_storage().data_ptr() for tensor in frame.message.tensors}
    assert len(storages) == 1
    assert all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in frame.message.tensors)


def test_payload_of_a_large_tensor_is_hardly_more_than_the_tensor() -> None:
    encoded = encode(SCOPE, FrameType.REQUEST, Lane.FORWARD, 1, Message("a", tensors=(torch.zeros(64, 1024),)))
    assert encoded.tensor_bytes == 64 * 1024 * 4
    assert encoded.payload_bytes <= 1.03 * encoded.tensor_bytes


@pytest.mark.parametrize(
    ("offset", "form", "value", "field"),
    [
        (0, "<4s", b"XXXX", "magic"),
        (4, "<H", 1, "version"),
        (4, "<H", 3, "version"),
        (6, "<B", 0, "type"),
        (6, "<B", 6, "type"),
        (7, "<B", 0, "lane"),
        (7, "<B", 9, "lane"),
        (8, "<16s", b"another run 1234", "run"),
        (24, "<I", 4, "epoch"),
        (72, "<24s", b"", "kind"),
        (72, "<24s", b"UPPER", "kind"),
        (72, "<24s", b"a\0b", "kind"),
        (96, "<I", 65537, "body_length"),
        (96, "<I", 2**32 - 1, "body_length"),
        (96, "<I", 9, "reserved"),  # one byte less: the last one of the body now lies in the padding
        (100, "<H", 4097, "tensor_count"),
        (100, "<H", 65535, "tensor_count"),
        (102, "<H", 1, "reserved"),
        (104, "<Q", 2**63, "data_length"),
        (104, "<Q", 67, "data_length"),
        (HEADER_BYTES, "<B", 0, "dtype"),
        (HEADER_BYTES, "<B", 9, "dtype"),
        (HEADER_BYTES + 1, "<B", 9, "rank"),
        (HEADER_BYTES + 1, "<B", 1, "reserved"),
        (HEADER_BYTES + 2, "<H", 1, "reserved"),
        (HEADER_BYTES + 8, "<Q", 25, "nbytes"),
        (HEADER_BYTES + 16, "<Q", 3, "nbytes"),
        (HEADER_BYTES + 16, "<Q", 2**63, "shape"),
        (HEADER_BYTES + 40, "<Q", 1, "reserved"),
    ],
)
def test_each_field_of_the_head_is_checked(offset: int, form: str, value: object, field: str) -> None:
    with pytest.raises(FrameError) as caught:
        read([patched(example(), offset, form, value)])
    assert caught.value.field == field


def test_the_header_holds_every_number_of_an_address_once() -> None:
    assert [*ADDRESS] == [field.name for field in fields(Address)]
    assert [name for name in HEADER if name in ADDRESS] == [*ADDRESS]
    assert struct.calcsize("<" + "".join(HEADER.values())) == HEADER_BYTES


def test_an_empty_tensor_cannot_carry_an_impossible_extent() -> None:
    (chunk,) = chunks_of(Message("a", tensors=(torch.empty(0, 2),)))
    with pytest.raises(FrameError) as caught:
        read([patched(chunk, HEADER_BYTES + 24, "<Q", 2**62)])
    assert caught.value.field == "shape"


def test_a_bool_that_is_neither_0_nor_1_is_refused() -> None:
    (chunk,) = chunks_of(Message("a", tensors=(torch.tensor([True, False]),)))
    with pytest.raises(FrameError, match="bool"):
        read([chunk[:-1] + b"\x02"])


@pytest.mark.parametrize(
    "body", [b"[1]", b"{", b'{"a": NaN}', b"[" * 60_000, b'"\xff"', b'{"a": 1' + b"0" * 5000 + b"}"]
)
def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    (chunk,) = chunks_of(Message("a"))
    head = patched(chunk, 96, "<I", len(body))[:HEADER_BYTES] + body
    with pytest.raises(FrameError) as caught:
        read([head + bytes(-len(head) % ALIGNMENT)])
    assert caught.value.field == "body"


def test_a_frame_larger_than_the_lane_allows_is_refused_on_both_sides() -> None:
    message = Message("a", tensors=(torch.zeros(300_000),))
    with pytest.raises(FrameError) as sender:
        chunks_of(message, max_data_bytes=1_000_000)
    with pytest.raises(FrameError) as receiver:
        read(chunks_of(message), max_data_bytes=1_000_000)
    assert sender.value.field == receiver.value.field == "data_length"


def test_chunks_that_do_not_add_up_to_the_frame_are_refused() -> None:
    chunks = chunks_of(Message("a", tensors=(torch.zeros(600_000),)))
    assert len(chunks) == 3
    short = [chunks[0], chunks[1][:-1]]
    long = [chunks[0], chunks[1], chunks[2] + b"x"]
    for wrong in (short, long, [chunks[0], b""], [chunks[0], chunks[1] + b"x"], [chunks[0] + chunks[1]]):
        with pytest.raises(FrameError):
            read(wrong)


def feed_or_refuse(chunk: bytes) -> Frame | None:
    """What a reader makes of the bytes; any exception but FrameError escapes and fails the test."""
    try:
        return FrameReader(SCOPE, Lane.FORWARD, max_data_bytes=1 << 40).feed(chunk)
    except FrameError:
        return None


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_give_frame_error_and_nothing_else(raw: bytes) -> None:
    assert feed_or_refuse(raw) is None


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=100, max_size=400))
def test_random_bytes_behind_a_good_start_give_frame_error_and_nothing_else(raw: bytes) -> None:
    start = MAGIC + struct.pack("<HBB16sI", 1, 1, 1, SCOPE.run, SCOPE.epoch)
    feed_or_refuse(start + raw)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32))
def test_a_truncated_frame_never_completes(cut: int) -> None:
    chunk = example()
    assert feed_or_refuse(chunk[: cut % len(chunk)]) is None


@settings(max_examples=600, deadline=None)
@given(st.lists(st.integers(0, 8 * len(example()) - 1), min_size=1, max_size=6, unique=True))
def test_flipped_bits_give_frame_error_or_a_well_formed_message(bits: list[int]) -> None:
    changed = bytearray(example())
    for bit in bits:
        changed[bit // 8] ^= 1 << bit % 8
    frame = feed_or_refuse(bytes(changed))
    if frame is not None:
        assert frame.tensor_bytes == sum(t.numel() * t.itemsize for t in frame.message.tensors)


def test_a_head_that_announces_too_much_is_refused_before_memory_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    readers = [FrameReader(SCOPE, Lane.FORWARD, max_data_bytes=1 << 40) for _ in range(3)]
    taken: list[object] = []
    monkeypatch.setattr(torch, "empty", lambda *size, **options: taken.append(size))
    for reader, offset in zip(readers, (104, HEADER_BYTES + 8, HEADER_BYTES + 16), strict=True):
        with pytest.raises(FrameError):
            reader.feed(patched(example(), offset, "<Q", 1 << 39))
    assert taken == []


def test_memory_that_does_not_exist_gives_frame_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*args: object, **options: object) -> None:
        raise RuntimeError("not enough memory")

    chunks = chunks_of(Message("a", tensors=(torch.zeros(10),)))
    reader = FrameReader(SCOPE, Lane.FORWARD)
    monkeypatch.setattr(torch, "empty", no_memory)
    with pytest.raises(FrameError, match="no memory"):
        reader.feed(chunks[0])
