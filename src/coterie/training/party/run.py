"""One party's part in a federation from joining to the end, over any transport."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from coterie.errors import CoterieError
from coterie.federation.identity.certificates import COORDINATOR
from coterie.federation.rounds.attempt import RecentAttempts
from coterie.federation.rounds.coordinator import refusals_allowed
from coterie.federation.rounds.directives import Directive
from coterie.federation.rounds.follower import Follower
from coterie.federation.rounds.heartbeat import Heartbeat
from coterie.federation.rounds.run_folder import RunFolder, status_of
from coterie.federation.rounds.settings import heartbeat_s, plan_of
from coterie.federation.rounds.state import Ending, State
from coterie.federation.wire.gate import Gate
from coterie.federation.wire.messages import unfit
from coterie.federation.wire.transport import Address, Lane, Message, Transport
from coterie.revision import software
from coterie.storage import write_json
from coterie.training.experts.exchange import ExpertsExchange
from coterie.training.experts.shared_trunk import shared_names
from coterie.training.folders import private_folder, public_folder, result_folder, write_statement
from coterie.training.party.actor import PartyActor
from coterie.training.party.inputs import PartyInputs
from coterie.training.party.own_trunk import OwnTrunk
from coterie.training.party.recordings import Recordings
from coterie.training.party.store import PartyStore
from coterie.training.planning.forecast import Announce
from coterie.training.planning.measured import peak_rss_bytes
from coterie.training.tokens.exchange import TokensExchange


@dataclass(frozen=True)
class PartyResult:
    """How a party's run ended.

    Attributes:
        rounds: rounds behind the model.
        finished: all rounds are done; False after a clean stop.
        loss, perplexity, tokens: on the party's own held-out text, nats per token; None without such text or before
            the end. For this party's eyes.
        model_state_bytes: trunk, hosted experts, their gradients and optimiser states.
        peak_rss_bytes: largest resident size of the process.
        privacy: what the party revealed, to whom, at what epsilon and delta; None without privacy.
        statement: what is promised about the party's records, for people, or what others can read of them.
        wire: bytes per peer: ``sent``, ``received`` (payload), ``tensors_sent``, ``tensors_received``.
        model: folder of the whole model (of the adapters, where those were trained); empty where there is none.
    """

    party: str
    run_dir: str
    rounds: int
    finished: bool
    loss: float | None
    perplexity: float | None
    tokens: int | None
    model_state_bytes: int
    peak_rss_bytes: int
    wire: Mapping[str, Mapping[str, int]]
    privacy: Mapping[str, Any] | None = None
    statement: str = ""
    model: str = ""

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), **software()}


@dataclass(frozen=True)
class Watch:
    """What is called in the course of a party's run.

    Attributes:
        directive: called with each directive before it is carried out.
        failed: called with each error that was reported to the coordinator; its text stays here.
        silent: called after every heartbeat with the seconds that the coordinator has not been heard of.
        privacy: called before ``directive`` with what was revealed so far; see `Exchange.privacy`.
        announce: called with what the run will cost, before anything is spent; None: nobody wants to know.
    """

    directive: Callable[[Directive], None] = lambda directive: None
    failed: Callable[[CoterieError], None] = lambda error: None
    privacy: Callable[[Mapping[str, Any] | None], None] = lambda privacy: None
    silent: Callable[[float], None] = lambda silent_s: None
    announce: Announce | None = None


class PartyRun:
    """Joins a federation with what it brings, prepared, and takes part until the end.

    Args:
        inputs: what the party brings.
        transport: not started yet; closed at the end.
        agreement: hash of what all parties signed.
        watch: see `Watch`.
        certificate_warning: what a person should know of this party's certificates; stands in the status file.

    Attributes:
        actor: the party's model, data and experts.

    Raises:
        CheckpointError: the run folder belongs to another run, party or agreement, or other text.
        RoundError: another process uses the run folder.
    """

    def __init__(
        self,
        inputs: PartyInputs,
        transport: Transport,
        agreement: str,
        watch: Watch | None = None,
        certificate_warning: Callable[[], str] = str,
    ) -> None:
        self._inputs, self._transport, self._watch, self._certificate_warning = (
            inputs,
            transport,
            watch or Watch(),
            certificate_warning,
        )
        self._folder = RunFolder(inputs.run_dir, inputs.ranks if inputs.ranks.world > 1 else None)
        private_folder(inputs.run_dir).mkdir(mode=0o700, exist_ok=True)
        self._status: dict[str, Any] = {}
        self._attempts = RecentAttempts()
        try:
            self._store = PartyStore(inputs.run_dir, inputs.party, agreement, inputs.train.digest())
            self._recordings = Recordings(inputs, agreement)
            limit, recorder = refusals_allowed(plan_of(inputs.federation)), self._recordings.received
            self._gate = Gate(transport, limit, self._period, self._complain, recorder)
            self.actor = make_actor(inputs, self._gate, self._store, self._recordings)
        except BaseException:
            self._folder.close()
            raise
        self._follower = Follower(inputs.party, self.actor, self._on_directive, self._on_error)
        self._heartbeat = Heartbeat(
            self._gate,
            agreement,
            run=self._store.run,
            heartbeat_s=heartbeat_s(inputs.federation),
            patience_s=inputs.federation.join_deadline_s,
            check=self._check,
            on_change=self._follower.on_change,
            on_beat=self._beat,
        )

    def stop(self) -> bool:
        """Ask for a clean end after the round in progress. Safe in a signal handler.

        Returns:
            False: the coordinator has not been heard of yet; it would not hear us either.
        """
        self._heartbeat.ask_to_stop()
        return self._heartbeat.directive is not None

    def cancel(self) -> None:
        """End at once without a goodbye; the others treat this party as lost. Safe from any thread."""
        self._heartbeat.cancel()
        self.actor.cancel()

    def run(self) -> PartyResult:
        """Take part until the run ends; see `Follower.run` for what it raises."""
        try:
            self._gate.start(self._handle)
            self._transport.connect(self._inputs.federation.join_deadline_s, [COORDINATOR])
            state = self._follower.run(self._heartbeat)
            result = self._result(state)
            if result.finished:
                written = self.actor.write_model(state.committed) or result_folder(self._inputs.run_dir)
                result = replace(result, model=str(written or ""))
                write_json(private_folder(self._inputs.run_dir) / "result.json", result.as_json())
                if result.statement:
                    write_statement(self._for_statement(), result.statement)
            return result
        finally:
            self._heartbeat.close()
            self.actor.exchange.stop_serving()
            self._transport.close()
            self.actor.close()
            self._recordings.close()
            self._folder.close()

    def wire(self) -> dict[str, dict[str, int]]:
        """Bytes so far, by peer."""
        counters = self._transport.counters()
        by_peer = {}
        for peer in sorted({peer for peer, _ in counters.lanes}):
            total = counters.total(peer)
            by_peer[peer] = {
                "sent": total.payload_bytes_sent,
                "received": total.payload_bytes_received,
                "tensors_sent": total.tensor_bytes_sent,
                "tensors_received": total.tensor_bytes_received,
            }
        return by_peer

    def _for_statement(self) -> Path:
        """A seeded run has nothing that may be given away."""
        privacy, run_dir = self._inputs.privacy, self._inputs.run_dir
        return public_folder(run_dir) if privacy is not None and privacy.seed is None else private_folder(run_dir)

    def _handle(self, peer: str, lane: Lane, message: Message) -> Message | None:
        if peer == COORDINATOR:
            self._heartbeat.handle(message)
            return None
        return self.actor.exchange.handle(peer, lane, message)

    def _period(self, address: Address | None) -> int:
        directive = self._heartbeat.directive
        return self._attempts.seq(address, 0 if directive is None else directive.state.seq)

    def _complain(self, peer: str, code: str) -> None:
        if peer != COORDINATOR:
            self._heartbeat.complain(peer, code)

    def _check(self, directive: Directive) -> None:
        """A coordinator can name no round and no party that was not agreed on."""
        state, federation = directive.state, self._inputs.federation
        if max(state.round, state.committed) > federation.train.rounds:
            raise unfit(
                COORDINATOR, "directive", "round", f"is beyond the {federation.train.rounds} that were agreed"
            )
        if not {*directive.missing, *state.absent, *state.rejoining, *state.sources} <= federation.parties.keys():
            raise unfit(COORDINATOR, "directive", "absent", "names a party that is none")

    def _on_error(self, error: CoterieError) -> None:
        self._gate.count(error)
        self._watch.failed(error)

    def _on_directive(self, directive: Directive) -> None:
        self._attempts.add(directive.state)
        self._store.adopt(directive.run)
        self._recordings.open(directive.run)
        self._store.published(directive.newest)
        federation, privacy = self._inputs.federation, self.actor.exchange.privacy()
        self._status = dict(
            role="party",
            party=self._inputs.party,
            federation=federation.name,
            run=directive.run,
            rounds=federation.train.rounds,
            parties=list(federation.parties),
            checkpoint=directive.newest,
            privacy=privacy,
            **status_of(directive.state),
        )
        self._beat(0.0)
        self._watch.privacy(privacy)
        self._watch.directive(directive)

    def _beat(self, silent_s: float) -> None:
        """Write the status anew: bytes so far, who is waited for, how long the coordinator has been silent."""
        self._watch.silent(silent_s)
        newest = self._heartbeat.directive
        if self._status and newest is not None:
            self._folder.status(
                **self._status,
                missing=list(newest.missing),
                cut=[list(pair) for pair in newest.cut],
                wire=self.wire(),
                certificate=self._certificate_warning(),
                coordinator_silent_s=round(silent_s, 1),
            )

    def _result(self, state: State) -> PartyResult:
        self.actor.exchange.open_ledger()
        evaluation = self.actor.evaluation if state.ending is Ending.FINISHED else None
        return PartyResult(
            party=self._inputs.party,
            run_dir=str(self._inputs.run_dir),
            rounds=state.committed,
            finished=state.ending is Ending.FINISHED,
            loss=evaluation.loss if evaluation else None,
            perplexity=evaluation.perplexity if evaluation else None,
            tokens=evaluation.tokens if evaluation else None,
            model_state_bytes=self.actor.state_bytes(),
            peak_rss_bytes=peak_rss_bytes(),
            wire=self.wire(),
            privacy=self.actor.exchange.privacy(),
            statement=self.actor.exchange.statement(),
        )


def make_actor(
    inputs: PartyInputs, transport: Transport, store: PartyStore, recordings: Recordings | None = None
) -> PartyActor:
    """A party as it is before the first round, with the exchange that was agreed on.

    Args:
        inputs: what the party brings.
        transport: to the others; not started.
        store: the party's checkpoints.
        recordings: told what leaves; None where nothing is recorded.
    """
    weights = inputs.weights()
    key, masks = (None, None) if recordings is None else (recordings.key, recordings.masks)
    if inputs.federation.exchange == "tokens":
        trunk = OwnTrunk(inputs, weights)
        return PartyActor(trunk, TokensExchange(trunk, transport, weights, key), transport, store)
    trunk = OwnTrunk(inputs, weights, shared_names(inputs.federation, inputs.model), on_host=True)
    exchange = ExpertsExchange(trunk, transport, lambda: store.run, weights, key, masks)
    return PartyActor(trunk, exchange, transport, store)
