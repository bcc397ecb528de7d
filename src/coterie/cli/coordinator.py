"""`coterie coordinator`: keep the rounds of a federation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.output import EXIT_STOPPED, say, write_json
from coterie.cli.roster import fingerprint_line


def command(
    settings: Annotated[Path, typer.Argument(help="The federation.yaml that every party signed.")],
    kit: Annotated[
        Path | None, typer.Option(help="The coordinator's kit; default: kits/coordinator beside federation.yaml.")
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Folder of its journal; default: runs/coordinator beside federation.yaml.")
    ] = None,
    listen: Annotated[
        str | None, typer.Option(help="Address to listen on, where it differs from the agreed endpoint.")
    ] = None,
    dial: Annotated[
        list[str] | None,
        typer.Option("--dial", metavar="NAME=HOST:PORT", help="Dial a party there, not at its endpoint; repeat."),
    ] = None,
    questions: Annotated[
        bool,
        typer.Option("--questions", help="Take up a finished run once more, so that parties can ask its model."),
    ] = False,
    go_on: Annotated[
        bool, typer.Option("--go-on", help="Take up a run that paused, once people at all parties have looked.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write how it ended to this file.")] = None,
) -> None:
    """Keep the rounds of a federation: who is there, what is committed, which checkpoint counts.

    It sees no text, no tensor and no loss. Ctrl-C ends the run after the round in progress, with a checkpoint;
    started again, it goes on where it was.

    With --questions a finished federation is brought up once more, and nothing is trained: every party starts again
    with `coterie resume`, or asks with `coterie eval --live` or `coterie generate --live`; when all who ask have
    their answers, it ends.

    Example:
        coterie coordinator federation.yaml --kit kits/coordinator --run-dir runs/coordinator
        coterie coordinator federation.yaml --questions
        coterie coordinator federation.yaml --go-on
    """
    from coterie.cli.rounds_progress import RoundLines, log_file
    from coterie.cli.stopping import stop_signals
    from coterie.cli.up import dialled
    from coterie.config import FederationConfig, load_yaml
    from coterie.federation.rounds.coordinator_process import CoordinatorProcess
    from coterie.federation.rounds.run_folder import status_of

    config = load_yaml(settings, FederationConfig)
    base = settings.parent
    folder = run_dir or base / "runs" / "coordinator"
    lines = RoundLines(config.train.rounds)
    process = CoordinatorProcess(
        config,
        kit or base / "kits" / "coordinator",
        folder,
        lambda status: lines.show(
            status.state, status.missing, status.left_s, status.refused, cut=status.cut, busy=status.busy
        ),
        listen,
        dialled(dial),
        questions,
        go_on,
    )
    say(f"coordinator of {config.name}: {', '.join(config.parties)}; {config.train.rounds} rounds")
    say(fingerprint_line(process.roster))
    if process.certificate_warning():
        say(process.certificate_warning())
    with log_file(folder), stop_signals(process.stop), lines:
        state = process.run()
    if json_file is not None:
        write_json(json_file, status_of(state))
    if state.ending == "stopped":
        say(f"stopped after round {state.committed} ({state.note}); start everybody again to go on")
        raise typer.Exit(EXIT_STOPPED)
    say("all questions are answered" if questions else f"finished: {state.committed} rounds")
