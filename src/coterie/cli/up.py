"""`coterie up`: one party takes part in a federation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coterie.cli.output import EXIT_STOPPED, say, table, write_json
from coterie.cli.pairs import named_pairs
from coterie.cli.privacy_lines import opening_lines, revealed_so_far, spent_note, stopped_contributing
from coterie.cli.ranks import joined_party, option, start_party_if_asked
from coterie.cli.roster import fingerprint_line
from coterie.errors import as_argument

if TYPE_CHECKING:
    from coterie.config import PartyConfig
    from coterie.ranks.ranks import Ranks
    from coterie.training.party.run import PartyResult
    from coterie.training.planning.forecast import Forecast


def command(
    settings: Annotated[Path, typer.Argument(help="This party's party.yaml.")],
    listen: Annotated[
        str | None, typer.Option(help="Address to listen on, where it differs from the agreed endpoint.")
    ] = None,
    dial: Annotated[
        list[str] | None,
        typer.Option("--dial", metavar="NAME=HOST:PORT", help="Dial a member there, not at its endpoint; repeat."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Take part in a federation: train the own trunk on the own text, and host a share of the experts.

    Goes on from the newest checkpoint that all parties hold, if there is one. Ctrl-C asks for a clean end: the round
    is finished, everybody writes a checkpoint and leaves.

    With `devices: N` or `experts_over: N` in party.yaml N processes of this machine share the party's lots; one of
    them alone speaks to the others.

    Example:
        coterie up party.yaml --json result.json
    """
    from coterie.config import PartyConfig, load_yaml

    addresses = dialled(dial)
    options = [*option("--listen", listen), *option("--json", json_file)]
    options += [word for each in dial or [] for word in ("--dial", each)]
    start_party_if_asked(config := load_yaml(settings, PartyConfig), ["up", str(settings), *options])
    take_part(config, listen, json_file, addresses)


def dialled(given: list[str] | None) -> dict[str, str]:
    """What `--dial` says, by member."""
    return named_pairs("--dial", given, "--dial alder=127.0.0.1:7001 --dial birch=127.0.0.1:7002")


def take_part(
    config: PartyConfig, listen: str | None, json_file: Path | None, dial: Mapping[str, str] | None = None
) -> None:
    """Run a party, or be one of its ranks, and show how it goes; `coterie resume` ends here, too."""
    with joined_party() as ranks:
        if ranks is None or ranks.rank == 0:
            _speak(config, listen, json_file, dial, ranks)
        else:
            _help(config, ranks)


def _help(config: PartyConfig, ranks: Ranks) -> None:
    """Do another rank's part: nothing is shown, and a stop is asked of rank 0 alone."""
    from transformers.utils.logging import disable_progress_bar

    from coterie.cli.stopping import stop_signals
    from coterie.training.party.process import help_party

    disable_progress_bar()
    with stop_signals(lambda: True, quiet=True):
        help_party(config, ranks)


def _speak(
    config: PartyConfig,
    listen: str | None,
    json_file: Path | None,
    dial: Mapping[str, str] | None,
    ranks: Ranks | None,
) -> None:
    say(f"{config.party}: loading")

    from coterie.cli.output import error_console
    from coterie.cli.rounds_progress import RoundLines, log_file
    from coterie.cli.stopping import stop_signals
    from coterie.errors import CoterieError
    from coterie.federation.rounds.directives import Directive
    from coterie.training.party.process import PartyProcess
    from coterie.training.party.run import Watch

    def show(directive: Directive) -> None:
        state, missing = directive.state, directive.missing
        lines.show(state, missing, spent=shown["spent"], remark=shown["remark"], cut=directive.cut)

    def revealed(privacy: Mapping[str, Any] | None) -> None:
        shown.update(spent=spent_note(privacy), remark=stopped_contributing(privacy))

    def announce(figures: Forecast) -> None:
        for line in figures.lines():
            say(f"{config.party}: {line}")

    def tell(error: CoterieError) -> None:
        error_console().print(f"{config.party}: {error.code}: {error}", markup=False)
        log.error("%s: %s", error.code, error)

    shown = {"spent": "", "remark": ""}
    process = PartyProcess(
        config, Watch(show, tell, revealed, lambda silent_s: lines.silence(silent_s), announce), listen, dial, ranks
    )
    rounds = process.federation.train.rounds
    lines = RoundLines(rounds)
    say(f"{config.party}: joining {process.federation.name}: {rounds} rounds, {process.federation.exchange} exchange")
    for line in (
        fingerprint_line(process.roster),
        *opening_lines(config, process.federation),
        process.certificate_warning(),
    ):
        if line:
            say(f"{config.party}: {line}")
    with log_file(config.run_dir) as log, stop_signals(process.stop), lines:
        result = process.run()
    report(result, json_file)


def report(result: PartyResult, json_file: Path | None) -> None:
    """Print how the run ended for this party."""
    if json_file is not None:
        write_json(json_file, result.as_json())
    if not result.finished:
        say(f"stopped after round {result.rounds}; go on with: coterie resume {as_argument(result.run_dir)}")
        raise typer.Exit(EXIT_STOPPED)
    mib = 1024**2
    sent = sum(counts["sent"] for counts in result.wire.values())
    received = sum(counts["received"] for counts in result.wire.values())
    columns = (
        "rounds",
        "held-out loss",
        "perplexity",
        "model state MiB",
        "peak memory MiB",
        "sent MiB",
        "received MiB",
    )
    state, peak = result.model_state_bytes / mib, result.peak_rss_bytes / mib
    table(columns, [(result.rounds, result.loss, result.perplexity, state, peak, sent / mib, received / mib)])
    if result.privacy is not None:
        say(f"revealed: {revealed_so_far(result.privacy)}")
    if result.statement:
        say(result.statement)
    if result.model:
        say(f"the model that this party ends with: {result.model}")
    say(f"trained parts: trunk and experts in {result.run_dir}/private/checkpoints/round-{result.rounds:08d}")
    say(f"the loss is this party's own and stays here; figures: {result.run_dir}/private/metrics.jsonl")
