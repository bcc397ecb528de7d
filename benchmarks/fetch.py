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
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from coterie.federation.identity import members_of
from coterie.federation.provision import free_endpoints, provision
from delay_proxy import DelayProxy
from exchange import machine
from fetch_party import LENGTH, OWNER, Work
from memory import LARGE

PARTIES = ("alder", "birch", OWNER)
DELAY_S, GIGABIT = 0.020, 125e6


class Federation:
    """Three processes that do rounds when told to."""

    def __init__(self, work: Work, folder: Path, proxy: DelayProxy | None) -> None:
        folder.mkdir(parents=True)
        (folder / "work.json").write_text(json.dumps(asdict(work)), encoding="utf-8")
        real = free_endpoints(2 * len(work.parties))
        seen = dict(zip(work.parties, real, strict=False))
        listen = dict(seen)
        if proxy is not None:
            for name, hidden in zip(work.parties, real[len(work.parties) :], strict=True):
                listen[name] = hidden
                proxy.forward(_port(seen[name]), _port(hidden))
        provision("bench", members_of(seen, None), folder / "kits", config_hash="", placement_hash="")
        script = str(Path(__file__).with_name("fetch_party.py"))
        self._children = {
            name: subprocess.Popen(
                [sys.executable, script, name, str(folder), listen[name]],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "MALLOC_ARENA_MAX": "2"},
            )
            for name in work.parties
        }
        self._round = 0
        for child in self._children.values():
            self._answer(child)

    def round(self) -> dict[str, Any]:
        """The owner's figures of one whole round."""
        self._round += 1
        hosts = [name for name in self._children if name != OWNER]
        self._tell(f"round {self._round}", hosts)
        self._tell(f"round {self._round}", [OWNER])
        self._tell(f"declare {self._round}", hosts)
        figures = json.loads(self._tell("figures", [OWNER])[0])
        self._tell(f"step {self._round}", list(self._children))
        return figures

    def close(self) -> None:
        for child in self._children.values():
            assert child.stdin is not None
            child.stdin.close()
        for child in self._children.values():
            try:
                child.wait(20)
            except subprocess.TimeoutExpired:
                child.kill()

    def _tell(self, line: str, names: list[str]) -> list[str]:
        for name in names:
            stdin = self._children[name].stdin
            assert stdin is not None
            stdin.write(line + "\n")
            stdin.flush()
        return [self._answer(self._children[name]) for name in names]

    def _answer(self, child: subprocess.Popen[str]) -> str:
        assert child.stdout is not None
        answer = child.stdout.readline()
        if not answer:
            self.close()
            raise SystemExit("a party ended with an error; it is printed above")
        return answer


def _port(endpoint: str) -> int:
    return int(endpoint.rpartition(":")[2])


@contextmanager
def federation(work: Work, folder: Path, gbit: float) -> Iterator[tuple[Federation, DelayProxy | None]]:
    """A started `Federation`, ended afterwards, and the link before it."""
    with ExitStack() as stack:
        proxy = stack.enter_context(DelayProxy(DELAY_S, GIGABIT * gbit)) if gbit else None
        running = Federation(work, folder, proxy)
        stack.callback(running.close)
        yield running, proxy


def measure(work: Work, folder: Path, gbit: float, rounds: int) -> dict[str, Any]:
    """Medians over rounds; the first round, with its self-check, is not counted."""
    with federation(work, folder, gbit) as (running, proxy):
        first = running.round()
        passed = sum(proxy.passed) if proxy is not None else 0
        found = [running.round() for _ in range(rounds)]
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
        "method": work.method,
        "tokens_of_a_physical_batch": work.physical_batch * LENGTH,
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
            work = Work(LARGE, PARTIES, given.lot, size, given.method)
            found["rows"].append(measure(work, Path(name) / str(number), given.gbit, given.rounds))
            print(json.dumps(found["rows"][-1], indent=1), flush=True)
            if given.json is not None:
                given.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
