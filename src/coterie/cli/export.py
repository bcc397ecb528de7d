"""`coterie export`: trunk and shards, or a run, become one Hugging Face checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.output import say, write_json


def command(
    parts: Annotated[
        Path,
        typer.Argument(help="Folder that `coterie split` wrote, or a run folder of `coterie train` or `coterie up`."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="New folder for the checkpoint.")],
    trunk: Annotated[
        Path | None, typer.Option("--trunk", metavar="FILE", help="A trained trunk instead of the split's own.")
    ] = None,
    shard: Annotated[
        list[Path] | None,
        typer.Option(
            "--shard", metavar="FILE", help="Trained shards instead of the split's own; repeat, all parties'."
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            "--tokenizer", metavar="DIR", help="A tokenizer to put beside the weights: RUN_DIR/private/tokenizer."
        ),
    ] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Write the trained LoRA adapters alone, as a folder for peft.")
    ] = False,
    push: Annotated[
        str | None, typer.Option("--push", metavar="OWNER/NAME", help="Upload it to this repository of a model hub.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write file names and sizes here.")
    ] = None,
) -> None:
    """Join a trunk and all parties' shards into a checkpoint that transformers loads.

    All files must be of one run and round, and as they were written; a missing, doubled or misshapen expert is an
    error. Adapters of a run with `lora` are merged into the weights, or written for peft with --adapter. A card
    (README.md) and privacy.json say what was promised about the text behind it; --push refuses a model that read
    private text without a budget, and makes a repository that is not there yet a private one.

    Of a run of `coterie train`, its model; with `lora`, adapters merged, or with --adapter these alone. Of a party's
    run, the model or adapter that it ended with.

    Example:
        coterie export parts --out joined
        coterie export parts --trunk run/trunk.safetensors --shard a.safetensors --shard b.safetensors --out joined
        coterie export parts --trunk run/trunk.safetensors --adapter --out adapter
        coterie export run --out joined --push grove/olmoe-notes
    """
    from coterie.models.split.exporter import export
    from coterie.models.split.pushing import push as upload
    from coterie.training.data.tokenizer import load_tokenizer_from
    from coterie.training.single.prepared import MARKER
    from coterie.training.single.result import export_run

    words = None if tokenizer is None else load_tokenizer_from(tokenizer)
    if (parts / MARKER).is_file():
        if trunk is not None or shard:
            raise typer.BadParameter("--trunk and --shard belong to a split, and this is the folder of a run")
        export_run(parts, out, adapter=adapter)
    else:
        export(parts, out, trunk=trunk, shards=shard or None, adapter=adapter)
    if words is not None:
        words.save_pretrained(str(out))
    files = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    if json_file is not None:
        write_json(json_file, {"folder": str(out), "files": files})
    say(f"wrote {out}: {len(files)} files, {sum(files.values()) / 1e6:.1f} MB")
    if not (adapter or any(name.startswith("tokenizer") for name in files)):
        say(
            "no tokenizer is among them, as the split model had none; "
            "--tokenizer RUN_DIR/private/tokenizer adds that of a run"
        )
    if push is not None:
        say(f"uploaded to {upload(out, push)}")
