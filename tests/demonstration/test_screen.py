"""How far a demo's runs are, from the figures that they append."""

from __future__ import annotations

from pathlib import Path

from coterie.demonstration.screen import Follow
from coterie.training.metrics import MetricsWriter


def test_rounds_that_were_made_are_counted_from_one_over_all_runs(tmp_path: Path) -> None:
    folders = tuple(tmp_path / name for name in ("alder", "birch"))
    for folder in folders:
        (folder / "private").mkdir(parents=True)
    follow = Follow(folders, 4)
    assert follow.text().startswith("starting")
    for folder in folders:
        with MetricsWriter(folder / "private") as metrics:
            for round_no in range(1, 5):
                metrics.log(round_no, loss=2.0)
            metrics.log(4, test_loss=3.0)
    assert follow.text().startswith("round 4/4  training loss 2.00")
