"""Figures are written once per round, also over a restart; memory counts what training holds."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import PreTrainedModel

from coterie.config import OptimSpec
from coterie.training.metrics import MetricsWriter, read_metrics
from coterie.training.optim import make_optimizer
from coterie.training.planning.measured import model_state_bytes


def test_figures_are_in_both_places(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as metrics:
        metrics.log(0, loss=2.5, lr=0.1)
        metrics.log(1, loss=float("nan"))
    assert read_metrics(tmp_path) == [{"round": 0, "loss": 2.5, "lr": 0.1}, {"round": 1, "loss": None}]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.value for event in board.Scalars("lr")] == [0.10000000149011612]


def test_rounds_that_are_done_again_are_written_once(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as metrics:
        for number in range(1, 6):
            metrics.log(number, loss=float(number))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"round": 6, "lo')  # the process died in the middle of a line
    with MetricsWriter(tmp_path, finished=3) as metrics:
        metrics.log(4, loss=30.0)
    assert [row["round"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert read_metrics(tmp_path)[-1]["loss"] == 30.0


def test_model_state_counts_weights_gradients_and_moments_once(make_tiny: Callable[..., PreTrainedModel]) -> None:
    model = make_tiny("qwen3_moe", tie_word_embeddings=True)
    size = sum(parameter.numel() for parameter in model.parameters())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert model_state_bytes(model) == 2 * 4 * size + buffers
    optimizer = make_optimizer(model.parameters(), OptimSpec())
    optimizer.step()
    counters = 4 * len(list(model.parameters()))
    optimizer.zero_grad()
    assert model_state_bytes(model, optimizer) == 4 * 4 * size + buffers + counters
    model.requires_grad_(False)
    assert model_state_bytes(model) == 4 * size + buffers


def test_absent_weights_count_nothing(make_tiny: Callable[..., PreTrainedModel]) -> None:
    model = make_tiny("qwen3_moe").to("meta")
    assert model_state_bytes(model) == 0


def test_peak_memory_grows_with_what_is_held() -> None:
    """In a process of its own: the peak of this one may lie above anything held here."""
    code = (
        "from coterie.training.planning.measured import peak_rss_bytes\n"
        "before = peak_rss_bytes()\n"
        "held = b'x' * 200_000_000\n"
        "assert peak_rss_bytes() >= before + 150_000_000\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
