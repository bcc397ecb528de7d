"""Parts in chunks: interrupted, changed, too large, and with names that an enemy chose."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from coterie.errors import ModelError, TransportError
from coterie.federation.enrolment import fetching
from coterie.federation.enrolment.fetching import fetch_parts
from coterie.federation.wire.frame import CHUNK_BYTES
from coterie.models.split.shards import SPLIT_FORMAT

OWN = "experts-birch.safetensors"


class Handing:
    """A `PartsDesk` whose line can break."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = {OWN: b"own", **files}
        self.listed = {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in self.files.items()}
        self.asked: list[tuple[str, int]] = []
        self.breaks_after: list[int] = []

    def manifest(self) -> bytes:
        return json.dumps({"format": SPLIT_FORMAT, "files": self.listed}).encode()

    def chunks(self, name: str, first: int) -> Iterator[bytes]:
        self.asked.append((name, first))
        content, left = self.files[name], self.breaks_after.pop(0) if self.breaks_after else None
        for count, at in enumerate(range(first * CHUNK_BYTES, len(content), CHUNK_BYTES)):
            if count == left:
                raise TransportError("the line broke", code="unreachable")
            yield content[at : at + CHUNK_BYTES]


TRUNK = bytes(range(256)) * 4096 * 3 + b"the end"  # three chunks and a little


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "_AGAIN_S", 0.0)


def fetch(handing: Handing, folder: Path, patience_s: float = 0.0) -> dict[str, Any]:
    return fetch_parts(handing, "birch", folder, lambda *_: None, patience_s=patience_s)  # type: ignore[arg-type]


def test_an_interrupted_file_goes_on_with_the_next_chunk(tmp_path: Path) -> None:
    handing = Handing({"trunk.safetensors": TRUNK, "experts-cedar.safetensors": b"x"})
    handing.breaks_after = [5, 2, 0]  # the own shard comes whole, of the trunk two chunks, then none
    with pytest.raises(TransportError) as caught:
        fetch(handing, tmp_path)
    assert caught.value.code == "join-interrupted"
    assert not (tmp_path / "trunk.safetensors").exists()
    fetch(handing, tmp_path)
    assert (tmp_path / "trunk.safetensors").read_bytes() == TRUNK
    assert [first for name, first in handing.asked if name == "trunk.safetensors"] == [0, 2, 2]
    assert not (tmp_path / "experts-cedar.safetensors").exists()
    assert not list(tmp_path.glob(".*.part"))
    handing.asked.clear()
    fetch(handing, tmp_path)  # what is there is not fetched again
    assert handing.asked == []


def test_half_a_chunk_is_fetched_again_whole(tmp_path: Path) -> None:
    handing = Handing({"trunk.safetensors": TRUNK})
    digest = handing.listed["trunk.safetensors"]["sha256"]
    (tmp_path / f".trunk.safetensors.{str(digest)[:16]}.part").write_bytes(TRUNK[: CHUNK_BYTES + 1000])
    fetch(handing, tmp_path)
    assert (tmp_path / "trunk.safetensors").read_bytes() == TRUNK
    assert handing.asked == [(OWN, 0), ("trunk.safetensors", 1)]


@pytest.mark.parametrize("change", ["other bytes", "too short", "too long"])
def test_a_file_that_changed_since_the_split_is_found_and_fetched_anew(tmp_path: Path, change: str) -> None:
    handing = Handing({"trunk.safetensors": TRUNK})
    handing.files["trunk.safetensors"] = {
        "other bytes": TRUNK[:-1] + b"!",
        "too short": TRUNK[:-1],
        "too long": TRUNK + bytes(CHUNK_BYTES),
    }[change]
    with pytest.raises(ModelError) as caught:
        fetch(handing, tmp_path)
    assert caught.value.code == "join-changed-file"
    assert sorted(path.name for path in tmp_path.iterdir()) == [OWN, "manifest.json"]
    handing.files["trunk.safetensors"] = TRUNK
    fetch(handing, tmp_path)
    assert (tmp_path / "trunk.safetensors").read_bytes() == TRUNK


def test_a_file_spoilt_on_the_disk_is_fetched_again(tmp_path: Path) -> None:
    handing = Handing({"trunk.safetensors": TRUNK})
    fetch(handing, tmp_path)
    (tmp_path / "trunk.safetensors").write_bytes(TRUNK[:-1] + b"!")
    fetch(handing, tmp_path)
    assert (tmp_path / "trunk.safetensors").read_bytes() == TRUNK


@pytest.mark.parametrize("name", ["model/../../party.yaml", "model//etc/passwd", "model/a/b", "model/.ssh", "model/"])
def test_names_that_lead_elsewhere_are_refused_before_a_byte_is_written(tmp_path: Path, name: str) -> None:
    handing = Handing({name: b"x", "trunk.safetensors": b"y"})
    with pytest.raises(ModelError) as caught:
        fetch(handing, tmp_path / "parts")
    assert caught.value.code == "join-manifest"
    assert handing.asked == []
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["manifest.json"]


@pytest.mark.parametrize("lacking", [OWN, "trunk.safetensors"])
def test_a_model_that_was_split_for_others_is_refused(tmp_path: Path, lacking: str) -> None:
    handing = Handing({"trunk.safetensors": TRUNK, "experts-cedar.safetensors": b"x"})
    del handing.listed[lacking]
    with pytest.raises(ModelError, match=lacking) as caught:
        fetch(handing, tmp_path)
    assert caught.value.code == "join-no-part"
    assert handing.asked == []


@pytest.mark.parametrize("entry", [{"bytes": -1}, {"bytes": "7"}, {"sha256": "../x"}, {"sha256": None}])
def test_entries_that_cannot_be_checked_are_refused(tmp_path: Path, entry: dict[str, Any]) -> None:
    handing = Handing({"trunk.safetensors": TRUNK})
    handing.listed["trunk.safetensors"] |= entry
    with pytest.raises(ModelError) as caught:
        fetch(handing, tmp_path)
    assert caught.value.code == "join-manifest"


def test_a_disk_that_is_too_small_is_said_before_a_byte_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        free: int

    handing = Handing({"trunk.safetensors": TRUNK})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(len(TRUNK) - 1))
    with pytest.raises(ModelError, match="are free") as caught:
        fetch(handing, tmp_path)
    assert caught.value.code == "join-disk"
    assert handing.asked == []
