"""`coterie roster`: make, sign, join, verify and show the list of members."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coterie.cli.output import say, table, write_json
from coterie.errors import RosterError

if TYPE_CHECKING:
    from coterie.federation.identity.roster import Roster


class RosterAction(StrEnum):
    MAKE = "make"
    SIGN = "sign"
    JOIN = "join"
    VERIFY = "verify"
    SHOW = "show"


def fingerprint_line(roster: Roster) -> str:
    """What members read out to each other before they start, and why."""
    return f"roster fingerprint {roster.fingerprint()}; by phone: all members have the same, or do not start"


def command(
    action: Annotated[RosterAction, typer.Argument(help="What to do.")],
    files: Annotated[
        list[Path], typer.Argument(help="make: federation.yaml; otherwise roster files or kit folders.")
    ],
    kit: Annotated[Path | None, typer.Option(help="sign, verify: the kit to sign with or to check by.")] = None,
    federation: Annotated[
        Path | None, typer.Option(help="sign: check first that the roster is for this federation.yaml.")
    ] = None,
    certificates: Annotated[Path, typer.Option(help="make: folder with NAME.pem of every member.")] = Path(
        "approved"
    ),
    weights: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="make, sign: what `coterie split` wrote, whose digests the roster is to hold."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where to write; sign changes its file in place, others: roster.json.")
    ] = None,
    epoch: Annotated[
        int, typer.Option(min=0, help="make: membership epoch, one more than that of the last roster.")
    ] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="show: write the roster's content here.")] = None,
) -> None:
    """Work with the roster: the signed list of members, endpoints, certificates and hosted experts.

    make writes an unsigned one from federation.yaml and the approved certificates. Each member signs a copy (sign);
    join puts the signatures of the copies together; verify checks all of them; show prints the list and the
    fingerprint that members compare by phone.

    Example:
        coterie roster make federation.yaml --certificates approved --weights weights --out roster.json
        coterie roster sign roster.json --kit kit --federation federation.yaml --weights weights
        coterie roster join from-alder.json from-birch.json --out roster.json
        coterie roster verify roster.json --kit kit
        coterie roster show kit
    """
    from coterie.config import FederationConfig, load_yaml
    from coterie.federation.identity import roster as rosters
    from coterie.federation.identity.agreed import check_agreed, check_weights
    from coterie.federation.identity.kit import ROSTER_FILE, load_kit

    if action is not RosterAction.JOIN and len(files) != 1:
        raise RosterError(
            f"`coterie roster {action}` takes one file, not {len(files)}.",
            code="roster-usage",
            fix="name one file; only `coterie roster join` takes several",
        )
    first = files[0] / ROSTER_FILE if files[0].is_dir() else files[0]
    if action is RosterAction.MAKE:
        _save(_make(first, certificates, epoch, weights), out or Path(ROSTER_FILE))
    elif action is RosterAction.JOIN:
        _save(rosters.join([rosters.read_roster(file) for file in files]), out or Path(ROSTER_FILE))
    elif action is RosterAction.SIGN:
        mine = load_kit(_needed(kit, action))
        given = rosters.read_roster(first)
        if federation is not None:
            check_agreed(given, load_yaml(federation, FederationConfig), federation)
        if weights is not None:
            check_weights(given, weights)
        _save(rosters.sign(given, mine.key, mine.certificate), out or first)
        say(f"signed as {mine.name}")
    elif action is RosterAction.VERIFY:
        mine = load_kit(_needed(kit or (files[0] if files[0].is_dir() else None), action))
        given = rosters.read_roster(first)
        rosters.verify(given, mine.authority)
        given.admit(mine.certificate, mine.role)
        say(f"roster v{given.membership_epoch} {given.content_hash()} is signed by all {len(given.parties)} members")
    else:
        given = rosters.read_roster(first)
        _show(given)
        if json_file is not None:
            write_json(
                json_file, {"hash": given.content_hash(), "signed_by": sorted(given.signatures), **given.content()}
            )


def _needed(kit: Path | None, action: RosterAction) -> Path:
    if kit is None:
        raise RosterError(
            f"`coterie roster {action}` needs --kit.",
            code="roster-usage",
            fix="add --kit with the folder that holds your own key, as in `--kit kit`",
        )
    return kit


def _make(settings: Path, certificates: Path, epoch: int, weights: Path | None) -> Roster:
    from coterie.config import FederationConfig, load_yaml
    from coterie.federation.identity.agreed import draft_agreed, members
    from coterie.federation.identity.kit import load_certificate

    config = load_yaml(settings, FederationConfig)
    found = {
        member.name: load_certificate(certificates / f"{member.name}.pem", f"The certificate of {member.name}")
        for member in members(config)
    }
    return draft_agreed(config, found, weights, epoch=epoch)


def _save(roster: Roster, path: Path) -> None:
    from coterie.federation.identity.roster import save_roster

    save_roster(roster, path)
    missing = [entry.name for entry in roster.parties if entry.name not in roster.signatures]
    say(f"{path}: roster v{roster.membership_epoch} {roster.content_hash()}")
    say(fingerprint_line(roster))
    say(f"still to sign: {', '.join(missing)}" if missing else "signed by all")


def _show(roster: Roster) -> None:
    rows = [
        (e.name, e.role, e.endpoint, e.cert_fingerprint[:23] + "..", "yes" if e.name in roster.signatures else "no")
        for e in roster.parties
    ]
    table(["name", "role", "endpoint", "certificate", "signed"], rows)
    say(f"federation  {roster.federation}, membership epoch {roster.membership_epoch}")
    say(f"settings    {roster.config_hash}")
    say(f"placement   {roster.placement_hash}")
    say(f"weights     {len(roster.weights)} files" if roster.weights else "weights     not recorded")
    say(f"roster hash {roster.content_hash()}")
    say(fingerprint_line(roster))
    say("signatures are only listed here; `coterie roster verify` checks them")
