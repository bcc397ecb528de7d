"""A party's part in the `tokens` exchange: its hidden vectors go to the hosts of the experts it needs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from coterie.federation.host import ExpertHost
from coterie.federation.participant import Alive
from coterie.federation.round_state import State
from coterie.federation.shard import Shard
from coterie.federation.tokens import TokenExchange, TokenMicroBatch
from coterie.federation.transport import Lane, Message, Transport
from coterie.models.seam import check_selected
from coterie.models.segments import Cut
from coterie.models.turn import Turn
from coterie.training.agreed_limits import host_limits
from coterie.training.packing import Batch
from coterie.training.party_parts import PartyParts, Weights
from coterie.training.party_store import PartyStore
from coterie.training.party_work import PartyWork, superseded
from coterie.training.scheduler import RoundSums, Scheduler
from coterie.training.seeds import derived_seed


class TokensWork(PartyWork):
    """`PartyWork` for the `tokens` exchange.

    Attributes:
        host: the experts hosted here.
    """

    def __init__(self, parts: PartyParts, transport: Transport, store: PartyStore) -> None:
        self._cut = Cut(parts.model)
        self._scheduler: Scheduler[Batch] = Scheduler(self._cut, self._loss, parts.federation.train.in_flight)
        self._prepared: tuple[RoundSums, float] | None = None
        super().__init__(parts, transport, store)

    def _begin(self, weights: Weights) -> None:
        parts = self.parts
        shard = Shard(self._cut.layers, weights.experts, self._make_optimizer, device=parts.device)
        self.host = ExpertHost(
            parts.party,
            tuple(parts.federation.parties),
            self._cut.layers,
            shard,
            recompute=parts.federation.model.gradient_checkpointing,
            limits=host_limits(parts.federation, parts.model),
        )
        self._exchange = TokenExchange(
            self._transport,
            self.host,
            self._cut.layers,
            parts.placement,
            combine=parts.federation.combine,
            deadline_s=parts.federation.deadline_s,
            value_limit=parts.federation.value_limit,
        )

    def _hosted_state(self) -> dict[str, Tensor]:
        return self.host.state_dict()

    def _load_hosted(self, state: dict[str, Tensor]) -> None:
        self.host.load_state_dict(state)

    def compute(self, told: State, alive: Alive) -> None:
        began = time.monotonic()
        self._pristine = False
        self._meet(told.absent, alive)
        check_selected(self.parts.model)
        self.host.begin(told.round, told.attempt, self._active(told.absent))
        self._exchange.absent = frozenset(told.absent)

        def exchange(number: int, stopped: object) -> TokenMicroBatch:
            if not alive():
                raise superseded()
            return self._exchange.micro_batch(told.round, told.attempt, number, stopped)  # type: ignore[arg-type]

        seed = derived_seed(self._spec.seed, told.round - 1)
        sums = self._scheduler.run(self._batches(told.round), exchange, seed=seed)
        self._exchange.declare(told.round, told.attempt, sums.tokens, self._cut.turn.stopped)
        self._prepared = sums, time.monotonic() - began

    def drop(self, round: int, attempt: int) -> None:
        self._prepared = None
        self.host.abort(round, attempt)

    def _commit(self, round: int, attempt: int, rate: float) -> Mapping[str, float]:
        assert self._prepared is not None
        sums, seconds = self._prepared
        self.host.commit(round, attempt, rate)
        self._step_trunk(sums.gradients, sums.tokens, rate)
        self._prepared = None
        return {"loss": sum(sums.losses) / sums.tokens, "tokens": sums.tokens, "seconds": seconds}

    @contextmanager
    def _inference(self, told: State, alive: Alive) -> Iterator[None]:
        turn = self._cut.turn = Turn()  # an earlier one may have been stopped with its round
        if not alive():
            raise superseded()
        self._exchange.absent = frozenset(told.absent)
        with self._cut.inference(self._exchange.inference(told.round, turn.stopped)):
            yield

    def handle(self, peer: str, lane: Lane, message: Message) -> Message:
        return self.host.handle(peer, lane, message)

    def interrupt(self) -> None:
        self._scheduler.interrupt()

    def stop_serving(self) -> None:
        self.host.close()

    def _close(self) -> None:
        self._cut.close()
