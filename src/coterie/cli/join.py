"""`coterie join`: come into a federation by the code that its inviter read out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coterie.cli.output import say, size
from coterie.cli.party_file import check_named, offer_settings
from coterie.cli.roster import fingerprint_line
from coterie.errors import as_argument

if TYPE_CHECKING:
    from coterie.config import FederationConfig


def command(
    code: Annotated[str, typer.Argument(help="As it was read out, CODE@HOST:PORT; case and hyphens do not matter.")],
    kit: Annotated[Path, typer.Option(help="Folder to make; your private key is made there and stays.")] = Path(
        "kit"
    ),
    train: Annotated[
        list[Path] | None, typer.Option("--train", metavar="FILE", help="Write a party.yaml with this text; repeat.")
    ] = None,
    test: Annotated[Path | None, typer.Option("--test", metavar="FILE", help="Held-out text for that file.")] = None,
    agree: Annotated[
        bool, typer.Option("--agree", help="Sign for the federation.yaml that comes, without being asked.")
    ] = False,
    roster: Annotated[
        str | None,
        typer.Option(
            metavar="FINGERPRINT", help="The roster's fingerprint as other members read it out; no other is signed."
        ),
    ] = None,
) -> None:
    """Make your own key, have it certified, fetch your parts of the model, and sign the roster.

    The other side has to prove that it gave out the code before anything is made here. A federation.yaml in this
    folder is what you agreed to, and has to be the inviter's; without one you are shown theirs and asked. If the
    line breaks, run the same command again: it goes on where it was.

    Before you start, read the roster's fingerprint to the other members by phone: an inviter that stands between you
    has another for each. Where pushes are masked you are asked for it before you sign; --roster answers for scripts.

    Example:
        coterie join K7Q2M-9FDXA-3T0ZR-8WQ4E-VVB2K@alder.example:7400 --train notes.jsonl
    """
    from coterie.federation.enrolment.codes import parse

    given = parse(code)
    check_named(train, test)

    from coterie.cli.output import error_console
    from coterie.federation.enrolment.joining import Watch, join_federation

    def fetched(name: str, done: int, whole: int) -> None:
        part = 100 * done // max(whole, 1)
        if shown.get(name, -10) + 10 <= part or done == whole:
            shown[name] = part
            error_console().print(f"{name} {size(done)} of {size(whole)}", markup=False)

    shown: dict[str, int] = {}
    watch = Watch(
        agrees=lambda config: agree or _asked(config),
        step=say,
        fetched=fetched,
        waits=lambda names: say(f"waiting for {names}"),
        same=_compared,
    )
    joined = join_federation(given, Path(), kit, watch, heard_roster=roster)
    say(fingerprint_line(joined.roster))
    if joined.parts is None:
        say(f"next: coterie coordinator federation.yaml --kit {as_argument(kit)}")
        return
    offer_settings(joined.member, Path("federation.yaml"), kit, joined.parts, train or [], test)
    say("next: coterie doctor party.yaml, then coterie up party.yaml")


def _asked(config: FederationConfig) -> bool:
    """Show the agreement and have a person decide."""
    import sys

    import yaml

    from coterie.errors import RosterError

    say(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True), sort_keys=False).rstrip())
    if not sys.stdin.isatty():
        raise RosterError(
            "Nobody is here to agree to this federation.yaml; nothing was signed, and the code was not used.",
            code="join-not-agreed",
            why="it says what others may see of your text",
            fix="put the federation.yaml that you agreed on into this folder, or add --agree",
        )
    return typer.confirm(f"Sign for this (hash {config.content_hash()[:16]})?", err=True)


def _compared(fingerprint: str) -> bool:
    """Have a person compare the roster with the other members'."""
    import sys

    from coterie.errors import RosterError

    if not sys.stdin.isatty():
        raise RosterError(
            f"Nobody is here to compare the roster's fingerprint {fingerprint} with the others'; it was not signed.",
            code="join-not-compared",
            why="an inviter that shows each member another roster reads each one's sums, which masks are to hide",
            fix=f"read it to every other member by phone, then run the same command with --roster {fingerprint}: it "
            "goes on where it was",
        )
    say(f"roster fingerprint {fingerprint}")
    say("Read it to every other member by phone. One that has another tells you that somebody stands between you.")
    return typer.confirm("Do all of them have the same?", err=True)
