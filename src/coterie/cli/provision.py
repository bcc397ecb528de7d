"""`coterie provision`: the CA and all kits from one hand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.output import say, table, write_json


def command(
    settings: Annotated[Path, typer.Argument(help="The federation.yaml that all parties agreed on.")],
    out: Annotated[Path, typer.Option(help="Folder to make: the CA and one kit per member, or the CA alone.")] = Path(
        "kits"
    ),
    ca_only: Annotated[
        bool, typer.Option("--ca-only", help="Make the CA alone; every party then makes its own key.")
    ] = False,
    weights: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="What `coterie split` wrote: members sign its digests, and start from it only."
        ),
    ] = None,
    days: Annotated[int, typer.Option(min=1, help="How long the certificates are valid.")] = 397,
    epoch: Annotated[int, typer.Option(min=0, help="Membership epoch of the roster.")] = 1,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write names and fingerprints to this file.")
    ] = None,
) -> None:
    """Make the private CA of a federation, and a kit with key, certificate and signed roster for every member.

    For one machine or one administrator, because all keys are made here. Where each organisation keeps its own key,
    use --ca-only, then `coterie request`, `approve` and `install`.

    Example:
        coterie split --federation federation.yaml --out weights
        coterie provision federation.yaml --weights weights --out kits
    """
    from coterie.config import FederationConfig, load_yaml
    from coterie.federation.identity.agreed import members, placement_hash, weights_of
    from coterie.federation.identity.certificates import fingerprint, new_authority
    from coterie.federation.identity.kit import CA_FOLDER, load_authority, save_authority
    from coterie.federation.identity.provision import provision

    config = load_yaml(settings, FederationConfig)
    if ca_only:
        authority = new_authority(config.name)
        save_authority(authority, out)
        shown = fingerprint(authority.certificate)
        say(f"CA of {config.name} in {out}; keep ca-key.pem to yourself")
        say(f"fingerprint {shown}")
        say("tell it to every party by phone or in person; then coterie approve each request")
        if json_file is not None:
            write_json(json_file, {"federation": config.name, "ca_fingerprint": shown})
        return
    roster = provision(
        *(config.name, members(config), out),
        config_hash=config.content_hash(),
        placement_hash=placement_hash(config),
        weights=weights_of(weights),
        membership_epoch=epoch,
        days=days,
    )
    shown = fingerprint(load_authority(out / CA_FOLDER).certificate)
    rows = [(e.name, e.role, e.endpoint, f"{out / e.name}") for e in roster.parties]
    table(["name", "role", "endpoint", "kit"], rows, title=f"{config.name}, roster v{epoch}, signed by all")
    say(f"CA fingerprint {shown}")
    say(f"roster hash    {roster.content_hash()}")
    if weights is None:
        say("starting weights are not in the roster; --weights DIR puts in what `coterie split` wrote")
    if json_file is not None:
        fingerprints = {e.name: e.cert_fingerprint for e in roster.parties}
        record = {"federation": config.name, "ca_fingerprint": shown, "roster_hash": roster.content_hash()}
        write_json(json_file, {**record, "members": fingerprints})
