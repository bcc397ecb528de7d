"""The demo's picture: losses per party, and their course over the rounds."""

from __future__ import annotations

import io

import matplotlib

matplotlib.use("Agg")  # no window, no display

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from coterie.demonstration.plan import ARMS
from coterie.demonstration.results import Results

COLOURS = {
    "public": "#9a9a9a",
    "isolated": "#d1495b",
    "tokens": "#2e6f95",
    "experts": "#3a9d6b",
    "centralised": "#3c3c3c",
    "isolated_dp": "#d1495b",
    "experts_dp": "#3a9d6b",
    "experts_dp_shared": "#2e6f95",
    "centralised_dp": "#3c3c3c",
}
"""Told apart also in grey and by people who do not see red and green alike; markers differ too."""
MARKERS = {
    "public": "s",
    "isolated": "o",
    "tokens": "D",
    "experts": "v",
    "centralised": "^",
    "isolated_dp": "o",
    "experts_dp": "v",
    "experts_dp_shared": "D",
    "centralised_dp": "^",
}


def draw(results: Results, *, tall: bool = False) -> bytes:
    """The picture as PNG: panels for the arms without privacy, then those for the private arms.

    Args:
        results: of the demo.
        tall: panels stand below each other, for a narrow screen; otherwise three beside each other.
    """
    groups = {False: "without privacy", True: f"each party within epsilon {results.plan.private.epsilon:g}"}
    rows = [p for p in groups if any(ARMS[arm].private == p and arm != "public" for arm in results.arms)] or [False]
    size = (5.0, 0.4 + 11.2 * len(rows)) if tall else (13.8, 0.4 + 4.2 * len(rows))
    figure = plt.figure(figsize=size, layout="constrained")
    strips = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for strip, private in zip(strips, rows, strict=True):
        panels = strip.subplots(3, 1) if tall else strip.subplots(1, 3, width_ratios=(1.1, 1.1, 1))
        arms = [arm for arm in results.arms if arm == "public" or ARMS[arm].private == private]
        _losses(results, arms, panels[0])
        _differences(results, arms, panels[1])
        _over_rounds(results, arms, panels[2])
        handles, labels = panels[0].get_legend_handles_labels()
        strip.legend(handles, labels, loc="outside lower center", ncols=2 if tall else len(labels), frameon=False)
        strip.suptitle(groups[private], fontsize=11, fontweight="bold")
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=140)
    plt.close(figure)
    return drawn.getvalue()


def _losses(results: Results, arms: list[str], axes: Axes) -> None:
    for arm in arms:
        losses = [figures.loss for figures in results.arms[arm].values()]
        at = _places(results, arms, arm)
        axes.plot(at, losses, MARKERS[arm], color=COLOURS[arm], markersize=8, label=ARMS[arm].title)
        for x, loss in zip(at, losses, strict=True):
            axes.annotate(f"{loss:.2f}", (x, loss), (0, 7), textcoords="offset points", ha="center", fontsize=7)
    axes.set_ylabel("nats per token; lower is better")
    _dress(results, axes, "held-out loss after the last round")


def _differences(results: Results, arms: list[str], axes: Axes) -> None:
    """How far each trained arm is from the party alone, with the interval of that difference."""
    compared = [arm for arm in arms if arm != "public" and ARMS[arm].kind != "alone" and ARMS[arm].alone in arms]
    for arm in compared:
        found = [results.difference(arm, ARMS[arm].alone, party) for party in results.parties]
        means = [difference.mean for difference in found if difference]
        below = [difference.mean - difference.low for difference in found if difference]
        above = [difference.high - difference.mean for difference in found if difference]
        at = _places(results, compared, arm)
        axes.errorbar(at, means, (below, above), fmt=MARKERS[arm], color=COLOURS[arm], capsize=4, markersize=7)
    axes.axhline(0, color=COLOURS["isolated"], linewidth=1.5)
    axes.set_ylabel("nats per token; below the line is better")
    _dress(results, axes, "difference from training alone, 95 % interval")


def _places(results: Results, arms: list[str], arm: str) -> list[float]:
    """Beside each other within each party's column."""
    shift = (arms.index(arm) - (len(arms) - 1) / 2) * 0.7 / len(arms)
    return [column + shift for column in range(len(results.parties))]


def _dress(results: Results, axes: Axes, title: str) -> None:
    names = [f"{party}\n{results.subjects[party].replace(' and ', chr(10) + 'and ')}" for party in results.parties]
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.margins(y=0.12)
    axes.set_title(title, fontsize=10)
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _over_rounds(results: Results, arms: list[str], axes: Axes) -> None:
    start = None
    if "public" in results.arms:
        figures = results.arms["public"].values()
        start = sum(f.evaluation.loss_S.sum() for f in figures) / sum(f.evaluation.tokens for f in figures)
    for arm, points in results.curves.items():
        if arm not in arms:
            continue
        course = [(0, float(start)), *points] if start is not None else list(points)
        rounds, losses = zip(*course, strict=True)
        axes.plot(rounds, losses, color=COLOURS[arm], marker=MARKERS[arm], markersize=4, label=ARMS[arm].title)
    axes.set_xlabel("round")
    axes.set_ylabel("nats per token; lower is better")
    axes.set_title("over the rounds, mean over all parties", fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
