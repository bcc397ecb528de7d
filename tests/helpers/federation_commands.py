"""One federation folder for tests of commands, and the commands called in this process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from coterie.cli.app import main
from coterie.federation.identity.provision import free_endpoints

PARTIES = ("alder", "birch")


MODEL = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_experts": 4,
    "num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 0,
}  # fmt: skip


def run(*arguments: object) -> int:
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation of two with everything in place."""
    folder = tmp_path_factory.mktemp("grove")
    endpoints = free_endpoints(3)
    federation = {
        "name": "grove",
        "model": {"family": "olmoe", "config": MODEL},
        "parties": {name: {"endpoint": endpoint} for name, endpoint in zip(PARTIES, endpoints, strict=False)},
        "coordinator": {"endpoint": endpoints[2]},
        "exchange": "tokens",
        "train": {"rounds": 2, "batch_size": 2, "micro_batch": 2},
        "deadline_s": 4.0,
        "join_deadline_s": 1.0,
    }
    (folder / "federation.yaml").write_text(yaml.safe_dump(federation))
    (folder / "public.txt").write_text("leaf and root, wind and rain\n" * 40)
    (folder / "own.txt").write_text("the river and the stone\n" * 40)
    for name in PARTIES:
        tokenizer = {"train": {"files": ["public.txt"], "vocab_size": 290}}
        party = {
            "party": name,
            "federation": "federation.yaml",
            "kit": f"kits/{name}",
            "data": {"train": "own.txt", "sequence_length": 16, "tokenizer": tokenizer},
            "trunk": "split/trunk.safetensors",
            "shard": f"split/experts-{name}.safetensors",
            "run_dir": f"runs/{name}",
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(party))
    assert run("split", "--federation", folder / "federation.yaml", "--out", folder / "split") == 0
    weights = ("--weights", folder / "split")
    assert run("provision", folder / "federation.yaml", *weights, "--out", folder / "kits") == 0
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(made, tmp_path / "grove"))


def edit(path: Path, **changes: object) -> Path:
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))
    return path


def with_a_budget(folder: Path, **changes: object) -> None:
    """Let the parties of a folder train privately in `experts`; alder has short records, and says what is given."""
    rows = [{"text": f"{word} and the {other}"} for word in ("river", "stone", "wind") for other in ("leaf", "root")]
    (folder / "notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    edit(
        folder / "federation.yaml", exchange="experts", trunk="shared",
        privacy={"epsilon": 8.0, "delta": 1e-3, "lot_size": 4, "isolation": "fast"},
    )  # fmt: skip
    text = {"train": "notes.jsonl", "packing": "records"}
    data = yaml.safe_load((folder / "alder.yaml").read_text())["data"] | text
    own = {"ledger": "ledger", "physical_batch": 2, "seeded": True}
    edit(folder / "alder.yaml", data=data, privacy=own, **changes)
