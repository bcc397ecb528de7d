"""Are the one-run bounds of the audit of epsilon those of jax-privacy, on the same scores and the same counts?

It needs the extra `audits`, which brings JAX; nothing else in the project does (`make compare-audits` makes an
environment for it).

    python benchmarks/audit_bounds.py [--json bounds.json]

Both laws of both packages, for scores of simulated canaries from hopeless to perfect, told apart at one threshold
that is fixed beforehand, so that numbers of guesses are the same.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
from pathlib import Path
from typing import Any

import numpy as np
from jax_privacy import auditing

from coterie.audit.epsilon import bounds
from harness import machine, write_figures

CANARIES = (60, 200, 1000, 2000)
SIGNALS = (0.0, 0.5, 1.0, 2.0, 4.0, 16.0)
"""How far members' scores lie from others', in standard deviations."""
LEVELS = ((1e-5, 0.05), (1e-6, 0.001))
"""(delta, error)."""


def compared(canaries: int, signal: float, delta: float, error: float, seed: int) -> dict[str, Any]:
    """Both packages' bounds of one set of scores, each canary in or out by coin, everything above zero guessed in."""
    draw = np.random.default_rng(seed)
    inside = draw.random(canaries) < 0.5
    scores = draw.normal(size=canaries) + np.where(inside, signal / 2, -signal / 2)
    guesses = int((scores > 0).sum())
    right = int((inside & (scores > 0)).sum())
    theirs = auditing.CanaryScoreAuditor(scores[inside], scores[~inside])
    at = auditing.Explicit(0.0)
    return {
        "canaries": canaries,
        "signal": signal,
        "delta": delta,
        "error": error,
        "guesses": guesses,
        "right": right,
        "ours": [
            bounds.epsilon_lower(canaries, guesses, right, delta, error),
            bounds.epsilon_of(bounds.mu_lower(canaries, guesses, right, error), delta),
        ],
        "theirs": [
            float(theirs.epsilon_one_run(error, delta, threshold_strategy=at, one_sided=True)),
            float(theirs.epsilon_one_run_fdp(error, delta, threshold_strategy=at, one_sided=True)),
        ],
    }


def main() -> None:
    """Compare, print a line for each set of scores and the largest difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rows = [
        compared(canaries, signal, delta, error, given.seed + number)
        for number, (canaries, signal, (delta, error)) in enumerate(itertools.product(CANARIES, SIGNALS, LEVELS))
    ]
    for row in rows:
        told = "  ".join(f"{one:.4f} {other:.4f}" for one, other in zip(row["ours"], row["theirs"], strict=True))
        print(f"{row['canaries']:5} canaries, {row['right']:4} of {row['guesses']:4} right: {told}")
    apart = [abs(one - other) for row in rows for one, other in zip(row["ours"], row["theirs"], strict=True)]
    version = importlib.metadata.version("jax-privacy")
    print(f"largest difference to jax-privacy {version} over {len(rows)} sets of scores: {max(apart):.2g}")
    write_figures(given.json, {"machine": machine(), "jax-privacy": version, "rows": rows, "largest": max(apart)})


if __name__ == "__main__":
    main()
