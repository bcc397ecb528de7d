"""What a party does in each phase of a round, in the `tokens` exchange: the `Actor` behind a `Participant`."""

from __future__ import annotations

import time
from collections.abc import Collection

import torch
from torch import Tensor

from coterie.errors import CheckpointError, RoundError
from coterie.federation.control import COORDINATOR
from coterie.federation.host import ExpertHost, HostLimits
from coterie.federation.participant import Alive
from coterie.federation.round_state import Saved, State
from coterie.federation.shard import Shard
from coterie.federation.tokens import TokenExchange, TokenMicroBatch
from coterie.federation.transport import Lane, Message, Transport
from coterie.models.seam import check_selected
from coterie.models.segments import Cut
from coterie.models.turn import Turn
from coterie.training.evaluate import Evaluation, evaluate
from coterie.training.loop import finish_round, loss_sum, to_device
from coterie.training.memory import model_state_bytes
from coterie.training.metrics import MetricsWriter
from coterie.training.optim import lr_at, make_optimizer
from coterie.training.packing import Batch, RoundOrder
from coterie.training.party_parts import PartyParts, trunk_parameters, trunk_tensors
from coterie.training.party_store import PartyStore
from coterie.training.scheduler import RoundSums, Scheduler

_EVALUATION = "evaluation.safetensors"
_STEMS = ("trunk", "trunk-optimizer", "experts")


