"""Three parties in one process that exchange tokens, and the single process they are compared with."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coterie.config import OptimSpec
from coterie.federation.shard import Shard
from coterie.federation.tokens.host import TokensHost
from coterie.federation.tokens.owner import TokensOwner
from coterie.federation.wire.in_process import InProcessHub
from coterie.federation.wire.transport import Transport
from coterie.models.cut.cut_model import Cut
from coterie.models.seam import expert_layers
from coterie.models.split.placement import Placement
from coterie.models.split.shards import expert_key
from coterie.models.zoo.tiny import VOCAB, tiny_model
from coterie.training.loop import finish_round, loss_sum, use_checkpointing
from coterie.training.optim import AdamW, make_optimizer
from coterie.training.tokens.micro_batches import RoundSums, Scheduler

PARTIES = ("alder", "birch", "cedar")
# Adam steps by a gradient's sign as long as it is above eps. The usual 1e-8 would turn the rounding of gradients that
# nearly cancel (a key's bias) into full steps, in any two runs that add in another order; 1e-6 still does on some
# processors.
SPEC = OptimSpec(lr=1e-3, weight_decay=0.1, eps=1e-4)
Batch = Mapping[str, Tensor]


def batches_of(seed: int, micro_batches: int = 2, sequences: int = 2, length: int = 12) -> list[Batch]:
    """The micro-batches of one party in one round."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (micro_batches, sequences, length), generator=generator)
    return [{"input_ids": one, "attention_mask": torch.ones_like(one), "labels": one} for one in ids]


def expert_weights(model: nn.Module) -> dict[str, Tensor]:
    """All experts of a whole model, by global key."""
    return {
        expert_key(layer.index, expert, name): value.detach()[expert].clone()
        for layer in expert_layers(model)
        for name, value in layer.parameters().items()
        for expert in range(layer.num_experts)
    }


def trunk_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """A model's parameters that are not experts', by name."""
    return {name: p for name, p in model.named_parameters() if not p.is_meta and not _is_expert(model, name)}


def _is_expert(model: nn.Module, name: str) -> bool:
    owner, _, last = name.rpartition(".")
    return any(owner == layer.name and last in layer.layout.parameter_names for layer in expert_layers(model))


@dataclass
class Party:
    """One party: a trunk whose experts are on the meta device, and a host with a shard."""

    name: str
    model: nn.Module
    cut: Cut
    host: TokensHost
    transport: Transport
    exchange: TokensOwner
    optimizer: AdamW
    scheduler: Scheduler[Batch]

    def compute(self, round_no: int, attempt: int, batches: Sequence[Batch], seed: int | None = None) -> RoundSums:
        """This party's part of a round, declared to all hosts."""
        sums = self.scheduler.run(
            batches, lambda n, stopped: self.exchange.training(round_no, attempt, n, stopped), seed=seed
        )
        self.exchange.declare(round_no, attempt, sums.tokens)
        return sums

    def step(self, sums: RoundSums) -> None:
        """Step the trunk."""
        for parameter, gradient in sums.gradients.items():
            self.optimizer.gradient(parameter).copy_(gradient)
        finish_round(self.optimizer, sums.tokens, lr=SPEC.lr)


