"""The calculation for many GPUs: its page shows what it gives, and its arithmetic is that of closed forms."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECORDS, TOKENS = 1024, 512


@pytest.fixture
def many_gpus(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import many_gpus

    return many_gpus


def test_the_page_shows_its_tables(many_gpus: ModuleType) -> None:
    page = (ROOT / "docs" / "concepts" / "several-devices.md").read_text("utf-8")
    assert many_gpus.tables().strip() in page


def test_it_counts_as_closed_forms_do(many_gpus: ModuleType) -> None:
    olmoe = many_gpus.Layout.of("OLMoE-1B-7B")
    everything = 6_919_161_856  # as the model is published
    experts = 16 * 64 * 3 * 2048 * 1024
    assert (olmoe.trunk_values + olmoe.expert_values, olmoe.expert_values) == (everything, experts)
    records, spread = (many_gpus.row(olmoe, 8, over, lora=False) for over in (1, 8))
    assert records.crossing == pytest.approx(8 * everything * 7 / 8)  # float32, up and down
    owned = 12 * everything / 8  # float32: master and two moments, at the owner alone
    assert records.state == pytest.approx(6 * everything + owned)  # bfloat16, and a sum in float32
    assert spread.state == pytest.approx(6 * (everything - experts * 7 / 8) + owned)
    visited = 7 * (1 - (7 / 8) ** 8)
    row = 4 * 2048 * 2 + 4 * (3 * 8 + 1)  # four hidden vectors; weights, their gradients, experts and a record
    rows = RECORDS * TOKENS / 8 * 16 * visited * row
    assert spread.crossing == pytest.approx(8 * (everything - experts) * 7 / 8 + rows)
    adapters = many_gpus.row(olmoe, 8, 1, lora=True)
    values = 16 * 64 * 16 * ((2048 + 2 * 1024) + (1024 + 2048))
    assert adapters.crossing == pytest.approx(8 * values * 7 / 8)
    assert adapters.state == pytest.approx(2 * everything + 6 * values + 12 * values / 8)
    assert adapters.spool_s == pytest.approx(4 * values / 2e9)
