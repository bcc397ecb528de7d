"""`coterie plan train.yaml` says which way of using devices suits a private run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coterie.cli import training_progress
from coterie.cli.app import main
from coterie.training.single.calibrated import Calibration
from coterie.training.single.previewed import Preview

SETTINGS = {
    "model": {"family": "olmoe", "provenance": "public"},
    "data": {"train": "text.txt", "tokenizer": {"train": {"files": ["public.txt"], "vocab_size": 280}}},
    "train": {"rounds": 5},
    "privacy": {"epsilon": 8.0, "delta": 1e-3, "lot_size": 4},
    "run_dir": "run",
}
GB = 10**9


@pytest.mark.parametrize(
    ("gb", "words"),
    [
        (110, "of devices with 110 GB: one device holds it"),
        (100, "`devices: 2` is the fewest"),  # 75 of state, and 4 of activations: 79 at each
        (78, "`experts_over: 2` is the fewest"),
        (58, "`experts_over: 3` is the fewest"),
        (30, "no number of devices holds it"),
    ],
)
def test_the_fewest_devices_are_named(
    gb: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("text.txt", "public.txt"):
        (tmp_path / name).write_text("the cat\n")
    (tmp_path / "train.yaml").write_text(json.dumps(SETTINGS))
    measured = Calibration(1.0, 0.2, 0.1, 104 * GB, (2, 4, 8), 1.0)
    devices, over = ([each * GB for each in way] for way in ((100, 75, 66), (100, 55, 40)))
    found = Preview(
        10, 0.8, 100 * GB, 1, 1, 5, None, devices=tuple(devices), experts_over=tuple(over), calibration=measured
    )
    monkeypatch.setattr(training_progress, "preview", lambda config, others: found)
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(tmp_path / "train.yaml"), "--device-gb", str(gb)])
    assert not ended.value.code
    assert words in capsys.readouterr().out
