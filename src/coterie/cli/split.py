"""`coterie split`: a checkpoint becomes a trunk and one shard of experts per party."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coterie.cli.output import say, table, write_json
from coterie.errors import PlacementError

if TYPE_CHECKING:
    from coterie.config import ModelSpec
    from coterie.models.preconditioner import Preconditioner


def command(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="New folder for the parts.")],
    checkpoint: Annotated[
        Path | None, typer.Argument(help="Folder of a Hugging Face checkpoint; default: the federation's model.")
    ] = None,
    federation: Annotated[
        Path | None, typer.Option("--federation", metavar="FILE", help="federation.yaml: parties, placement, dtype.")
    ] = None,
    party: Annotated[
        list[str] | None, typer.Option("--party", metavar="NAME", help="Without a federation: repeat for each party.")
    ] = None,
    placement: Annotated[
        Path | None,
        typer.Option(
            "--placement", metavar="FILE", help="YAML or JSON, {party: {layer: [experts]}}; default: in turn."
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32 or bfloat16; default: the federation's, else float32.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the manifest here, too.")
    ] = None,
) -> None:
    """Turn a checkpoint into a trunk file and one shard of experts per party.

    Reads and writes one decoder layer at a time, so the model need not fit in memory. Give every party the trunk,
    the `model` folder, its own shard, and manifest.json with the SHA-256 of each file. With the federation's
    `privacy.preconditioner` the parts are in its coordinates; `coterie export` joins them to an ordinary checkpoint.

    Example:
        coterie split ./olmoe --federation federation.yaml --out parts
        coterie split ./olmoe --party alder --party birch --out parts
    """
    spec, parties, layout, seed = _plan(checkpoint, federation, party or [], dtype)
    if placement is not None:
        layout = _read_placement(placement)
        parties = parties or list(layout)
    if not parties:
        raise typer.BadParameter("give --federation, --placement, or --party at least once")

    from coterie.models.seam import expert_layers
    from coterie.models.split.placement import Placement
    from coterie.models.split.splitter import split
    from coterie.models.zoo.build import build_model

    counts = [layer.num_experts for layer in expert_layers(build_model(spec, meta=True))]
    if placement is not None:
        placed = Placement.of_hosted(layout, parties, counts)
    elif isinstance(layout, str):
        placed = Placement.round_robin(parties, counts)
    else:
        placed = Placement.of_table(layout, parties, counts)
    manifest = split(spec, placed, out, seed=seed, preconditioner=_agreed(federation))
    if json_file is not None:
        write_json(json_file, manifest)
    rows = [
        [name, f"{entry['bytes'] / 1e6:.1f} MB", entry["sha256"][:16]]
        for name, entry in manifest["files"].items()
        if name.endswith(".safetensors")
    ]
    table(["file", "size", "sha256"], rows, title=f"{manifest['model_class']} in {out}")
    say(f"Give each party the trunk, the folder {out / 'model'}, manifest.json and its own shard.")


def _plan(
    checkpoint: Path | None, federation: Path | None, parties: list[str], dtype: str | None
) -> tuple[ModelSpec, list[str], Any, int | None]:
    """(model, parties, placement setting, seed of random weights) from the command line and federation.yaml."""
    from coterie.config import FederationConfig, ModelSpec, load_yaml

    if federation is not None:
        config = load_yaml(federation, FederationConfig)
        spec, seed = config.model, config.train.seed
        parties, layout = list(config.parties), config.placement
    elif checkpoint is not None:
        spec, seed, layout = ModelSpec(path=checkpoint), None, "round_robin"
    else:
        raise typer.BadParameter("give a checkpoint folder, or --federation with a model")
    if checkpoint is not None:
        spec = ModelSpec(path=checkpoint, config=spec.config if spec.family is None else {}, dtype=spec.dtype)
    if dtype is not None:
        if dtype not in ("float32", "bfloat16"):
            raise typer.BadParameter(f"--dtype {dtype}: use float32 or bfloat16")
        spec = spec.model_copy(update={"dtype": dtype})
    return spec, parties, layout, seed


def _agreed(federation: Path | None) -> Preconditioner | None:
    """The preconditioner that a federation agreed on."""
    from coterie.config import FederationConfig, load_yaml
    from coterie.models.preconditioner import Preconditioner

    spec = None if federation is None else load_yaml(federation, FederationConfig).preconditioner
    return None if spec is None else Preconditioner.load(spec.path)


def _read_placement(path: Path) -> dict[str, dict[int, list[int]]]:
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        return {
            str(party): {int(layer): [int(expert) for expert in experts] for layer, experts in layers.items()}
            for party, layers in data.items()
        }
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise PlacementError(
            f"{path} is not a placement file: {str(error).splitlines()[0]}",
            code="placement-format",
            fix="write {party: {layer: [experts]}}, for example `alder: {0: [0, 1], 1: [2, 3]}`",
        ) from error
