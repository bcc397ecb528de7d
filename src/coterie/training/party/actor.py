"""What a party does in each phase of a round: the `Actor` behind a `Follower`, whatever the exchange.

The two exchanges differ in how an attempt is computed and committed, and in what a party stores for others:
`TokensExchange` and `ExpertsExchange` do, each behind the protocol `Exchange`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from torch import Tensor

from coterie.federation.cancel import CancelToken
from coterie.federation.identity.certificates import COORDINATOR
from coterie.federation.rounds.state import Saved, State
from coterie.federation.wire.transport import Lane, Message, Transport
from coterie.federation.wire.values import check_own
from coterie.models.split.shards import EXPERT_KEY
from coterie.models.streaming.cache import LayerWeights
from coterie.training.evaluate import Evaluation, evaluate
from coterie.training.folders import private_folder
from coterie.training.metrics import MetricsWriter
from coterie.training.optim import lr_at
from coterie.training.party.inputs import Weights
from coterie.training.party.own_trunk import OwnTrunk
from coterie.training.party.store import PartyStore
from coterie.training.party.whole_model import save_whole

_EVALUATION = "evaluation.safetensors"
_STEMS = ("trunk", "trunk-optimizer", "experts", "hosted")
"""``trunk`` and ``experts`` hold parameters alone, in the form that `coterie export` reads; ``hosted`` the rest.
Where adapters are trained, frozen weights are in none: the first two name the files that hold them, by digest."""


class Exchange(Protocol):
    """One party's two sides in an exchange: what it stores for everybody, and how it computes with everybody's.

    All methods but `handle` and `cancel` are called from one thread.

    Attributes:
        shares_trunk: hosts step parameters of the trunk, so that after a commit the model's are old until `catch_up`.
    """

    shares_trunk: bool

    def restart(self, weights: Weights) -> None:
        """Hosted experts as they are before the first round."""
        ...

    def hosted_state(self) -> dict[str, Tensor]:
        """Everything this party stores for others, with its optimiser, for a checkpoint; an optimiser's names hold a
        slash."""
        ...

    def forget(self) -> None:
        """Trunk and hosted experts are about to be replaced by a checkpoint's."""
        ...

    def load_hosted(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `hosted_state` gave."""
        ...

    def go_on_after(self, round_no: int) -> None:
        """A state was loaded, behind which lie this many rounds of the run."""
        ...

    def compute(self, state: State, cancel: CancelToken) -> None:
        """One attempt, its sums brought to where they are needed; changes no parameter that is trained here alone."""
        ...

    def drop(self, round_no: int, attempt: int) -> None:
        """Forget an attempt; it may be unfinished, or never have begun."""
        ...

    def commit(self, round_no: int, attempt: int, rate: float) -> Mapping[str, float]:
        """Apply a computed attempt to trunk and hosted experts; metrics of the round for the owner's eyes."""
        ...

    def inference(self, state: State, cancel: CancelToken) -> AbstractContextManager[object]:
        """Inside, the model's experts answer without gradients."""
        ...

    def catch_up(self, state: State, cancel: CancelToken) -> None:
        """Bring the trunk up to what its hosts made of it, and every layer's experts where these come here."""
        ...

    def layers(self) -> Callable[[int], LayerWeights] | None:
        """What gives, after `catch_up`, an MoE layer's experts as their hosts store them; None: they never come."""
        ...

    def saved(self, round_no: int, oldest: int) -> None:
        """A checkpoint of ``round_no`` was written; ``oldest`` is the oldest that everybody could go back to."""
        ...

    def open_ledger(self) -> bool:
        """Make `privacy` and `statement` answer also where nothing was computed in this process.

        Returns:
            Whether this party keeps a ledger.
        """
        ...

    def privacy(self) -> dict[str, object] | None:
        """What this party revealed, to whom, at what epsilon and delta; None where nothing bounds it."""
        ...

    def statement(self) -> str:
        """What is promised about this party's records, for people; where nothing is, what others can read."""
        ...

    def handle(self, peer: str, lane: Lane, message: Message) -> Message:
        """Serve another party; on any thread."""
        ...

    def cancel(self) -> None:
        """What is being computed no longer counts; called from another thread, returns at once."""
        ...

    def stop_serving(self) -> None:
        """Let requests of others that wait for something here fail now; called before the transport closes."""
        ...

    def close(self) -> None:
        """End whatever runs beside."""
        ...


class PartyActor:
    """One party's trunk, data and hosted experts, doing what the rounds ask.

    Args:
        trunk: what the party trains by itself, before the first round.
        exchange: how it works with the others; before the first round, too.
        transport: to the others; started by the caller, whose handler passes the parties' messages to the exchange.
        store: the party's checkpoints.
    """

    def __init__(self, trunk: OwnTrunk, exchange: Exchange, transport: Transport, store: PartyStore) -> None:
        self.inputs, self.exchange = trunk.inputs, exchange
        self._trunk, self._transport, self._store = trunk, transport, store
        self._spec = trunk.inputs.federation.train
        self._pristine = True
        self._seconds = 0.0
        self._whole = False  # every part of the model is here as the last round left it
        self._metrics: MetricsWriter | None = None  # which metrics stay is known once a state is loaded

    @property
    def evaluation(self) -> Evaluation | None:
        """The newest evaluation on this party's held-out text, for its own eyes; also one of an earlier process."""
        path = private_folder(self.inputs.run_dir) / _EVALUATION
        return Evaluation.load(path) if path.exists() else None

    def state_bytes(self) -> int:
        """Trunk and hosted experts with their gradients and optimiser states."""
        hosted = self.exchange.hosted_state()
        return self._trunk.state_bytes() + sum(
            t.nbytes if "/" in name else 2 * t.nbytes for name, t in hosted.items()
        )

    # ---- the phases ----

    def held(self) -> tuple[Saved, ...]:
        return self._store.held()

    def load(self, source: Saved, state: State) -> None:
        if source.round == 0:
            self._restart()
        else:
            self._load_checkpoint(source)
        self._store.went_back_to(source.round)
        self._close_metrics()
        private = private_folder(self.inputs.run_dir)
        self._metrics = MetricsWriter(private, finished=state.round, trackers=self.inputs.trackers)
        self.exchange.go_on_after(state.round)

    def compute(self, state: State, cancel: CancelToken) -> None:
        began = time.monotonic()
        self._pristine = False
        self._meet(state.absent, cancel)
        self.exchange.compute(state, cancel)
        self._seconds = time.monotonic() - began

    def drop(self, round_no: int, attempt: int) -> None:
        self.exchange.drop(round_no, attempt)

    def step(self, round_no: int, attempt: int) -> None:
        rate = lr_at(round_no, self.inputs.federation.optim, self._spec.rounds)
        metrics = self.exchange.commit(round_no, attempt, rate)
        hosted = (value for name, value in self.exchange.hosted_state().items() if "/" not in name)
        own = (*self._trunk.tensors().values(), *hosted)
        check_own("the parameters", own, where=f"after round {round_no}, at {self.inputs.party}")
        self._log(round_no, **{**metrics, "seconds": self._seconds}, lr=rate, attempt=attempt)

    def evaluate(self, state: State, cancel: CancelToken) -> None:
        if state.for_questions:
            self._answer(state, cancel)
            return
        if not self.inputs.federation.evaluate:
            return
        self._meet(state.absent, cancel)
        with self.exchange.inference(state, cancel):
            if self.inputs.test is None:
                return
            evaluation = evaluate(self.inputs.model, self.inputs.test, batch_size=self._spec.micro_batch)
        evaluation.save(private_folder(self.inputs.run_dir) / _EVALUATION)
        self._log(state.round, test_loss=evaluation.loss)

    def _answer(self, state: State, cancel: CancelToken) -> None:
        """Be there for those who ask; they look like those who do not until their first question."""
        self._meet(state.absent, cancel)
        with self.exchange.inference(state, cancel):
            if self.inputs.questions is not None:
                self.inputs.questions.put_to(self.inputs.model)

    def save(self, state: State, cancel: CancelToken) -> str:
        last = state.round == self._spec.rounds
        if self.exchange.shares_trunk or last:
            # The commit moved it where it is stored; without this the file would hold the round's before.
            self._meet(state.absent, cancel)
            self.exchange.catch_up(state, cancel)
        hosted = self.exchange.hosted_state()
        tensors = {
            "trunk": self._trunk.tensors(),
            "trunk-optimizer": self._trunk.optimizer_tensors(),
            "experts": {name: value for name, value in hosted.items() if EXPERT_KEY.fullmatch(name)},
            "hosted": {name: value for name, value in hosted.items() if not EXPERT_KEY.fullmatch(name)},
        }
        for stem, named in tensors.items():
            check_own(f"`{stem}`", named.values(), where=f"checkpoint of round {state.round}; nothing was written")
        apart = {stem: {name: _apart(value) for name, value in named.items()} for stem, named in tensors.items()}
        lora = self.inputs.federation.lora
        adapters = lora.model_dump(mode="json") if lora is not None else None
        digest = self._store.save(state.round, apart, adapters, self.inputs.trainings, self.inputs.bases)
        self._whole = last and not state.absent
        # Everybody may have to go back to the oldest checkpoint that is still here, or, while the first one is not
        # published, to the split model.
        self.exchange.saved(state.round, min((saved.round for saved in self.held()), default=0))
        return digest

    def write_model(self, round_no: int) -> Path | None:
        """Write the model that this party ends with; None where its exchange or a lost party leaves it without one.

        Raises:
            CheckpointError: the disk is full or broken.
        """
        layer = self.exchange.layers()
        if not self._whole or layer is None:
            return None
        return save_whole(self.inputs, self._store.trunk_file(round_no), layer)

    def cancel(self) -> None:
        self.exchange.cancel()

    def close(self) -> None:
        """Finish the metrics and whatever runs beside."""
        self._close_metrics()
        self.exchange.close()

    # ----

    def _restart(self) -> None:
        """Trunk, hosted experts and both optimisers as they are before the first round."""
        if not self._pristine:
            self.exchange.forget()
            weights = self.inputs.weights()
            self._trunk.restart(weights)
            self.exchange.restart(weights)
            self._pristine = True

    def _load_checkpoint(self, source: Saved) -> None:
        self.exchange.forget()
        loaded = self._store.load(source, _STEMS, self.inputs.bases)
        self._pristine = False
        self._trunk.load(loaded["trunk"], loaded["trunk-optimizer"])
        self.exchange.load_hosted(loaded["experts"] | loaded["hosted"])

    def _close_metrics(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None

    def _log(self, round_no: int, **metrics: float) -> None:
        if self._metrics is None:
            raise RuntimeError("metrics belong to a state that was loaded")
        self._metrics.log(round_no, **metrics)

    def _meet(self, absent: Collection[str], cancel: CancelToken) -> None:
        """Make sure that every party that takes part can be reached from here, as long as it matters."""
        others = [name for name in self.inputs.active(absent) if name not in (self.inputs.party, COORDINATOR)]
        self._transport.connect(self.inputs.federation.deadline_s, others, cancel)
        cancel.check()


def _apart(tensor: Tensor) -> Tensor:
    """A scalar may be shared by many names (an optimiser's step), which safetensors refuses; rows are apart."""
    return tensor.detach().clone() if tensor.ndim == 0 else tensor
