"""`coterie split` and `coterie export`: the same model comes out, and mistakes are one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from coterie.cli import app as cli
from coterie.config import ModelSpec
from coterie.models.split.shards import load_tensors, shard_file
from coterie.models.zoo.build import build_model
from coterie.models.zoo.tiny import tiny_model

FEDERATION = """
name: trees
model: {{path: {path}, dtype: bfloat16}}
exchange: tokens
parties: {{alder: {{endpoint: "localhost:7001"}}, birch: {{endpoint: "localhost:7002"}}}}
coordinator: {{endpoint: "localhost:7000"}}
train: {{rounds: 1}}
placement: {placement}
"""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def test_split_then_export_gives_the_same_weights(checkpoint, tmp_path, capsys):
    parts, joined = tmp_path / "parts", tmp_path / "joined"
    parties = ("--party", "alder", "--party", "birch")
    code, out, _ = run(capsys, "split", checkpoint, *parties, "--out", parts, "--json", tmp_path / "m.json")
    assert code == 0
    assert shard_file("birch") in out
    assert json.loads((tmp_path / "m.json").read_text())["placement"]["parties"] == ["alder", "birch"]
    code, out, _ = run(capsys, "export", parts, "--out", joined, "--json", tmp_path / "e.json")
    assert code == 0
    assert "config.json" in json.loads((tmp_path / "e.json").read_text())["files"]
    before, after = (build_model(ModelSpec(path=folder)).state_dict() for folder in (checkpoint, joined))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_federations_file_gives_model_parties_placement_and_dtype(checkpoint, tmp_path, capsys):
    table = {layer: {expert: "alder" if expert < 6 else "birch" for expert in range(8)} for layer in range(3)}
    path = tmp_path / "federation.yaml"
    path.write_text(FEDERATION.format(path=checkpoint, placement=json.dumps(table)))
    code, _, err = run(capsys, "split", "--federation", path, "--out", tmp_path / "parts")
    assert code == 0, err
    shard = load_tensors(tmp_path / "parts" / shard_file("birch"))
    assert {key.split(".")[3] for key in shard} == {"6", "7"}
    assert {tensor.dtype for tensor in shard.values()} == {torch.bfloat16}


def test_a_placement_file_is_read_and_checked(checkpoint, tmp_path, capsys):
    path = tmp_path / "placement.yaml"
    everything = "{0: [0, 1, 2, 3, 4, 5, 6, 7], 1: [0, 1, 2, 3, 4, 5, 6, 7], 2: [0, 1, 2, 3, 4, 5, 6, 7]}"
    path.write_text(f"alder: {everything}\n")
    assert run(capsys, "split", checkpoint, "--placement", path, "--out", tmp_path / "parts")[0] == 0
    path.write_text(f"alder: {everything}\nbirch: {{1: [3]}}\n")
    code, _, err = run(capsys, "split", checkpoint, "--placement", path, "--out", tmp_path / "other")
    assert code == 1
    assert "layer 1 expert 3 is hosted by alder and by birch" in err
    path.write_text("alder: [1, 2]\n")
    code, _, err = run(capsys, "split", checkpoint, "--placement", path, "--out", tmp_path / "other")
    assert code == 1
    assert "placement-format" in err
    assert not (tmp_path / "other").exists()


def test_mistakes_on_the_command_line_are_wrong_usage(checkpoint, tmp_path, capsys):
    out = tmp_path / "parts"
    assert run(capsys, "split", "--out", out)[0] == 2
    assert run(capsys, "split", checkpoint, "--out", out)[0] == 2
    assert run(capsys, "split", checkpoint, "--party", "a", "--dtype", "int8", "--out", out)[0] == 2
    code, _, err = run(capsys, "split", tmp_path / "none", "--party", "a", "--out", out)
    assert code == 1
    assert "model-no-folder" in err
    code, _, err = run(capsys, "export", tmp_path, "--out", tmp_path / "joined")
    assert code == 1
    assert "not a split model" in err


def test_plan_says_memory_bytes_and_the_cheaper_exchange(checkpoint, tmp_path, capsys):
    settings = tmp_path / "federation.yaml"
    settings.write_text(FEDERATION.format(path=checkpoint, placement="round_robin"))
    code, out, _ = run(capsys, "plan", settings, "--gbit", 10, "--json", tmp_path / "plan.json")
    assert code == 0
    assert "alder" in out
    assert "experts moves less" in out
    found = json.loads((tmp_path / "plan.json").read_text())
    parties = {(each["party"], each["exchange"]): each for each in found["parties"]}
    assert parties.keys() == {(name, exchange) for name in ("alder", "birch") for exchange in ("tokens", "experts")}
    assert parties["alder", "experts"]["need"]["device"] < parties["alder", "tokens"]["need"]["device"]
    assert parties["alder", "experts"]["down"] == 2 * parties["birch", "experts"]["hosted"]
    code, _, err = run(capsys, "plan", settings, "--parties", 5)
    assert code == 1
    assert "plan-parties: --parties 5 is for --preset" in err
    code, _, err = run(capsys, "plan", tmp_path / "nowhere.yaml")
    assert code == 1
    assert "nowhere.yaml" in err


def test_plan_says_that_a_party_may_stop_where_pushes_are_masked(checkpoint, tmp_path, capsys):
    settings = yaml.safe_load(FEDERATION.format(path=checkpoint, placement="round_robin"))
    settings["parties"]["cedar"] = {"endpoint": "127.0.0.1:7413"}
    settings |= {
        "exchange": "experts", "aggregation": "masked",
        "noise": "shared", "colluding": 1, "noise_multiplier": 2.0, "trunk": "shared",
        "privacy": {"epsilon": 8.0, "delta": 1e-3, "clip_norm": 1.0, "lot_size": 4},
    }  # fmt: skip
    (tmp_path / "federation.yaml").write_text(yaml.safe_dump(settings))
    code, out, err = run(capsys, "plan", tmp_path / "federation.yaml")
    assert code == 0, err
    assert "with the shares that fewer parties need, while at least 2 contribute" in " ".join(out.split())


def test_models_json_has_the_columns_of_the_folder_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "table.json"
    (tmp_path / "table").mkdir()
    column = {"title": "largest error", "cells": {"olmoe": 1e-7}}
    (tmp_path / "table" / "norms.json").write_text(json.dumps(column))
    code, _, _ = run(capsys, "models", "--json", target)
    assert code == 0
    found = {row["model_type"]: row["largest error"] for row in json.loads(target.read_text())["families"]}
    assert found["olmoe"] == 1e-7
    assert found["mixtral"] is None
