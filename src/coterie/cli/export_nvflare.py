"""`coterie export-nvflare`: a federation as a job of NVIDIA FLARE."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.output import say
from coterie.cli.pairs import named_pairs


def command(
    federation: Annotated[Path, typer.Argument(help="The federation.yaml that all parties agreed on.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="New folder for the job.")],
    site: Annotated[
        list[str] | None,
        typer.Option(
            "--site", metavar="MEMBER=SITE", help="FLARE site that runs a member; default: of its own name. Repeat."
        ),
    ] = None,
) -> None:
    """Write a job of FLARE 2.9 that runs a federation over FLARE's connections, with no port opened.

    Each site starts `coterie up` with its OWN party.yaml, named in its own local/coterie.json: text, kit, budget and
    ledger are the site's, and the job can name none of them. Members talk in mutual TLS through FLARE's messages; the
    hub sees who, when and how much. Needs pip install 'coterie[nvflare]' at the hub and at every site.

    Example:
        coterie export-nvflare federation.yaml --site coordinator=alder --out job
    """
    from coterie.config import FederationConfig, load_yaml
    from coterie.flare.job import sites_of, write_job

    config = load_yaml(federation, FederationConfig)
    sites = sites_of(config, named_pairs("--site", site, "--site coordinator=alder --site birch=clinic-2"))
    write_job(config, sites, out)
    for member, place in sites.items():
        say(f"{member} runs at {place}")
    say(f"wrote {out}. The privacy policy is each site's own: budgets are in party.yaml, not in this job.")
