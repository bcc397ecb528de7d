"""A finished federation of real processes is asked by one party, and answers as everybody's parts in one model do."""

from __future__ import annotations

import pytest

from helpers.federation_processes import PARTIES, make_folder, run_here
from helpers.forked import ForkedProcesses

ASKED = ("--prompt", "the river and", "--tokens", "8", "--temperature", "0")


@pytest.mark.slow
def test_a_party_generates_through_its_finished_federation(
    processes: ForkedProcesses, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = processes.folder
    make_folder(folder, train={"rounds": 2, "batch_size": 4, "micro_batch": 2})
    processes.coordinate()
    for name in PARTIES:
        processes.up(name)
    assert set(processes.wait().values()) == {0}
    processes.running.clear()

    processes.start("coordinator", "coordinator", "federation.yaml", "--questions")
    for name in PARTIES[1:]:
        processes.start(name, "resume", f"{name}/run")
    processes.start("asked", "generate", "alder/run", "--live", *ASKED)
    assert set(processes.wait().values()) == {0}, {name: processes.log(name) for name in processes.running}
    assert "they can read both" in " ".join(processes.log("asked").split())
    assert "all questions are answered" in processes.log("coordinator")

    newest = "run/private/checkpoints/round-00000002"
    shards = [word for name in PARTIES for word in ("--shard", str(folder / name / newest / "experts.safetensors"))]
    trunk = str(folder / "alder" / newest / "trunk.safetensors")
    tokenizer = ("--tokenizer", str(folder / "alder" / "run" / "private" / "tokenizer"))
    run_here("export", str(folder / "split"), "--trunk", trunk, *shards, *tokenizer, "--out", str(folder / "joined"))
    capsys.readouterr()
    run_here("generate", str(folder / "joined"), *ASKED)
    (expected,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("the river and")]
    assert expected in processes.log("asked").splitlines()
    assert len(expected) > len("the river and")
