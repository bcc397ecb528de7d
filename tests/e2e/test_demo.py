"""The demo end to end: real processes, real TLS, every file it promises, and nothing left running."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from coterie.config import FederationConfig, PartyConfig, TrainConfig, load_yaml
from coterie.demonstration.folder import MADE
from coterie.demonstration.plan import ARMS
from coterie.federation.identity.certificates import Role
from coterie.federation.identity.identify import identify
from helpers.waiting import until

QUICK = ("--quick", "--parties", "3")
DEMO = (sys.executable, "-m", "coterie.cli.app", "demo", *QUICK)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def running_in(folder: Path) -> list[int]:
    """Processes that work in a folder."""
    found = []
    for process in psutil.process_iter(["cwd", "status"]):
        cwd = process.info["cwd"]
        if cwd and Path(cwd) == folder and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.pid)
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A whole quick demo of three parties and two rounds; its folder and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    arguments = ("--rounds", "2", "--dir", str(folder / "run"), "--json", str(folder / "demo.json"))
    done = subprocess.run([*DEMO, *arguments], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.mark.slow
def test_the_figures_have_the_agreed_shape(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = finished
    figures = json.loads((folder / "demo.json").read_text("utf-8"))
    assert figures == json.loads((folder / "run" / "results.json").read_text("utf-8"))
    assert (figures["parties"], figures["rounds"]) == (["alder", "birch", "cedar"], 2)
    together = {"tokens", "experts", "experts_dp", "experts_dp_shared"}
    assert set(figures["arms"]) == {"public", "isolated", "centralised", "isolated_dp", "centralised_dp", *together}
    for arm in figures["arms"].values():
        assert all(2.0 < arm["loss"][party] < 8.0 for party in figures["parties"])
    assert set(figures["wire"]["arms"]) == together
    assert all(1.0 < moved["ratio"] <= 1.03 for moved in figures["wire"]["arms"].values())
    for arm in ("isolated_dp", "experts_dp", "experts_dp_shared", "centralised_dp"):
        for spent in figures["arms"][arm]["privacy"].values():
            assert 0 < spent["epsilon"] <= 8.0
            assert (spent["delta"], spent["rounds"]) == (1e-5, 2)
            assert spent["noise_multiplier"] > 0
    audit = figures["audit"]
    assert {"recovery", "layers", "prior"} <= set(audit["tokens"])
    assert {"recovery", "prior", "advantage", "auc", "epsilon_lower", "epsilon_ceiling"} <= set(audit["experts_dp"])
    assert 0 < audit["experts_dp"]["epsilon_claimed"] <= 8.0
    assert audit["outcome"] != "alarm"
    assert set(audit["findings"]) == together - {"experts_dp_shared"}  # what others receive there is random numbers
    memory = {arm: figures["memory"][arm]["alder"]["model_state_bytes"] for arm in figures["arms"]}
    assert memory["tokens"] < 0.7 * memory["isolated"]
    assert memory["centralised"] == memory["isolated"]


@pytest.mark.slow
def test_the_screen_ends_with_tables_meaning_and_warning(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    _, done = finished
    titles = [arm.title for arm in ARMS.values()]
    for piece in (*titles, "peak memory", "ratio", "privacy spent per record"):
        assert piece in done.stdout
    assert "`tokens` does NOT keep the text" in done.stdout
    assert "losses above are NOT private" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr  # piped: plain lines
    for phase in ("1/6 text", "2/6 public", "3/6 alone and pooled", "4/6 together", "5/6 attack", "6/6 compare"):
        assert phase in done.stderr


@pytest.mark.slow
def test_the_folder_is_complete(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    root = finished[0] / "run"
    assert {path.name for path in root.iterdir()} == MADE
    private = ("experts_dp", "experts_dp_shared")
    for arm in ("tokens", "experts", *private):
        federation = load_yaml(root / arm / "federation.yaml", FederationConfig)
        for party in federation.parties:
            own = load_yaml(root / arm / party / "party.yaml", PartyConfig)
            identify(federation, own.kit, party, Role.PARTY)  # kit and signed roster fit what is written
            assert own.trunk.is_file()
            assert own.shard.is_file()
            alone = "isolated_dp" if arm in private else "isolated"
            for run in (own.run_dir, root / alone / party / "run"):
                assert (run / "private" / "metrics.jsonl").read_text("utf-8")
                assert list((run / "private" / "checkpoints").glob("round-*/manifest.json"))
            assert load_yaml(root / alone / party / "train.yaml", TrainConfig)
    assert (root / "public" / "run" / "model" / "config.json").is_file()
    names = {path.stem for path in (root / "logs").glob("*.log")}
    counted, alone_and_pooled, federations = 3, 2 * (3 + 1), 4 * (3 + 2)
    assert len(names) == len({"preloaded", "public", "split", "noise"}) + counted + alone_and_pooled + federations
    assert (root / "losses.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_ledger_adds_up_what_a_partys_text_spent_alone_and_together(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    root = finished[0] / "run"
    texts = [path.read_text("utf-8") for path in (root / "ledger").glob("*/ledger.jsonl")]
    ledgers = [json.loads(line) for text in texts for line in text.splitlines()]
    assert (
        sum(entry["kind"] == "release" for entry in ledgers) == (3 + 3 + 3 + 1) * 2
    )  # alone, together twice, in one place
    log = (root / "logs" / "experts_dp-alder.log").read_text("utf-8")
    own, lifetime = (
        float(re.search(rf"{words} +epsilon ([0-9.]+)", log)[1])  # type: ignore[index]
        for words in ("this run", "lifetime")
    )
    assert own <= 8.0 < lifetime


@pytest.mark.slow
def test_nothing_keeps_running(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    assert running_in(finished[0] / "run") == []


@pytest.mark.slow
def test_ctrl_c_ends_every_process(tmp_path: Path) -> None:
    root = tmp_path / "run"
    demo = subprocess.Popen([*DEMO, "--dir", str(root)], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    try:
        until(lambda: running_in(root), 60)
        demo.send_signal(signal.SIGINT)
        assert demo.wait(timeout=30) == 130
    finally:
        demo.kill()
    assert running_in(root) == []
    assert demo.stderr is not None
    assert "interrupted: every process of the demo was ended" in demo.stderr.read()
    demo.stderr.close()


@pytest.mark.slow
def test_a_process_that_dies_ends_the_demo_with_its_log_named(tmp_path: Path) -> None:
    root = tmp_path / "run"
    demo = subprocess.Popen([*DEMO, "--dir", str(root)], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    try:
        until(lambda: len(running_in(root)) > 1, 60)  # what commands are forks of, and the first of them
        os.kill(max(running_in(root)), signal.SIGKILL)
        assert demo.wait(timeout=30) == 1
    finally:
        demo.kill()
    assert running_in(root) == []
    assert demo.stderr is not None
    told = demo.stderr.read()
    assert "public checkpoint (`coterie train public/train.yaml`) was ended by signal 9" in told
    assert str(root / "logs" / "public.log") in told
    demo.stderr.close()


def refused(*arguments: str) -> str:
    done = subprocess.run([*DEMO, *arguments], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_folder_with_something_else_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    told = refused("--dir", str(tmp_path))
    assert "demo-folder" in told
    assert "thesis.txt" in told
    assert list(tmp_path.iterdir()) == [tmp_path / "thesis.txt"]


def test_two_demos_in_one_folder_are_refused_in_words(tmp_path: Path) -> None:
    from coterie.federation.rounds.run_folder import RunFolder

    held = RunFolder(tmp_path)
    try:
        assert "another process is running" in refused("--dir", str(tmp_path))
    finally:
        held.close()
