"""`coterie plan party.yaml` says what the ranks of a party hold, and how many suit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from coterie.cli.app import main
from coterie.config import FederationConfig, PartyConfig, load_yaml
from coterie.training.party import planned_ranks as planning
from coterie.training.party.planned_ranks import planned_ranks

SIZES = {
    "vocab_size": 50, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_experts": 4,
    "num_experts_per_tok": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "eos_token_id": 0,
}  # fmt: skip
FAST = {"epsilon": 8.0, "delta": 1e-3, "lot_size": 4, "isolation": "fast"}
FILES = dict.fromkeys(("kit", "trunk", "shard", "run_dir"), "x")


def settings(folder: Path, own: dict[str, Any], **agreed: Any) -> Path:
    """A party.yaml with its federation.yaml."""
    (folder / "own.txt").touch()
    (folder / "federation.yaml").write_text(json.dumps({
        "name": "grove", "model": {"family": "olmoe", "config": SIZES}, "exchange": "experts", "privacy": FAST,
        "train": {"rounds": 2}, "coordinator": {"endpoint": "127.0.0.1:7002"},
        "parties": {name: {"endpoint": f"127.0.0.1:{7000 + i}"} for i, name in enumerate(("alder", "birch"))},
        **agreed,
    }))  # fmt: skip
    party = {"party": "alder", "federation": "federation.yaml", "data": {"train": "own.txt"}, "device": "cpu"}
    (folder / "party.yaml").write_text(json.dumps(party | FILES | own))
    return folder / "party.yaml"


def said(path: Path, capsys: pytest.CaptureFixture[str], *options: object) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(path), *map(str, options)])
    assert not ended.value.code
    return capsys.readouterr().out


def test_ranks_of_both_kinds_and_what_the_file_asks_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, figures = settings(tmp_path, {"devices": 4, "experts_over": 2}), tmp_path / "plan.json"
    text = said(path, capsys, "--json", figures)
    found = json.loads(figures.read_text())
    ranks = [(row["ranks"], row["experts_over"]) for row in found["rows"]]
    assert ranks == [(2, 1), (4, 1), (8, 1), (2, 2), (4, 4)], "no more ranks than a layer has experts"
    assert found["isolation"] == "fast"
    assert found["refused"] == ""
    assert "party.yaml asks for `devices: 4, experts_over: 2`: " in text
    assert (found["now"]["ranks"], found["now"]["experts_over"]) == (4, 2)
    for row in (*found["rows"], found["now"]):
        assert row["together"] == row["gateway"] + (row["ranks"] - 1) * row["other"]
    assert "which all ranks share: one device holds it" in text


def test_devices_that_are_too_small_for_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Adapters, whose sums and layers are most of what the gateway holds."""
    path = settings(tmp_path, {"cache": "disk"}, lora={"rank": 8}, privacy="none")
    config = load_yaml(path, PartyConfig)
    found = planned_ranks(config, load_yaml(config.federation, FederationConfig))
    assert found.adapters
    alone, (half,) = found.one_together, [row.gateway for row in found.rows if row.experts_over == 2]
    assert alone is not None
    assert half < alone
    text = said(path, capsys, "--device-gb", (half + 1) / 1e9)
    assert "of devices with " in text
    assert "one device does not hold it. `experts_over: 2` is the fewest" in text
    assert "no number of devices holds it" in said(path, capsys, "--device-gb", half / 2e9)


def test_of_ranks_on_gpus_only_what_computes_has_to_fit_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gateway's stored experts and sums are in host memory, more than any GPU here has."""
    monkeypatch.setattr(planning, "pick_device", lambda name: torch.device("cuda"))
    path, figures = settings(tmp_path, {"device": "auto"}), tmp_path / "plan.json"
    said(path, capsys, "--json", figures)
    found = json.loads(figures.read_text())
    (half,) = [row for row in found["rows"] if row["experts_over"] == 2]
    assert half["device"] < found["one"]["device"] < half["gateway"]
    text = said(path, capsys, "--device-gb", (half["device"] + 1) / 1e9)
    assert "`experts_over: 2` is the fewest" in text
    assert "on a GPU" in text


@pytest.mark.parametrize(
    ("own", "agreed", "words", "rows"),
    [
        ({"devices": 2}, {"exchange": "tokens", "privacy": None}, "`exchange: experts` alone", 0),
        ({}, {"privacy": {"epsilon": 8.0, "lot_size": 4}}, "`isolation: exact`", 3),
        ({"experts_over": 9}, {}, "has 4 experts, and there are 9 ranks", 5),
    ],
)
def test_what_is_refused_is_one_sentence(
    own: dict[str, Any], agreed: dict[str, Any], words: str, rows: int,
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path, figures = settings(tmp_path, own, **agreed), tmp_path / "plan.json"
    text = said(path, capsys, "--json", figures)
    (line,) = [each for each in text.splitlines() if "would be refused" in each]
    found = json.loads(figures.read_text())
    assert words in found["refused"]
    assert found["isolation"] != "fast" or agreed == {}, "exact where nothing is said"
    assert found["refused"][:30] in line
    assert (len(found["rows"]), found["now"]) == (rows, None)
    assert ("With `devices: N`" in text) is (rows > 0), "no ranks are proposed that would be refused"


def test_a_party_of_no_federation_is_refused_as_where_it_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(settings(tmp_path, {"party": "elder"}))])
    assert ended.value.code == 1
    assert "roster-unknown-member" in capsys.readouterr().err
