"""A whole federation in one process: the same coordinator, rounds, exchange and checkpoints, parties as threads.

For tests and small comparisons: no network; keys are made anew in every process. Random numbers that the model itself
draws (dropout) come from the process's generator, which the parties share here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from coterie.config import FederationConfig
from coterie.federation.identity.certificates import COORDINATOR, new_key
from coterie.federation.identity.signing import KeySigner
from coterie.federation.rounds.coordinator import Coordinator, CoordinatorStatus
from coterie.federation.rounds.journal import Journal
from coterie.federation.rounds.settings import plan_of
from coterie.federation.rounds.state import State
from coterie.federation.wire.in_process import InProcessHub
from coterie.training.party.inputs import PartyInputs
from coterie.training.party.run import PartyResult, PartyRun


@dataclass
class InProcessFederation:
    """Members of a federation as threads, each of which can be started, killed and started again.

    Args:
        config: the shared settings.
        folder: for the coordinator's journal.

    Attributes:
        ends: how each member ended: a result, a state (the coordinator), or the error.
        statuses: what the coordinator showed.
        runs: the newest run of each party.
    """

    config: FederationConfig
    folder: Path
    ends: dict[str, PartyResult | State | BaseException] = field(default_factory=dict)
    statuses: list[CoordinatorStatus] = field(default_factory=list)
    runs: dict[str, PartyRun] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._agreement = self.config.content_hash()
        self._keys = {name: new_key() for name in self.config.parties}
        self._public = {name: key.public_key() for name, key in self._keys.items()}
        self.hub = InProcessHub(self.config.parties, coordinator=COORDINATOR)
        self._threads: dict[str, threading.Thread] = {}
        self._kill: dict[str, Callable[[], None]] = {}
        self.coordinator: Coordinator | None = None

    def coordinate(self, *, questions: bool = False) -> None:
        """Start the coordinator; it takes up what its journal holds, or a finished run for questions."""
        transport = self.hub.transport(COORDINATOR)
        journal = Journal(self.folder, self.config.name, self._agreement)
        plan = replace(plan_of(self.config), questions=questions)
        coordinator = Coordinator(plan, transport, journal, self._agreement, self.statuses.append)
        self.coordinator = coordinator

        def serve() -> State:
            try:
                return coordinator.run()
            finally:
                transport.close()
                journal.close()

        self._start(COORDINATOR, serve)

    def up(self, inputs: PartyInputs) -> PartyRun:
        """Start a party."""
        transport = self.hub.transport(inputs.party)
        signer = KeySigner(self._keys[inputs.party], self._public.__getitem__)
        run = PartyRun(replace(inputs, signer=signer), transport, self._agreement)
        self.runs[inputs.party] = run
        self._kill[inputs.party] = transport.close
        self._start(inputs.party, run.run)
        return run

    def kill(self, party: str) -> None:
        """End a party as if its process had died; what it still computes reaches nobody."""
        self.cut_off(party)
        self._threads[party].join()

    def cut_off(self, party: str) -> None:
        """Take a party's connections away for good; can be called from its own threads."""
        self._kill[party]()
        self.runs[party].cancel()

    def join(self, timeout_s: float = 120.0) -> None:
        """Wait until everybody has ended.

        Raises:
            TimeoutError: somebody has not.
        """
        for name, thread in self._threads.items():
            thread.join(timeout_s)
            if thread.is_alive():
                raise TimeoutError(f"{name} has not ended after {timeout_s:g} s")

    def _start(self, name: str, run: Callable[[], PartyResult | State]) -> None:
        def target() -> None:
            try:
                self.ends[name] = run()
            except BaseException as error:  # whoever waits for the ends will see it
                self.ends[name] = error

        self.ends.pop(name, None)
        self._threads[name] = threading.Thread(target=target, name=name, daemon=True)
        self._threads[name].start()


def run_in_process(
    config: FederationConfig, inputs: Sequence[PartyInputs], folder: Path
) -> tuple[InProcessFederation, dict[str, PartyResult]]:
    """Run a federation from the beginning (or from its checkpoints) to the end.

    Returns:
        The federation, for a look at its parties, and each party's result.

    Raises:
        BaseException: the first error that ended the run.
    """
    federation = InProcessFederation(config, folder)
    federation.coordinate()
    for party_inputs in inputs:
        federation.up(party_inputs)
    federation.join()
    results = {}
    for name, end in federation.ends.items():
        if isinstance(end, BaseException):
            raise end
        if isinstance(end, PartyResult):
            results[name] = end
    return federation, results
