"""`coterie status`: where a federation is, as one of its processes sees it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from coterie.cli.output import say, table, write_json
from coterie.cli.privacy_lines import revealed_so_far

_NOTABLE_S = 3.5


def command(
    target: Annotated[
        Path, typer.Argument(help="A party.yaml, or the run folder of `coterie up` or `coterie coordinator`.")
    ],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Show parties, round, attempt, last commit, who is missing, and bytes on the wire. Never a loss.

    Example:
        coterie status party.yaml
    """
    from coterie.federation.rounds.run_folder import is_running, read_status

    folder = _run_folder(target)
    status = read_status(folder)
    age = max(0.0, time.time() - float(status.get("at", 0.0)))
    status |= {"running": is_running(folder), "age_s": round(age, 1)}
    if json_file is not None:
        write_json(json_file, status)
    show(status)


def _run_folder(target: Path) -> Path:
    if target.suffix not in (".yaml", ".yml"):
        return target
    from coterie.config import PartyConfig, load_yaml

    return load_yaml(target, PartyConfig).run_dir


def show(status: Mapping[str, Any]) -> None:
    """Print a status as lines, then the wire as a table."""
    running = "running" if status["running"] else f"not running, last seen {_age(status['age_s'])} ago"
    who = "coordinator" if status.get("role") == "coordinator" else f"party {status.get('party', '?')}"
    say(f"{status.get('federation', '?')}, {who}: {running}")
    attempt = f", attempt {status['attempt']}" if status.get("attempt") else ""
    doing = status.get("ending") or f"{status.get('phase', '?')}{attempt}"
    lines = {
        "round": f"{status.get('round', '?')} of {status.get('rounds', '?')} ({doing})",
        "committed": status.get("committed"),
        "checkpoint": status.get("checkpoint") or "none yet",
        "parties": ", ".join(status.get("parties", [])),
        "missing": ", ".join(status.get("missing", [])) or "nobody",
        "no connection": ", ".join(f"{one} and {other}" for one, other in status.get("cut", [])),
        "waiting for": ", ".join(status.get("waiting_for", [])),
        "going on without": ", ".join(status.get("absent", [])),
        "turned away": ", ".join(f"{name} ({code})" for name, code in status.get("refused", {}).items()),
        "last event": status.get("note"),
        "coordinator": _silence(status),
        "certificate": status.get("certificate"),
        "revealed": revealed_so_far(status.get("privacy")),
    }
    for name, value in lines.items():
        if value not in (None, ""):
            say(f"  {name:<16} {value}")
    wire = status.get("wire")
    if wire:
        mib = 1024**2
        rows = [
            (peer, *(counts[name] / mib for name in ("sent", "received", "tensors_sent", "tensors_received")))
            for peer, counts in wire.items()
        ]
        table(("peer", "sent MiB", "received MiB", "tensors sent MiB", "tensors received MiB"), rows)


def _silence(status: Mapping[str, Any]) -> str:
    """Said once a party has not heard of the coordinator for a few heartbeats."""
    silent = float(status.get("coordinator_silent_s", 0.0))
    return f"silent for {_age(silent)}" if status["running"] and silent >= _NOTABLE_S else ""


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
