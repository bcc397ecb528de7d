"""A party's part in the `tokens` exchange: its hidden vectors go to the hosts of the experts it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager

from torch import Tensor

from coterie.federation.cancel import CancelToken
from coterie.federation.rounds.state import State
from coterie.federation.shard import Shard
from coterie.federation.tokens.host import TokensHost
from coterie.federation.tokens.owner import TokenMicroBatch, TokensOwner
from coterie.federation.wire.transport import Address, Lane, Message, Transport
from coterie.models.cut.cut_model import Cut
from coterie.models.cut.device_lock import DeviceLock
from coterie.models.seam import check_selected
from coterie.models.streaming.cache import LayerWeights
from coterie.training.data.packing import Batch
from coterie.training.evaluate import batches_of
from coterie.training.party.agreed_limits import tokens_limits
from coterie.training.party.answer_key import AnswerKey
from coterie.training.party.inputs import Weights
from coterie.training.party.own_trunk import OwnTrunk
from coterie.training.planning import exposure
from coterie.training.seeds import derived_seed
from coterie.training.tokens.micro_batches import RoundSums, Scheduler


class TokensExchange:
    """The `Exchange` of a `PartyActor` where tokens travel.

    Args:
        trunk: what this party trains by itself.
        transport: to the others.
        weights: of the split model.
        key: told which tokens leave, where the agreement records transcripts.

    Attributes:
        host: the experts hosted here.
    """

    shares_trunk = False

    def __init__(self, trunk: OwnTrunk, transport: Transport, weights: Weights, key: AnswerKey | None = None) -> None:
        self._trunk, self._inputs, self._transport, self._key = trunk, trunk.inputs, transport, key
        self._cut = Cut(trunk.inputs.model)
        self._scheduler: Scheduler[Batch] = Scheduler(self._cut, trunk.loss, self._inputs.federation.train.in_flight)
        self._prepared: dict[tuple[int, int], RoundSums] = {}
        self.restart(weights)

    def restart(self, weights: Weights) -> None:
        inputs = self._inputs
        shard = Shard(self._cut.layers, weights.experts, self._trunk.make_optimizer, device=inputs.device)
        self.host = TokensHost(
            inputs.party,
            tuple(inputs.federation.parties),
            self._cut.layers,
            shard,
            recompute=inputs.federation.model.gradient_checkpointing,
            limits=tokens_limits(inputs.federation, inputs.model),
        )
        self._experts = TokensOwner(
            self._transport,
            self.host,
            self._cut.layers,
            inputs.placement,
            combine=inputs.federation.combine,
            deadline_s=inputs.federation.deadline_s,
            value_limit=inputs.federation.value_limit,
            sent=self._key.sent if self._key is not None else None,
        )

    def hosted_state(self) -> dict[str, Tensor]:
        return self.host.state_dict()

    def forget(self) -> None:
        """`load_hosted` replaces all at once."""

    def load_hosted(self, state: Mapping[str, Tensor]) -> None:
        self.host.load_state_dict(dict(state))

    def go_on_after(self, round_no: int) -> None:
        """Hosts refuse what belongs to no open attempt in any case."""

    def compute(self, state: State, cancel: CancelToken) -> None:
        check_selected(self._inputs.model)
        self.host.begin(state.round, state.attempt, self._inputs.active(state.absent))
        self._experts.absent = frozenset(state.absent)

        def exchange(number: int, cancelled: Future[None]) -> TokenMicroBatch:
            cancel.check()
            return self._experts.training(state.round, state.attempt, number, cancelled)

        if self._key is not None:
            for number, rows in enumerate(self._trunk.rows(state.round)):
                address = Address(round=state.round, attempt=state.attempt, micro_batch=number)
                self._key.batch(address, rows, self._inputs.train)
        seed = derived_seed(self._inputs.federation.train.seed, state.round - 1)
        sums = self._scheduler.run(self._trunk.batches(state.round), exchange, seed=seed)
        self._experts.declare(state.round, state.attempt, sums.tokens, self._cut.device_lock.cancelled)
        self._prepared = {(state.round, state.attempt): sums}

    def drop(self, round_no: int, attempt: int) -> None:
        self._prepared = {}
        self.host.drop(round_no, attempt)

    def commit(self, round_no: int, attempt: int, rate: float) -> Mapping[str, float]:
        sums = self._prepared.pop((round_no, attempt))
        self.host.commit(round_no, attempt, rate)
        self._trunk.step(sums.gradients, sums.tokens, rate)
        return {"loss": sum(sums.losses) / sums.tokens, "tokens": sums.tokens}

    @contextmanager
    def inference(self, state: State, cancel: CancelToken) -> Iterator[None]:
        lock = self._cut.device_lock = DeviceLock()  # an earlier one may have been cancelled with its round
        cancel.check()
        self._experts.absent = frozenset(state.absent)
        if self._key is not None and self._inputs.test is not None:
            size = self._inputs.federation.train.micro_batch
            for number, rows in enumerate(batches_of(len(self._inputs.test), size)):
                self._key.batch(Address(round=state.round, call=number), rows, self._inputs.test)
        with self._cut.inference(self._experts.inference(state.round, lock.cancelled)):
            yield

    def catch_up(self, state: State, cancel: CancelToken) -> None:
        """No host steps the trunk."""

    def layers(self) -> Callable[[int], LayerWeights] | None:
        """Experts stay with their hosts."""
        return None

    def saved(self, round_no: int, oldest: int) -> None:
        """Nothing is kept for going back."""

    def open_ledger(self) -> bool:
        return False

    def privacy(self) -> None:
        """Nothing bounds what hidden vectors reveal."""

    def statement(self) -> str:
        return "\n".join(exposure.of_tokens(self._inputs.federation))

    def handle(self, peer: str, lane: Lane, message: Message) -> Message:
        return self.host.handle(peer, lane, message)

    def cancel(self) -> None:
        self._scheduler.cancel()

    def stop_serving(self) -> None:
        self.host.close()

    def close(self) -> None:
        self._cut.close()
