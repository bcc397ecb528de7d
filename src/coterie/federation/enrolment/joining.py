"""How an invited member comes in: from a code to a kit with a signed roster, and the parts it starts from.

Nothing is made before the other side has proved that it gave out the code, and no certificate is asked for before a
person, or the own copy of federation.yaml, has agreed to what is offered. Whoever issues certificates can stand
between all members with keys of its own, and only members who compare their rosters see it: where the agreement rests
on who the others are, none is signed that nobody compared. Every step can be done again: the same command goes on
where it was.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from coterie.config import FederationConfig, load_yaml
from coterie.errors import IdentityError, RosterError
from coterie.federation.enrolment.asking import Desk, Invited, PartsDesk
from coterie.federation.enrolment.codes import JoinCode
from coterie.federation.enrolment.fetching import Fetched, fetch_parts
from coterie.federation.identity.agreed import check_agreed, check_weights, members
from coterie.federation.identity.certificates import COORDINATOR, fingerprint
from coterie.federation.identity.kit import CERT_FILE, REQUEST_FILE, Kit, install, load_kit, request
from coterie.federation.identity.letters import heard
from coterie.federation.identity.roster import Roster, from_json, install_roster, sign, to_json
from coterie.models.split.shards import MODEL_FOLDER
from coterie.storage import PUBLIC, write_whole

_LOOK_S = 0.5
FEDERATION_FILE = "federation.yaml"


@dataclass(frozen=True)
class Watch:
    """What a person sees and is asked.

    Args:
        agrees: whether to sign for these settings, which were read from this file.
        step: says what was done.
        fetched: how far a file is.
        waits: for whom; called again when that changes.
        same: whether all other members read the same fingerprint of the roster; asked where pushes are masked.
    """

    agrees: Callable[[FederationConfig], bool]
    step: Callable[[str], None]
    fetched: Fetched
    waits: Callable[[str], None]
    same: Callable[[str], bool]


@dataclass(frozen=True)
class Joined:
    """What came of it.

    Args:
        member: this one's name.
        config: what was agreed.
        kit: with the roster.
        roster: that all signed.
        parts: folder of trunk and shard; None for the coordinator.
    """

    member: str
    config: FederationConfig
    kit: Kit
    roster: Roster
    parts: Path | None


def join_federation(
    code: JoinCode,
    folder: Path,
    kit: Path,
    watch: Watch,
    *,
    heard_roster: str | None = None,
    patience_s: float = 600.0,
) -> Joined:
    """Come in by a code.

    Args:
        code: as it was read out.
        folder: for federation.yaml and the parts; a federation.yaml that lies there already has to be the same.
        kit: folder to make; where an earlier try left one, it is gone on with.
        watch: see there.
        heard_roster: fingerprint of the roster as other members read it out; no other is signed.
        patience_s: how long the inviter may be silent.

    Raises:
        IdentityError: the code does not count, or who answers did not give it out.
        RosterError: this member did not agree, the roster is not for what it agreed to, or not the others'.
        TransportError: the inviter cannot be reached.
        ModelError: parts that are not what was promised, or no room for them.
    """
    desk = Desk(code)
    invited = desk.invited(_key_of(kit))
    watch.step(f"invited as {invited.member} of {invited.offer.federation}")
    settings = folder / FEDERATION_FILE
    config = _agreed(invited, settings, watch)
    mine = _enrolled(desk, invited, config, kit)
    watch.step(f"certificate {fingerprint(mine.certificate)[:23]}.., its key stays in {kit}")
    handing = PartsDesk(invited.offer.parts_endpoint, desk.shown, mine, patience_s=patience_s)
    try:
        parts = None
        if invited.member != COORDINATOR:
            parts = parts_folder(config, settings)
            fetch_parts(handing, invited.member, parts, watch.fetched, patience_s=patience_s)
            watch.step(f"parts in {parts}")
        look = partial(_look, config=config, settings=settings, parts=parts, watch=watch, heard_roster=heard_roster)
        roster = _sign(handing, mine, look, watch)
    finally:
        handing.close()
    return Joined(invited.member, config, mine, roster, parts)


def parts_folder(config: FederationConfig, settings: Path) -> Path:
    """Where the parts of the split model lie: the folder around the ``model`` that federation.yaml names.

    Raises:
        IdentityError: it names the model by a path that other members cannot have.
    """
    if config.model.path is None:
        return settings.parent / "parts"
    path, base = config.model.path.resolve(), settings.parent.resolve()
    if path.name != MODEL_FOLDER or not path.is_relative_to(base) or path.parent == base:
        raise IdentityError(
            f"federation.yaml names the model by a path that members who join cannot have: {config.model.path}.",
            code="join-model-path",
            why="each gets the folder `model` that `coterie split` wrote, beside federation.yaml",
            fix="write `path: parts/model`; only the last name counts for the agreement's hash",
        )
    return path.parent


def _key_of(kit: Path) -> str:
    """Which request an earlier try left, so that its code counts for it alone."""
    left = kit / REQUEST_FILE
    return hashlib.sha256(left.read_bytes()).hexdigest() if left.is_file() else ""


def _agreed(invited: Invited, settings: Path, watch: Watch) -> FederationConfig:
    """The settings, once they are agreed to; kept as a file from then on."""
    mine = load_yaml(settings, FederationConfig) if settings.exists() else None
    offered = _offered(invited, settings)
    if mine is not None and mine.content_hash() != offered.content_hash():
        raise RosterError(
            f"The inviter's federation.yaml ({offered.content_hash()[:8]}) is not yours ({mine.content_hash()[:8]}).",
            code="join-other-agreement",
            where=str(settings),
            why="your signature says that you agree to all of it",
            fix="agree on one file; to read theirs and be asked, move yours away and join again",
        )
    if invited.member not in [member.name for member in members(offered)] or offered.name != invited.offer.federation:
        raise RosterError(
            f"The federation.yaml that came does not name {invited.member}.",
            code="join-other-agreement",
            fix="tell the inviter: codes and file do not belong together",
        )
    if mine is None:
        if not watch.agrees(offered):
            raise RosterError(
                "You did not agree; nothing was signed, and the code was not used.",
                code="join-not-agreed",
                fix="agree on another federation.yaml with the others; then the inviter makes new codes",
            )
        write_whole(settings, invited.offer.agreement, PUBLIC)
    return load_yaml(settings, FederationConfig)


def _offered(invited: Invited, settings: Path) -> FederationConfig:
    """The settings in the offer, read where they are going to lie."""
    aside = settings.with_name(f".offered-{settings.name}")
    settings.parent.mkdir(parents=True, exist_ok=True)
    write_whole(aside, invited.offer.agreement)
    try:
        return load_yaml(aside, FederationConfig)
    finally:
        aside.unlink()


def _enrolled(desk: Desk, invited: Invited, config: FederationConfig, folder: Path) -> Kit:
    """The kit with its certificate; the key in it is made here, and is the same at every try."""
    if not (folder / REQUEST_FILE).exists():
        member = next(each for each in members(config) if each.name == invited.member)
        request(member, config.name, folder)
    if not (folder / CERT_FILE).exists():
        certificate = desk.enrol((folder / REQUEST_FILE).read_bytes())
        install(folder, certificate, invited.authority, fingerprint(invited.authority))
    mine = load_kit(folder)
    if (mine.name, mine.federation) != (invited.member, config.name) or mine.authority != invited.authority:
        raise IdentityError(
            f"The kit in {folder} is {mine.name}'s of {mine.federation}, under a CA that this code is not of.",
            code="identity-other-member",
            fix="name a new folder with --kit",
        )
    return mine


def _look(
    roster: Roster,
    config: FederationConfig,
    settings: Path,
    parts: Path | None,
    watch: Watch,
    heard_roster: str | None,
) -> None:
    """Before signing: the roster is for what was agreed, and where that matters it is the others', too."""
    check_agreed(roster, config, settings)
    if parts is not None:
        check_weights(roster, parts)
    own = roster.fingerprint()
    if heard_roster is not None:
        same = heard(heard_roster) == heard(own)
    else:
        same = config.aggregation != "masked" or watch.same(own)
    if not same:
        raise RosterError(
            f"The others have another roster than {own}; it was not signed.",
            code="join-other-roster",
            why="whoever keeps the CA may stand between you, under keys of its own in the others' names",
            fix="compare it with each of them once more, letter by letter; if it differs, do not start, and tell all",
        )


def _sign(desk: PartsDesk, kit: Kit, look: Callable[[Roster], None], watch: Watch) -> Roster:
    """Sign the roster once it is laid out and was looked at, and install it once all have."""
    said, looked_at = "", ""
    while True:
        raw, waiting = desk.roster()
        roster = from_json(raw, "the inviter's roster") if raw else None
        if roster is not None and looked_at != roster.content_hash():
            look(roster)
            looked_at = roster.content_hash()
        if roster is not None and kit.name not in roster.signatures:
            desk.sign(to_json(sign(roster, kit.key, kit.certificate)))
            watch.step("signed the roster")
            continue
        if roster is not None and not waiting:
            install_roster(kit, roster)
            watch.step(f"roster v{roster.membership_epoch}, signed by all")
            desk.leave()
            return roster
        if waiting != said:
            said = waiting
            watch.waits(waiting)
        time.sleep(_LOOK_S)
