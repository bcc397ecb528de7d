"""`coterie audit`: attack one's own run, and say what leaked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coterie.cli.output import console, error_console, say, table, write_json
from coterie.errors import ConfigError

if TYPE_CHECKING:
    from coterie.audit.findings import Findings
    from coterie.audit.run import Asked

ALARM, INCONCLUSIVE = 3, 4
"""Exit codes beside 0, concluded without an alarm."""
_PREPARE = "prepare"


def command(  # noqa: PLR0913 - one for each option
    target: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN | prepare SETTINGS", help="The owner's run_dir; or `prepare` and train.yaml or party.yaml."
        ),
    ],
    received: Annotated[
        list[Path] | None,
        typer.Option(help="Another party's run_dir, or its transcript: what it received. Several times."),
    ] = None,
    public: Annotated[
        list[Path] | None, typer.Option(help="Folder or file of public text, which attackers have, too.")
    ] = None,
    start: Annotated[
        Path | None, typer.Option(help="The public starting checkpoint; absent: what federation.yaml names.")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            help="A party's whole trained model, as `coterie export` made it; absent: put together from --received."
        ),
    ] = None,
    reference: Annotated[
        list[Path] | None,
        typer.Option(help="A model that saw none of this text: run_dir or Hugging Face folder. Several times."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the page goes; absent: RUN/private/audit.html.")
    ] = None,
    shareable: Annotated[
        bool,
        typer.Option("--shareable", help="Leave out of page and figures what was measured over the owner's text."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of everything that the audit draws.")] = 0,
    minutes: Annotated[float, typer.Option(help="Time to stay within, roughly.")] = 15.0,
    out: Annotated[Path | None, typer.Option(help="prepare: the folder to make.")] = None,
) -> None:
    """Attack a run of your own: what others received of it, the trained model, and the epsilon it claims.

    Each attack names its adversary. What could not be tested is said, with its reason. The page and the figures are
    for the owner; --shareable makes the edition to pass on. Exit code 0: concluded, no alarm; 3: something promised
    is contradicted; 4: nothing could be concluded.

    `coterie audit prepare train.yaml --out FOLDER` makes a copy of the settings and text that can be audited: half of
    the documents held out by secret coins, and canaries put in. Train it like any other run.

    Example:
        coterie audit alder/run --received birch/run --received cedar/run --public text/public --json audit.json
        coterie audit prepare train.yaml --out audited
    """
    if target[0] == _PREPARE:
        _prepare(target[1:], out, seed if seed else None, json_file)
        return
    if len(target) > 1 or out is not None:
        raise typer.BadParameter("a second argument and --out belong to `coterie audit prepare`")
    run, models = Path(target[0]), tuple(reference or ())
    _check_there(public or [], [*models, *filter(None, [model, start])])

    from coterie.audit.run import Asked, public_files

    asked = Asked(run, tuple(received or ()), public_files(public or ()), start, whole=model, references=models)
    found = _audited(asked, seed, 60.0 * minutes)

    from coterie.audit.report.findings_page import save_report
    from coterie.audit.report.shareable import shareable as withheld
    from coterie.training.folders import private_folder

    shown = withheld(found) if shareable else found
    page = report or private_folder(run) / ("audit-shareable.html" if shareable else "audit.html")
    save_report(shown, page)
    if json_file is not None:
        write_json(json_file, shown.as_json())
    show(shown)
    say(f"Report   {page}")
    raise typer.Exit(exit_code(found))


def exit_code(found: Findings) -> int:
    """0, or what says that there is an alarm or no conclusion."""
    from coterie.audit.findings import Outcome

    return {Outcome.ALARM: ALARM, Outcome.UNKNOWN: INCONCLUSIVE}.get(found.outcome, 0)


def show(found: Findings) -> None:
    """Print verdicts, channels, and what was not tested."""
    from coterie.audit.report.findings_page import channel_table
    from coterie.audit.verdicts import failed, named

    for sentence in found.headline:
        console().print(sentence, style="bold", markup=False)
    say()
    rows = [(named(v.part, found.experts_dp), v.adversary.label, v.outcome.value, v.sentence) for v in found.verdicts]
    table(("of", "adversary", "outcome", "why"), rows, title="what each adversary could do")
    channels = channel_table(found)
    if channels.rows:
        say()
        table(channels.columns, channels.rows, title=channels.title)
    say()
    why = failed(found.controls)
    say("Instruments: they work." if not why else f"Instruments: no verdict counts as held; {why}.")
    for title, sentences in (("Not tested", found.untested), ("Next", found.next_settings)):
        if sentences:
            say(title)
        for sentence in sentences:
            say(f"- {sentence}")
    say()


def _check_there(public: Sequence[Path], models: Sequence[Path]) -> None:
    for path in public:
        if not path.exists():
            raise ConfigError(
                f"{path} does not exist.", code="audit-public-none", fix="name a folder or a file of public text"
            )
    for path in models:
        if not path.exists():
            raise ConfigError(f"{path} does not exist.", code="audit-model-none", fix="name the folder of a model")


def _audited(asked: Asked, seed: int, budget_s: float) -> Findings:
    from coterie.audit.run import audit

    return audit(
        [asked],
        seed=seed,
        budget_s=budget_s,
        progress=lambda what: error_console().print(f"audit: {what}", markup=False),
    )


def _prepare(settings: list[str], out: Path | None, seed: int | None, json_file: Path | None) -> None:
    if len(settings) != 1 or out is None:
        raise typer.BadParameter("`coterie audit prepare` needs one settings file and --out FOLDER")
    from coterie.audit.model import prepare_audit

    made = prepare_audit(Path(settings[0]), out, seed=seed)
    rows = [("documents trained on by coin", made.members), ("documents held out by coin", made.held_out)]
    rows += [(f"canaries: {kind}", count) for kind, count in made.canaries.items()]
    table(("", "count"), rows)
    say(f"Train it with {made.settings}; keep {out} closed to others, its key says who was held out.")
    if json_file is not None:
        figures = {"settings": str(made.settings), "members": made.members, "held_out": made.held_out}
        write_json(json_file, {**figures, "canaries": made.canaries, "records": made.records})
