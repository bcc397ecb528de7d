"""`coterie approve`: the keeper of the CA certifies a party's key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.output import say, write_json


def command(
    request: Annotated[Path, typer.Argument(help="The request.csr a party sent.")],
    settings: Annotated[Path, typer.Argument(help="The federation.yaml that all parties agreed on.")],
    ca: Annotated[Path, typer.Option(help="Folder of the CA, from `coterie provision --ca-only`.")],
    out: Annotated[Path, typer.Option(help="Folder for the certificates; NAME.pem and ca.pem go there.")] = Path(
        "approved"
    ),
    days: Annotated[int, typer.Option(min=1, help="How long the certificate is valid.")] = 397,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the fingerprints to this file.")] = None,
) -> None:
    """Check a request against federation.yaml and issue the certificate. Name, role and endpoint come from the file.

    Make sure by another channel that the request is from that party: whoever holds the certified key speaks in its
    name. The CA fingerprint this prints is what the party needs for `coterie install`; tell it by phone.

    Example:
        coterie approve request.csr federation.yaml --ca ca --out approved
    """
    from coterie.config import FederationConfig, load_yaml
    from coterie.errors import IdentityError
    from coterie.federation.identity import kit as kits
    from coterie.federation.identity.agreed import members
    from coterie.federation.identity.certificates import cert_pem, fingerprint
    from coterie.storage import PUBLIC, write_whole

    config = load_yaml(settings, FederationConfig)
    if not request.is_file():
        raise IdentityError(
            f"There is no request {request}.",
            code="identity-missing",
            fix="name the file that `coterie request` wrote at the party: kit/request.csr",
        )
    authority = kits.load_authority(ca)
    member, certificate = kits.approve(request.read_bytes(), members(config), authority, days=days)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / kits.CA_FILE, cert_pem(authority.certificate), PUBLIC)
    write_whole(out / f"{member.name}.pem", cert_pem(certificate), PUBLIC)
    mine, theirs = fingerprint(authority.certificate), fingerprint(certificate)
    say(f"{member.name} ({member.role}, {member.endpoint}) approved until {certificate.not_valid_after_utc:%Y-%m-%d}")
    say(f"send back        {out / f'{member.name}.pem'} and {out / kits.CA_FILE}")
    say(f"certificate      {theirs}")
    say(f"CA fingerprint   {mine}  (tell it by phone)")
    if json_file is not None:
        write_json(json_file, {"name": member.name, "fingerprint": theirs, "ca_fingerprint": mine})
