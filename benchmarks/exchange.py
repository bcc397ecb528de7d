"""What the `tokens` exchange costs: bytes, time, where the time goes, and what two micro-batches in flight save.

    python benchmarks/exchange.py --json exchange.json

Four parts, each with real processes over real mutual TLS on loopback:

- ``echo``: 8 MiB of bfloat16 there and back, against a bare TCP socket in the same run (benchmarks/transport.py).
- ``bytes``: payload sent in training rounds, against the tensors that had to move by the routing alone.
- ``round``: tokens per second of rounds of three parties, against the same work in one process, and which threads
  took the processor time. Rounds and single-process rounds alternate; medians.
- ``delay``: the same rounds with 20 ms added to the link in each direction (so 40 ms there and back), one and two
  micro-batches in flight, alternating.

``targets`` in the JSON says of each agreed number whether it was met. ``--parts`` runs some of the parts.

Anything else that runs on the machine makes these figures worse; ``machine`` in the JSON says what it was.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from coterie.demonstration.plan import DemoPlan
from coterie.training.loop import train_round
from coterie.training.optim import make_optimizer
from exchange_party import OPTIM, TokensWorkload
from harness import Parties, machine, parties, write_figures
from transport import measure as measure_echo

PARTIES = ("alder", "birch", "cedar")
DELAY_S = 0.020
IN_FLIGHT = 2
SCRIPT = "exchange_party.py"
PARTS = ("echo", "round", "delay")
RECORD = 16 << 10
"""Bytes that TLS encrypts at once."""
CONFIG = DemoPlan().model | {"vocab_size": 1024}


def timed_round(three: Parties, in_flight: int) -> float:
    """Seconds of one whole round, both phases."""
    number = three.next_round()
    began = time.perf_counter()
    three.tell(f"round {number} {in_flight}")
    three.tell(f"step {number}")
    return time.perf_counter() - began


class OneProcess:
    """The same sequences through the same model with all experts here; one process, one thread."""

    def __init__(self, workload: TokensWorkload) -> None:
        self._model = workload.model()
        self._optimizer = make_optimizer(self._model.parameters(), OPTIM)
        self._batches = [batch for party in workload.parties for batch in workload.batches(party)]

    def round(self) -> tuple[float, float]:
        """Seconds and processor seconds of one optimiser step."""
        began, used = time.perf_counter(), time.process_time()
        train_round(self._model, self._optimizer, self._batches, lr=OPTIM.lr)
        return time.perf_counter() - began, time.process_time() - used


def measure_rounds(workload: TokensWorkload, folder: Path, repeats: int) -> dict[str, Any]:
    """Rounds of three processes and of one, in turn; bytes, and processor time by what it went to."""
    alone = OneProcess(workload)
    tokens = len(workload.parties) * workload.batch * workload.tokens
    with parties(SCRIPT, workload, folder) as (three, _):
        for _ in range(3):
            timed_round(three, IN_FLIGHT)
            alone.round()
        before = three.figures()
        spans, single, single_cpu = [], [], []
        for _ in range(repeats):
            spans.append(timed_round(three, IN_FLIGHT))
            seconds, used = alone.round()
            single.append(seconds)
            single_cpu.append(used)
        after = three.figures()
    kinds = {
        kind: sum(b["cpu_s"].get(kind, 0.0) - a["cpu_s"].get(kind, 0.0) for a, b in zip(before, after, strict=True))
        for kind in ("trunk", "experts", "frames_and_copies", "encryption_and_sockets")
    }
    payload, needed = (
        sum(b[name] - a[name] for a, b in zip(before, after, strict=True))
        for name in ("payload_bytes", "must_move_bytes")
    )
    waiting = sum(b["exchange_s"] - a["exchange_s"] for a, b in zip(before, after, strict=True))
    cpu = sum(kinds.values()) / repeats
    cores = len(os.sched_getaffinity(0))
    wall = statistics.median(spans)
    return {
        "bytes": {
            "payload_per_round": payload / repeats,
            "must_move_per_round": needed / repeats,
            "ratio": payload / needed,
        },
        "round": {
            "tokens": tokens,
            "three_processes_tokens_per_s": tokens / wall,
            "one_process_tokens_per_s": tokens / statistics.median(single),
            "three_processes_tokens_per_cpu_s": tokens / cpu,
            "one_process_tokens_per_cpu_s": tokens / statistics.median(single_cpu),
            "cpu_s_per_round": cpu,
            # Own experts included, which are computed while the others' answers are on their way.
            "micro_batch_time_in_exchange_share": waiting / (len(workload.parties) * IN_FLIGHT * sum(spans)),
            "cpu_share": {kind: used / repeats / cpu for kind, used in kinds.items()},
            "encryption_alone_share": _encryption_s(payload / repeats) / cpu,
            "idle_share_of_cores": max(0.0, 1 - cpu / (wall * cores)),
            "repeats": repeats,
        },
    }


def _encryption_s(count: float) -> float:
    """Processor seconds to encrypt and decrypt ``count`` bytes as TLS does: AES-GCM, record by record."""
    cipher, nonce, record = AESGCM(bytes(16)), bytes(12), bytes(RECORD)
    rounds = 400
    began = time.process_time()
    for _ in range(rounds):
        cipher.decrypt(nonce, cipher.encrypt(nonce, record, None), None)
    return (time.process_time() - began) * count / (rounds * RECORD)


def measure_delay(workload: TokensWorkload, folder: Path, repeats: int) -> dict[str, Any]:
    """Rounds over a slow link with one and two micro-batches in flight, in turn."""
    spans: dict[int, list[float]] = {1: [], 2: []}
    with parties(SCRIPT, workload, folder, delay_s=DELAY_S) as (three, _):
        for in_flight in (1, 2):
            timed_round(three, in_flight)
        for _ in range(repeats):
            for in_flight, measured in spans.items():
                measured.append(timed_round(three, in_flight))
    tokens = len(workload.parties) * workload.batch * workload.tokens
    rates = {in_flight: tokens / statistics.median(measured) for in_flight, measured in spans.items()}
    paired = [one / two for one, two in zip(spans[1], spans[2], strict=True)]
    return {
        "added_delay_ms_each_way": 1e3 * DELAY_S,
        "micro_batches": workload.batch // workload.micro_batch,
        "one_in_flight_tokens_per_s": rates[1],
        "two_in_flight_tokens_per_s": rates[2],
        "speed_up": statistics.median(paired),
        "repeats": repeats,
    }


def targets(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The agreed numbers: what was measured, the bound, and whether it was met."""
    bounds = (
        ("payload over the tensors that must move", ("bytes", "ratio"), "at most", 1.03),
        ("8 MiB there and back over a bare socket", ("echo", "ratio"), "at most", 6.0),
        ("two micro-batches in flight over one, with delay", ("delay", "speed_up"), "at least", 1.5),
    )
    return {
        name: {
            "measured": found[part][key],
            bound: limit,
            "met": found[part][key] <= limit if bound == "at most" else found[part][key] >= limit,
        }
        for name, (part, key), bound, limit in bounds
        if part in found
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=15, help="measured rounds of each kind")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="`round` gives the bytes, too")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "echo" in given.parts:
            found["echo"] = measure_echo(max(10, given.repeats), folder / "echo")
        if "round" in given.parts:
            found |= measure_rounds(TokensWorkload(CONFIG, PARTIES, 8, 4, 64), folder / "round", given.repeats)
        if "delay" in given.parts:
            slow = TokensWorkload(CONFIG, PARTIES, 8, 2, 32)
            found["delay"] = measure_delay(slow, folder / "delay", max(5, given.repeats // 2))
    found["targets"] = targets(found)
    print(json.dumps(found, indent=2))
    write_figures(given.json, found)


if __name__ == "__main__":
    main()
