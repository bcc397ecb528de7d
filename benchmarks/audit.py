"""How much do attacks read at the sizes where figures carry: many places under a budget, lots, membership, epsilon?

The folder is that of a finished `coterie demo`, whose federations recorded what their parties received.

    coterie demo --dir demo --arms public,experts,experts_dp
    python benchmarks/audit.py demo --json audit.json [--places 1000] [--runs 20] [--only experts_dp]

Results are written after every part; the same command goes on where an interrupted one stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from coterie.audit import pieces
from coterie.audit.adversaries import Adversary
from coterie.audit.evidence import Evidence
from coterie.audit.experts import noised, plain
from coterie.audit.experts.case import Case, TimeBudget
from coterie.audit.findings import Finding
from coterie.demonstration.corpus import PUBLIC
from coterie.demonstration.plan import NAMES
from harness import machine, write_figures

LOTS = (1, 4, 16)
MEMBER_LOTS = (16, 64, 256)
ATTACKERS = (Adversary.HOST_PUBLIC, Adversary.ALL_HOSTS)
_EPSILON_S = 60.0
_ENOUGH_S = 24 * 3600.0
"""Parts end by their places, not by the clock."""

Part = Callable[[], Any]


def case_of(demo: Path, arm: str, seed: int) -> Case:
    """The first party's run in one of the demo's federations, with what all others received."""
    owner, *others = [name for name in NAMES if (demo / arm / name).is_dir()]
    evidence = Evidence.read(
        demo / arm / owner / "run",
        [demo / arm / other / "run" for other in others],
        [demo / "data" / PUBLIC / "train.jsonl"],
        demo / PUBLIC / "run" / "model",
    )
    return Case(evidence, seed)


def told(found: Finding | list[Finding]) -> Any:
    """As JSON, without curves."""
    some = found if isinstance(found, list) else [found]
    return [one.model_dump(mode="json", exclude={"roc"}) for one in some]


def parts(demo: Path, places: int, runs: int, seed: int) -> Mapping[str, Part]:
    """Everything that is measured, by name."""
    found: dict[str, Part] = {}
    for adversary in ATTACKERS:
        found[f"experts_dp/{adversary.label}/places"] = _noised(demo, adversary, places, seed)
        found[f"experts_dp/{adversary.label}/membership"] = _member(demo, adversary, seed)
        for lot in MEMBER_LOTS:
            found[f"experts/{adversary.label}/membership, lot {lot}"] = _open_member(demo, adversary, lot, seed)
    for adversary in ATTACKERS:
        for lot in LOTS:
            found[f"experts/{adversary.label}/lot {lot}"] = _open(demo, adversary, lot, places, seed)
    for number in range(runs):
        found[f"epsilon/{number}"] = _epsilon(demo, number)
    return found


def _open(demo: Path, adversary: Adversary, lot: int, places: int, seed: int) -> Part:
    return lambda: told(
        plain.next_tokens(case_of(demo, "experts", seed), adversary, lot, TimeBudget(_ENOUGH_S), places=places)
    )


def _open_member(demo: Path, adversary: Adversary, lot: int, seed: int) -> Part:
    return lambda: told(plain.membership(case_of(demo, "experts", seed), adversary, lot, TimeBudget(_ENOUGH_S)))


def _noised(demo: Path, adversary: Adversary, places: int, seed: int) -> Part:
    return lambda: told(
        noised.tokens(case_of(demo, "experts_dp", seed), adversary, TimeBudget(_ENOUGH_S), places=places)
    )


def _member(demo: Path, adversary: Adversary, seed: int) -> Part:
    return lambda: told(noised.membership(case_of(demo, "experts_dp", seed), adversary, TimeBudget(_ENOUGH_S)))


def _epsilon(demo: Path, seed: int) -> Part:
    owner = next(name for name in NAMES if (demo / "experts_dp" / name).is_dir())
    run, start = demo / "experts_dp" / owner / "run", demo / PUBLIC / "run" / "model"
    return lambda: pieces.on_epsilon(run, start, seed, _EPSILON_S)


def measure(wanted: Mapping[str, Part], path: Path | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Run what is not there yet, and write after each.

    Raises:
        SystemExit: the file was made with other settings.
    """
    found: dict[str, Any] = {"settings": dict(settings), "machine": machine(), "parts": {}}
    if path is not None and path.is_file():
        found = json.loads(path.read_text("utf-8"))
        if found["settings"] != dict(settings):
            raise SystemExit(f"{path} was made with {found['settings']}: name another file")
    for name, part in wanted.items():
        if name in found["parts"]:
            continue
        began = time.monotonic()
        outcome = part()
        found["parts"][name] = {"outcome": outcome, "seconds": round(time.monotonic() - began, 1)}
        write_figures(path, found)
        print(f"{name}: {found['parts'][name]['seconds']} s", flush=True)
    return found


def main() -> None:
    """Read the command line, measure, print one line a part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--places", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=20, help="of the audit of epsilon, each with another seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[""], help="parts whose names begin so")
    given = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"places": given.places, "runs": given.runs, "seed": given.seed}
    wanted = parts(given.demo, given.places, given.runs, given.seed)
    wanted = {name: part for name, part in wanted.items() if name.startswith(tuple(given.only))}
    found = measure(wanted, given.json, settings)
    alarms = [
        n for n, part in found["parts"].items() if n.startswith("epsilon/") and part["outcome"]["verdict"] == "ALARM"
    ]
    audits = sum(name.startswith("epsilon/") for name in found["parts"])
    print(f"{audits} audits of epsilon, {len(alarms)} with an alarm")
    for name, part in found["parts"].items():
        for one in part["outcome"] if isinstance(part["outcome"], list) else ():
            print(f"{name}: {one['sentence']}")


if __name__ == "__main__":
    main()
