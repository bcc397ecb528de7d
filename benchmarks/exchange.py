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
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from coterie.federation.identity import members_of
from coterie.federation.provision import free_endpoints, provision
from coterie.training.loop import train_round
from coterie.training.optim import make_optimizer
from delay_proxy import DelayProxy
from exchange_party import OPTIM, Work
from transport import measure as measure_echo

PARTIES = ("alder", "birch", "cedar")
DELAY_S = 0.020
IN_FLIGHT = 2
PARTS = ("echo", "round", "delay")
RECORD = 16 << 10
"""Bytes that TLS encrypts at once."""
CONFIG: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 96,
    "intermediate_size": 96,
    "moe_intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 24,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": True,
    "max_position_embeddings": 64,
}
"""The demo's model."""


class Federation:
    """Three party processes that do rounds when told to."""

    def __init__(self, work: Work, folder: Path, proxy: DelayProxy | None) -> None:
        folder.mkdir(parents=True)
        (folder / "work.json").write_text(json.dumps(asdict(work)), encoding="utf-8")
        listen = free_endpoints(2 * len(work.parties))
        real, seen = listen[: len(work.parties)], listen[len(work.parties) :]
        if proxy is None:
            seen = real
        else:
            for target, port in zip(real, seen, strict=True):
                proxy.forward(int(port.rpartition(":")[2]), int(target.rpartition(":")[2]))
        endpoints = dict(zip(work.parties, seen, strict=True))
        provision("bench", members_of(endpoints, None), folder / "kits", config_hash="", placement_hash="")
        script = str(Path(__file__).with_name("exchange_party.py"))
        self._children = [
            subprocess.Popen(
                [sys.executable, script, name, str(folder), address],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
            )
            for name, address in zip(work.parties, real, strict=True)
        ]
        self._answers()
        self._round = 0

    def round(self, in_flight: int) -> float:
        """Seconds of one whole round, both phases."""
        self._round += 1
        began = time.perf_counter()
        self._tell(f"round {self._round} {in_flight}")
        self._tell(f"step {self._round}")
        return time.perf_counter() - began

    def figures(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._tell("figures")]

    def close(self) -> None:
        for child in self._children:
            assert child.stdin is not None
            child.stdin.close()
        for child in self._children:
            try:
                child.wait(20)
            except subprocess.TimeoutExpired:
                child.kill()

    def _tell(self, line: str) -> list[str]:
        for child in self._children:
            assert child.stdin is not None
            child.stdin.write(line + "\n")
            child.stdin.flush()
        return self._answers()

    def _answers(self) -> list[str]:
        answers = []
        for child in self._children:
            assert child.stdout is not None
            answer = child.stdout.readline()
            if not answer:
                self.close()
                raise SystemExit("a party ended with an error; it is printed above")
            answers.append(answer)
        return answers


@contextmanager
def federation(work: Work, folder: Path, delay_s: float = 0.0) -> Iterator[Federation]:
    """A started `Federation`, ended afterwards."""
    with ExitStack() as stack:
        proxy = stack.enter_context(DelayProxy(delay_s)) if delay_s else None
        running = Federation(work, folder, proxy)
        stack.callback(running.close)
        yield running


class OneProcess:
    """The same sequences through the same model with all experts here; one process, one thread."""

    def __init__(self, work: Work) -> None:
        self._model = work.model()
        self._optimizer = make_optimizer(self._model.parameters(), OPTIM)
        self._batches = [batch for party in work.parties for batch in work.batches(party)]

    def round(self) -> tuple[float, float]:
        """Seconds and processor seconds of one optimiser step."""
        began, used = time.perf_counter(), time.process_time()
        train_round(self._model, self._optimizer, self._batches, lr=OPTIM.lr)
        return time.perf_counter() - began, time.process_time() - used


def measure_rounds(work: Work, folder: Path, repeats: int) -> dict[str, Any]:
    """Rounds of three processes and of one, in turn; bytes, and processor time by what it went to."""
    alone = OneProcess(work)
    tokens = len(work.parties) * work.batch * work.tokens
    with federation(work, folder) as three:
        for _ in range(3):
            three.round(IN_FLIGHT)
            alone.round()
        before = three.figures()
        spans, single, single_cpu = [], [], []
        for _ in range(repeats):
            spans.append(three.round(IN_FLIGHT))
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
            "micro_batch_time_in_exchange_share": waiting / (len(work.parties) * IN_FLIGHT * sum(spans)),
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


def measure_delay(work: Work, folder: Path, repeats: int) -> dict[str, Any]:
    """Rounds over a slow link with one and two micro-batches in flight, in turn."""
    spans: dict[int, list[float]] = {1: [], 2: []}
    with federation(work, folder, DELAY_S) as three:
        for in_flight in (1, 2):
            three.round(in_flight)
        for _ in range(repeats):
            for in_flight, measured in spans.items():
                measured.append(three.round(in_flight))
    tokens = len(work.parties) * work.batch * work.tokens
    rates = {in_flight: tokens / statistics.median(measured) for in_flight, measured in spans.items()}
    paired = [one / two for one, two in zip(spans[1], spans[2], strict=True)]
    return {
        "added_delay_ms_each_way": 1e3 * DELAY_S,
        "micro_batches": work.batch // work.micro_batch,
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


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
    }


def _lines(path: str) -> Sequence[str]:
    try:
        return Path(path).read_text("utf-8").splitlines()
    except OSError:
        return ()


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
            found |= measure_rounds(Work(CONFIG, PARTIES, 8, 4, 64), folder / "round", given.repeats)
        if "delay" in given.parts:
            slow = Work(CONFIG, PARTIES, 8, 2, 32)
            found["delay"] = measure_delay(slow, folder / "delay", max(5, given.repeats // 2))
    found["targets"] = targets(found)
    print(json.dumps(found, indent=2))
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
