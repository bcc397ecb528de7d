"""The file of one noised result: safetensors, written and hashed a piece at a time by as many threads as torch uses.

A result is as large as what is trained, and its digest is needed before a round may go on. One thread that hashes all
of it would take longer than writing it; so the digest is that of the pieces' digests, and pieces are hashed as they
are written, side by side.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from coterie.models.tensors import raw_bytes, tensor_file_layout

PIECE = 8 * 2**20
"""Bytes of a file that are hashed together."""

_T = TypeVar("_T")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], mode: int) -> str:
    """Write a file, readable at once and not synced.

    Args:
        path: a file there is overwritten.
        tensors: by name.
        metadata: of the file's header.
        mode: of the file from its first byte on.

    Returns:
        Its digest; see `pieces_digest`.

    Raises:
        OSError: the disk is full or broken. What was written is left there.
    """
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    header, starts, _ = tensor_file_layout(shapes, metadata)
    views = [memoryview(header), *(raw_bytes(tensors[name]) for name in sorted(starts, key=starts.__getitem__))]
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)

    def put(piece: tuple[int, list[memoryview]]) -> bytes:
        offset, digest = piece[0] * PIECE, hashlib.sha256()
        for view in piece[1]:
            digest.update(view)
            while view:
                written = os.pwrite(handle, view, offset)
                offset, view = offset + written, view[written:]
        return digest.digest()

    try:
        os.fchmod(handle, mode)  # whatever the umask took or left
        return _joined(_side_by_side(put, enumerate(_pieces(views))))
    finally:
        os.close(handle)


def pieces_digest(path: Path) -> str:
    """SHA-256, in hex, of the SHA-256 of each `PIECE` bytes of a file, in order."""
    handle = os.open(path, os.O_RDONLY)
    try:
        starts = range(0, os.fstat(handle).st_size, PIECE)
        return _joined(_side_by_side(lambda start: hashlib.sha256(os.pread(handle, PIECE, start)).digest(), starts))
    finally:
        os.close(handle)


def _side_by_side(work: Callable[[_T], bytes], over: Iterable[_T]) -> list[bytes]:
    """Results in order, from as many threads as torch may use."""
    threads = torch.get_num_threads()
    if threads == 1:
        return [work(each) for each in over]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, over))


def _joined(digests: Iterable[bytes]) -> str:
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _pieces(views: Iterable[memoryview]) -> Iterator[list[memoryview]]:
    """What lies together in each `PIECE` bytes, of views that lie one after another."""
    piece: list[memoryview] = []
    room = PIECE
    for view in views:
        while view:
            piece.append(view[:room])
            view = view[room:]
            room -= len(piece[-1])
            if room == 0:
                yield piece
                piece, room = [], PIECE
    if piece:
        yield piece
