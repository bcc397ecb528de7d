"""`coterie ledger`: what was spent, on which text, and what it adds up to."""

from __future__ import annotations

import math
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coterie.cli.output import say, table, write_json
from coterie.dp.accounting.digits import epsilon_digits
from coterie.errors import LedgerError

if TYPE_CHECKING:
    from coterie.dp.accounting.ledger import Ledger
    from coterie.dp.accounting.overlap import RecordedRun

_DELTA = 1e-5
_MEANINGLESS = 30.0
_EXPORTED = {
    "mechanism": "mechanism",
    "budget": "budget",
    "rounds": "planned",
    "record": "record",
    "pooled": "pooled",
}
"""Of what was fixed when a run started: public numbers and words."""


class LedgerAction(StrEnum):
    LIST = "list"
    SHOW = "show"
    MERGE = "merge"
    EXPORT = "export"


def command(
    action: Annotated[LedgerAction, typer.Argument(help="What to do.")],
    target: Annotated[
        str | None, typer.Argument(help="show: a run. merge: the other machine's folder of ledgers. export: a file.")
    ] = None,
    ledger: Annotated[
        Path | None,
        typer.Option(help="Folder of the ledgers; absent: COTERIE_HOME/ledger, else ~/.local/share/coterie/ledger."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="list, show: write the figures to this file.")
    ] = None,
) -> None:
    """Show privacy ledgers, explain them, and put those of two machines of one owner together.

    list shows every run with its own epsilon and that of all runs on some of the same text. show explains one run:
    its mechanism, what its epsilon means, and how the second figure comes about. export writes all runs into a file
    for whoever has to check them: everything that epsilon is computed from, and no key or hash of a text. merge
    copies another folder's ledgers, hashes and keys beside these: what was spent on the same text there is counted
    here from then on. No text is in any of them; the keys are secret.

    Example:
        coterie ledger list
        coterie ledger show 3f9c2a7be410
        coterie ledger export spent.json
        coterie ledger merge /media/laptop/coterie/ledger
    """
    from coterie.dp.accounting.ledger import default_root

    root = (ledger or default_root()).expanduser()
    if root.exists() and not root.is_dir():
        raise LedgerError(
            f"{root} is no folder of ledgers.", code="dp-ledger-none", fix="name the folder of `privacy: ledger:`"
        )
    if action is LedgerAction.LIST:
        rows = [_figures(ledger, run) for ledger, run in _runs(root)]
        _list(rows)
        figures: Any = {"runs": rows}
    elif action is LedgerAction.SHOW:
        figures = _show(root, _needed(target, "show", "a run"))
    elif action is LedgerAction.EXPORT:
        figures = _export(root, Path(_needed(target, "export", "a file to write")))
    else:
        figures = _merge(Path(_needed(target, "merge", "the other folder of ledgers")), root)
    if json_file is not None:
        write_json(json_file, figures)


def _needed(target: str | None, action: str, what: str) -> str:
    if target is None:
        raise typer.BadParameter(f"`coterie ledger {action}` needs {what}")
    return target


def _runs(root: Path) -> list[tuple[Ledger, RecordedRun]]:
    from coterie.dp.accounting.lifetime import ledgers_under

    return [(ledger, run) for ledger in ledgers_under(root) for run in ledger.runs() if run.facts]


