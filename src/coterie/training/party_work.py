"""What a party does in each phase of a round: the `Actor` behind a `Participant`, whatever the exchange.

The two exchanges differ in how an attempt is computed and committed; `tokens_work` and `experts_work` say that.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from coterie.errors import CheckpointError, RoundError
from coterie.federation.identity import COORDINATOR
from coterie.federation.participant import Alive
from coterie.federation.round_state import Saved, State
from coterie.federation.transport import Lane, Message, Transport
from coterie.federation.values import check_own
from coterie.models import seam
from coterie.training.evaluate import Evaluation, evaluate
from coterie.training.folders import private_folder
from coterie.training.loop import finish_round, loss_sum, to_device
from coterie.training.memory import model_state_bytes
from coterie.training.metrics import MetricsWriter
from coterie.training.optim import AdamW, lr_at, make_optimizer
from coterie.training.packing import Batch, RoundOrder
from coterie.training.party_parts import PartyParts, Weights, trunk_parameters, trunk_tensors
from coterie.training.party_store import PartyStore

_EVALUATION = "evaluation.safetensors"
_STEMS = ("trunk", "trunk-optimizer", "experts", "hosted")
"""``trunk`` and ``experts`` hold parameters alone, in the form that `coterie export` reads; ``hosted`` the rest."""
_EXPERT = re.compile(r"layer\.\d+\.expert\.\d+\.\w+")


class PartyWork(ABC):
    """One party's trunk, data and hosted experts, doing what the rounds ask.

    Args:
        parts: what the party brings.
        transport: to the others; started by the caller, whose handler passes the parties' messages to `handle`.
        store: the party's checkpoints.
    """

    def __init__(self, parts: PartyParts, transport: Transport, store: PartyStore) -> None:
        self.parts, self._transport, self._store = parts, transport, store
        self._spec = parts.federation.train
        self._order = RoundOrder(len(parts.train), self._spec.batch_size, self._spec.seed)
        self._layers = seam.expert_layers(parts.model)
        self._pristine = False
        self._begin_from_split()
        self._metrics: MetricsWriter | None = None  # which figures stay is known once a state is loaded

    # ---- what an exchange says ----

    @abstractmethod
    def _begin(self, weights: Weights) -> None:
        """Hosted experts as they are before the first round."""

    @abstractmethod
    def _hosted_state(self) -> dict[str, Tensor]:
        """Everything this party stores for others, with its optimiser, for a checkpoint."""

    @abstractmethod
    def _load_hosted(self, state: dict[str, Tensor]) -> None: ...

    @abstractmethod
    def compute(self, told: State, alive: Alive) -> None: ...

    @abstractmethod
    def drop(self, round: int, attempt: int) -> None: ...

    @abstractmethod
    def _commit(self, round: int, attempt: int, rate: float) -> Mapping[str, float]:
        """Apply a prepared attempt to trunk and hosted experts; figures of the round for the owner's eyes."""

    @abstractmethod
    def _inference(self, told: State, alive: Alive) -> AbstractContextManager[object]:
        """Inside, the model's experts answer without gradients."""

    @abstractmethod
    def handle(self, peer: str, lane: Lane, message: Message) -> Message:
        """Serve another party."""

    @abstractmethod
    def interrupt(self) -> None: ...

    @abstractmethod
    def stop_serving(self) -> None:
        """Let requests of others that wait for something here fail now; called before the transport closes."""

    @abstractmethod
    def _close(self) -> None: ...

    # ---- the phases ----

    @property
    def evaluation(self) -> Evaluation | None:
        """The newest evaluation on this party's held-out text, for its own eyes; also one of an earlier process."""
        path = private_folder(self.parts.run_dir) / _EVALUATION
        return Evaluation.load(path) if path.exists() else None

    def open_books(self) -> bool:
        """Make `privacy` and `statement` answer also where nothing was computed in this process.

        Returns:
            Whether this party keeps a ledger.
        """
        return False

    def privacy(self) -> dict[str, object] | None:
        """What this party revealed, to whom, at what epsilon and delta; None where nothing bounds it."""
        return None

    def statement(self) -> str:
        """What is promised about this party's records, for people; empty where there is no promise."""
        return ""

    def state_bytes(self) -> int:
        """Trunk and hosted experts with their gradients and optimiser states."""
        trunk = model_state_bytes(self.parts.model, self._optimizer)
        return trunk + sum(t.nbytes if "/" in name else 2 * t.nbytes for name, t in self._hosted_state().items())

    def held(self) -> tuple[Saved, ...]:
        return self._store.held()

    def load(self, source: Saved, told: State) -> None:
        if source.round == 0:
            if not self._pristine:
                self._begin_from_split()
        else:
            self._load_checkpoint(source)
        self._store.went_back_to(source.round)
        self._close_metrics()
        self._metrics = MetricsWriter(private_folder(self.parts.run_dir), first_round=told.round)

    def step(self, round: int, attempt: int) -> None:
        rate = lr_at(round - 1, self.parts.federation.optim, self._spec.rounds)
        figures = self._commit(round, attempt, rate)
        hosted = (value for name, value in self._hosted_state().items() if "/" not in name)
        own = (*trunk_tensors(self.parts.model).values(), *hosted)
        check_own("the parameters", own, where=f"after round {round}, at {self.parts.party}")
        self._log(round - 1, **figures, lr=rate, attempt=attempt)

    def evaluate(self, told: State, alive: Alive) -> None:
        self._meet(told.absent, alive)
        with self._inference(told, alive):
            if self.parts.test is None:
                return
            found = evaluate(self.parts.model, self.parts.test, micro_batch=self._spec.micro_batch)
        found.save(private_folder(self.parts.run_dir) / _EVALUATION)
        self._log(max(told.round - 1, 0), test_loss=found.loss)

    def save(self, told: State, alive: Alive) -> str:
        hosted = self._hosted_state()
        tensors = {
            "trunk": trunk_tensors(self.parts.model),
            "trunk-optimizer": self._optimizer.tensors(dict(self._parameters)),
            "experts": {name: value for name, value in hosted.items() if _EXPERT.fullmatch(name)},
            "hosted": {name: value for name, value in hosted.items() if not _EXPERT.fullmatch(name)},
        }
        for stem, named in tensors.items():
            check_own(f"`{stem}`", named.values(), where=f"checkpoint of round {told.round}; nothing was written")
        apart = {stem: {name: _own(value) for name, value in named.items()} for stem, named in tensors.items()}
        lora = self.parts.federation.lora
        adapters = lora.model_dump(mode="json") if lora is not None else None
        return self._store.save(told.round, apart, adapters, self.parts.trainings)

    def close(self) -> None:
        """Finish the figures and whatever runs beside."""
        self._close_metrics()
        self._close()

    # ---- for the exchanges ----

    def _batches(self, round: int) -> list[Batch]:
        """The micro-batches of a round, from 1."""
        rows = self._order.micro_batches(round - 1, self._spec.micro_batch)
        return [self.parts.train.batch(each) for each in rows]

    def _loss(self, batch: Batch) -> tuple[Tensor, int]:
        return loss_sum(self.parts.model, to_device(batch, self.parts.device))

    def _own_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that this party's own optimiser steps."""
        return trunk_parameters(self.parts.model)

    def _make_optimizer(self, params: Collection[Tensor]) -> AdamW:
        return make_optimizer(params, self.parts.federation.optim)

    def _step_trunk(self, sums: dict[Tensor, Tensor], divisor: float, rate: float) -> None:
        """Step the party's own trunk by sums of gradients over ``divisor``."""
        for param in self._parameters.values():
            if param in sums:
                self._optimizer.gradient(param).copy_(sums[param])
        finish_round(self._optimizer, divisor, lr=rate)

    def _close_metrics(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None

    def _log(self, round_index: int, **figures: float) -> None:
        assert self._metrics is not None, "figures belong to a state that was loaded"
        self._metrics.log(round_index, **figures)

    def _active(self, absent: Collection[str]) -> tuple[str, ...]:
        return tuple(name for name in self.parts.federation.parties if name not in absent)

    def _meet(self, absent: Collection[str], alive: Alive) -> None:
        """Make sure that every party that takes part can be reached from here, as long as it matters."""
        others = [name for name in self._active(absent) if name not in (self.parts.party, COORDINATOR)]
        self._transport.connect(self.parts.federation.deadline_s, others, alive)
        if not alive():
            raise superseded()

    # ----

    @torch.no_grad()
    def _begin_from_split(self) -> None:
        """Trunk, hosted experts and both optimisers as they are before the first round."""
        weights = self.parts.weights()
        _copy_trunk(trunk_tensors(self.parts.model), weights.trunk)
        self._parameters = self._own_parameters()
        self._optimizer = self._make_optimizer(self._parameters.values())
        self._begin(weights)
        self.parts.model.train()
        self._pristine = True

    def _load_checkpoint(self, source: Saved) -> None:
        loaded = self._store.load(source, _STEMS)
        self._pristine = False
        _copy_trunk(trunk_tensors(self.parts.model), loaded["trunk"])
        self._optimizer.load_tensors(dict(self._parameters), loaded["trunk-optimizer"])
        self._load_hosted(loaded["experts"] | loaded["hosted"])


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


def superseded() -> RoundError:
    """What ends an attempt that no longer counts."""
    return RoundError("The round was interrupted.", code="round-interrupted")
