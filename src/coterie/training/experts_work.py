"""A party's part in the `experts` exchange, as the rounds ask for it; `experts_way` says what crosses."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from coterie.config import PrivacyRules
from coterie.dp.contributor import Contributor
from coterie.dp.ledger import Head
from coterie.federation.participant import Alive
from coterie.federation.round_state import Saved, State
from coterie.federation.transport import Lane, Message
from coterie.training.adapter_sums import AdapterSums
from coterie.training.experts_way import Contribution, ExpertsWay, PlainSums, shared_names
from coterie.training.folders import private_folder
from coterie.training.load_home import releases_loads
from coterie.training.party_parts import Weights
from coterie.training.party_work import PartyWork
from coterie.training.private_sums import PrivateSums

_TRUNK = "trunk:"
_RECEIVED = "received-round:"
_RECEIVED_BEFORE, _NUMBERS_BEFORE = "received:", 1024
"""In checkpoints of protocol version 1, where a round had that many numbers, one for each attempt."""
_LEDGER = "ledger:"


class ExpertsWork(PartyWork):
    """`PartyWork` for the `experts` exchange.

    Attributes:
        way: what is served, fetched and pushed.
    """

    way: ExpertsWay | None = None

    def _begin(self, weights: Weights) -> None:
        parts = self.parts
        if self.way is not None:
            self.way.close()
        self._sums = self._contribution()
        self._saved_round = 0
        self.way = ExpertsWay(
            parts.party,
            parts.federation,
            parts.model,
            parts.placement,
            weights.trunk,
            weights.experts,
            self._transport,
            self._make_optimizer,
            self._sums,
            balancer=self._sums.balancer if isinstance(self._sums, PrivateSums) else None,
            cache_dir=private_folder(parts.run_dir) / "cache" if parts.cache == "disk" else None,
            device=parts.device,
            roster=parts.roster,
        )

    def _own_parameters(self) -> dict[str, nn.Parameter]:
        """What this party steps by itself; shared parameters are stepped where they are at home.

        Sums come in host memory and are needed once a round, so gradients and optimiser state stay there too.
        """
        shared = set(shared_names(self.parts.federation, self.parts.model))
        trained = super()._own_parameters()
        self._private = {name: param for name, param in trained.items() if name not in shared}
        self._stepped = {name: _on_host(param) for name, param in self._private.items()}
        return self._stepped or trained

    def _contribution(self) -> Contribution:
        parts = self.parts
        if parts.privacy is not None:
            return PrivateSums(parts.model, self._layers, parts.train, parts.privacy, lambda: self._ledger_run())
        if parts.federation.lora is not None:
            return AdapterSums(parts.model, self._batches, self._spec.seed)
        per_record = isinstance(parts.federation.privacy, PrivacyRules)
        return PlainSums(parts.model, self._layers, self._batches, self._loss, self._spec.seed, per_record=per_record)

    def _ledger_run(self) -> str:
        """One name for this party's run in its ledger, the same after a restart."""
        return f"{self._store.run or 'unnamed'}-{self.parts.party}"

    def _hosted_state(self) -> dict[str, Tensor]:
        assert self.way is not None
        home = {f"{_TRUNK}{name}": value for name, value in self.way.pool.home.state_dict().items()}
        received = {f"{_RECEIVED}{party}": torch.tensor(n) for party, n in self.way.pool.received.items()}
        return self.way.pool.shard.state_dict() | home | received | self._ledger_state()

    def _ledger_state(self) -> dict[str, Tensor]:
        """The newest entry of this party's ledger, so that a later start notices one that was put back."""
        head = self._sums.ledger_head() if isinstance(self._sums, PrivateSums) else None
        if head is None:
            return {}
        return {f"{_LEDGER}{head.seq}": torch.tensor(list(bytes.fromhex(head.hash)), dtype=torch.uint8)}

    def load(self, source: Saved, told: State) -> None:
        super().load(source, told)
        assert self.way is not None
        self.way.go_on_after(told.round)

    def _load_checkpoint(self, source: Saved) -> None:
        assert self.way is not None
        self.way.forget()
        super()._load_checkpoint(source)

    def _load_hosted(self, state: dict[str, Tensor]) -> None:
        assert self.way is not None
        if isinstance(self._sums, PrivateSums):
            heads = [
                Head(int(name.removeprefix(_LEDGER)), bytes(value.tolist()).hex())
                for name, value in state.items()
                if name.startswith(_LEDGER)
            ]
            self._sums.expect(heads[0] if heads else None)
        home = {name.removeprefix(_TRUNK): value for name, value in state.items() if name.startswith(_TRUNK)}
        self.way.pool.home.load_state_dict(home)
        received = received_rounds(state)
        self.way.pool.received = {n: max(round, self.way.pool.received.get(n, 0)) for n, round in received.items()}
        others = (_TRUNK, _RECEIVED, _RECEIVED_BEFORE, _LEDGER)
        self.way.pool.shard.load_state_dict({n: v for n, v in state.items() if not n.startswith(others)})
        for name, param in self._stepped.items():
            _follow(param, self._private[name])

    def open_books(self) -> bool:
        if not isinstance(self._sums, PrivateSums) or self.way is None:
            return False
        self._sums.open_books(self.way.streamer)
        return True

    def privacy(self) -> dict[str, object] | None:
        contributor = self._contributor()
        if contributor is None or not isinstance(self._sums, PrivateSums):
            return None
        spent = contributor.spent()
        others = [name for name in self.parts.federation.parties if name != self.parts.party]
        return {
            "epsilon": spent.epsilon if math.isfinite(spent.epsilon) else None,
            "delta": spent.delta,
            "noise_multiplier": contributor.noise_multiplier,
            "isolation": contributor.isolation,
            "rounds": contributor.rounds_released(),
            "rounds_left": contributor.rounds_left(),
            "contributing": not self._sums.exhausted,
            "revealed": "noised sums of clipped gradients"
            + (" and of expert loads" if releases_loads(self.parts.federation) else ""),
            "revealed_to": others,
        }

    def statement(self) -> str:
        contributor = self._contributor()
        return "" if contributor is None else str(contributor.statement())

    def _contributor(self) -> Contributor | None:
        return self._sums.contributor if isinstance(self._sums, PrivateSums) else None

    def save(self, told: State, alive: Alive) -> str:
        assert self.way is not None
        if shared_names(self.parts.federation, self.parts.model):
            # The commit moved a shared trunk at its homes; without this the file would hold the round's before.
            self._meet(told.absent, alive)
            self.way.catch_up(told)
        digest = super().save(told, alive)
        # Everybody may have to go back to the oldest checkpoint that is still here, or, while the first one is not
        # published, to the split model. What that includes is never needed again.
        oldest = min((saved.round for saved in self.held()), default=0)
        self._sums.applied(min(oldest, self._saved_round), self._saved_round)
        self._saved_round = told.round
        return digest

    def compute(self, told: State, alive: Alive) -> None:
        assert self.way is not None
        began = time.monotonic()
        self._pristine = False
        self._meet(told.absent, alive)
        self.way.compute(told, alive)
        self._seconds = time.monotonic() - began

    def drop(self, round: int, attempt: int) -> None:
        assert self.way is not None
        self.way.drop()

    @torch.no_grad()
    def _commit(self, round: int, attempt: int, rate: float) -> Mapping[str, float]:
        assert self.way is not None
        sums = self.way.step(rate)
        if self._private and sums.experts is not None and sums.weight > 0:
            named: dict[Tensor, Tensor] = {param: sums.trunk[name] for name, param in self._stepped.items()}
            self._step_trunk(named, sums.weight, rate)
            for name, param in self._private.items():
                _follow(param, self._stepped[name])
        return {**sums.figures, "seconds": self._seconds, **self.way.seconds}

    @contextmanager
    def _inference(self, told: State, alive: Alive) -> Iterator[None]:
        assert self.way is not None
        with self.way.evaluating(told):
            yield

    def handle(self, peer: str, lane: Lane, message: Message) -> Message:
        assert self.way is not None
        return self.way.handle(peer, lane, message)

    def interrupt(self) -> None:
        if self.way is not None:
            self.way.interrupt()

    def stop_serving(self) -> None:
        if self.way is not None:
            self.way.pool.close()

    def _close(self) -> None:
        if self.way is not None:
            self.way.close()


def received_rounds(state: Mapping[str, Tensor]) -> dict[str, int]:
    """By party, the newest round of which a checkpoint's host had all its sums."""
    found = {}
    for name, value in state.items():
        if name.startswith(_RECEIVED):
            found[name.removeprefix(_RECEIVED)] = int(value)
        elif name.startswith(_RECEIVED_BEFORE):
            found[name.removeprefix(_RECEIVED_BEFORE)] = int(value) // _NUMBERS_BEFORE
    return found


def _on_host(param: nn.Parameter) -> nn.Parameter:
    """The parameter itself where the model computes on the processor, otherwise a copy in host memory."""
    return param if param.device.type == "cpu" else nn.Parameter(param.detach().to("cpu"))


@torch.no_grad()
def _follow(copy: Tensor, original: Tensor) -> None:
    if copy is not original:
        copy.copy_(original)
