"""The demo's run folder: every settings file an ordinary command needs, with paths inside the folder only.

::

    README.txt          how to run any part again by hand
    data/NAME/          train.jsonl and test.jsonl of the public part and each party
    public/             train.yaml and run/ of the public checkpoint (run/model is a Hugging Face folder)
    isolated/PARTY/     train.yaml and run/
    centralised/        train.yaml and run/
    tokens/             federation.yaml, kits/, weights/ (trunks and shards), PARTY/party.yaml and PARTY/run/,
                        coordinator/
    logs/               what each process printed
    results.json, losses.png, report.html
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from coterie.config import (
    Address,
    DataSpec,
    FederationConfig,
    FederationTrainSpec,
    ModelSpec,
    PartyConfig,
    TokenizerSpec,
    TokenizerTraining,
    TrainConfig,
    TrainSpec,
    dump_yaml,
)
from coterie.demonstration.corpus import PUBLIC
from coterie.demonstration.plan import ARMS, Arm, Plan
from coterie.demonstration.processes import Command
from coterie.errors import ConfigError

# The names `coterie split` gives its files (coterie.models.shards imports torch, which this process does without:
# a process that starts others passes its own size on to their peak).
TRUNK = "trunk.safetensors"
SHARD = "experts-{party}.safetensors"
MARKER = "demo.json"
LOCK = ".lock"
MADE = frozenset(
    {MARKER, LOCK, "README.txt", "data", PUBLIC, *ARMS, "logs", "results.json", "losses.png", "report.html"}
)
"""Everything the demo puts at the top of its folder: what an earlier demo may have left, and nothing else."""


def check_folder(folder: Path) -> None:
    """Make sure that the demo may have the folder: it is not there, empty, or an earlier demo's. Writes nothing.

    Raises:
        ConfigError: it holds anything that is not an earlier demo's.
    """
    if folder.exists() and not folder.is_dir():
        raise _taken(folder, "is a file")
    entries = _entries(folder)
    foreign = sorted(entries - MADE) if MARKER in entries else sorted(entries - {LOCK})
    if foreign:
        raise _taken(folder, f"holds `{foreign[0]}`" + (f" and {len(foreign) - 1} more" if foreign[1:] else ""))


def empty_folder(folder: Path) -> bool:
    """Remove what an earlier demo left in a folder that `check_folder` has passed, and mark it as a demo's.

    Returns:
        Whether there was an earlier demo.
    """
    earlier = _entries(folder) - {LOCK}
    for name in earlier:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    (folder / MARKER).write_text(json.dumps({"made by": "coterie demo"}) + "\n", encoding="utf-8")
    return bool(earlier)


def _entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _taken(folder: Path, holds: str) -> ConfigError:
    return ConfigError(
        f"{folder} {holds}, which no earlier demo made.",
        code="demo-folder",
        why="the demo starts from an empty folder, and would have to delete what is there",
        fix="name another folder with --dir, or move that away",
    )


class Folder:
    """Writes the settings files of a demo and names the commands that use them.

    Args:
        root: the folder, which exists. Commands run inside it.
    """

    def __init__(self, root: Path, plan: Plan) -> None:
        self.root = root
        self._plan = plan

    # ---- one process ----

    def public(self) -> Command:
        """Train tokenizer and model on the public part."""
        plan = self._plan
        files = (self._text(Path("public"), PUBLIC, "train"),)
        tokenizer = TokenizerSpec(train=TokenizerTraining(files=files, vocab_size=plan.vocab_size))
        config = TrainConfig(
            model=ModelSpec(family=plan.family, config=plan.model),
            data=self._data(Path("public"), (PUBLIC,), tokenizer),
            optim=plan.public_optim,
            train=TrainSpec(
                rounds=plan.public_rounds,
                batch_size=plan.public_batch,
                micro_batch=plan.public_batch,
                seed=plan.seed,
                eval_every=0,
                checkpoint_every=0,
            ),
            run_dir=Path("run"),
            device="cpu",
        )
        return self._train(Path("public"), config, "public checkpoint")

    def alone(self, arm: Arm, party: str) -> Command:
        """Train the whole model on one party's text."""
        where = Path(arm.name, party)
        return self._train(where, self._from_public(where, (party,)), f"{party} alone")

    def pooled(self, arm: Arm) -> Command:
        """Train the whole model on everybody's text."""
        where = Path(arm.name)
        return self._train(where, self._from_public(where, self._plan.parties), "all text in one place")

    def run_dir(self, arm: Arm, party: str) -> Path:
        """Where an arm's run for a party leaves its figures."""
        if arm.kind == "public":
            return self.root / PUBLIC / "run"
        return self.root / arm.name / ("" if arm.kind == "pooled" else party) / "run"

    def test_file(self, party: str) -> Path:
        return self.root / "data" / party / "test.jsonl"

    # ---- a federation ----

    def federation(self, arm: Arm, endpoints: Iterable[str]) -> FederationConfig:
        """Write federation.yaml and every party.yaml.

        Args:
            endpoints: one per party, then the coordinator's.
        """
        plan, where = self._plan, Path(arm.name)
        *addresses, coordinator = [Address(endpoint=endpoint) for endpoint in endpoints]
        assert arm.exchange is not None
        config = FederationConfig(
            name="demo",
            model=ModelSpec(path=self._up(where) / PUBLIC / "run" / "model", provenance="public"),
            parties=dict(zip(plan.parties, addresses, strict=True)),
            coordinator=coordinator,
            optim=plan.optim,
            train=FederationTrainSpec(**self._length(plan.batch, plan.micro_batch).model_dump(), in_flight=2),
            exchange=arm.exchange,
            join_deadline_s=120.0,
            max_attempts=2,
        )
        self._write(where / "federation.yaml", config)
        for party in plan.parties:
            own = where / party
            spec = PartyConfig(
                party=party,
                federation=Path("../federation.yaml"),
                kit=Path("../kits") / party,
                data=self._data(own, (party,), TokenizerSpec()),
                trunk=Path("../weights") / TRUNK,
                shard=Path("../weights") / SHARD.format(party=party),
                run_dir=Path("run"),
                device="cpu",
            )
            self._write(own / "party.yaml", spec)
        return config

    def split(self, arm: Arm) -> Command:
        """Cut the public checkpoint into a trunk and shards."""
        arguments = ("split", "--federation", f"{arm.name}/federation.yaml", "--out", f"{arm.name}/weights")
        return self._command("split", *arguments)

    def provision(self, arm: Arm) -> Command:
        """Make keys, certificates and the signed roster."""
        return self._command("provision", "provision", f"{arm.name}/federation.yaml", "--out", f"{arm.name}/kits")

    def coordinator(self, arm: Arm) -> Command:
        where = arm.name
        arguments = ("--kit", f"{where}/kits/coordinator", "--run-dir", f"{where}/coordinator")
        return self._command("coordinator", "coordinator", f"{where}/federation.yaml", *arguments)

    def up(self, arm: Arm, party: str) -> Command:
        return self._command(party, "up", f"{arm.name}/{party}/party.yaml")

    # ----

    def _from_public(self, where: Path, parties: tuple[str, ...]) -> TrainConfig:
        return TrainConfig(
            model=ModelSpec(path=self._up(where) / PUBLIC / "run" / "model", provenance="public"),
            data=self._data(where, parties, TokenizerSpec()),
            optim=self._plan.optim,
            train=self._length(self._plan.batch * len(parties), 2 * self._plan.micro_batch),
            run_dir=Path("run"),
            device="cpu",
        )

    def _length(self, batch: int, micro_batch: int) -> TrainSpec:
        """How much is trained; the size of a micro-batch changes the speed only."""
        plan = self._plan
        return TrainSpec(
            rounds=plan.rounds,
            batch_size=batch,
            micro_batch=micro_batch,
            seed=plan.seed,
            eval_every=plan.eval_every,
            checkpoint_every=max(1, plan.rounds // 2),
        )

    def _data(self, where: Path, names: tuple[str, ...], tokenizer: TokenizerSpec) -> DataSpec:
        return DataSpec(
            train=tuple(self._text(where, name, "train") for name in names),
            test=tuple(self._text(where, name, "test") for name in names),
            sequence_length=self._plan.sequence_length,
            tokenizer=tokenizer,
        )

    def _text(self, where: Path, name: str, side: str) -> Path:
        return self._up(where) / "data" / name / f"{side}.jsonl"

    def _up(self, where: Path) -> Path:
        """From a folder inside the root back to the root: settings files name paths from where they are."""
        return Path(*[".."] * len(where.parts))

    def _train(self, where: Path, config: TrainConfig, name: str) -> Command:
        self._write(where / "train.yaml", config)
        log = "-".join(where.parts)
        return self._command(name, "train", f"{where}/train.yaml", log=log)

    def _command(self, name: str, *arguments: str, log: str | None = None) -> Command:
        return Command(name, arguments, self.root / "logs" / f"{log or name}.log")

    def _write(self, path: Path, config: TrainConfig | FederationConfig | PartyConfig) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        dump_yaml(self.root / path, config)
