"""The coordinator as a process: identity, journal and transport put together for one federation.yaml."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from coterie.config import FederationConfig
from coterie.federation.identity.certificates import COORDINATOR, Role
from coterie.federation.identity.identify import identify
from coterie.federation.rounds.coordinator import Coordinator, CoordinatorStatus
from coterie.federation.rounds.journal import Journal
from coterie.federation.rounds.run_folder import RunFolder, status_of
from coterie.federation.rounds.settings import plan_of, transport_settings
from coterie.federation.rounds.state import State
from coterie.federation.wire.grpc_transport import GrpcTransport


class CoordinatorProcess:
    """Everything a coordinator needs, opened by `run` and closed after it.

    Args:
        config: the agreed federation.yaml.
        kit_folder: the coordinator's kit, with the roster.
        run_dir: its folder: journal and status.
        on_change: called after every change.
        listen: address to listen on, where it differs from the agreed endpoint.
        dial: addresses of parties to dial in place of their endpoints.
        questions: take up the finished run once more, so that parties can ask its model.
        go_on: take up a paused run, too.
    """

    def __init__(
        self,
        config: FederationConfig,
        kit_folder: Path,
        run_dir: Path,
        on_change: Callable[[CoordinatorStatus], None] = lambda status: None,
        listen: str | None = None,
        dial: Mapping[str, str] | None = None,
        questions: bool = False,
        go_on: bool = False,
    ) -> None:
        self._config, self._run_dir, self._on_change, self._listen = config, run_dir, on_change, listen
        self._dial, self._plan = dial, replace(plan_of(config), questions=questions, go_on=go_on)
        self._kit, self.roster = identify(config, kit_folder, COORDINATOR, Role.COORDINATOR)
        self._coordinator: Coordinator | None = None

    def certificate_warning(self) -> str:
        """What a person should know of the coordinator's certificates; empty while there is nothing."""
        return self._kit.ends_soon()

    def stop(self, who: str = "the coordinator") -> bool:
        """Ask for a clean end. Safe in a signal handler. False: it has not begun, there is nothing to end."""
        if self._coordinator is None:
            return False
        self._coordinator.stop(who)
        return True

    def run(self) -> State:
        """Coordinate until the run ends; see `Coordinator.run`."""
        config = self._config
        folder = RunFolder(self._run_dir)
        try:
            journal = Journal(self._run_dir, config.name, config.content_hash())
            settings = transport_settings(config, carried=bool(self._dial))
            transport = GrpcTransport(
                COORDINATOR, self.roster, self._kit, listen=self._listen, dial=self._dial, settings=settings
            )

            def on_change(status: CoordinatorStatus) -> None:
                folder.status(
                    role="coordinator",
                    federation=config.name,
                    run=journal.run,
                    rounds=config.train.rounds,
                    parties=list(config.parties),
                    missing=list(status.missing),
                    cut=[list(pair) for pair in status.cut],
                    waiting_for=list(status.busy),
                    refused=status.refused,
                    checkpoint=journal.history.newest,
                    certificate=self.certificate_warning(),
                    **status_of(status.state),
                )
                self._on_change(status)

            try:
                coordinator = Coordinator(self._plan, transport, journal, config.content_hash(), on_change)
                self._coordinator = coordinator
                return coordinator.run()
            finally:
                transport.close()
                journal.close()
        finally:
            folder.close()
