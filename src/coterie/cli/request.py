"""`coterie request`: a party makes its own key and asks for a certificate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.output import say


def command(
    name: Annotated[str, typer.Argument(help="This member's name in federation.yaml, or `coordinator`.")],
    settings: Annotated[Path, typer.Argument(help="The federation.yaml that all parties agreed on.")],
    kit: Annotated[Path, typer.Option(help="Folder to make; the private key is written there and stays.")],
) -> None:
    """Make a private key and a request for its certificate. Send the request to the keeper of the CA, not the key.

    Example:
        coterie request alder federation.yaml --kit kit
    """
    from coterie.config import FederationConfig, load_yaml
    from coterie.errors import IdentityError
    from coterie.federation.identity import kit as kits
    from coterie.federation.identity.agreed import members

    config = load_yaml(settings, FederationConfig)
    listed = {member.name: member for member in members(config)}
    if name not in listed:
        raise IdentityError(
            f"`{name}` is no member of {config.name}.",
            code="identity-unknown-member",
            where=str(settings),
            fix=f"members: {', '.join(listed)}",
        )
    asked = kits.request(listed[name], config.name, kit)
    say(f"key      {kit / kits.KEY_FILE}  (stays here)")
    say(f"request  {asked}  (send it to the keeper of the CA)")
