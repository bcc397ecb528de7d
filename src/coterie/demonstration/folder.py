"""The demo's run folder: every settings file an ordinary command needs, with paths inside the folder only.

::

    README.txt          how to run any part again by hand
    data/NAME/          train.jsonl and test.jsonl of the public part and each party
    public/             train.yaml and run/ of the public checkpoint (run/model is a Hugging Face folder)
    isolated/PARTY/     train.yaml and run/; isolated_dp/ likewise
    centralised/        train.yaml and run/; centralised_dp/ likewise
    weights/            the public checkpoint as a trunk and a shard for each party
    tokens/             federation.yaml, kits/, PARTY/party.yaml and PARTY/run/, coordinator/; experts/, experts_dp/
                        and experts_dp_shared/ likewise
    ledger/             what the private arms spent, by dataset
    logs/               what each process printed
    results.json, losses.png, report.html, audit.html
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from coterie.config import (
    DataSpec,
    FederationConfig,
    FederationTrainSpec,
    MemberAddress,
    ModelSpec,
    OptimSpec,
    PartyConfig,
    PartyPrivacy,
    PrivacyRules,
    PrivacySpec,
    TokenizerSpec,
    TokenizerTraining,
    TrainConfig,
    TrainSpec,
    TranscriptSpec,
    dump_yaml,
)
from coterie.demonstration.commands import Command
from coterie.demonstration.corpus import PUBLIC
from coterie.demonstration.plan import ARMS, Arm, DemoPlan
from coterie.errors import ConfigError

# The names `coterie split` gives its files (coterie.models.split.shards imports torch, which this process does
# without: a process that starts others passes its own size on to their peak).
TRUNK = "trunk.safetensors"
SHARD = "experts-{party}.safetensors"
MARKER = "demo.json"
_COUNTED, _NOISE = "records.json", "plan.json"
LOCK = ".lock"
LEDGER = "ledger"
WEIGHTS = "weights"
MADE = frozenset(
    {
        MARKER,
        LOCK,
        "README.txt",
        "data",
        PUBLIC,
        *ARMS,
        LEDGER,
        WEIGHTS,
        "logs",
        "results.json",
        "losses.png",
        "report.html",
        "audit.html",
    }
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

    def __init__(self, root: Path, plan: DemoPlan) -> None:
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
        return self._train(where, self._from_public(arm, where, (party,)), f"{party} alone")

    def pooled(self, arm: Arm) -> Command:
        """Train the whole model on everybody's text."""
        where = Path(arm.name)
        return self._train(where, self._from_public(arm, where, self._plan.parties), "all text in one place")

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
            arm: its exchange and privacy.
            endpoints: one per party, then the coordinator's.
        """
        plan, where = self._plan, Path(arm.name)
        *addresses, coordinator = [MemberAddress(endpoint=endpoint) for endpoint in endpoints]
        assert arm.exchange is not None
        config = FederationConfig(
            name="demo",
            model=ModelSpec(path=self._up(where) / PUBLIC / "run" / "model", provenance="public"),
            parties=dict(zip(plan.parties, addresses, strict=True)),
            coordinator=coordinator,
            optim=self._optim(arm),
            train=FederationTrainSpec(**self._length(arm, plan.parties[:1]).model_dump(), in_flight=2),
            exchange=arm.exchange,
            privacy=self._rules(arm),
            lot_sizes={party: plan.lot_of(party) for party in plan.parties} if arm.private else None,
            trunk="shared" if arm.exchange == "experts" else "private",
            join_deadline_s=120.0,
            max_attempts=2,
            **self._aggregation(arm),
        )
        self._write(where / "federation.yaml", config)
        for party in plan.parties:
            own = where / party
            spec = PartyConfig(
                party=party,
                federation=Path("../federation.yaml"),
                kit=Path("../kits") / party,
                data=self._data(own, (party,), TokenizerSpec(), arm),
                trunk=self._up(own) / WEIGHTS / TRUNK,
                shard=self._up(own) / WEIGHTS / SHARD.format(party=party),
                run_dir=Path("run"),
                device="cpu",
                privacy=PartyPrivacy(**self._local(own)) if arm.private else None,
            )
            self._write(own / "party.yaml", spec)
        return config

    def split(self, arm: Arm) -> Command:
        """Cut the public checkpoint into a trunk and shards, which all federations start from."""
        return self._command("split", "split", "--federation", f"{arm.name}/federation.yaml", "--out", WEIGHTS)

    def count(self, party: str) -> Command:
        """Count the records that a party has for private training; writes settings that say no lot yet."""
        where = Path("isolated_dp", party)
        settings = self.alone(ARMS["isolated_dp"], party).arguments[-1]
        arguments = ("data", "check", settings, "--show", "0", "--json", f"{where}/{_COUNTED}")
        return self._command(f"{party}'s records", *arguments, log=f"{party}-records")

    def counted(self, party: str) -> int:
        """What `count` found."""
        found = json.loads((self.root / "isolated_dp" / party / _COUNTED).read_text("utf-8"))
        return int(found["records"])

    def noise(self, arm: Arm) -> Command:
        """Find the noise multiplier that all parties add alike, from their public numbers of records."""
        records = [word for party, count in self._plan.units.items() for word in ("--records", f"{party}={count}")]
        arguments = ("plan", f"{arm.name}/federation.yaml", *records, "--json", f"{arm.name}/{_NOISE}")
        return self._command("plan", *arguments, log=f"{arm.name}-plan")

    def noise_multiplier(self, arm: Arm) -> float:
        """What `noise` found."""
        found = json.loads((self.root / arm.name / _NOISE).read_text("utf-8"))
        return float(found["equal_rates"]["noise_multiplier"])

    def provision(self, arm: Arm) -> Command:
        """Make keys, certificates and the signed roster."""
        weights = ("--weights", WEIGHTS)
        arguments = ("provision", f"{arm.name}/federation.yaml", *weights, "--out", f"{arm.name}/kits")
        return self._command("provision", *arguments, log=f"{arm.name}-provision")

    def coordinator(self, arm: Arm) -> Command:
        where = arm.name
        arguments = ("--kit", f"{where}/kits/coordinator", "--run-dir", f"{where}/coordinator")
        log = f"{arm.name}-coordinator"
        return self._command("coordinator", "coordinator", f"{where}/federation.yaml", *arguments, log=log)

    def up(self, arm: Arm, party: str) -> Command:
        return self._command(party, "up", f"{arm.name}/{party}/party.yaml", log=f"{arm.name}-{party}")

    # ----

    def _from_public(self, arm: Arm, where: Path, parties: tuple[str, ...]) -> TrainConfig:
        train, rules = self._length(arm, parties), self._rules(arm)
        privacy = None
        if isinstance(rules, PrivacyRules):
            privacy = PrivacySpec(**{**rules.model_dump(), "lot_size": train.batch_size}, **self._local(where))
        return TrainConfig(
            model=ModelSpec(path=self._up(where) / PUBLIC / "run" / "model", provenance="public"),
            data=self._data(where, parties, TokenizerSpec(), arm),
            optim=self._optim(arm),
            train=train,
            privacy=privacy,
            run_dir=Path("run"),
            device="cpu",
        )

    def _optim(self, arm: Arm) -> OptimSpec:
        return self._plan.private.optim if arm.private else self._plan.optim

    def _rules(self, arm: Arm) -> PrivacyRules | Literal["none"] | None:
        """What all parties of a federation agree on; of a single run without privacy, nothing."""
        if not arm.private:
            return "none" if arm.exchange == "experts" else None
        private = self._plan.private
        return PrivacyRules(epsilon=private.epsilon, delta=private.delta, clip_norm=private.clip_norm)

    def _local(self, where: Path) -> dict[str, Any]:
        """One ledger for the whole demo: it adds up what all arms spend on the same text."""
        return {"physical_batch": self._plan.private.physical_batch, "ledger": self._up(where) / LEDGER}

    def _aggregation(self, arm: Arm) -> dict[str, Any]:
        """How pushes are added up."""
        plan = self._plan
        if not arm.shared_noise:
            return {"transcript": TranscriptSpec(rounds="all" if arm.private else plan.recorded)}
        if plan.noise_multiplier is None:
            return {}  # what `coterie plan` reads to find it
        noise = {"noise": "shared", "colluding": plan.colluding, "noise_multiplier": plan.noise_multiplier}
        return {"aggregation": "masked", "transcript": TranscriptSpec(rounds=plan.recorded), **noise}

    def _length(self, arm: Arm, parties: Sequence[str]) -> TrainSpec:
        """How much is trained; the size of a micro-batch changes the speed only.

        Args:
            arm: which way of training.
            parties: whose sequences one process takes in a round.
        """
        plan = self._plan
        rounds = plan.rounds_of(arm)
        return TrainSpec(
            rounds=rounds,
            batch_size=sum(plan.lot_of(party) if arm.private else plan.batch for party in parties),
            micro_batch=self._at_once(arm),
            seed=plan.seed,
            eval_every=plan.private.eval_every if arm.private else plan.eval_every,
            checkpoint_every=max(1, rounds // 2),
        )

    def _at_once(self, arm: Arm) -> int:
        """Sequences of a micro-batch; a private run computes by its physical batch, and evaluates so many at once."""
        if arm.private:
            return self._plan.private.physical_batch
        return self._plan.micro_batch * (1 if arm.kind == "federation" else 2)

    def _data(
        self, where: Path, names: tuple[str, ...], tokenizer: TokenizerSpec, arm: Arm | None = None
    ) -> DataSpec:
        side = "all" if arm is not None and arm.private else "train"
        return DataSpec(
            train=tuple(self._text(where, name, side) for name in names),
            test=tuple(self._text(where, name, "test") for name in names),
            sequence_length=self._plan.sequence_length,
            tokenizer=tokenizer,
            provenance="public" if names == (PUBLIC,) else "private",
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
