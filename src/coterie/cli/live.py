"""`--live` of `coterie eval` and `coterie generate`: the model of a finished federation, experts with their hosts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from coterie.cli.output import error_console, say

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def through_federation(
    run_dir: Path, texts: tuple[str, ...], ask: Callable[[PreTrainedModel], None], listen: str | None
) -> None:
    """Join the finished federation of a party's run, ask, and leave when all who ask have their answers.

    Args:
        run_dir: of the party.
        texts: everything the model will read.
        ask: see `coterie.training.party.questions.Questions`.
        listen: address to listen on, where it differs from the agreed endpoint.

    Raises:
        CoterieError: nothing may be asked, or the federation was not taken up for questions.
    """
    from coterie.cli.rounds_progress import RoundLines, log_file
    from coterie.cli.stopping import stop_signals
    from coterie.errors import CoterieError
    from coterie.training.party.process import PartyProcess, settings_of_run
    from coterie.training.party.questions import Questions, check_questions, unasked
    from coterie.training.party.run import Watch
    from coterie.training.planning import exposure

    # One process asks, however many share the party's lots in training.
    config = settings_of_run(run_dir).model_copy(update={"devices": 1, "experts_over": 1})
    answered = False

    def asked(model: PreTrainedModel) -> None:
        nonlocal answered
        ask(model)
        answered = True

    def tell(error: CoterieError) -> None:
        error_console().print(f"{config.party}: {error.code}: {error}", markup=False)

    lines = RoundLines(0)
    watch = Watch(
        lambda directive: lines.show(directive.state, directive.missing, cut=directive.cut),
        tell,
        silent=lambda silent_s: lines.silence(silent_s),
    )
    process = PartyProcess(config, watch, listen, questions=Questions(texts, asked))
    check_questions(config, process.federation, texts)
    for line in exposure.of_questions(process.federation):
        say(f"{config.party}: {line}")
    with log_file(run_dir), stop_signals(process.stop), lines:
        process.run()
    if not answered:
        raise unasked(process.federation)
