"""How much noise bands leave in the weights, at which budget, and whether others' code says the same.

Public numbers alone, no training: for shapes of a run (records, lot, rounds) and budgets, the noise multiplier that
each number of bands needs and the noise that is left in the weights, over that of independent rounds. With
jax-privacy (the extra `audits`, in an environment of its own: see `make compare-audits`) the coefficients are held
to its banded Toeplitz optimum and sensitivity, and epsilon to its accountant.

    python benchmarks/noise_bands.py --json bands.json
    make compare-audits, then the same with .venv-audits/bin/python and --jax
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from coterie.dp.accounting.accountant import epsilon
from coterie.dp.accounting.budget import Budget
from coterie.dp.noise.bands import NoiseBands
from coterie.dp.plan import PrivacyPlan
from coterie.training.planning.noise_bands import bands_choices

SHAPES = {"demo": (1400, 256, 40), "5,000 records": (5000, 256, 60), "SST-2": (67349, 1024, 400)}
"""Records, lot and rounds by name."""

BUDGETS = (1.0, 3.0, 8.0)
DELTA = 1e-5


def table() -> list[dict[str, Any]]:
    """What each number of bands leaves."""
    rows = []
    for shape, (units, lot, rounds) in SHAPES.items():
        for budget in BUDGETS:
            for momentum in (0.0, 0.9):
                plan = PrivacyPlan(Budget(budget, DELTA), rounds, lot)
                for each in bands_choices(plan, units, momentum):
                    rows.append({"shape": shape, "epsilon": budget, "momentum": momentum, **asdict(each)})
    return rows


def against_jax() -> list[dict[str, Any]]:
    """Our coefficients beside jax-privacy's optimum, by its own error and sensitivity; our epsilon beside its own."""
    from jax_privacy.accounting import accountants, analysis
    from jax_privacy.matrix_factorization import toeplitz

    rows = []
    for rounds, count in ((40, 4), (60, 8), (400, 16)):
        own = NoiseBands.of(count, rounds)
        if own is None:
            continue
        theirs = np.asarray(toeplitz.optimize_banded_toeplitz(rounds, count), float)
        errors = [
            math.sqrt(float(toeplitz.loss(np.array(coefficients), rounds)))
            for coefficients in (own.coefficients, theirs)
        ]
        sensitivity = toeplitz.minsep_sensitivity_squared(np.array(own.coefficients), count, 1, rounds)
        units, lot = 200 * count, 50
        plan = PrivacyPlan(Budget(8.0, DELTA), rounds, lot, bands=own)
        mechanism = plan.mechanism(plan.lots(units))
        accountant = analysis.DpsgdTrainingAccountant(accountants.PldAccountantConfig())
        params = analysis.DpParams(
            noise_multipliers=mechanism.noise_multiplier,
            num_samples=units,
            delta=DELTA,
            batch_size=lot,
            cycle_length=count,
        )
        rows.append(
            {
                "rounds": rounds,
                "bands": count,
                "noise in the weights, of ours": errors[0],
                "noise in the weights, of jax-privacy's": errors[1],
                "squared sensitivity by jax-privacy": float(sensitivity),
                "epsilon": epsilon([(mechanism, rounds)], DELTA),
                "epsilon by jax-privacy": accountant.compute_epsilon(rounds, params),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jax", action="store_true", help="compare with jax-privacy, too")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    found: dict[str, Any] = {"table": table()}
    for row in found["table"]:
        print(
            f"{row['shape']:>14} epsilon {row['epsilon']:g} momentum {row['momentum']:g} bands {row['bands']:>2}: "
            f"noise multiplier {row['noise_multiplier']:.3f}, in the weights {row['weights_noise']:.3f}"
        )
    if chosen.jax:
        found["jax-privacy"] = against_jax()
        for row in found["jax-privacy"]:
            print(json.dumps(row))
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
