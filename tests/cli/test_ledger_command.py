"""`coterie ledger` and `coterie purge`."""

from __future__ import annotations

import fcntl
import json
import math
import os
from pathlib import Path

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant

from coterie.cli.app import main
from coterie.config import TrainConfig, dump_yaml
from coterie.dp.accounting.accountant import Mechanism
from coterie.dp.accounting.dataset import dataset_digest
from coterie.dp.accounting.ledger import open_ledger
from coterie.dp.accounting.spool import Spool
from coterie.dp.accounting.texts import Keyring
from coterie.dp.noise.pooled import PooledNoise
from coterie.federation.rounds.run_folder import is_running
from coterie.training.purging import purge
from helpers.spending import TEXTS, composed, spend


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def test_a_file_is_no_folder_in_which_nothing_was_spent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ledger.jsonl").write_text("{}\n")
    assert run("ledger", "list", "--ledger", tmp_path / "ledger.jsonl") == 1
    assert "is no folder of ledgers" in capsys.readouterr().err


def test_list_show_and_merge_add_up_what_two_folders_spent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here, there, figures = tmp_path / "here", tmp_path / "there", tmp_path / "figures.json"
    assert run("ledger", "list", "--ledger", here) == 0
    assert "no run was counted here yet" in capsys.readouterr().out
    spend(here, "own", TEXTS)
    spend(there, "theirs", [*TEXTS, "one more"])
    assert run("ledger", "merge", there, "--ledger", here) == 0
    assert "ledgers of 1 data sets copied" in capsys.readouterr().out
    assert run("ledger", "list", "--ledger", here, "--json", figures) == 0
    rows = {row["run"]: row for row in json.loads(figures.read_text())["runs"]}
    assert {name: row["merged"] for name, row in rows.items()} == {"own": False, "theirs": True}
    assert rows["own"]["epsilon"] == composed(1)
    assert rows["own"]["lifetime"] == composed(2)
    assert run("ledger", "show", "own", "--ledger", here) == 0
    shown = capsys.readouterr().out
    assert f"lifetime   epsilon {composed(2):.3f} at delta 1e-05" in shown
    assert "counted    1 run hashed with another key, so assumed to be on the same text" in shown
    assert not any(text in shown for text in TEXTS)


def test_from_an_export_anybody_can_compute_epsilon_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spend(tmp_path / "ledger", "own", TEXTS, rounds=7)
    assert run("ledger", "export", tmp_path / "spent.json", "--ledger", tmp_path / "ledger") == 0
    written = (tmp_path / "spent.json").read_text()
    (own,) = json.loads(written)["runs"]
    mechanism = own["mechanism"]
    gaussian = dp_accounting.GaussianDpEvent(mechanism["noise_multiplier"])
    accountant = PLDAccountant()
    accountant.compose(
        dp_accounting.PoissonSampledDpEvent(mechanism["sampling_rate"], gaussian), len(own["released"])
    )
    assert own["epsilon"] == pytest.approx(accountant.get_epsilon(own["delta"]), rel=1e-3)
    assert (own["planned"], own["rounds"], own["units"]) == (7, 7, len(TEXTS))
    secret = [Keyring(tmp_path / "ledger").own.hex(), dataset_digest(TEXTS), *TEXTS]
    assert not [each for each in secret if each in written]
    assert run("ledger", "show", "own", "--ledger", tmp_path / "ledger") == 0
    shown = capsys.readouterr().out
    assert "joins with chance 0.05" in shown
    assert "noise of 2.000 clip norms" in shown
    assert f"at most {math.exp(own['epsilon']):,.4g}-fold" in shown


@pytest.mark.parametrize(("colluding", "said"), [(1, True), (None, False)])
def test_where_noise_was_shared_the_ledger_says_against_whom_alone_its_figures_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], colluding: int | None, said: bool
) -> None:
    book = open_ledger("a" * 64, tmp_path)
    book.start_run("r", Mechanism(2.0, 1.0), 1, unit="record", units=9, pooled=PooledNoise(3, colluding).to_json())
    book.record_release("r", 1, 0, "d" * 64, {})
    assert run("ledger", "show", "r", "--ledger", tmp_path) == 0
    shown = capsys.readouterr().out
    assert ("against any 1 of the 2 others together, not against all" in shown) is said
    assert ("whoever holds all that it released" in shown) is not said
    assert run("ledger", "export", tmp_path / "spent.json", "--ledger", tmp_path) == 0
    (written,) = json.loads((tmp_path / "spent.json").read_text())["runs"]
    assert written["pooled"] == {"parties": 3, "colluding": colluding}


