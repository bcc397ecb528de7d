"""The page of `coterie dashboard`: what it says of runs that go on, wait, ended or are gone."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from coterie.audit.report.live_page import LiveRun, live_page
from coterie.errors import CheckpointError
from coterie.federation.rounds.run_folder import RunFolder

WIRE = {"birch": {"sent": 2_020_000, "received": 3_000, "tensors_sent": 2_000_000, "tensors_received": 2_900}}


def party(folder: Path, **status: Any) -> Path:
    """A party's run folder after two rounds of four and twenty seconds each."""
    (folder / "private").mkdir(parents=True)
    rows = [{"round": n, "loss_not_private": 4.5 - n / 10, "epsilon": 1.0 + n, "seconds": 20.0} for n in (1, 2)]
    (folder / "private" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (folder / "run.json").write_text(json.dumps({"kind": "federation", "party": "alder", "run": "ac74"}), "utf-8")
    told = {
        "at": time.time() - 7200,
        "role": "party",
        "party": "alder",
        "federation": "three",
        "rounds": 4,
        "round": 3,
        "committed": 2,
        "phase": "compute",
        "parties": ["alder", "birch", "cedar", "dogwood", "elm"],
        "missing": ["birch"],
        "absent": ["cedar"],
        "refused": {"dogwood": "roster-unknown"},
        "wire": WIRE,
        "privacy": {"epsilon": 3.0, "delta": 1e-5, "rounds_left": 2, "contributing": True},
    }
    (folder / "status.json").write_text(json.dumps(told | status), "utf-8")
    return folder


def page_of(*folders: Path, refresh_s: int = 3) -> str:
    return live_page([LiveRun.read(folder) for folder in folders], refresh_s).replace("\xa0", " ")


def cells(page: str, who: str) -> list[str]:
    row = re.search(rf"<tr><td[^>]*>{who}</td>(.*?)</tr>", page)
    assert row is not None
    return re.findall(r"<td[^>]*>(.*?)</td>", row[1])


def test_a_running_party_tells_time_left_who_is_missing_bytes_and_its_budget(tmp_path: Path) -> None:
    folder = party(tmp_path / "run")
    with RunFolder(folder):
        page = page_of(folder)
    assert "three, alder: 2 of 4 rounds; about 40 s left; waiting for birch." in page
    assert cells(page, "alder") == ["this party", "–", "–"]
    assert cells(page, "birch") == ["missing", "2.0 MB", "3.0 kB"]
    assert cells(page, "cedar")[0] == "gone; the others go on"
    assert cells(page, "dogwood")[0] == "turned away (roster-unknown)"
    assert cells(page, "elm")[0] == "here"
    assert "epsilon 3.000 spent at delta 1e-05, 2 releases left" in page
    assert '<meta http-equiv="refresh" content="3">' in page
    assert "<script" not in page
    assert not re.search(r"(src|href)=", page)


def test_a_party_that_nobody_runs_is_not_shown_as_running(tmp_path: Path) -> None:
    page = page_of(party(tmp_path / "run"))
    assert "2 of 4 rounds; not running, last seen 2.0 h ago." in page
    assert "about" not in page
    assert "as it was last seen" in page
    assert "2 of 4 rounds; finished." in page_of(party(tmp_path / "ended", ending="finished"))


def test_a_spent_budget_is_said(tmp_path: Path) -> None:
    spent = {"epsilon": 8.0, "delta": 1e-5, "rounds_left": 0, "contributing": False, "budget": {"epsilon": 8.0}}
    page = page_of(party(tmp_path / "run", privacy=spent))
    assert "epsilon 8.000 spent of 8 at delta 1e-05, 0 releases left; it is spent, the party only hosts" in page
    assert "nothing bounds it" in page_of(party(tmp_path / "none", privacy={"epsilon": None, "delta": 1e-5}))


def test_a_coordinator_has_no_loss_and_several_runs_share_a_page(tmp_path: Path) -> None:
    keeper = tmp_path / "coordinator"
    keeper.mkdir()
    status = {
        "role": "coordinator",
        "federation": "three",
        "rounds": 4,
        "committed": 1,
        "parties": ["alder", "birch"],
    }
    (keeper / "status.json").write_text(json.dumps(status | {"waiting_for": ["alder"]}), "utf-8")
    page = page_of(keeper)
    assert "Loss, private" not in page
    assert cells(page, "alder") == ["late: the others wait"]
    both = page_of(keeper, party(tmp_path / "run"))
    assert both.index("three, coordinator: 1 of 4 rounds") < both.index("three, alder: 2 of 4 rounds")
    assert both.index("late: the others wait") < both.index("Loss, private to the owner")


def test_a_run_of_one_party_before_its_first_round_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "first"
    with RunFolder(folder):
        page = page_of(folder)
    assert f"run {tmp_path.name}/first: 0 rounds." in page


def test_a_run_that_was_made_longer_counts_to_its_new_end(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "private").mkdir(parents=True)
    (folder / "private" / "metrics.jsonl").write_text('{"round": 1, "loss_not_private": 4.5}\n', "utf-8")
    (folder / "config.yaml").write_text(
        "{model: {family: olmoe}, data: {train: a.txt}, train: {rounds: 2}, run_dir: .}"
    )
    for marker, planned in (({"run": "a"}, 2), ({"run": "a", "rounds": 3}, 3)):
        (folder / "run.json").write_text(json.dumps(marker), "utf-8")
        assert f"1 of {planned} rounds" in page_of(folder)


def test_the_folder_of_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        LiveRun.read(tmp_path)
    assert error.value.code == "run-dir-none"
