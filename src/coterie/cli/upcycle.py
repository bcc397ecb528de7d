"""`coterie upcycle`: a dense checkpoint becomes an MoE one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.output import say, table, write_json


def command(
    dense: Annotated[str, typer.Argument(help="Folder (or hub name) of a Llama, Qwen2, Qwen3 or BERT checkpoint.")],
    out: Annotated[Path, typer.Option("--out", help="New folder for the MoE checkpoint.")],
    experts: Annotated[int, typer.Option("--experts", help="Copies of each feed-forward layer.")] = 8,
    top_k: Annotated[int, typer.Option("--top-k", help="Experts that each token uses.")] = 2,
    noise: Annotated[float, typer.Option("--noise", help="Noise on each copy, relative to its weights.")] = 0.0,
    normalise: Annotated[bool, typer.Option("--normalise/--no-normalise", help="Routing weights sum to one.")] = True,
    seed: Annotated[int, typer.Option("--seed", help="Of router and noise.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Turn a dense checkpoint into a Mixture-of-Experts one, which saves, loads and trains like any other.

    With no noise and normalised routing weights its output is that of the dense model. Its provenance is the dense
    checkpoint's: what that was made from, this was made from.

    Example:
        coterie upcycle checkpoints/llama --experts 8 --top-k 2 --out checkpoints/llama-moe
    """
    from transformers.utils.logging import disable_progress_bar

    from coterie.models.zoo.upcycle import upcycle_checkpoint

    disable_progress_bar()
    model = upcycle_checkpoint(dense, out, experts, top_k, noise, normalise=normalise, seed=seed)
    total = sum(parameter.numel() for parameter in model.parameters())
    figures = {"type": model.config.model_type, "class": type(model).__name__, "experts": experts, "top_k": top_k}
    if json_file is not None:
        write_json(json_file, {**figures, "parameters": total, "out": str(out)})
    table(("type", "class", "experts", "per token", "parameters"), [(*figures.values(), f"{total:,}")])
    say(f"written to {out}")
