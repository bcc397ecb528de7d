"""One party of the fetch benchmark, as a process: an owner that trains privately, or a host that only serves.

Started by fetch.py. Commands on its input: ``round N``, ``declare N``, ``step N``, ``figures`` (a line of JSON).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coterie.config import FederationConfig, ModelSpec, OptimSpec, PrivacySpec
from coterie.federation.cancel import NEVER, CancelToken
from coterie.federation.experts.parts import Part
from coterie.federation.rounds.attempt import Attempt
from coterie.federation.rounds.state import State
from coterie.models.seam import expert_layers
from coterie.models.split.placement import Placement
from coterie.models.streaming.streamer import LayerStreamer
from coterie.models.zoo.build import build_model
from coterie.training.data.packing import pack
from coterie.training.experts.contribution import Sums, WithoutLedger
from coterie.training.experts.host import make_host, model_parts
from coterie.training.experts.owner import ExpertsOwner
from coterie.training.experts.private_sums import PrivateSums
from coterie.training.experts.shared_trunk import TrunkCopy
from coterie.training.optim import make_optimizer
from coterie.training.party.inputs import PrivacyInputs, trunk_tensors
from harness import Workload, serve, take_out_experts, transport_of

OWNER = "cedar"
"""The last in the roster dials all others, so its whole traffic passes the proxies before their doors."""
LENGTH = 64


@dataclass(frozen=True)
class FetchWorkload(Workload):
    """What the processes agree on; the model is an olmoe.

    Attributes:
        lot: expected records of a round. physical_batch: records computed at once.
        method: of clipping.
    """

    lot: int
    physical_batch: int
    method: str

    def federation(self) -> FederationConfig:
        return FederationConfig.model_validate(
            {
                "name": "fetch",
                "model": {"family": "olmoe", "config": self.config},
                "parties": {name: {"endpoint": f"127.0.0.1:{i + 1}"} for i, name in enumerate(self.parties)},
                "coordinator": {"endpoint": "127.0.0.1:99"},
                "optim": {"lr": 1e-4},
                "train": {"rounds": 100, "batch_size": self.lot, "micro_batch": self.physical_batch},
                "privacy": {"epsilon": 8.0, "delta": 1e-5, "lot_size": self.lot},
                "deadline_s": 120.0,
            }
        )


class HostOnly(WithoutLedger):
    """A `Contribution` of a party that hosts and adds nothing."""

    def sums(self, round_no: int, pins: Mapping[str, str], streamer: LayerStreamer, cancel: CancelToken) -> Sums:
        return Sums(None, 0.0, {})


class Party:
    """A party without coordinator and checkpoints: the round alone."""

    def __init__(self, name: str, folder: Path, listen: str) -> None:
        workload = FetchWorkload.load(folder)
        self.workload, self.name = workload, name
        federation = workload.federation()
        torch.manual_seed(0)
        model: nn.Module = build_model(ModelSpec(family="olmoe", config=workload.config)).train()
        placement = Placement.of_spec("round_robin", list(workload.parties), model)
        experts = take_out_experts(model, placement, name)
        for layer in expert_layers(model):
            for param in layer.parameters().values():
                param.requires_grad_(True)
        self.contribution: Any = HostOnly() if name != OWNER else self._private(model, folder)
        self.transport = transport_of(name, folder, listen)
        self.parts = model_parts(federation, model, placement)
        copy = TrunkCopy(model, None)
        self.host = host = make_host(
            name, federation, model, self.parts, trunk_tensors(model), experts,
            lambda params: make_optimizer(params, OptimSpec(lr=1e-4)), copy,
        )  # fmt: skip
        self.owner = ExpertsOwner(
            federation, model, self.parts, host, self.transport, self.contribution, copy,
            cache_dir=None, device=torch.device("cpu"),
        )  # fmt: skip
        wait_s = federation.deadline_s
        self.transport.start(lambda peer, lane, message: host.handle(peer, lane, message, wait_s=wait_s))
        self.transport.connect(120.0)

    def _private(self, model: nn.Module, folder: Path) -> PrivateSums:
        generator = torch.Generator().manual_seed(1)
        vocabulary = self.workload.config["vocab_size"]
        texts = torch.randint(0, vocabulary, (64 * self.workload.lot, LENGTH), generator=generator).tolist()
        records = pack(texts, sequence_length=LENGTH, packing="records", end_id=None)
        spec = PrivacySpec(
            epsilon=8.0, delta=1e-5, lot_size=self.workload.lot, physical_batch=self.workload.physical_batch,
            method=self.workload.method, ledger=folder / "ledger",
        )  # fmt: skip
        return PrivateSums(model, expert_layers(model), records, PrivacyInputs(spec, 100), lambda: "fetch")

    def round(self, number: int) -> None:
        """Owner: fetch, compute, push. Host: open the round, which lets owners fetch and push."""
        if self.name == OWNER:
            self.owner.compute(State(round=number, attempt=1), NEVER)
        else:
            self.host.begin(Attempt(number, 1))

    def declare(self, number: int) -> None:
        """Host: say that nothing will come."""
        self.owner.sender.declare(Attempt(number, 1), contributes=False, weight=0.0)

    def step(self, number: int) -> None:
        self.host.commit(Attempt(number, 1), 1e-4)

    def figures(self) -> dict[str, Any]:
        if self.name != OWNER:
            return {}
        total = [self.transport.counters().total(peer) for peer in self.workload.parties if peer != self.name]
        last = self.contribution.contributor.run.lot_sums.last
        return {
            **self.owner.seconds,
            **{f"{what}_seconds": seconds for what, seconds in self.contribution.contributor.run.seconds.items()},
            "records": last.drawn,
            "payload_bytes": sum(each.payload_bytes_sent + each.payload_bytes_received for each in total),
            "must_move_bytes": sum(_moved(part) for part in self.parts if part.host != self.name),
        }

    def close(self) -> None:
        self.transport.close()
        self.owner.close()
        self.contribution.close()


def _moved(part: Part) -> int:
    """A part goes down in bfloat16 and comes up in float32."""
    return part.num_bytes(torch.bfloat16) + (part.num_bytes(torch.float32) if part.trained else 0)


if __name__ == "__main__":
    serve(Party, ("round", "declare", "step"))
