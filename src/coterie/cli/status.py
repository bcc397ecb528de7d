"""`coterie status`: where a federation is, as one of its processes sees it."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from coterie.cli.output import console, say, table, write_json
from coterie.cli.privacy_lines import revealed_so_far
from coterie.pages.amounts import duration

_NOTABLE_S = 3.5


def command(
    targets: Annotated[
        list[Path],
        typer.Argument(help="A party.yaml, or the run folder of `coterie up` or `coterie coordinator`; or several."),
    ],
    watch: Annotated[
        bool, typer.Option("--watch", help="Show it again and again, until Ctrl-C or all have ended.")
    ] = False,
    every: Annotated[float, typer.Option("--every", min=0.2, help="Seconds between two looks of --watch.")] = 2.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Show parties, round, attempt, last commit, who is missing, and bytes on the wire. Never a loss.

    Example:
        coterie status party.yaml
        coterie status --watch runs/coordinator runs/alder
    """
    folders = [_run_folder(target) for target in targets]
    if watch:
        _watch(folders, every, json_file)
        return
    found = [_read(folder) for folder in folders]
    _write(json_file, found)
    for status in found:
        show(status)


def _watch(folders: Sequence[Path], every_s: float, json_file: Path | None) -> None:
    """One screen that is drawn anew; where nothing can be drawn over, a line for each change."""
    shown = ""
    while True:
        found = [_read(folder) for folder in folders]
        _write(json_file, found)
        if sys.stdout.isatty():
            console().clear()
            for status in found:
                show(status)
        elif (lines := "\n".join(map(_line, found))) != shown:
            shown = lines
            say(lines)
        if not any(status["running"] for status in found):
            return
        time.sleep(every_s)


def _read(folder: Path) -> dict[str, Any]:
    from coterie.federation.rounds.run_folder import is_running, read_status

    status = read_status(folder)
    age = max(0.0, time.time() - float(status.get("at", 0.0)))
    return status | {"running": is_running(folder), "age_s": round(age, 1)}


def _write(json_file: Path | None, found: Sequence[Mapping[str, Any]]) -> None:
    """One process as an object, several as a list of them."""
    if json_file is not None:
        write_json(json_file, found[0] if len(found) == 1 else list(found))


def _line(status: Mapping[str, Any]) -> str:
    """Where one process is, in a line."""
    doing = status.get("ending") or (status.get("phase") if status["running"] else "not running")
    missing = f"; missing: {', '.join(status['missing'])}" if status.get("missing") else ""
    return f"{_who(status)}: round {status.get('round', '?')} of {status.get('rounds', '?')}, {doing}{missing}"


def _who(status: Mapping[str, Any]) -> str:
    return "coordinator" if status.get("role") == "coordinator" else f"party {status.get('party', '?')}"


def _run_folder(target: Path) -> Path:
    if target.suffix not in (".yaml", ".yml"):
        return target
    from coterie.config import PartyConfig, load_yaml

    return load_yaml(target, PartyConfig).run_dir


def show(status: Mapping[str, Any]) -> None:
    """Print a status as lines, then the wire as a table."""
    running = "running" if status["running"] else f"not running, last seen {duration(status['age_s'])} ago"
    say(f"{status.get('federation', '?')}, {_who(status)}: {running}")
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
    return f"silent for {duration(silent)}" if status["running"] and silent >= _NOTABLE_S else ""
