"""`coterie generate`: continue a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    run_dir: Annotated[Path, typer.Argument(help="The run_dir of a trained run.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    tokens: Annotated[int, typer.Option(min=1, help="Most new tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.8,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
) -> None:
    """Continue a prompt with the model of a run.

    A model can repeat private text it was trained on, unless it was trained with a privacy budget.

    Example:
        coterie generate runs/first --prompt "The patient" --tokens 40
    """
    from coterie.training.single.generate import generate
    from coterie.training.single.trained import load_trained

    trained = load_trained(run_dir)

    def show(piece: str) -> None:
        typer.echo(piece, nl=False)

    show(prompt)
    generate(trained.model, trained.tokenizer, prompt, tokens=tokens, temperature=temperature, seed=seed, show=show)
    show("\n")
