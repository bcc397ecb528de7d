"""One party of the round benchmark, as a process: trunk, data and hosted experts, told what to do on its input.

Started by exchange.py. Commands: ``round N IN_FLIGHT`` (compute), ``step N`` (commit), ``figures`` (a line of JSON).
"""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coterie.config import ModelSpec, OptimSpec
from coterie.federation.shard import Shard
from coterie.federation.tokens.host import TokensHost
from coterie.federation.tokens.owner import TokenMicroBatch, TokensOwner
from coterie.models.cut.cut_model import Cut
from coterie.models.seam import ExpertLayer, ExpertsCall, expert_layers
from coterie.models.split.placement import Placement
from coterie.models.zoo.build import build_model
from coterie.training.data.packing import Batch
from coterie.training.loop import finish_round, loss_sum
from coterie.training.optim import make_optimizer
from coterie.training.tokens.micro_batches import Scheduler
from harness import Workload, serve, take_out_experts, transport_of

OPTIM = OptimSpec(lr=1e-3)


@dataclass(frozen=True)
class TokensWorkload(Workload):
    """What the processes agree on; the model is a qwen3_moe.

    Attributes:
        batch, micro_batch: sequences per party and round, and per micro-batch.
        tokens: per sequence.
    """

    batch: int
    micro_batch: int
    tokens: int

    def model(self) -> nn.Module:
        """The same random weights in every process."""
        torch.manual_seed(0)
        return build_model(ModelSpec(family="qwen3_moe", config=self.config)).train()

    def batches(self, party: str) -> list[Batch]:
        """A party's micro-batches; the same in every round."""
        generator = torch.Generator().manual_seed(self.parties.index(party))
        shape = (self.batch, self.tokens)
        ids = torch.randint(0, self.config["vocab_size"], shape, generator=generator)
        parts = ids.split(self.micro_batch)
        return [{"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part} for part in parts]


class Watched:
    """A micro-batch's exchange that counts what had to move, from the routing alone, and how long answers took."""

    def __init__(self, inner: TokenMicroBatch, party: Party) -> None:
        self._inner, self._party = inner, party

    def answers_rows(self, layer: ExpertLayer) -> bool:
        return self._inner.answers_rows(layer)

    def forward(self, call: ExpertsCall, keep: bool) -> tuple[Tensor, Any]:
        self._party.add("must_move_bytes", self._party.needed_bytes(call))
        began = time.perf_counter()
        try:
            return self._inner.forward(call, keep)
        finally:
            self._party.add("exchange_s", time.perf_counter() - began)

    def backward(self, ticket: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        began = time.perf_counter()
        try:
            return self._inner.backward(ticket, grad)
        finally:
            self._party.add("exchange_s", time.perf_counter() - began)


class Party:
    """A party without coordinator, checkpoints and evaluation: the round alone."""

    def __init__(self, name: str, folder: Path, listen: str) -> None:
        workload = TokensWorkload.load(folder)
        self.workload, self.name = workload, name
        model = workload.model()
        counts = [layer.num_experts for layer in expert_layers(model)]
        self.placement = Placement.round_robin(workload.parties, counts)
        experts = take_out_experts(model, self.placement, name)
        cut = Cut(model)
        self.host = TokensHost(
            name,
            workload.parties,
            cut.layers,
            Shard(cut.layers, experts, lambda params: make_optimizer(params, OPTIM)),
        )
        self.transport = transport_of(name, folder, listen)
        self.transport.start(self.host.handle)
        self.transport.connect(60.0)
        self.exchange = TokensOwner(self.transport, self.host, cut.layers, self.placement)
        trunk = [param for param in model.parameters() if not param.is_meta]
        self.optimizer = make_optimizer(trunk, OPTIM)
        self.schedulers = {n: Scheduler(cut, lambda batch: loss_sum(model, batch), n) for n in (1, 2)}
        self.batches = workload.batches(name)
        self._counts: dict[str, float] = defaultdict(float)
        self._guard = threading.Lock()

    def add(self, name: str, amount: float) -> None:
        """Count something; several micro-batches do so at once."""
        with self._guard:
            self._counts[name] += amount

    def round(self, number: int, in_flight: int) -> None:
        self.host.begin(number, 1)
        self._sums = self.schedulers[in_flight].run(
            self.batches, lambda n, cancelled: Watched(self.exchange.training(number, 1, n, cancelled), self)
        )
        self.exchange.declare(number, 1, self._sums.tokens)

    def step(self, number: int) -> None:
        self.host.commit(number, 1, OPTIM.lr)
        for param, gradient in self._sums.gradients.items():
            self.optimizer.gradient(param).copy_(gradient)
        finish_round(self.optimizer, self._sums.tokens, lr=OPTIM.lr)

    def needed_bytes(self, call: ExpertsCall) -> int:
        """Bytes that one experts call has to move there and back, forward and backward, by its routing.

        Per remote host: a token's hidden vector once, its combined output back, the gradient of that, the gradient
        of the hidden vector back; per (token, expert) pair the expert's number (1 byte), its weight, and the
        gradient of the weight.
        """
        hosts = torch.tensor(self.placement.hosts[call.layer.index])[call.expert_ids_NK]
        mine = self.workload.parties.index(self.name)
        width, item = call.hidden_ND.shape[1], call.hidden_ND.element_size()
        total = 0
        for host in range(len(self.workload.parties)):
            if host != mine:
                chosen = hosts == host
                total += int(chosen.any(1).sum()) * 4 * width * item + int(chosen.sum()) * (1 + 2 * item)
        return total

    def figures(self) -> dict[str, Any]:
        """Counts since the process began."""
        sent = [self.transport.counters().total(peer) for peer in self.workload.parties if peer != self.name]
        return {
            "cpu_s": cpu_by_kind(),
            "payload_bytes": sum(total.payload_bytes_sent for total in sent),
            "tensor_bytes": sum(total.tensor_bytes_sent for total in sent),
            **self._counts,
        }

    def close(self) -> None:
        self.transport.close()


def cpu_by_kind() -> dict[str, float]:
    """Processor seconds of this process so far, by what its threads are for."""
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    tick = os.sysconf("SC_CLK_TCK")
    found: dict[str, float] = defaultdict(float)
    for task in Path("/proc/self/task").iterdir():
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        found[kind_of(names.get(int(task.name)))] += (int(fields[11]) + int(fields[12])) / tick
    ended = sum(os.times()[:2]) - sum(found.values())  # threads of micro-batches end with their round
    found["trunk"] += ended
    return dict(found)


def kind_of(name: str | None) -> str:
    """What a thread does, from the name it was given; gRPC's own threads have none."""
    if name is None:
        return "encryption_and_sockets"
    if name == "MainThread" or name.startswith("micro-batches"):
        return "trunk"
    if any(word in name for word in ("-read-", "-dial-", "-serve", "-clock")):
        return "frames_and_copies"
    return "experts"


if __name__ == "__main__":
    serve(Party, ("round", "step"))
