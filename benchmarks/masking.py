"""What masked pushes cost: processor time of a round against plain pushes, and bytes against float32.

    python benchmarks/masking.py --json masking.json [--lot 256] [--rounds 4] [--pairs 3]

Three parties in one process train the demo's model under a budget, on made-up records of the demo's length. There is
no network: what is measured is the work itself. A plain and a masked federation take turns. A round's processor time
is that of all parties and the coordinator together, from one commit to the next; the first round of a run, which
makes tables and caches, is left out. Both add the same noise, so the difference is the agreement on keys, the
streams, the digests and the look at the sums.

Anything else that runs on the machine makes single figures worse, and the ratio of medians little; ``machine`` in the
JSON says what it was.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from coterie.config import FederationConfig, PrivacySpec
from coterie.demonstration.plan import DemoPlan
from coterie.federation.wire.transport import Lane, Message
from coterie.models.split.placement import Placement
from coterie.models.zoo.build import build_model
from coterie.training.data.packing import Sequences, pack
from coterie.training.experts.exchange import ExpertsExchange
from coterie.training.party.in_process import InProcessFederation
from coterie.training.party.inputs import PartyInputs, PrivacyInputs, Weights, trunk_tensors
from harness import machine, take_out_experts, write_figures

PARTIES = ("alder", "birch", "cedar")
RULES = {"epsilon": 8.0, "delta": 1e-5, "clip_norm": 1.0}
SIGMA = 1.0
MODEL = DemoPlan().model | {"vocab_size": 1024}
MOST_TIME, MOST_BYTES = 1.10, 1.3
"""Agreed: a masked round over a plain one."""


class Meter:
    """Watches one party's host in a running federation.

    Attributes:
        marks: processor seconds of the process at each commit.
        pushed: bytes of sums that came from the other parties.
    """

    def __init__(self, exchange: ExpertsExchange) -> None:
        self.marks: list[float] = []
        self.pushed = 0
        host = exchange.host
        self._commit, self._handle = host.commit, host.handle
        host.commit = self._committed  # type: ignore[method-assign]
        host.handle = self._handled  # type: ignore[method-assign]

    def _committed(self, *arguments: Any) -> None:
        self._commit(*arguments)
        self.marks.append(time.process_time())

    def _handled(self, peer: str, lane: Lane, message: Message, **more: Any) -> Message:
        if message.kind == "push-chunk":
            self.pushed += sum(tensor.nbytes for tensor in message.tensors)
        return self._handle(peer, lane, message, **more)


def config_of(aggregation: str, lot: int, rounds: int) -> FederationConfig:
    """Three parties that train the demo's model."""
    values: dict[str, Any] = {
        "name": "bench",
        "model": {"family": DemoPlan().family, "config": MODEL},
        "parties": {name: {"endpoint": f"127.0.0.1:{7000 + i}"} for i, name in enumerate(PARTIES)},
        "coordinator": {"endpoint": "127.0.0.1:7999"},
        "trunk": "shared",
        "privacy": RULES | {"lot_size": lot},
        "optim": {"lr": 1e-3},
        "train": {
            "rounds": rounds,
            "batch_size": lot,
            "micro_batch": 16,
            "eval_every": 0,
            "checkpoint_every": rounds,
        },
        "aggregation": aggregation,
        "deadline_s": 600.0,
        "round_deadline_s": 3600.0,
    }
    return FederationConfig.model_validate(values | ({"noise_multiplier": SIGMA} if aggregation == "masked" else {}))


def inputs_of(config: FederationConfig, records: Sequences, folder: Path) -> list[PartyInputs]:
    """All parties with the same records: what they hold costs nothing."""
    found = []
    for name in PARTIES:
        model = build_model(config.model, seed=0)
        placement = Placement.of_spec(config.placement, PARTIES, model)
        experts = take_out_experts(model, placement, name)
        model.requires_grad_(True)
        weights = Weights({key: value.detach().clone() for key, value in trunk_tensors(model).items()}, experts)
        spec = PrivacySpec(**RULES, lot_size=config.train.batch_size, physical_batch=16, ledger=folder / f"of-{name}")
        (folder / name).mkdir(parents=True)
        found.append(
            PartyInputs(
                party=name,
                federation=config,
                model=model,
                weights=lambda weights=weights: weights,  # type: ignore[misc]
                placement=placement,
                train=records,
                test=None,
                run_dir=folder / name,
                device=torch.device("cpu"),
                privacy=PrivacyInputs(spec, config.train.rounds, noise_multiplier=SIGMA, seed=0),
            )
        )
    return found


def measured(aggregation: str, lot: int, rounds: int, records: Sequences) -> tuple[list[float], int]:
    """Processor seconds of every round but the first, and bytes that one host took in one."""
    config = config_of(aggregation, lot, rounds)
    with tempfile.TemporaryDirectory() as folder:
        federation = InProcessFederation(config, Path(folder) / "coordinator")
        federation.coordinate()
        meters = []
        for inputs in inputs_of(config, records, Path(folder)):
            exchange = federation.up(inputs).actor.exchange
            if isinstance(exchange, ExpertsExchange):
                meters.append(Meter(exchange))
        federation.join(3600.0)
        for end in federation.ends.values():
            if isinstance(end, BaseException):
                raise end
    marks = meters[0].marks
    return [later - earlier for earlier, later in itertools.pairwise(marks)], meters[0].pushed // rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--lot", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    made = torch.Generator().manual_seed(0)
    length = DemoPlan().sequence_length
    documents = [torch.randint(3, 1024, (length,), generator=made).tolist() for _ in range(4 * asked.lot)]
    records = pack(documents, sequence_length=length, packing="records", end_id=2)
    seconds: dict[str, list[float]] = {"plain": [], "masked": []}
    pushed: dict[str, int] = {}
    before = machine()
    for _ in range(asked.pairs):
        for aggregation, found in seconds.items():
            rounds, pushed[aggregation] = measured(aggregation, asked.lot, asked.rounds, records)
            found += rounds
    median = {aggregation: statistics.median(found) for aggregation, found in seconds.items()}
    time_ratio, bytes_ratio = median["masked"] / median["plain"], pushed["masked"] / pushed["plain"]
    print(f"a round at {asked.lot} records a party: {median['plain']:.2f} s of processor time plain, ", end="")
    print(f"{median['masked']:.2f} s masked: {time_ratio:.3f} times; bytes {bytes_ratio:.3f} times")
    write_figures(
        asked.json,
        {
            "machine": before,
            "lot": asked.lot,
            "model": MODEL,
            "seconds": seconds,
            "median_seconds": median,
            "pushed_bytes_of_a_round": pushed,
            "time_ratio": time_ratio,
            "bytes_ratio": bytes_ratio,
            "targets": {"time": time_ratio <= MOST_TIME, "bytes": bytes_ratio <= MOST_BYTES},
        },
    )


if __name__ == "__main__":
    main()
