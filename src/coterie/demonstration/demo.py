"""The whole demo: an empty folder becomes a run with its figures, picture, pages and commands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from coterie.demonstration.folder import Folder, check_folder, empty_folder
from coterie.demonstration.plan import DemoPlan
from coterie.demonstration.processes import interrupt_on_signals
from coterie.demonstration.readme import save_readme
from coterie.demonstration.run import PHASES, run
from coterie.demonstration.screen import Screen
from coterie.federation.rounds.run_folder import RunFolder
from coterie.storage import write_json

if TYPE_CHECKING:
    from coterie.demonstration.results import Results

RESULTS, PICTURE, REPORT, README = "results.json", "losses.png", "report.html", "README.txt"
AUDIT = "audit.html"


def run_demo(plan: DemoPlan, folder: Path, screen: Screen) -> Results:
    """Run all arms and compare them.

    Args:
        plan: arms, sizes and the text.
        folder: made when it is not there; an earlier demo in it is replaced.
        screen: is told how far it is.

    Raises:
        ConfigError: the folder holds something else.
        RoundError: another demo runs in it.
        DataError: this Python carries no documentation.
        CoterieError: a command failed; the message names the log to read.
        KeyboardInterrupt: Ctrl-C, SIGTERM or a closed terminal. No process is left in any of these cases.
    """
    root = folder.resolve()
    with interrupt_on_signals():
        check_folder(root)
        held = RunFolder(root)
        try:
            replaced = empty_folder(root)
            remark = "; the earlier demo there was replaced" if replaced else ""
            screen.line(f"files go to {folder}{remark}; nothing keeps running afterwards")
            finished = run(plan, root, screen)
            plan = finished.plan
            screen.phase(PHASES - 1, PHASES, "attack")
            # torch from here on: all processes have ended
            from coterie.demonstration.audited import audited

            findings = audited(plan, root, screen, root / AUDIT)
            screen.phase(PHASES, PHASES, "compare")
            from coterie.demonstration.plot import draw
            from coterie.demonstration.report import save_report
            from coterie.demonstration.results import collect

            subjects = {party: part.subject for party, part in finished.corpus.parties.items()}
            results = collect(plan, root, subjects, screen, findings)
            write_json(root / RESULTS, results.as_json())
            picture = draw(results)
            (root / PICTURE).write_bytes(picture)
            save_report(results, picture, draw(results, tall=True), root / REPORT)
            save_readme(plan, Folder(root, plan), root / README)
            screen.line(f"{finished.cpu_s:.0f} s of processor time in {finished.seconds:.0f} s")
            return results
        except KeyboardInterrupt:
            screen.line(f"interrupted: every process of the demo was ended; {folder} stays as it is")
            raise
        finally:
            held.close()
