"""Where a round of the `experts` exchange spends its time, over a link of 1 Gbit/s and 20 ms.

    python benchmarks/fetch.py --json fetch.json
    python benchmarks/fetch.py --json fetch.json --gbit 0.1

One owner trains privately (noise, spool and ledger included); two hosts store two thirds of the experts between them.
Three real processes over mutual TLS; the owner's traffic passes a proxy (`delay_proxy.py`) that holds it to the rate
of one line in each direction and delays it. The model is the one of memory.py: 16 MoE layers, 93 % in experts.

Weights come layer by layer while the first physical batch computes its forward, so that batch decides what hides:
where a layer's forward takes longer than a layer's fetch, computing waits for the first layer only. The benchmark
goes through sizes of the physical batch at the same lot.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from fetch_party import LENGTH, OWNER, FetchWorkload
from harness import Parties, machine, parties, write_figures
from memory import LARGE

SCRIPT = "fetch_party.py"
PARTIES = ("alder", "birch", OWNER)
DELAY_S, GIGABIT = 0.020, 125e6


def owner_round(running: Parties) -> dict[str, Any]:
    """The owner's figures of one whole round."""
    number = running.next_round()
    hosts = [name for name in running.names if name != OWNER]
    running.tell(f"round {number}", hosts)
    running.tell(f"round {number}", [OWNER])
    running.tell(f"declare {number}", hosts)
    (figures,) = running.figures([OWNER])
    running.tell(f"step {number}")
    return figures


def measure(workload: FetchWorkload, folder: Path, gbit: float, rounds: int) -> dict[str, Any]:
    """Medians over rounds; the first round, with its self-check, is not counted."""
    few_arenas = {"MALLOC_ARENA_MAX": "2"}
    link = parties(
        SCRIPT, workload, folder, delay_s=DELAY_S if gbit else 0.0, bytes_per_s=GIGABIT * gbit, environment=few_arenas
    )
    with link as (running, proxy):
        first = owner_round(running)
        passed = sum(proxy.passed) if proxy is not None else 0
        found = [owner_round(running) for _ in range(rounds)]
        on_line = sum(proxy.passed) - passed if proxy is not None else None

    def middle(name: str) -> float:
        return statistics.median(figures[name] for figures in found)

    waits = [figures["waited_first_seconds"] + figures["waited_later_seconds"] for figures in found]
    computing = [figures["sums_seconds"] - wait for figures, wait in zip(found, waits, strict=True)]
    before = [
        figures["lot_seconds"] - figures["sums_seconds"] - figures["noise_seconds"] - figures["spool_seconds"]
        for figures in found
    ]
    must = found[0]["must_move_bytes"] * rounds
    return {
        "link": f"{gbit:g} Gbit/s, 20 ms each way" if gbit else "loopback",
        "method": workload.method,
        "tokens_of_a_physical_batch": workload.physical_batch * LENGTH,
        "tokens_of_a_lot": statistics.fmean(figures["records"] for figures in found) * LENGTH,
        "seconds": {
            "agree": middle("agree_seconds"),
            "fetch": middle("fetch_seconds"),
            "waited_for_first_layer": middle("waited_first_seconds"),
            "waited_for_later_layers": middle("waited_later_seconds"),
            "before_computing": statistics.median(before),
            "compute": statistics.median(computing),
            "noise": middle("noise_seconds"),
            "spool_and_ledger": middle("spool_seconds"),
            "push": middle("push_seconds"),
        },
        "fetch_hidden": 1
        - statistics.median(
            figures["waited_later_seconds"] / max(figures["fetch_seconds"] - figures["waited_first_seconds"], 1e-9)
            for figures in found
        ),
        "payload_over_must_move": (found[-1]["payload_bytes"] - first["payload_bytes"]) / must,
        "line_over_must_move": on_line / must if on_line is not None else None,
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file; rows that are there are kept")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds of each row")
    parser.add_argument("--lot", type=int, default=64, help="expected records of 64 tokens")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64], help="records at once")
    parser.add_argument("--method", choices=["book_keeping", "ghost"], default="book_keeping")
    parser.add_argument("--gbit", type=float, default=1.0, help="rate of the owner's line; 0: loopback as it is")
    given = parser.parse_args()
    found: dict[str, Any] = {"machine": machine(), "rows": []}
    if given.json is not None and given.json.exists():
        found["rows"] = json.loads(given.json.read_text("utf-8"))["rows"]
    with tempfile.TemporaryDirectory() as name:
        for number, size in enumerate(given.batches):
            workload = FetchWorkload(LARGE, PARTIES, given.lot, size, given.method)
            found["rows"].append(measure(workload, Path(name) / str(number), given.gbit, given.rounds))
            print(json.dumps(found["rows"][-1], indent=1), flush=True)
            write_figures(given.json, found)


if __name__ == "__main__":
    main()