class Recording:
    """A `HostOptimizer` that moves nothing and remembers the gradients of each step."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": params, "lr": 0.0}]
        self._gradients = {param: torch.zeros_like(param) for param in params}
        self.steps: list[list[Tensor]] = []

    def gradient(self, param: Tensor) -> Tensor:
        return self._gradients[param]  # type: ignore[index]

    def step(self) -> None:
        self.steps.append([value.clone() for value in self._gradients.values()])

    def zero_grad(self) -> None:
        for value in self._gradients.values():
            value.zero_()

    def tensors(self, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {}

    def load_tensors(self, names: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        pass


class TokensWorld:
    """The parties, their transports and their experts, which all start from the same whole model."""

    def __init__(
        self,
        family: str = "olmoe",
        *,
        combine: str = "host",
        checkpointing: bool = False,
        in_flight: int = 2,
        seed: int = 5,
        trunk_seeds: Sequence[int] = (0, 1, 2),
        prepare: Callable[[nn.Module], None] = lambda model: None,
        sizes: Mapping[str, Any] | None = None,
        random_bytes: Callable[[int], bytes] | None = None,
        host_optimizer: Callable[[list[nn.Parameter]], Any] = lambda params: make_optimizer(params, SPEC),
        **host_settings: Any,
    ) -> None:
        self.family, self.prepare, self.checkpointing = family, prepare, checkpointing
        self.sizes = dict(sizes or {})
        whole = tiny_model(family, **self.sizes)
        self.experts = expert_weights(whole)
        self.placement = Placement.round_robin(PARTIES, [layer.num_experts for layer in expert_layers(whole)])
        hub = InProcessHub(PARTIES)
        self.parties: dict[str, Party] = {}
        for name, trunk_seed in zip(PARTIES, trunk_seeds, strict=True):
            model = self.model(trunk_seed)
            for layer in expert_layers(model):
                for parameter in layer.layout.parameter_names:
                    meta = getattr(layer.module, parameter).to("meta")
                    setattr(layer.module, parameter, nn.Parameter(meta, requires_grad=False))
            cut = Cut(model)
            hosted = {
                key: self.experts[key]
                for layer, experts in self.placement.hosted(name).items()
                for expert in experts
                for key in (expert_key(layer, expert, n) for n in cut.layers[layer].layout.parameter_names)
            }
            shard = Shard(cut.layers, hosted, host_optimizer)
            host = TokensHost(name, PARTIES, cut.layers, shard, **host_settings)
            transport = hub.transport(name)
            exchange = TokensOwner(
                transport,
                host,
                cut.layers,
                self.placement,
                combine=combine,  # type: ignore[arg-type]
                deadline_s=20.0,
                random_bytes=random_bytes or random.Random(f"{seed}{name}").randbytes,
            )
            optimizer = make_optimizer(trunk_of(model).values(), SPEC)
            scheduler = Scheduler(cut, lambda batch, model=model: loss_sum(model, batch), in_flight)
            self.parties[name] = Party(name, model, cut, host, transport, exchange, optimizer, scheduler)
        for party in self.parties.values():
            # Looked up for each message, so that a test can watch what a host is handed.
            party.transport.start(lambda *received, host=party.host: host.handle(*received))
        for party in self.parties.values():
            party.transport.connect(10.0)

    def model(self, trunk_seed: int) -> nn.Module:
        """A whole model with one party's trunk and the common experts."""
        model = tiny_model(self.family, seed=trunk_seed, **self.sizes)
        self.prepare(model)
        for layer in expert_layers(model):
            for name, stacked in layer.parameters().items():
                for expert in range(layer.num_experts):
                    stacked.data[expert] = self.experts[expert_key(layer.index, expert, name)]
        if self.checkpointing:
            use_checkpointing(model)
        return model.train()

    def begin(self, round_no: int, attempt: int = 0) -> None:
        for party in self.parties.values():
            party.host.begin(round_no, attempt)

    def abort(self, round_no: int, attempt: int = 0) -> None:
        for party in self.parties.values():
            party.host.drop(round_no, attempt)

    def commit(self, round_no: int, attempt: int = 0) -> None:
        for party in self.parties.values():
            party.host.commit(round_no, attempt, SPEC.lr)

    def only(self, name: str, round_no: int, batches: Sequence[Batch], attempt: int = 0) -> RoundSums:
        """A round in which one party trains and the others host."""
        self.begin(round_no, attempt)
        for other in PARTIES:
            if other != name:
                self.parties[other].exchange.declare(round_no, attempt, 0)
        sums = self.parties[name].compute(round_no, attempt, batches)
        self.commit(round_no, attempt)
        self.parties[name].step(sums)
        return sums

    def everybody(
        self, round_no: int, batches: Mapping[str, Sequence[Batch]], attempt: int = 0
    ) -> dict[str, RoundSums]:
        """A round in which all parties train at the same time, up to before the commit."""
        self.begin(round_no, attempt)
        with ThreadPoolExecutor(len(PARTIES)) as pool:
            running = {
                name: pool.submit(self.parties[name].compute, round_no, attempt, batches[name], 17)
                for name in PARTIES
            }
            return {name: future.result() for name, future in running.items()}

    def summed_gradients(self) -> dict[str, Tensor]:
        """What the hosts' `Recording` optimisers were given in the last step, by expert key."""
        found = {}
        for party in self.parties.values():
            given = iter(party.host.shard._optimizer.steps[-1])
            for layer, experts in party.host.shard.hosted.items():
                for name in party.cut.layers[layer].layout.parameter_names:
                    stacked = next(given)
                    found |= {expert_key(layer, e, name): stacked[row] for row, e in enumerate(experts)}
        return found

    def hosted(self) -> dict[str, Tensor]:
        """All experts as their hosts hold them now."""
        found: dict[str, Tensor] = {}
        for party in self.parties.values():
            found |= {key: value.clone() for key, value in party.host.state_dict().items() if "/" not in key}
        return found

    def close(self) -> None:
        for party in self.parties.values():
            party.transport.close()


@contextmanager
def world(*args: Any, **settings: Any) -> Iterator[TokensWorld]:
    """A `TokensWorld` that is closed at the end."""
    made = TokensWorld(*args, **settings)
    try:
        yield made
    finally:
        made.close()


def assert_equal(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-5) -> None:
    """Norm of the difference over the norm, per tensor."""
    assert got.keys() == expected.keys()
    for name, reference in expected.items():
        assert (got[name] - reference).norm() <= tolerance * reference.norm(), name
