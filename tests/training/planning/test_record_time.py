"""A record's time, and what lots take in a party's plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from coterie.cli.app import main
from coterie.config import dump_yaml
from coterie.errors import ConfigError
from coterie.training.planning import record_time
from helpers.private_settings import private_settings

SIZES = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 32,
}  # fmt: skip


def test_a_partys_record_is_computed_alone_at_its_full_length(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    made = record_time.synthetic_batch

    def seen(model: object, like: dict, rows: int, length: int) -> dict:
        batch = made(model, like, rows, length)
        shapes.append(tuple(batch["input_ids"].shape))
        return batch

    monkeypatch.setattr(record_time, "synthetic_batch", seen)
    small = private_settings(model={"family": "olmoe", "config": SIZES})
    assert record_time.party_seconds(small, 11) > 0
    assert shapes == [(1, 11)]


def test_without_a_budget_there_is_no_lot_to_time() -> None:
    with pytest.raises(ConfigError) as caught:
        record_time.party_seconds(private_settings(privacy="none"), 11)
    assert caught.value.code == "plan-records-none"


def test_the_plan_shows_the_processor_time_of_its_lots(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_time, "party_seconds", lambda federation, length: 0.036 * length / 10)
    path = tmp_path / "federation.yaml"
    small = {"family": "olmoe", "config": SIZES}
    dump_yaml(path, private_settings(model=small, privacy__lot_size=180, train__rounds=10))
    records = [word for each in ("alder=1600", "birch=800", "cedar=1200") for word in ("--records", each)]
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(path), *records, "--sequence-length", "10"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    # 240 of alder's in each of 10 rounds, at 36 ms: 86.4 s.
    assert "alder 2400 0.024" in " ".join(said.split())
    assert "36 ms a record of 10 tokens" in said
    assert "lot_sizes: {alder: 240, birch: 120, cedar: 180}" in said
