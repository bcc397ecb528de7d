"""What a site runs, in the site's own words: ``local/coterie.json`` in its FLARE workspace, which no job can write.

::

    {"members": {"alder": {"settings": "/srv/alder/party.yaml"},
                 "coordinator": {"settings": "/srv/alder/federation.yaml", "kit": "/srv/alder/kits/coordinator",
                                 "run_dir": "/srv/alder/coordinator"}}}
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from coterie.config import FederationConfig, PartyConfig, load_yaml
from coterie.errors import ConfigError, CoterieError
from coterie.federation.identity.certificates import COORDINATOR
from coterie.storage import PRIVATE, json_object

FILE = "coterie.json"
REFUSALS = "coterie.log"
"""Beside it: why this site started nothing. A hub may collect FLARE's own logs, and reasons name files."""
STOPPED = 5
"""What a member's process ends with after a clean stop."""


@dataclass(frozen=True)
class LocalMember:
    """A member that this site is willing to run.

    Attributes:
        settings: party.yaml, or for the coordinator federation.yaml.
        kit, run_dir: of the coordinator; a party's party.yaml names its own.
    """

    name: str
    settings: Path
    kit: Path | None = None
    run_dir: Path | None = None

    @property
    def federation(self) -> FederationConfig:
        """What this site itself agreed to."""
        if self.name == COORDINATOR:
            return load_yaml(self.settings, FederationConfig)
        return load_yaml(load_yaml(self.settings, PartyConfig).federation, FederationConfig)

    def open_log(self) -> BinaryIO:
        """What the process prints is added here: beside its settings, since a hub may collect FLARE's own logs.

        Closed to other accounts, whatever it was before: a party's figures are in it.
        """
        return _closed_log(self.settings.parent / f"flare-{self.name}.log")

    def command(self, listen: str, dial: Mapping[str, str]) -> list[str]:
        """The process that is started: an ordinary `coterie` command with this site's settings."""
        words = [sys.executable, "-P", "-m", "coterie", "coordinator" if self.name == COORDINATOR else "up"]
        words += [str(self.settings), "--listen", listen]
        for name, address in dial.items():
            words += ["--dial", f"{name}={address}"]
        if self.kit is not None:
            words += ["--kit", str(self.kit)]
        if self.run_dir is not None:
            words += ["--run-dir", str(self.run_dir)]
        return words


def environment_of(workspace: Path) -> dict[str, str]:
    """This process's environment for a member's, without FLARE's own folders on the path of what is imported.

    Args:
        workspace: FLARE's; FLARE puts the folder there that a job's own code would lie in.
    """
    found = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    inside = workspace.resolve()
    kept = [path for path in found if path and not Path(path).resolve().is_relative_to(inside)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(kept)}


def refuse_code(folder: Path) -> None:
    """Refuse a job that brings code.

    Args:
        folder: where FLARE puts a job's own code.

    Raises:
        ConfigError: it is there.
    """
    if folder.exists():
        raise ConfigError(
            "The job brings code of its own.",
            code="flare-code",
            why="code that a hub sends can read this site's text and keys; coterie's own job brings none",
            fix="export the job again, and set `byoc` to none for every role in local/authorization.json",
        )


def note_refusal(folder: Path, error: CoterieError) -> None:
    """Write down, for this site alone, why it started nothing."""
    with _closed_log(folder / REFUSALS) as log:
        log.write(f"{error.code}: {error}\n".encode())


def _closed_log(path: Path) -> BinaryIO:
    log = open(path, "ab", opener=partial(os.open, mode=PRIVATE))  # noqa: SIM115 - as long as its process runs
    os.fchmod(log.fileno(), PRIVATE)
    return log


def members_here(folder: Path, wanted: Iterable[str], agreement: str) -> list[LocalMember]:
    """The members that a job wants this site to run, as the site's own file describes them.

    Args:
        folder: the ``local`` folder of the site's FLARE workspace.
        wanted: names.
        agreement: hash of the federation.yaml that the job was made from.

    Raises:
        ConfigError: there is no such file, it lacks a member, or the site agreed to another federation.yaml.
    """
    path = folder / FILE
    try:
        found = json_object(path.read_bytes())["members"]
        members = {name: _member(name, entry) for name, entry in found.items()}
    except FileNotFoundError:
        raise _unwilling(path, "is not there") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unwilling(path, "is not of the form that is needed") from error
    chosen = []
    for name in wanted:
        if name not in members:
            raise _unwilling(path, f"does not name {name}")
        if members[name].federation.content_hash() != agreement:
            raise ConfigError(
                f"The job was made from another federation.yaml than the one that {name} agreed to.",
                code="flare-agreement",
                why="what a site agreed to is in its own files, and no job changes it",
                fix="compare the files of both sides, and export the job again from the agreed one",
            )
        chosen.append(members[name])
    return chosen


def _member(name: str, entry: Mapping[str, str]) -> LocalMember:
    paths = {key: Path(entry[key]) for key in ("settings", "kit", "run_dir") if key in entry}
    return LocalMember(name, **paths)


def _unwilling(path: Path, how: str) -> ConfigError:
    return ConfigError(
        f"{path} {how}.",
        code="flare-local",
        why="a site runs what it names in a file of its own; a job cannot name settings, text or a budget",
        fix='write {"members": {"NAME": {"settings": "/path/to/party.yaml"}}} there',
    )
