"""The coordinator as a process: identity, roster, journal and transport put together for one federation.yaml."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from coterie.config import FederationConfig
from coterie.errors import ConfigError, IdentityError, RosterError
from coterie.federation.identity.certificates import COORDINATOR, Role
from coterie.federation.identity.kit import ROSTER_FILE, Kit, load_kit
from coterie.federation.identity.roster import Roster, read_roster
from coterie.federation.rounds.coordinator import Coordinator, CoordinatorStatus
from coterie.federation.rounds.journal import Journal
from coterie.federation.rounds.run_folder import RunFolder
from coterie.federation.rounds.state import RoundPlan, State
from coterie.federation.wire.base_transport import Settings
from coterie.federation.wire.grpc_transport import GrpcTransport


def plan_of(config: FederationConfig) -> RoundPlan:
    """What federation.yaml says about rounds.

    A party is lost after half the time it may keep another one waiting, but never before two seconds; one that has
    no connection after four seconds at most.
    """
    return RoundPlan(
        parties=tuple(config.parties),
        rounds=config.train.rounds,
        evaluate_every=config.train.eval_every,
        checkpoint_every=config.train.checkpoint_every,
        deadline_s=config.round_deadline_s,
        lease_s=lease_s(config),
        join_s=config.join_deadline_s,
        max_attempts=config.max_attempts,
        max_refusals=config.max_refusals,
        lost_party=config.lost_party,
    )


def lease_s(config: FederationConfig) -> float:
    """Silence after which a party counts as lost."""
    return max(2.0, config.deadline_s / 2)


def heartbeat_s(config: FederationConfig) -> float:
    """Time between a party's heartbeats: five in a lease, at most half a second."""
    return min(0.5, lease_s(config) / 5)


def transport_settings(config: FederationConfig) -> Settings:
    """Transport times that fit the federation's deadline: a frozen peer is noticed within it."""
    silence = lease_s(config)
    return Settings(send_deadline_s=config.deadline_s, heartbeat_s=silence / 5, silence_s=silence)


def identify(config: FederationConfig, kit_folder: Path, name: str, role: Role) -> tuple[Kit, Roster]:
    """The kit and the roster beside it, checked against each other and against federation.yaml.

    Signatures are checked when the transport is made.

    Raises:
        IdentityError, RosterError: the kit is another member's, or the roster does not list exactly these members.
        ConfigError: federation.yaml is not the one whose hash was signed.
    """
    kit = load_kit(kit_folder)
    if (kit.name, kit.role) != (name, role):
        raise IdentityError(
            f"The kit in {kit_folder} is that of {kit.role} {kit.name}, not of {role} {name}.",
            code="identity-other-member",
            fix="name the folder of the right kit",
        )
    roster = read_roster(kit_folder / ROSTER_FILE)
    if roster.config_hash != config.content_hash():
        raise ConfigError(
            f"federation.yaml ({config.content_hash()[:8]}) is not the one that was signed "
            f"({roster.config_hash[:8]}).",
            code="config-mismatch",
            where=f"compared with {ROSTER_FILE} in {kit_folder}",
            why="parties with different settings would not train the same model",
            fix="take the federation.yaml that everybody signed, or let everybody sign a new roster",
        )
    listed = {entry.name: entry.endpoint for entry in roster.parties}
    agreed = {name: address.endpoint for name, address in config.parties.items()}
    agreed[COORDINATOR] = config.coordinator.endpoint
    if listed != agreed:
        wrong = sorted(name for name in listed.keys() | agreed.keys() if listed.get(name) != agreed.get(name))
        raise RosterError(
            f"The roster and federation.yaml disagree about {', '.join(wrong)}.",
            code="roster-mismatch",
            fix="make and sign a new roster from this federation.yaml",
        )
    return kit, roster


class CoordinatorProcess:
    """Everything a coordinator needs, opened by `run` and closed after it.

    Args:
        config: the agreed federation.yaml.
        kit_folder: the coordinator's kit, with the roster.
        run_dir: its folder: journal and status.
        on_change: called after every change.
        listen: address to listen on, where it differs from the agreed endpoint.
    """

    def __init__(
        self,
        config: FederationConfig,
        kit_folder: Path,
        run_dir: Path,
        on_change: Callable[[CoordinatorStatus], None] = lambda status: None,
        listen: str | None = None,
    ) -> None:
        self._config, self._run_dir, self._on_change, self._listen = config, run_dir, on_change, listen
        self._kit, self._roster = identify(config, kit_folder, COORDINATOR, Role.COORDINATOR)
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
            transport = GrpcTransport(
                COORDINATOR, self._roster, self._kit, listen=self._listen, settings=transport_settings(config)
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
                coordinator = Coordinator(plan_of(config), transport, journal, config.content_hash(), on_change)
                self._coordinator = coordinator
                return coordinator.run()
            finally:
                transport.close()
                journal.close()
        finally:
            folder.close()


def status_of(state: State) -> dict[str, object]:
    """The part of a status file that tells where the rounds are."""
    fields = asdict(state)
    names = ("phase", "round", "attempt", "committed", "absent", "failures", "ending", "note")
    return {name: fields[name] for name in names}