def _figures(ledger: Ledger, run: RecordedRun) -> dict[str, Any]:
    from coterie.dp.accounting.lifetime import lifetime
    from coterie.dp.noise.pooled import restriction

    delta = float((run.facts.get("budget") or {}).get("delta", _DELTA))
    overall = lifetime(ledger, run.run, delta)
    return {
        "ledger": ledger.public_name(),
        "run": run.run,
        "unit": str(run.facts.get("unit", "record")),
        "units": run.facts.get("units"),
        "rounds": len(run.releases),
        "delta": delta,
        "epsilon": _finite(ledger.spent(run.run, delta).epsilon),
        "lifetime": _finite(overall.spent.epsilon),
        "merged": run.merged,
        "holds": restriction(run.facts),
        "counted": list(overall.lines),
        "revealed": list(overall.revealed),
        "seeded": list(overall.seeded),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _list(rows: list[dict[str, Any]]) -> None:
    columns = ("ledger", "run", "unit", "units", "rounds", "delta", "epsilon", "lifetime")
    shown = [(*(row[name] for name in columns), "merged" if row["merged"] else "here") for row in rows]
    if shown:
        table((*columns, "from"), shown)
        say("lifetime: all runs on some of the same text, for this run's unit; `-`: no bound")
    else:
        say("no run was counted here yet")


def _show(root: Path, run: str) -> dict[str, Any]:
    found = [(ledger, recorded) for ledger, recorded in _runs(root) if recorded.run == run]
    if not found:
        raise LedgerError(
            f"run {run} is in no ledger under {root}.",
            code="dp-ledger-no-run",
            fix="`coterie ledger list` shows the runs; --ledger names another folder",
        )
    row = _figures(*found[0])
    words = {name: "no bound" if row[name] is None else epsilon_digits(row[name]) for name in ("epsilon", "lifetime")}
    say(f"run {run}, ledger {row['ledger']} ({found[0][0].folder})")
    say(f"  unit       one {row['unit']} of {row['units']}; {row['rounds']} rounds released")
    say(f"  each round {_mechanism(found[0][1], row['unit'])}")
    if row["holds"]:
        say(f"  holds      {row['holds']}")
    say(f"  this run   epsilon {words['epsilon']} at delta {row['delta']:.3g}{_odds(row)}")
    say(f"  lifetime   epsilon {words['lifetime']} at delta {row['delta']:.3g}")
    for line in row["counted"]:
        say(f"  counted    {line}")
    for name in ("revealed", "seeded"):
        if row[name]:
            say(f"  {name:<10} {', '.join(row[name])}")
    return row


def _mechanism(run: RecordedRun, unit: str) -> str:
    from coterie.dp.accounting.accountant import Mechanism

    mechanism = Mechanism.from_json(run.facts["mechanism"])
    every = f" in every {mechanism.bands}th round" if mechanism.bands > 1 else ""
    most = f", at most {mechanism.limit} in all" if mechanism.limit is not None else ""
    return (
        f"each {unit} joins with chance {mechanism.sampling_rate:.4g}{every}{most}; what it adds is at most one "
        f"clip norm, and noise of {mechanism.noise_multiplier:.3f} clip norms hides it"
    )


def _odds(row: dict[str, Any]) -> str:
    """What an epsilon means: a bound on what others can learn of one unit."""
    epsilon = row["epsilon"]
    if row["seeded"] and row["run"] in row["seeded"]:
        return ", had its noise been secret: it came from a seed"
    if epsilon is None or epsilon > _MEANINGLESS:
        return ""
    who = "whoever it holds against" if row["holds"] else "whoever holds all that it released"
    return (
        f": {who}, and knows every other {row['unit']}, can raise the odds that one "
        f"{row['unit']} was in it at most {math.exp(epsilon):,.4g}-fold, but for a chance of delta"
    )


def _export(root: Path, file: Path) -> dict[str, Any]:
    from coterie.revision import software

    runs = []
    for ledger, run in _runs(root):
        facts = {name: run.facts.get(stored) for stored, name in _EXPORTED.items()}
        released = [{"round": at, "draw": draw, "digest": digest} for at, draw, digest in sorted(run.releases)]
        runs.append({**_figures(ledger, run), **facts, "released": released})
    content = {"format": 1, **software(), "relation": "one unit added or removed", "runs": runs}
    write_json(file, content)
    say(f"{len(runs)} runs written to {file}: no text, key or hash of a text is in it")
    return content


def _merge(other: Path, root: Path) -> dict[str, Any]:
    from coterie.dp.accounting.merging import merge

    brought = merge(other.expanduser(), root)
    say(f"ledgers of {brought.ledgers} data sets copied, {brought.known} were known: see `coterie ledger list`")
    return {"ledgers": brought.ledgers, "known": brought.known}
