"""The party.yaml that `coterie invite` and `coterie join` can write."""

from __future__ import annotations

from pathlib import Path

from coterie.cli.output import say

PARTY_FILE = Path("party.yaml")


def check_named(train: list[Path] | None, test: Path | None) -> None:
    """Text that party.yaml would name is there, before anybody is asked for anything.

    Raises:
        DataError: a file is not.
    """
    from coterie.errors import DataError

    for option, path in [*(("--train", path) for path in train or ()), *([("--test", test)] if test else [])]:
        if not path.exists():
            raise DataError(
                f"There is no data file {path}.",
                code="data-no-file",
                where=option,
                fix="check the path, or leave it out",
            )


def offer_settings(
    party: str, federation: Path, kit: Path, parts: Path, train: list[Path], test: Path | None
) -> None:
    """Write party.yaml into this folder, where text was named and there is none yet; otherwise show what it needs."""
    import yaml

    from coterie.models.split.shards import TRUNK_FILE, shard_file
    from coterie.storage import write_whole

    parts = parts.relative_to(Path.cwd()) if parts.is_relative_to(Path.cwd()) else parts
    settings = {
        "party": party,
        "federation": str(federation),
        "kit": str(kit),
        "trunk": str(parts / TRUNK_FILE),
        "shard": str(parts / shard_file(party)),
        "data": {
            "train": [str(file) for file in train] or ["YOUR-TEXT.jsonl"],
            **({"test": str(test)} if test else {}),
        },
        "run_dir": "run",
    }
    text = yaml.safe_dump(settings, sort_keys=False)
    if PARTY_FILE.exists():
        say(f"{PARTY_FILE} is there already and was left as it is")
    elif train:
        write_whole(PARTY_FILE, text.encode())
        say(f"wrote {PARTY_FILE}")
    else:
        say(f"write your {PARTY_FILE}, for example:\n{text.rstrip()}")
