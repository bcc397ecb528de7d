"""`coterie invite`: give the other members codes by which they come in, and serve until they have."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coterie.cli.output import EXIT_STOPPED, say, size
from coterie.cli.party_file import check_named, offer_settings
from coterie.cli.roster import fingerprint_line
from coterie.errors import as_argument

if TYPE_CHECKING:
    import datetime as dt

    from coterie.federation.enrolment.codes import JoinCode
    from coterie.federation.identity.certificates import Authority


def command(
    name: Annotated[str, typer.Argument(help="Your own party's name in federation.yaml.")],
    settings: Annotated[Path, typer.Argument(help="The federation.yaml that all parties agreed on.")],
    keys: Annotated[
        Path, typer.Option(help="Folder for the CA (ca), your kit and coordinator-kit; what is there is used.")
    ] = Path(),
    elsewhere: Annotated[
        bool, typer.Option("--coordinator-elsewhere", help="The coordinator is on another machine: invite it, too.")
    ] = False,
    at: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Address in the codes; default: the coordinator's endpoint."),
    ] = None,
    at_listen: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Listen here for it, behind a port forwarding.")
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Hand out parts here, where it differs from your endpoint."),
    ] = None,
    train: Annotated[
        list[Path] | None, typer.Option("--train", metavar="FILE", help="Write a party.yaml with this text; repeat.")
    ] = None,
    test: Annotated[Path | None, typer.Option("--test", metavar="FILE", help="Held-out text for that file.")] = None,
    hours: Annotated[float, typer.Option(min=0.01, max=240, help="How long a code counts.")] = 24.0,
) -> None:
    """Give every other member a code to come in by, certify its key, hand out the split model, and have all sign.

    Read each member its own code by telephone: who has it becomes that member, once, by `coterie join CODE`.
    This ends when all have their parts and the roster that all signed. Ctrl-C and the same command again go on.
    Members then read the roster's fingerprint to each other, which shows that nobody stands between them.

    Example:
        coterie split ./olmoe --federation federation.yaml --out parts
        coterie invite alder federation.yaml --train notes.jsonl
    """
    check_named(train, test)
    say(f"{name}: loading")

    import datetime as dt

    from coterie.cli.stopping import stop_signals
    from coterie.federation.enrolment.inviting import Inviting, Listening, Places

    kit, coordinator_kit = keys / "kit", keys / "coordinator-kit"
    places = Places(keys / "ca", kit, None if elsewhere else coordinator_kit)
    inviting = Inviting(
        *(name, settings, places, Listening(at, at_listen, listen)),
        valid=dt.timedelta(hours=hours),
        tell=lambda line: say(f"{name}: {line}"),
    )
    total = sum(int(entry["bytes"]) for entry in inviting.files.values())
    say(f"{name}: inviting {', '.join(inviting.invited)}; {size(total)} of parts in {inviting.parts}")

    def show(authority: Authority, codes: dict[str, tuple[JoinCode, dt.datetime]]) -> None:
        for member, (code, until) in codes.items():
            say(f"{member:<12} coterie join {code}")
            say(f"{'':<12} counts once, until {until:%Y-%m-%d %H:%M} UTC; read it to {member} alone, by telephone")
        if not codes:
            say(f"{name}: all codes are used; going on with what members still need")

    with stop_signals(inviting.stop, quiet=True):
        roster = inviting.run(show)
    if roster is None:
        say(f"{name}: stopped; the same command goes on, with the same codes")
        raise typer.Exit(EXIT_STOPPED)
    say(f"{name}: everybody is in: roster v{roster.membership_epoch} {roster.content_hash()}")
    say(fingerprint_line(roster))
    if not elsewhere:
        say(f"next: coterie coordinator {as_argument(settings)} --kit {as_argument(coordinator_kit)}")
    offer_settings(name, settings, kit, inviting.parts, train or [], test)
    say("next: coterie doctor party.yaml, then coterie up party.yaml")
