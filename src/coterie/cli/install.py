"""`coterie install`: a party puts its certificate, the CA's and the roster into its kit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.output import say
from coterie.cli.roster import fingerprint_line


def command(
    kit: Annotated[Path, typer.Argument(help="The kit folder `coterie request` made.")],
    certificate: Annotated[Path | None, typer.Option(help="The approved certificate, NAME.pem.")] = None,
    ca: Annotated[Path | None, typer.Option(help="The CA's certificate, ca.pem, that came with it.")] = None,
    fingerprint: Annotated[
        str | None, typer.Option(help="The CA fingerprint as you heard it by phone; colons and case do not matter.")
    ] = None,
    roster: Annotated[Path | None, typer.Option(help="The roster that all members signed.")] = None,
) -> None:
    """Put what came back into the kit: first the certificates, later the signed roster. Everything is checked first.

    Example:
        coterie install kit --certificate alder.pem --ca ca.pem --fingerprint 9F:2C:...
        coterie install kit --roster roster.json
    """
    from coterie.errors import IdentityError
    from coterie.federation.identity import certificates
    from coterie.federation.identity import kit as kits
    from coterie.federation.identity.roster import install_roster, read_roster

    given = (certificate, ca, fingerprint)
    if all(part is None for part in given) and roster is None:
        raise IdentityError(
            "There is nothing to install.",
            code="install-nothing",
            fix="give --certificate, --ca and --fingerprint, or --roster",
        )
    if any(part is not None for part in given):
        if certificate is None or ca is None or fingerprint is None:
            raise IdentityError(
                "--certificate, --ca and --fingerprint belong together.",
                code="install-incomplete",
                why="without the fingerprint you cannot know whose CA it is",
                fix="ask the keeper of the CA for the fingerprint, by phone",
            )
        installed = kits.install(
            kit,
            kits.load_certificate(certificate, "The approved certificate"),
            kits.load_certificate(ca, "The CA certificate"),
            fingerprint,
        )
        until = installed.certificate.not_valid_after_utc
        say(f"{installed.name} of {installed.federation}: certificate valid until {until:%Y-%m-%d}")
        say(f"certificate  {certificates.fingerprint(installed.certificate)}")
    if roster is not None:
        agreed = read_roster(roster)
        install_roster(kits.load_kit(kit), agreed)
        say(f"roster v{agreed.membership_epoch} {agreed.content_hash()}, signed by all {len(agreed.parties)} members")
        say(fingerprint_line(agreed))
