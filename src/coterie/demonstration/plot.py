"""The demo's picture: losses per party, and their course over the rounds."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no window, no display

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from coterie.demonstration.plan import ARMS
from coterie.demonstration.results import Results

COLOURS = {"public": "#9a9a9a", "isolated": "#d1495b", "tokens": "#2e6f95", "centralised": "#3c3c3c"}
"""Told apart also in grey and by people who do not see red and green alike; markers differ too."""
MARKERS = {"public": "s", "isolated": "o", "tokens": "D", "centralised": "^"}


def save_plot(results: Results, path: Path) -> None:
    """Write the picture as PNG."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), width_ratios=(1.15, 1), layout="constrained")
    _per_party(results, left)
    _over_rounds(results, right)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _per_party(results: Results, axes: Axes) -> None:
    width = 0.8 / len(results.arms)
    for index, (arm, by_party) in enumerate(results.arms.items()):
        at = [place + (index - (len(results.arms) - 1) / 2) * width for place in range(len(by_party))]
        losses = [figures.loss for figures in by_party.values()]
        bars = axes.bar(at, losses, width * 0.92, color=COLOURS[arm], label=ARMS[arm].title)
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
    every = [figures.loss for by_party in results.arms.values() for figures in by_party.values()]
    margin = max(0.05, 0.25 * (max(every) - min(every)))
    axes.set_ylim(min(every) - margin, max(every) + margin / 2)
    axes.set_xticks(range(len(results.parties)), [f"{p}\n{results.subjects[p]}" for p in results.parties], fontsize=8)
    axes.set_ylabel("held-out loss, nats per token (axis does not start at 0)")
    axes.set_title("after the last round, each party's own held-out text", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def _over_rounds(results: Results, axes: Axes) -> None:
    start = None
    if "public" in results.arms:
        figures = results.arms["public"].values()
        start = sum(f.evaluation.loss_S.sum() for f in figures) / sum(f.evaluation.tokens for f in figures)
    for arm, points in results.curves.items():
        course = [(0, float(start)), *points] if start is not None else list(points)
        rounds, losses = zip(*course, strict=True)
        axes.plot(rounds, losses, color=COLOURS[arm], marker=MARKERS[arm], markersize=4, label=ARMS[arm].title)
    axes.set_xlabel("round")
    axes.set_ylabel("held-out loss over all parties' text")
    axes.set_title("on the way there", fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
