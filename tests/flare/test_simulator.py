"""A whole federation inside FLARE's simulator: three sites, the hub between them, members as their own processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from helpers.federation_processes import PARTIES, make_folder, run_here

pytest.importorskip("nvflare", reason="the extra `nvflare` is not installed")


@pytest.mark.slow
def test_three_sites_train_through_the_hub_with_files_of_their_own(tmp_path: Path) -> None:
    folder = tmp_path / "grove"
    patient = {"deadline_s": 300.0, "round_deadline_s": 900.0, "join_deadline_s": 900.0}
    train = {"rounds": 2, "batch_size": 4, "micro_batch": 2, "eval_every": 0, "checkpoint_every": 2}
    # An endpoint that nobody listens on: who dialled it would not arrive.
    endpoints = [f"127.0.0.1:{port}" for port in (1, 2, 3, 4)]
    make_folder(folder, endpoints, train=train, **patient)
    run_here(
        "export-nvflare", str(folder / "federation.yaml"), "--site", "coordinator=alder", "--out", f"{folder}/job"
    )
    members = {name: {"settings": str(folder / name / "party.yaml")} for name in PARTIES}
    kit, run_dir = str(folder / "kits" / "coordinator"), str(folder / "coordinator")
    members["coordinator"] = {"settings": str(folder / "federation.yaml"), "kit": kit, "run_dir": run_dir}
    local = tmp_path / "workspace" / "local"
    local.mkdir(parents=True)
    (local / "coterie.json").write_text(json.dumps({"members": members}), encoding="utf-8")
    allowed = {"format_version": 2, "class_allow_list": ["coterie.flare."]}
    (local / "resources.json").write_text(json.dumps(allowed), encoding="utf-8")
    flare = [str(Path(sys.executable).with_name("nvflare")), "simulator", f"{folder}/job"]
    flare += ["-w", str(local.parent), "-c", ",".join(PARTIES), "-t", str(len(PARTIES))]
    subprocess.run(flare, cwd=tmp_path, check=True, timeout=900)
    for name in PARTIES:
        result = json.loads((folder / name / "run" / "private" / "result.json").read_text("utf-8"))
        assert (result["finished"], result["rounds"]) == (True, 2)
        others = {*PARTIES} - {name}
        assert all(result["wire"][other]["tensors_received"] > 0 for other in others)
    assert (
        yaml.safe_load((folder / "federation.yaml").read_text("utf-8"))["parties"]["alder"]["endpoint"]
        == endpoints[0]
    )
