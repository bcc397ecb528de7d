"""The folder of a FLARE job: who runs where, and nothing else. A site's text and its budget stay its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coterie.config import FederationConfig
from coterie.errors import ConfigError
from coterie.federation.identity.certificates import COORDINATOR
from coterie.storage import is_vacant, new_folder, write_json


def sites_of(config: FederationConfig, named: Mapping[str, str]) -> dict[str, str]:
    """Member to FLARE site: as named, else a site of the party's own name; the coordinator must be named.

    Raises:
        ConfigError: a name is no member's, or the coordinator has no site.
    """
    members = [*config.parties, COORDINATOR]
    unknown = [name for name in named if name not in members]
    if unknown:
        raise ConfigError(
            f"{', '.join(unknown)} is no member of {config.name}.",
            code="flare-unknown-member",
            fix=f"members: {', '.join(members)}",
        )
    if COORDINATOR not in named:
        raise ConfigError(
            "No site is named that runs the coordinator.",
            code="flare-no-coordinator",
            why="it keeps the rounds and sees no tensor; any site can run it beside its party",
            fix=f"add, for example, --site {COORDINATOR}={named.get(members[0], members[0])}",
        )
    return {member: named.get(member, member) for member in members}


def write_job(config: FederationConfig, sites: Mapping[str, str], out: Path) -> None:
    """Write the job.

    Args:
        config: what all parties agreed on; only its name and hash go into the job.
        sites: member to FLARE site.
        out: a folder that is not there yet, or is empty.

    Raises:
        ConfigError: something else is there.
    """
    if not is_vacant(out):
        raise ConfigError(
            f"{out} exists and is not an empty folder.",
            code="flare-job-folder",
            why="the job would take its place",
            fix="name another folder, or remove what is there",
        )
    clients = sorted(set(sites.values()))
    with new_folder(out) as aside:
        write_json(
            aside / "meta.json",
            {
                "name": f"coterie-{config.name}",
                "resource_spec": {},
                "min_clients": len(clients),
                "mandatory_clients": clients,
                "deploy_map": {"hub": ["server"], "site": clients},
            },
        )
        controller = {"sites": dict(sites), "agreement": config.content_hash()}
        _write_app(aside / "hub" / "config" / "config_fed_server.json", workflows=[
            {"id": "coterie", "path": "coterie.flare.hub.CoterieController", "args": controller}
        ])  # fmt: skip
        _write_app(aside / "site" / "config" / "config_fed_client.json", executors=[
            {"tasks": ["config", "start"], "executor": {"path": "coterie.flare.site.CoterieExecutor", "args": {}}}
        ])  # fmt: skip


def _write_app(path: Path, **parts: Any) -> None:
    """FLARE's own filters are left empty: what crosses is encrypted, so that they could only break it."""
    path.parent.mkdir(parents=True)
    common = {"format_version": 2, "task_data_filters": [], "task_result_filters": [], "components": []}
    write_json(path, {**common, **parts})
