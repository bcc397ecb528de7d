"""A private step of the benchmark writes what a session's does."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from coterie.models import seam
from coterie.models.zoo.tiny import VOCAB, tiny_model

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def dp_step(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    import dp_step

    return dp_step


def test_private_steps_write_spool_and_ledger_and_plain_ones_do_not(dp_step: ModuleType, tmp_path: Path) -> None:
    ids = torch.randint(3, VOCAB, (2, 5), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    model = tiny_model("olmoe", num_hidden_layers=1)
    seam.select(model)
    steps = [dp_step.make_step(arm, model, batch, folder=tmp_path) for arm in ("plain", "book_keeping")]
    for step in steps:
        step()
        step()
    (ledger,) = tmp_path.glob("*/ledger/*/ledger.jsonl")
    kinds = [json.loads(line)["kind"] for line in ledger.read_text().splitlines()]
    assert kinds.count("release") == 2
    (left,) = tmp_path.glob("*/spool/release-*")
    assert left.name.startswith("release-00000002-0"), "the first was dropped, as by a checkpoint"
    unrecorded = dp_step.make_step("book_keeping", model, batch, folder=tmp_path, recorded=False)
    unrecorded()
    assert len(list(tmp_path.iterdir())) == 1
