"""Files of a private run that a disk or a bad copy damaged: one sentence each, and the spool goes on without them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from coterie.dp.accounting.ledger import existing_ledger
from coterie.dp.accounting.merging import merge
from coterie.dp.accounting.spool import Spool
from coterie.errors import LedgerError
from helpers.first_formats import first_spool
from helpers.spending import TEXTS, spend

DEEP = b"[" * 100_000
NO_OBJECTS = [b"", b"{", b"\xff\xfe\x00", b"null", b"[1]", b"{}", b"\0" * 200, DEEP]
LOTS = [
    b'{"draw": null, "pins": {}, "lot": {"round": 3, "records": [1], "units": [0]}}',
    b'{"draw": 0, "pins": [1], "lot": {"round": 3, "records": [1], "units": [0]}}',
    b'{"draw": 0, "pins": {}, "lot": [1]}',
    b'{"draw": 0, "pins": {}, "lot": {"round": 3, "records": [[1]], "units": [0]}}',
    b'{"draw": 0, "pins": {}, "lot": {"round": 3, "records": [1.5], "units": [0]}}',
    b'{"draw": 0, "pins": {}, "lot": {"round": 3, "records": [-1], "units": [0]}}',
    b'{"draw": 0, "pins": {}, "lot": {"round": 3, "records": [1, 2], "units": [0]}}',
    b'{"draw": 0, "pins": {}, "lot": {"round": 3, "records": [1%s], "units": [0]}}' % (b"0" * 30),
    b'{"draw": 0, "pins": {}, "lot": {"round": 1e999, "records": [1], "units": [0]}}',
]
CUTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "torn": lambda content: content[:-3],
    "zeros": lambda content: bytes(len(content)),
    "other": lambda content: b"\x07" * 100,
}


@pytest.mark.parametrize("content", [*NO_OBJECTS, *LOTS], ids=lambda content: str(content[:90]))
def test_a_damaged_lot_is_named_and_can_be_removed(tmp_path: Path, content: bytes) -> None:
    first_spool(tmp_path / "spool")
    path = tmp_path / "spool" / "lot.json"
    path.write_bytes(content)
    spool = Spool(path.parent)
    with pytest.raises(LedgerError, match=r"lot\.json is damaged") as caught:
        spool.stored_lot()
    assert caught.value.code == "dp-spool-damaged"
    path.unlink()
    assert spool.stored_lot() is None


@pytest.mark.parametrize("cut", CUTS)
def test_a_damaged_result_is_named_and_can_be_removed(tmp_path: Path, cut: str) -> None:
    path = first_spool(tmp_path / "spool")
    path.write_bytes(CUTS[cut](path.read_bytes()))
    spool = Spool(path.parent)
    with pytest.raises(LedgerError, match=f"{path.name} is damaged") as caught:
        spool.releases()
    assert caught.value.code == "dp-spool-damaged"
    path.unlink()
    assert spool.releases() == []


@pytest.mark.parametrize("pins", ["", "{", "[1]", DEEP.decode()], ids=lambda pins: pins[:9])
def test_a_result_whose_header_says_nothing_is_damaged(tmp_path: Path, pins: str) -> None:
    path = first_spool(tmp_path / "spool", pins=pins)
    with pytest.raises(LedgerError, match="is damaged"):
        Spool(path.parent).releases()


@pytest.mark.parametrize("line", [DEEP, b"null", b"\xff"], ids=["deep", "null", "no text"])
@pytest.mark.parametrize("first", [True, False])
def test_a_line_of_a_ledger_that_is_no_entry_is_refused(tmp_path: Path, line: bytes, first: bool) -> None:
    path = spend(tmp_path / "there", "theirs", TEXTS).folder / "ledger.jsonl"
    path.write_bytes((b"" if first else path.read_bytes()) + line + b"\n")
    with pytest.raises(LedgerError, match="is not a ledger" if first else "does not continue the chain"):
        existing_ledger(path.parent).entries()
    with pytest.raises(LedgerError, match="does not continue the chain"):
        merge(tmp_path / "there", tmp_path / "here")