class PartyWork:
    """One party's trunk, data and hosted experts, doing what the rounds ask.

    Args:
        parts: what the party brings.
        transport: to the others; started by the caller, whose handler passes the parties' messages to `handle`.
        store: the party's checkpoints.

    Attributes:
        host: its experts.
    """

    def __init__(self, parts: PartyParts, transport: Transport, store: PartyStore) -> None:
        self.parts, self._transport, self._store = parts, transport, store
        federation = parts.federation
        self._spec = federation.train
        self._order = RoundOrder(len(parts.train), self._spec.batch_size, self._spec.seed)
        self._cut = Cut(parts.model)
        self._scheduler: Scheduler[Batch] = Scheduler(self._cut, self._loss, self._spec.in_flight)
        self._pristine = False
        self._begin_from_split()
        self._metrics = MetricsWriter(parts.run_dir)
        self._prepared: tuple[RoundSums, float] | None = None

    @property
    def evaluation(self) -> Evaluation | None:
        """The newest evaluation on this party's held-out text, for its own eyes; also one of an earlier process."""
        path = self.parts.run_dir / _EVALUATION
        return Evaluation.load(path) if path.exists() else None

    def state_bytes(self) -> int:
        """Trunk and hosted experts with their gradients and optimiser states."""
        trunk = model_state_bytes(self.parts.model, self._optimizer)
        experts = self.host.state_dict()
        return trunk + sum(t.nbytes if "/" in name else 2 * t.nbytes for name, t in experts.items())

    def handle(self, peer: str, lane: Lane, message: Message) -> Message:
        """Serve another party: its tokens through the experts hosted here."""
        return self.host.handle(peer, lane, message)

    # ---- the phases ----

    def held(self) -> tuple[Saved, ...]:
        return self._store.held()

    def load(self, source: Saved, told: State) -> None:
        if source.round == 0:
            if not self._pristine:
                self._begin_from_split()
        else:
            self._load_checkpoint(source)
        self._metrics.close()
        self._metrics = MetricsWriter(self.parts.run_dir, first_round=told.round)

    def compute(self, told: State, alive: Alive) -> None:
        began = time.monotonic()
        self._pristine = False
        self._meet(told.absent)
        check_selected(self.parts.model)
        self.host.begin(told.round, told.attempt, self._active(told.absent))
        rows = self._order.micro_batches(told.round - 1, self._spec.micro_batch)
        batches = [self.parts.train.batch(each) for each in rows]

        def exchange(number: int, stopped: object) -> TokenMicroBatch:
            if not alive():
                raise _superseded()
            return self._exchange.micro_batch(told.round, told.attempt, number, stopped)  # type: ignore[arg-type]

        seed = (self._spec.seed * 1_000_003 + told.round - 1) % 2**63
        sums = self._scheduler.run(batches, exchange, seed=seed)
        self._exchange.declare(told.round, told.attempt, sums.tokens)
        self._prepared = sums, time.monotonic() - began

    def drop(self, round: int, attempt: int) -> None:
        self._prepared = None
        self.host.abort(round, attempt)

    def step(self, round: int, attempt: int) -> None:
        assert self._prepared is not None
        sums, seconds = self._prepared
        rate = lr_at(round - 1, self.parts.federation.optim, self._spec.rounds)
        self.host.commit(round, attempt, rate)
        self._step_trunk(sums, rate)
        self._prepared = None
        loss = sum(sums.losses) / sums.tokens
        self._metrics.log(round - 1, loss=loss, lr=rate, tokens=sums.tokens, seconds=seconds, attempt=attempt)

    def evaluate(self, told: State, alive: Alive) -> None:
        if self.parts.test is None:
            return
        self._meet(told.absent)
        turn = self._cut.turn = Turn()  # an earlier one may have been stopped with its round
        if not alive():
            raise _superseded()
        with self._cut.inference(self._exchange.inference(told.round, turn.stopped)):
            found = evaluate(self.parts.model, self.parts.test, micro_batch=self._spec.micro_batch)
        found.save(self.parts.run_dir / _EVALUATION)
        self._metrics.log(max(told.round - 1, 0), test_loss=found.loss)

    def save(self, told: State) -> str:
        tensors = {
            "trunk": trunk_tensors(self.parts.model),
            "trunk-optimizer": self._optimizer.tensors(dict(self._parameters)),
            "experts": self.host.state_dict(),
        }
        apart = {stem: {name: _own(value) for name, value in named.items()} for stem, named in tensors.items()}
        return self._store.save(told.round, apart)

    def interrupt(self) -> None:
        self._scheduler.interrupt()

    def close(self) -> None:
        """Finish the figures; nothing else is open."""
        self._metrics.close()
        self._cut.close()

    # ----

    def _loss(self, batch: Batch) -> tuple[Tensor, int]:
        return loss_sum(self.parts.model, to_device(batch, self.parts.device))

    @torch.no_grad()
    def _begin_from_split(self) -> None:
        """Trunk, hosted experts and both optimisers as they are before the first round."""
        parts = self.parts
        weights = parts.weights()
        _copy_trunk(trunk_tensors(parts.model), weights.trunk)
        self._parameters = trunk_parameters(parts.model)
        self._optimizer = make_optimizer(self._parameters.values(), parts.federation.optim)
        shard = Shard(
            self._cut.layers,
            weights.experts,
            lambda params: make_optimizer(params, parts.federation.optim),
            device=parts.device,
        )
        limits = HostLimits(begin_s=parts.federation.deadline_s)
        self.host = ExpertHost(parts.party, tuple(parts.federation.parties), self._cut.layers, shard, limits=limits)
        self._exchange = TokenExchange(
            self._transport,
            self.host,
            self._cut.layers,
            parts.placement,
            combine=parts.federation.combine,
            deadline_s=parts.federation.deadline_s,
        )
        parts.model.train()
        self._pristine = True

    def _load_checkpoint(self, source: Saved) -> None:
        loaded = self._store.load(source, _STEMS)
        self._pristine = False
        _copy_trunk(trunk_tensors(self.parts.model), loaded["trunk"])
        self._optimizer.load_tensors(dict(self._parameters), loaded["trunk-optimizer"])
        self.host.load_state_dict(loaded["experts"])

    def _step_trunk(self, sums: RoundSums, rate: float) -> None:
        for param in self._parameters.values():
            if param in sums.gradients:
                self._optimizer.gradient(param).copy_(sums.gradients[param])
        finish_round(self._optimizer, sums.tokens, lr=rate)

    def _active(self, absent: Collection[str]) -> tuple[str, ...]:
        return tuple(name for name in self.parts.federation.parties if name not in absent)

    def _meet(self, absent: Collection[str]) -> None:
        """Make sure that every party that takes part can be reached from here."""
        others = [name for name in self._active(absent) if name not in (self.parts.party, COORDINATOR)]
        self._transport.connect(self.parts.federation.deadline_s, others)


@torch.no_grad()
def _copy_trunk(own: dict[str, Tensor], saved: object) -> None:
    assert isinstance(saved, dict)
    different = sorted(own.keys() ^ saved.keys()) or [n for n in own if own[n].shape != saved[n].shape]
    if different:
        raise CheckpointError(
            f"The saved trunk does not fit the model: {len(different)} tensors differ, first `{different[0]}`.",
            code="checkpoint-weights",
            why="a partly loaded trunk would train on random weights",
            fix="write trunk and shards again with `coterie split` from the model that federation.yaml names",
        )
    for name, tensor in own.items():
        tensor.copy_(saved[name])


def _own(tensor: Tensor) -> Tensor:
    """A scalar may be shared by many names (an optimiser's step), which safetensors refuses; rows are apart."""
    return tensor.detach().clone() if tensor.ndim == 0 else tensor


def _superseded() -> RoundError:
    return RoundError("The round was interrupted.", code="round-interrupted")
