"""A party's part in the `experts` exchange: `host` stores, `owner` computes and brings sums back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from coterie.config import PrivacyRules
from coterie.dp.accounting.ledger import LedgerHead
from coterie.dp.accounting.lots import Lot
from coterie.errors import IdentityError
from coterie.federation.cancel import CancelToken
from coterie.federation.rounds.attempt import Attempt
from coterie.federation.rounds.state import State
from coterie.federation.wire.transport import Lane, Message, Transport
from coterie.models import seam
from coterie.models.streaming.cache import LayerWeights
from coterie.training.experts.adapter_sums import AdapterSums
from coterie.training.experts.contribution import Contribution, PlainSums, Sums
from coterie.training.experts.gateway import GatewayContribution
from coterie.training.experts.host import make_host, model_parts
from coterie.training.experts.masked_push import MaskedPush
from coterie.training.experts.owner import ExpertsOwner
from coterie.training.experts.private_sums import PrivateSums
from coterie.training.experts.public_loads import releases_loads
from coterie.training.experts.shared_trunk import TrunkCopy, shared_names
from coterie.training.folders import ledger_run
from coterie.training.loop import loss_sum, to_device
from coterie.training.party.answer_key import AnswerKey
from coterie.training.party.inputs import Weights
from coterie.training.party.own_masks import OwnMasks
from coterie.training.party.own_trunk import OwnTrunk
from coterie.training.planning import exposure

_TRUNK = "trunk:"
_RECEIVED = "received-round:"
_RECEIVED_BEFORE, _NUMBERS_BEFORE = "received:", 1024
"""In checkpoints of protocol version 1, where a round had that many numbers, one for each attempt."""
_LEDGER = "ledger:"


class ExpertsExchange:
    """The `Exchange` of a `PartyActor` where whole layers travel.

    Args:
        trunk: what this party trains by itself.
        transport: to the others.
        run: name of this party's run, once it has joined.
        weights: of the split model.
        key: told what each sum is made of, where the agreement records transcripts.
        masks: keeps those of masked pushes, where it does.

    Attributes:
        parts: every part of the model.
        contribution: makes this party's sums.
        host: what is stored here for everybody.
        owner: fetches, computes and pushes.
    """

    def __init__(
        self,
        trunk: OwnTrunk,
        transport: Transport,
        run: Callable[[], str],
        weights: Weights,
        key: AnswerKey | None = None,
        masks: OwnMasks | None = None,
    ) -> None:
        self._trunk, self._inputs, self._transport, self._run = trunk, trunk.inputs, transport, run
        self._key, self._masks = key, masks
        federation, model = trunk.inputs.federation, trunk.inputs.model
        self.parts = model_parts(federation, model, trunk.inputs.placement)
        self.shares_trunk = bool(shared_names(federation, model))
        self._prepared: dict[Attempt, Sums] = {}
        self._set_up(weights)

    def restart(self, weights: Weights) -> None:
        self.close()
        self._set_up(weights)

    def _set_up(self, weights: Weights) -> None:
        inputs, transport = self._inputs, self._transport
        own = make_contribution(self._trunk, self._ledger_run, self._drawn)
        self.contribution: Contribution = (
            own if inputs.ranks.world == 1 else GatewayContribution(own, inputs, self._ledger_run)
        )
        self._saved_round = 0
        balancer = self.contribution.balancer
        copy = TrunkCopy(inputs.model, balancer)
        self.host = make_host(
            inputs.party,
            inputs.federation,
            inputs.model,
            self.parts,
            weights.trunk,
            weights.experts,
            self._trunk.make_optimizer,
            copy,
            balancer,
        )
        self.owner = ExpertsOwner(
            inputs.federation,
            inputs.model,
            self.parts,
            self.host,
            transport,
            self.contribution,
            copy,
            cache_dir=inputs.cache_folder,
            device=inputs.device,
            roster=inputs.roster,
            masked=self._masked_push(),
            shares=inputs.experts_over,
        )

    def _masked_push(self) -> MaskedPush | None:
        inputs = self._inputs
        if self.host.board is None:
            return None
        if inputs.signer is None:
            raise IdentityError(
                "masked pushes need this party's kit: without a key nobody knows whose masks they are."
            )
        return MaskedPush(
            inputs.federation,
            self.parts,
            self.host,
            self.host.board,
            self._transport,
            inputs.signer,
            self._run,
            inputs.roster,
            self._masks,
        )

    def _drawn(self, lot: Lot) -> None:
        if self._key is not None:
            self._key.lot(lot.round, lot.records.tolist())

    def _ledger_run(self) -> str:
        """One name for this party's run in its ledger, the same after a restart."""
        return ledger_run(self._run() or "unnamed", self._inputs.party)

    # ---- checkpoints ----

    def hosted_state(self) -> dict[str, Tensor]:
        trunk = {f"{_TRUNK}{name}": value for name, value in self.host.trunk.state_dict().items()}
        received = {f"{_RECEIVED}{party}": torch.tensor(n) for party, n in self.host.received.items()}
        return self.host.shard.state_dict() | trunk | received | self._ledger_state()

    def _ledger_state(self) -> dict[str, Tensor]:
        """The newest entry of this party's ledger, so that a later start notices one that was put back."""
        head = self.contribution.ledger_head()
        if head is None:
            return {}
        return {f"{_LEDGER}{head.seq}": torch.tensor(list(bytes.fromhex(head.hash)), dtype=torch.uint8)}

    def forget(self) -> None:
        self.drop(0, 0)
        self.owner.forget_trunk()
        self.host.forget()

    def load_hosted(self, state: Mapping[str, Tensor]) -> None:
        heads = [
            LedgerHead(int(name.removeprefix(_LEDGER)), bytes(value.tolist()).hex())
            for name, value in state.items()
            if name.startswith(_LEDGER)
        ]
        self.contribution.expect(heads[0] if heads else None)
        trunk = {name.removeprefix(_TRUNK): value for name, value in state.items() if name.startswith(_TRUNK)}
        self.host.trunk.load_state_dict(trunk)
        received = received_rounds(state)
        self.host.received = {party: max(n, self.host.received.get(party, 0)) for party, n in received.items()}
        others = (_TRUNK, _RECEIVED, _RECEIVED_BEFORE, _LEDGER)
        self.host.shard.load_state_dict({n: v for n, v in state.items() if not n.startswith(others)})

    def go_on_after(self, round_no: int) -> None:
        self.host.go_on_after(round_no)

    def catch_up(self, state: State, cancel: CancelToken) -> None:
        self.owner.catch_up(state, cancel)

    def layers(self) -> Callable[[int], LayerWeights] | None:
        return self.owner.layer

    def saved(self, round_no: int, oldest: int) -> None:
        """What ``oldest`` includes is never needed again."""
        self.contribution.applied(min(oldest, self._saved_round), self._saved_round)
        self._saved_round = round_no

    # ---- rounds ----

    def compute(self, state: State, cancel: CancelToken) -> None:
        if self._key is not None:
            self._key.attempt(state.round, state.attempt)
            if self._inputs.privacy is None:
                self._key.lot(state.round, [row for rows in self._trunk.rows(state.round) for row in rows])
        sums = self.owner.compute(state, cancel, self._trunk.parameters.keys())
        self._prepared = {Attempt(state.round, state.attempt): sums}

    def drop(self, round_no: int, attempt: int) -> None:
        self._prepared = {}
        self.owner.drop()

    @torch.no_grad()
    def commit(self, round_no: int, attempt: int, rate: float) -> Mapping[str, float]:
        sums = self._prepared.pop(Attempt(round_no, attempt))
        self.host.commit(Attempt(round_no, attempt), rate)
        own = self._trunk.parameters
        if own and sums.values is not None and sums.weight > 0:
            self._trunk.step({param: sums.trunk_values(name) for name, param in own.items()}, sums.weight, rate)
        return {**sums.metrics, **self.owner.seconds}

    @contextmanager
    def inference(self, state: State, cancel: CancelToken) -> Iterator[None]:
        with self.owner.evaluating(state, cancel):
            yield

    # ---- privacy ----

    def open_ledger(self) -> bool:
        return self.contribution.open_ledger(self.owner.streamer) is not None

    def privacy(self) -> dict[str, object] | None:
        spent, federation = self.contribution.privacy(), self._inputs.federation
        if spent is None:
            return None
        loads = " and of expert loads" if releases_loads(federation) else ""
        return {
            **spent,
            "revealed": f"noised sums of clipped gradients{loads}",
            "revealed_to": [name for name in federation.parties if name != self._inputs.party],
        }

    def statement(self) -> str:
        return self.contribution.statement() or "\n".join(self._unbounded())

    def _unbounded(self) -> list[str]:
        inputs = self._inputs
        most = inputs.federation.train.batch_size * int(inputs.train.lengths.max())
        return exposure.of_pushes(
            inputs.federation, exposure.Reach.of_model(inputs.model, inputs.federation.lora), most
        )

    # ---- serving ----

    def handle(self, peer: str, lane: Lane, message: Message) -> Message:
        return self.host.handle(peer, lane, message, wait_s=self._inputs.federation.deadline_s)

    def cancel(self) -> None:
        self.owner.cancel()

    def stop_serving(self) -> None:
        self.host.close()

    def close(self) -> None:
        self.host.close()
        self.owner.close()
        self.contribution.close()


