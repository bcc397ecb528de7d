"""The file of a noised result beside what safetensors itself reads and writes, and its digest by hand."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from coterie.dp.accounting.release_file import pieces_digest, write_tensors

PIECE = 8 * 2**20


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    usual = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(usual)


def by_hand(path: Path) -> str:
    content = path.read_bytes()
    pieces = [content[start : start + PIECE] for start in range(0, len(content), PIECE)]
    return hashlib.sha256(b"".join(hashlib.sha256(piece).digest() for piece in pieces)).hexdigest()


@pytest.mark.parametrize("size", [0, 7, PIECE // 4 - 50, PIECE // 4, 2 * PIECE // 4 + 1001])
def test_safetensors_reads_what_was_written_and_the_digest_is_that_of_the_pieces(
    tmp_path: Path, threads: int, size: int
) -> None:
    path, generator = tmp_path / "file", torch.Generator().manual_seed(0)
    tensors = {
        "b": torch.randn(size, generator=generator),
        "a": torch.randint(-(2**62), 2**62, (3, 5), generator=generator),
        "empty": torch.empty(0, 4),
        "turned": torch.randn(300, 200, generator=generator).T,
        "scalar": torch.tensor(1.5),
    }
    path.write_bytes(b"something longer that was there before" * PIECE)
    digest = write_tensors(path, tensors, {"round": "3"}, 0o600)
    assert digest == pieces_digest(path) == by_hand(path)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"round": "3"}
    save_file({name: each.contiguous() for name, each in tensors.items()}, tmp_path / "theirs", {"round": "3"})
    assert path.stat().st_size == (tmp_path / "theirs").stat().st_size


def test_every_changed_byte_changes_the_digest(tmp_path: Path) -> None:
    path = tmp_path / "file"
    digest = write_tensors(path, {"a": torch.arange(2 * PIECE // 4, dtype=torch.float32)}, {}, 0o600)
    content = bytearray(path.read_bytes())
    for place in (0, 9, PIECE - 1, PIECE, len(content) - 1):
        content[place] ^= 1
        path.write_bytes(content)
        assert pieces_digest(path) != digest
        content[place] ^= 1
    path.write_bytes(content[PIECE:] + content[:PIECE])
    assert pieces_digest(path) != digest


def test_the_file_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_tensors(path, {"a": torch.ones(1)}, {}, 0o600)
    assert path.stat().st_mode & 0o777 == 0o600