def test_what_is_not_there_is_said_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spend(tmp_path, "own", TEXTS)
    assert run("ledger", "show", "nobody", "--ledger", tmp_path) == 1
    assert "Error dp-ledger-no-run" in capsys.readouterr().err
    assert run("ledger", "show", "--ledger", tmp_path) == 2
    assert run("ledger", "merge", tmp_path / "nothing", "--ledger", tmp_path) == 1
    assert "Error dp-ledger-none" in capsys.readouterr().err


def finished_run(tmp_path: Path) -> tuple[Path, Path]:
    """A run folder of `coterie train` and its spool."""
    folder, ledger = tmp_path / "run", tmp_path / "ledger"
    (folder / "private" / "cache").mkdir(parents=True)
    (folder / "private" / "cache" / "layer").write_text("weights")
    (folder / "private" / "metrics.jsonl").write_text("{}")
    (folder / "private" / "result.json").write_text("{}")
    (folder / "run.json").write_text(json.dumps({"run": "a" * 64, "privacy_run": "cafe"}))
    values = {
        "model": {"family": "olmoe"},
        "data": {"train": ["x.txt"], "tokenizer": {"train": {"files": ["y.txt"]}}},
        "train": {"rounds": 1},
        "privacy": {"epsilon": 8.0, "ledger": str(ledger)},
        "run_dir": str(folder),
    }
    dump_yaml(folder / "config.yaml", TrainConfig.model_validate(values))
    book = open_ledger("d" * 64, ledger)
    book.start_run("cafe", Mechanism(2.0, 0.1), 1, unit="record", units=10)
    Spool(book.folder / "spool" / "other").close()
    spool = Spool(book.folder / "spool" / "cafe")
    (spool.folder / "lot.json").write_text("{}")
    spool.close()
    return folder, spool.folder


def test_purge_removes_what_holds_text_and_never_a_ledger_entry(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, spool = finished_run(tmp_path)
    entries = (spool.parent.parent / "ledger.jsonl").read_bytes()
    assert run("purge", folder) == 0
    shown = capsys.readouterr().out
    assert not spool.exists()
    assert not (folder / "private" / "cache").exists()
    assert (spool.parent / "other").is_dir(), "other runs' spools stay"
    assert (folder / "private" / "metrics.jsonl").exists()
    assert (spool.parent.parent / "ledger.jsonl").read_bytes() == entries
    for part in ("released sums", "models, checkpoints and exports", "the ledger keeps its entries"):
        assert part in shown
    assert run("purge", folder) == 0
    assert "nothing to remove" in capsys.readouterr().out


def test_purge_refuses_a_run_that_is_running_or_not_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, spool = finished_run(tmp_path)
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert run("purge", folder) == 1
    assert "Error purge-running" in capsys.readouterr().err
    os.close(lock)
    held = Spool(spool)
    assert run("purge", folder) == 1
    assert "Error dp-spool-busy" in capsys.readouterr().err
    held.close()
    (folder / "private" / "result.json").unlink()
    assert run("purge", folder) == 1
    assert "Error purge-unfinished" in capsys.readouterr().err
    assert spool.exists()
    assert run("purge", folder, "--give-up") == 0
    assert not spool.exists()
    assert run("purge", tmp_path) == 1
    assert "Error run-dir-none" in capsys.readouterr().err


def test_purge_does_not_say_that_nothing_is_left_where_it_looks_in_the_wrong_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, spool = finished_run(tmp_path)
    (tmp_path / "ledger").rename(tmp_path / "moved")
    assert run("purge", folder) == 1
    assert "Error purge-no-ledger" in capsys.readouterr().err
    assert (folder / "private" / "cache").exists()
    (tmp_path / "moved").rename(tmp_path / "ledger")
    assert run("purge", folder) == 0
    assert not spool.exists()


def test_nobody_takes_a_run_up_while_it_is_purged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = finished_run(tmp_path)
    seen = []
    monkeypatch.setattr("coterie.training.purging.shutil.rmtree", lambda path: seen.append(is_running(folder)))
    purge(folder)
    assert seen == [True, True]
    assert not is_running(folder)
