"""What was audited and with what, so that it can be done again."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from coterie import __version__
from coterie.audit.evidence import Evidence
from coterie.audit.findings import Audited, Identification, RunKind
from coterie.audit.transcript import Transcript
from coterie.config import FederationConfig, content_hash, load_yaml
from coterie.revision import revision
from coterie.storage import file_digest, json_object
from coterie.training.party.process import FEDERATION_FILE
from coterie.training.single.prepared import read_config

_PACKAGES = ("torch", "transformers", "dp-accounting", "numpy")


def identification(
    runs: list[Audited], seed: int, seconds: float, cpu_s: float, pieces: Mapping[str, float]
) -> Identification:
    """Of a whole audit that took so long."""
    return Identification(
        version=__version__,
        commit=revision(),
        packages={name: _version(name) for name in _PACKAGES},
        seed=seed,
        seconds=round(seconds, 1),
        cpu_s=round(cpu_s, 1),
        pieces=dict(pieces),
        machine=f"{platform.machine()}, {os.cpu_count()} cores",
        at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        runs=tuple(runs),
    )


def federation_run(evidence: Evidence, part: RunKind) -> Audited:
    """One owner's part in a federation."""
    federation = load_yaml(evidence.run_folder / FEDERATION_FILE, FederationConfig)
    rounds = federation.train.rounds
    recorded = min((_whole_rounds(transcript, rounds) for transcript in evidence.received.values()), default=0)
    claim = evidence.privacy
    return Audited(
        part=part,
        owner=evidence.owner,
        parties=tuple(federation.parties),
        config_hash=str(json_object((evidence.run_folder / "run.json").read_bytes())["agreement"]),
        model=_model(evidence.start),
        start=_digest(evidence.start),
        rounds=rounds,
        recorded=min(recorded, rounds),
        claimed=None if claim is None else (claim.epsilon, claim.delta),
    )


def _whole_rounds(transcript: Transcript, rounds: int) -> int:
    """How many rounds were recorded whole: those before the one in which the recording grew too large."""
    asked = rounds if transcript.rounds is None else transcript.rounds
    return asked if transcript.stopped is None else min(asked, max(0, transcript.stopped - 1))


def lone_run(run_folder: Path, claimed: tuple[float, float] | None) -> Audited:
    """A run of `coterie train`."""
    config = read_config(run_folder)
    start = config.model.path
    return Audited(
        part=RunKind.ALONE,
        owner="the party that trained alone",
        parties=(),
        config_hash=content_hash(config, without={"run_dir", "device"}),
        model=_model(start or run_folder / "model"),
        start=_digest(start) if start else "random weights",
        rounds=config.train.rounds,
        recorded=0,
        claimed=claimed,
    )


def _model(folder: Path) -> str:
    """Family and size, by what lies in the folder."""
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return "unknown"
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return f"{config.get('model_type', 'unknown')}, {weights / 1e6:.1f} MB of weights"


def _digest(folder: Path) -> str:
    """Over config and weights, file by file."""
    whole = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        if path.is_file():
            whole.update(f"{path.name} {file_digest(path)}\n".encode())
    return whole.hexdigest()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
