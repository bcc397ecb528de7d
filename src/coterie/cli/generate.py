"""`coterie generate`: continue a prompt, or answer it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def command(
    run_dir: Annotated[
        Path, typer.Argument(help="The run_dir of a trained run or of a party, or an exported checkpoint.")
    ],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a user's turn, and the model answers it.")
    ] = False,
    template: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --chat: a Jinja chat template, in place of the tokenizer's own."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Most new tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.8,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    live: Annotated[
        bool, typer.Option("--live", help="Through this party's finished federation, with its hosts' experts.")
    ] = False,
    listen: Annotated[
        str | None, typer.Option(help="With --live: address to listen on, where it differs from the agreed endpoint.")
    ] = None,
) -> None:
    """Continue a prompt, or answer it with --chat.

    With --live experts stay with their hosts: the coordinator runs with --questions, the other parties with `coterie
    resume`. In `experts` no text leaves; in `tokens` the hosts can read the prompt and what follows.

    A model can repeat private text it was trained on, unless it was trained with a privacy budget.

    Example:
        coterie generate runs/first --prompt "The patient" --tokens 40
        coterie generate exported --chat --prompt "What helps against a cough?"
        coterie generate run --live --prompt "The patient"
    """
    from coterie.training.data.chat import answer_end, as_turn, read_template
    from coterie.training.single.generate import generate
    from coterie.training.single.trained import model_of, tokenizer_of

    tokenizer = tokenizer_of(run_dir)
    asked, ends = prompt, None
    if chat:
        chosen = read_template(template)
        asked, ends = as_turn(prompt, tokenizer, chosen), answer_end(tokenizer, chosen)

    def show(piece: str) -> None:
        typer.echo(piece, nl=False)

    def answer(model: PreTrainedModel) -> None:
        if not chat:
            show(prompt)
        generate(
            model,
            tokenizer,
            asked,
            tokens=tokens,
            temperature=temperature,
            seed=seed,
            written=chat,
            ends=() if ends is None else (ends,),
            show=show,
        )
        show("\n")

    if live:
        from coterie.cli.live import through_federation

        through_federation(run_dir, (prompt,), answer, listen)
    else:
        answer(model_of(run_dir))
