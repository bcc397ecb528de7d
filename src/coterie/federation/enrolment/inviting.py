"""The party that invites: keeps the CA, gives out codes, and serves until all invited members have what they need.

It listens in two places, each for as long as members are missing: at the desk, by default where the coordinator will
listen, for strangers who hold a code; and at its own endpoint, over mutual TLS, for those who have their certificate.
No tensor passes the desk.
"""

from __future__ import annotations

import datetime as dt
import os
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coterie.config import FederationConfig, load_yaml
from coterie.config.federation import is_endpoint
from coterie.errors import ConfigError, IdentityError, ModelError, as_argument
from coterie.federation.enrolment.codes import JoinCode
from coterie.federation.enrolment.desk import EnrolmentDesk, Offer, Tell
from coterie.federation.enrolment.hand_out import HandOut, RosterTable
from coterie.federation.enrolment.invitations import Invitations
from coterie.federation.enrolment.joining import parts_folder
from coterie.federation.identity.agreed import draft_agreed, members, placement_hash
from coterie.federation.identity.certificates import (
    COORDINATOR,
    Authority,
    fingerprint,
    new_authority,
    parse_certificate,
)
from coterie.federation.identity.kit import (
    CA_FILE,
    CA_KEY_FILE,
    REQUEST_FILE,
    Kit,
    approve,
    install,
    load_authority,
    load_kit,
    request,
    save_authority,
)
from coterie.federation.identity.roster import Roster, install_roster, read_roster, sign, verify
from coterie.federation.wire.unreachable import split_endpoint
from coterie.models.split.shards import MANIFEST_FILE, check_digests
from coterie.storage import lock

_LOOK_S = 0.1
_LOCK_FILE = "invite.lock"
_AGREEMENT_BYTES = 1 << 20


@dataclass(frozen=True)
class Places:
    """Folders of the inviter.

    Args:
        ca: of the CA; made where there is none.
        kit: its own; made where there is none.
        coordinator_kit: the coordinator's, where that runs here; else it is invited, too.
    """

    ca: Path
    kit: Path
    coordinator_kit: Path | None


@dataclass(frozen=True)
class Listening:
    """Where it listens, where that is not the agreed endpoint.

    Args:
        desk: ``host:port`` that stands in the codes; None: the coordinator's endpoint.
        desk_here: the local address of it, behind a port forwarding.
        parts_here: the same for the own endpoint.
    """

    desk: str | None = None
    desk_here: str | None = None
    parts_here: str | None = None