def make_contribution(
    trunk: OwnTrunk, run: Callable[[], str], drawn: Callable[[Lot], None] = lambda lot: None
) -> Contribution:
    """What makes a party's sums, as it was agreed.

    Args:
        trunk: the party's model and text.
        run: name of its run in its ledger, known once it has joined.
        drawn: see `coterie.dp.party_session.Contributor`.
    """
    inputs, seed, limit = trunk.inputs, trunk.inputs.federation.train.seed, trunk.inputs.federation.push_limit
    model, layers = inputs.lots_model, seam.expert_layers(inputs.lots_model)
    if inputs.privacy is not None:
        masked = inputs.federation.aggregation == "masked"
        return PrivateSums(
            model, layers, inputs.train, inputs.privacy, run, drawn, masked=masked, ranks=inputs.ranks,
            whole=inputs.model,
        )  # fmt: skip
    if inputs.federation.lora is not None:
        return AdapterSums(model, trunk.batches, seed, push_limit=limit, ranks=inputs.ranks)
    per_record = isinstance(inputs.federation.privacy, PrivacyRules)
    return PlainSums(
        model, layers, trunk.batches, lambda batch: loss_sum(model, to_device(batch, inputs.device)), seed,
        per_record=per_record, push_limit=limit, ranks=inputs.ranks,
    )  # fmt: skip


def received_rounds(state: Mapping[str, Tensor]) -> dict[str, int]:
    """By party, the newest round of which a checkpoint's host had all its sums."""
    rounds = {}
    for name, value in state.items():
        if name.startswith(_RECEIVED):
            rounds[name.removeprefix(_RECEIVED)] = int(value)
        elif name.startswith(_RECEIVED_BEFORE):
            rounds[name.removeprefix(_RECEIVED_BEFORE)] = int(value) // _NUMBERS_BEFORE
    return rounds
