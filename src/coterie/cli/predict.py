"""`coterie predict`: classes of texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.output import say, table, write_json


def command(
    run_dir: Annotated[Path, typer.Argument(help="The run_dir of a run with `data.task: label_words`.")],
    data: Annotated[list[Path], typer.Option("--data", help="Files with texts, as those of training.")],
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the class of every text to this file.")
    ] = None,
) -> None:
    """Say which class each text is, by a run that learnt label words.

    Without --json only how many texts are of which class is shown.

    Example:
        coterie predict run --data new.jsonl --json classes.json
    """
    from coterie.training.single.predict import predict
    from coterie.training.single.trained import load_trained

    found = predict(load_trained(run_dir), data)
    rows = found.rows()
    counts = {name: sum(row["class"] == name for row in rows) for name in found.classes}
    table(("class", "texts"), list(counts.items()))
    if json_file is not None:
        write_json(json_file, {"classes": list(found.classes), "texts": rows})
        say(f"classes: {json_file}")