class Inviting:
    """Everything that the party which invites does.

    Args:
        me: its name.
        settings: federation.yaml.
        places: see there.
        listening: see there.
        valid: how long a code counts.
        tell: shows what happens, a line each.

    Raises:
        ConfigError, IdentityError, ModelError: names, files or parts do not fit; nobody was invited.
    """

    def __init__(
        self, me: str, settings: Path, places: Places, listening: Listening, valid: dt.timedelta, tell: Tell
    ) -> None:
        self.config = load_yaml(settings, FederationConfig)
        if me not in self.config.parties:
            raise IdentityError(
                f"`{me}` is no party of {self.config.name}.",
                code="identity-unknown-member",
                where=str(settings),
                fix=f"parties: {', '.join(self.config.parties)}",
            )
        self._me, self._settings, self._places, self._tell = me, settings, places, tell
        self._listening, self._valid = listening, valid
        self.desk = self._usual_desk() if listening.desk is None else _named_desk(listening.desk)
        self.parts = parts_folder(self.config, settings)
        self.files = self._checked_parts()
        self._stopped = threading.Event()

    @property
    def invited(self) -> tuple[str, ...]:
        """Members that are not here."""
        here = {self._me} | ({COORDINATOR} if self._places.coordinator_kit is not None else set())
        return tuple(member.name for member in members(self.config) if member.name not in here)

    def stop(self) -> bool:
        """Listen no more; codes stay, and `run` goes on with them."""
        self._stopped.set()
        return True

    def run(self, show: Callable[[Authority, dict[str, tuple[JoinCode, dt.datetime]]], None]) -> Roster | None:
        """Invite, and serve until all have the roster.

        Args:
            show: is given the CA and the codes that are still open, by name, with their end.

        Returns:
            The roster that all signed; None after `stop`.

        Raises:
            TransportError: it cannot listen.
        """
        with ExitStack() as stack:
            authority = self._authority()
            stack.callback(os.close, self._only_one())
            kits = self._own_kits(authority)
            invitations = Invitations(
                *(self._places.ca, self.config.content_hash(), self.invited),
                valid=self._valid,
                now=dt.datetime.now(dt.UTC),
            )
            table = RosterTable(kits[0])
            hand_out = self._hand_out(kits[0], invitations, table)
            desk = self._desk(kits[0], authority, invitations)
            hand_out.open(len(self.invited))
            stack.callback(hand_out.close)
            desk.open()
            stack.callback(desk.close)
            show(
                authority,
                {
                    each.name: (JoinCode(each.secret, self.desk), dt.datetime.fromtimestamp(each.expires, dt.UTC))
                    for each in invitations.all()
                    if not each.request
                },
            )
            while not (self._further(kits, invitations, table) and all(each.left for each in invitations.all())):
                if self._stopped.wait(_LOOK_S):
                    return None
                desk.look()
            return table.read()

    def _further(self, kits: list[Kit], invitations: Invitations, table: RosterTable) -> bool:
        """Lay the roster out once all have certificates, and install it once all signed; whether it is installed."""
        roster = table.read()
        if roster is None:
            issued = {each.name: each.certificate for each in invitations.all()}
            if not all(issued.values()):
                return False
            certificates = {
                name: parse_certificate(pem.encode(), f"The certificate of {name}", "invitations")
                for name, pem in issued.items()
            }
            certificates |= {kit.name: kit.certificate for kit in kits}
            roster = self._signed_before(kits[0], draft_agreed(self.config, certificates, self.parts, epoch=1))
            for kit in kits:
                roster = sign(roster, kit.key, kit.certificate)
            table.lay_out(roster)
            self._tell(f"all have certificates; the roster is there to be signed, fingerprint {roster.fingerprint()}")
            return False
        if table.unsigned():
            return False
        if not all(kit.roster_path.exists() for kit in kits):
            for kit in kits:
                install_roster(kit, roster)
            self._tell("all signed the roster")
        table.settle()
        return True

    def _signed_before(self, kit: Kit, roster: Roster) -> Roster:
        """With the signatures that an earlier start brought together."""
        if not kit.roster_path.exists():
            return roster
        earlier = read_roster(kit.roster_path)
        if earlier.content_hash() != roster.content_hash():
            raise IdentityError(
                f"{kit.folder} has the roster of another agreement.",
                code="invite-other-roster",
                why="it would be replaced by one that its members did not sign",
                fix="name a new folder with --keys, or renew the roster by hand: docs/how-to/identity.md",
            )
        verify(earlier, kit.authority)
        return earlier

    def _checked_parts(self) -> dict[str, Any]:
        """The manifest's files, all of them there, split for these parties and this placement."""
        manifest = check_digests(self.parts)
        files: dict[str, Any] = manifest["files"]
        missing = [name for name in files if not (self.parts / name).is_file()]
        if missing:
            raise ModelError(
                f"{', '.join(missing)} of the split model is not in {self.parts}.",
                code="invite-missing-part",
                why="the inviter hands every party its own part",
                fix="put the whole folder back that `coterie split` wrote, with the shards of all parties",
            )
        if manifest.get("placement_hash") != placement_hash(self.config):
            raise ModelError(
                f"The model in {self.parts} was split for other parties, or deals them other experts.",
                code="invite-other-split",
                why="members would get certificates, and parts that do not fit the roster",
                fix="split it again: coterie split MODEL --federation "
                f"{as_argument(self._settings)} --out NEW-FOLDER",
            )
        return files

    def _usual_desk(self) -> str:
        coordinator, own = self.config.coordinator.endpoint, self.config.parties[self._me].endpoint
        if self._places.coordinator_kit is None or split_endpoint(coordinator)[0] != split_endpoint(own)[0]:
            raise ConfigError(
                f"The coordinator ({coordinator}) does not listen on the machine of {self._me}.",
                code="invite-where",
                why="codes carry the address where invited members find this process",
                fix="name one that reaches this machine, as in --at alder.example:7400",
            )
        return coordinator

    def _authority(self) -> Authority:
        folder = self._places.ca
        if not (folder / CA_KEY_FILE).exists() and not (folder / CA_FILE).exists():
            save_authority(new_authority(self.config.name), folder)
        authority = load_authority(folder)
        if authority.federation != self.config.name:
            raise IdentityError(
                f"The CA in {folder} belongs to `{authority.federation}`, not to `{self.config.name}`.",
                code="identity-other-federation",
                fix="name another folder with --keys",
            )
        return authority

    def _only_one(self) -> int:
        try:
            return lock(self._places.ca / _LOCK_FILE, wait=False, error=IdentityError)
        except BlockingIOError:
            raise IdentityError(
                f"Another `coterie invite` runs with the CA in {self._places.ca}.",
                code="invite-twice",
                why="two could give one code to two keys",
                fix="go on with that one, or end it first",
            ) from None

    def _own_kits(self, authority: Authority) -> list[Kit]:
        """The kit of this party, then the coordinator's where it runs here."""
        folders = {self._me: self._places.kit}
        if self._places.coordinator_kit is not None:
            folders[COORDINATOR] = self._places.coordinator_kit
        return [self._own_kit(name, folder, authority) for name, folder in folders.items()]

    def _own_kit(self, name: str, folder: Path, authority: Authority) -> Kit:
        listed = {member.name: member for member in members(self.config)}
        if not folder.exists():
            request(listed[name], self.config.name, folder)
        if (folder / REQUEST_FILE).exists() and not (folder / CA_FILE).exists():
            _, certificate = approve((folder / REQUEST_FILE).read_bytes(), listed.values(), authority)
            install(folder, certificate, authority.certificate, fingerprint(authority.certificate))
        kit = load_kit(folder)
        if kit.name != name or kit.authority != authority.certificate:
            raise IdentityError(
                f"The kit in {folder} is {kit.name}'s under another CA, or another member's.",
                code="identity-other-member",
                fix="name another folder with --keys",
            )
        return kit

    def _hand_out(self, kit: Kit, invitations: Invitations, table: RosterTable) -> HandOut:
        listen = self._listening.parts_here or self.config.parties[self._me].endpoint
        return HandOut(listen, kit, self.parts, [*self.files, MANIFEST_FILE], invitations, table, self._tell)

    def _desk(self, kit: Kit, authority: Authority, invitations: Invitations) -> EnrolmentDesk:
        agreement = self._settings.read_bytes()
        if len(agreement) > _AGREEMENT_BYTES:
            raise ConfigError(
                f"{self._settings} is larger than a megabyte.",
                code="invite-agreement-size",
                fix="deal experts in turn, or write the placement in a shorter form",
            )
        offer = Offer(agreement, self.config.name, self.config.parties[self._me].endpoint)
        listen = self._listening.desk_here or self.desk
        return EnrolmentDesk(listen, kit, authority, members(self.config), invitations, offer, self._tell)


def _named_desk(address: str) -> str:
    if not is_endpoint(address):
        raise ConfigError(
            f"{address!r} cannot stand in a code: it is not HOST:PORT.",
            code="invite-at",
            why="members would type the code, and be told that it ends with no address",
            fix="write it as in --at alder.example:7400",
        )
    return address
