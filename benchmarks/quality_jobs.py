"""What `quality.py` compares, as a list of jobs, and how one job is run: by the project's own code, in one process.

A job is one training of one arm. Single runs go through `coterie.training.single.run`, as `coterie train` does;
federations through `coterie.training.party.in_process`: the same coordinator, rounds, exchange, private sums and
checkpoints as over the network, parties as threads. Rounds, lots, learning rates and the model are the demo's, which
were tuned on other text; nothing was tuned on these sets.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from coterie.config import (
    DataSpec,
    FederationConfig,
    FederationTrainSpec,
    MemberAddress,
    ModelSpec,
    PartyConfig,
    PartyPrivacy,
    PrivacyRules,
    PrivacySpec,
    TokenizerSpec,
    TokenizerTraining,
    TrainConfig,
    TrainSpec,
)
from coterie.demonstration.plan import DemoPlan
from coterie.models.seam import expert_layers
from coterie.models.split.placement import Placement
from coterie.models.split.shards import TRUNK_FILE, shard_file
from coterie.models.split.splitter import split
from coterie.models.zoo.build import build_model
from coterie.training.data.documents import read_documents
from coterie.training.data.tokenizer import get_tokenizer, tokenize
from coterie.training.evaluate import Evaluation
from coterie.training.folders import private_folder
from coterie.training.metrics import read_metrics
from coterie.training.party.in_process import InProcessFederation
from coterie.training.party.process import prepare_party
from coterie.training.single import run
from coterie.training.single.stepper import Step
from quality_text import DOMAINS, dealt, held_out, public_text, read_domains, shares, write_texts

ARMS = ("public", "isolated", "tokens", "experts_own_trunks", "experts", "centralised")
Split = Literal["domains", "unequal", "iid", "scarce"]
_WAIT_S = 6 * 3600.0
_ISOLATION: Literal["fast"] = "fast"
"""A federation's default computes records alone, against members who serve weights of their choice: the same sums up
to rounding, in four times the time. Here all text is public and nobody attacks."""


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        arm: one of `ARMS`; ``public`` makes the checkpoint that all other jobs of its seed start from.
            ``experts_own_trunks`` exchanges as ``experts`` and keeps trunks private as ``tokens`` does: what lies
            between it and either is due to the trunk or to the exchange.
        parties: the first so many of `DOMAINS`.
        seed: of starting weights and the order of text; noise and lots of private jobs are secret and drawn anew.
        epsilon: None without privacy.
        split: ``domains``: each party has one set, as much as every other. ``unequal``: each further party has 0.6
            times as much. ``iid``: the text of ``domains``, dealt out evenly. ``scarce``: each party has one set, and
            little of it.
        party: whose text, of an isolated job.
    """

    arm: str
    parties: int
    seed: int
    epsilon: float | None = None
    split: Split = "domains"
    party: str = ""

    @property
    def key(self) -> str:
        private = "" if self.epsilon is None else f"-eps{self.epsilon:g}"
        what = self.party or str(self.parties)
        return f"{self.arm}{private}-{what}-{self.split}-seed{self.seed}"

    @property
    def names(self) -> tuple[str, ...]:
        return (self.party,) if self.party else DOMAINS[: self.parties]


@dataclass(frozen=True)
class Sizes:
    """How much of everything.

    Attributes:
        text: characters that each party may train on. scarce: those of a party that has little.
        held_out: characters of each domain that models are measured on.
        public: characters that the public checkpoint learns from.
        counts: numbers of parties.
        repeated: those of them that run with every seed.
        seeds: the first is that of everything else.
        epsilons: budgets of the private arms, at ``delta``.
    """

    plan: DemoPlan
    text: int = 240_000
    held_out: int = 30_000
    public: int = 900_000
    counts: tuple[int, ...] = (7, 3, 2, 5, 4, 6)
    repeated: tuple[int, ...] = (7, 3)
    seeds: tuple[int, ...] = (0, 1, 2)
    epsilons: tuple[float, ...] = (8.0, 3.0)
    delta: float = 1e-5
    scarce: int = 8_000

    def as_json(self) -> dict[str, Any]:
        """What the report says of the comparison."""
        plan, private = self.plan, self.plan.private
        figures = {name: value for name, value in vars(self).items() if name != "plan"}
        return {
            **figures,
            "family": plan.family,
            "model": plan.model,
            "vocabulary": plan.vocab_size,
            "sequence_length": plan.sequence_length,
            "rounds": plan.rounds,
            "batch": plan.batch,
            "public_rounds": plan.public_rounds,
            "private_rounds": private.rounds,
            "lot_size": private.lot_size,
        }


def jobs_of(sizes: Sizes) -> list[Job]:
    """Everything, what says most first. One party is the isolated job: nobody is there to exchange with."""
    budgets = (None, *sizes.epsilons)
    found: list[Job] = []
    for seed in sizes.seeds:
        found.append(Job("public", 0, seed))
        for epsilon in budgets:
            found += [Job("isolated", 1, seed, epsilon, party=name) for name in DOMAINS]
            for count in sizes.repeated:
                found += _together(count, seed, epsilon)
    first = sizes.seeds[0]
    for count in (count for count in sizes.counts if count not in sizes.repeated):
        for epsilon in budgets:
            found += _together(count, first, epsilon)
    found += [Job("experts_own_trunks", count, first) for count in sizes.repeated]
    most = max(sizes.counts)
    others: list[tuple[Split, float | None]] = [("unequal", None), ("scarce", None), ("iid", None)]
    others += [("iid", epsilon) for epsilon in sizes.epsilons[:1]]
    for split_name, epsilon in others:
        found += [Job("isolated", 1, first, epsilon, split_name, name) for name in DOMAINS[:most]]
        found += [job for job in _together(most, first, epsilon, split_name) if split_name != "iid" or _moves(job)]
    found.append(Job("experts_own_trunks", most, first, split="iid"))
    return found


def _together(count: int, seed: int, epsilon: float | None, split_name: Split = "domains") -> list[Job]:
    arms = ("tokens", "experts", "centralised") if epsilon is None else ("experts", "centralised")
    return [Job(arm, count, seed, epsilon, split_name) for arm in arms]


def asked_job(sizes: Sizes) -> Job:
    """The training whose model answers the commonsense questions: most text, nothing spared for privacy."""
    return Job("centralised", max(sizes.counts), sizes.seeds[0])


def kept_model(folder: Path) -> Path:
    """Where the model of `asked_job` lies."""
    return folder / "trained"


def keep_model(run_dir: Path, folder: Path) -> None:
    """Move a run's model out of a folder that goes when its job is done."""
    shutil.rmtree(kept_model(folder), ignore_errors=True)
    shutil.move(run_dir / "model", kept_model(folder))


def public_run(folder: Path, seed: int) -> Path:
    """The run that made the checkpoint that a seed's other jobs start from."""
    return folder / f"public-{seed}"


def _moves(job: Job) -> bool:
    """Whether dealing the text out otherwise makes another training: in one place it does not."""
    return job.arm != "centralised"


def prepare(folder: Path, data: Path, sizes: Sizes) -> None:
    """Write every party's text, the held-out text, and what is public, once."""
    texts = folder / "text"
    if (texts / "done").is_file():
        return
    domains = read_domains(data)
    write_texts(texts / "public.jsonl", public_text(data, sizes.public))
    unequal = {name: int(sizes.text * 0.6**number) for number, name in enumerate(DOMAINS)}
    held = {
        "domains": shares(domains, dict.fromkeys(DOMAINS, sizes.text)),
        "unequal": shares(domains, unequal),
        "scarce": shares(domains, dict.fromkeys(DOMAINS, sizes.scarce)),
        "iid": dealt(domains, sizes.text),
    }
    for split_name, by_party in held.items():
        for name, some in by_party.items():
            write_texts(texts / split_name / f"{name}.jsonl", some)
    for name, domain in domains.items():
        write_texts(texts / "test" / f"{name}.jsonl", held_out(domain, sizes.held_out))
    (texts / "done").touch()


class Worker:
    """Runs jobs in a folder that `prepare` has filled."""

    def __init__(self, folder: Path, sizes: Sizes) -> None:
        self._folder, self._sizes, self._plan = folder, sizes, sizes.plan

    def run(self, job: Job, where: Path) -> dict[str, Any]:
        """Train, and measure on held-out text of every domain the job's parties have.

        Args:
            job: what to train.
            where: an empty folder for it.

        Returns:
            The line of `quality.py`'s file: losses in nats per token by domain, the course, seconds.
        """
        torch.set_num_threads(1)
        began, cpu = time.perf_counter(), time.process_time()
        if job.arm == "public":
            losses, curve, more = self._public(job, where)
        elif job.arm in ("isolated", "centralised"):
            losses, curve, more = self._single(job, where)
        else:
            losses, curve, more = self._federation(job, where)
        return {
            **asdict(job),
            "key": job.key,
            "loss": losses,
            "curve": curve,
            "wall_s": round(time.perf_counter() - began, 1),
            "cpu_s": round(time.process_time() - cpu, 1),
            "load": round(os.getloadavg()[0], 1),
            "isolation": None if job.epsilon is None else _ISOLATION,
            **more,
        }

    def _public(self, job: Job, where: Path) -> tuple[dict[str, float], list[Any], dict[str, Any]]:
        plan, text = self._plan, self._folder / "text" / "public.jsonl"
        tokenizer = TokenizerSpec(train=TokenizerTraining(files=(text,), vocab_size=plan.vocab_size))
        tests = tuple(self._test(name) for name in DOMAINS)
        config = TrainConfig(
            model=ModelSpec(family=plan.family, config=plan.model),
            data=DataSpec(
                train=(text,), test=tests, sequence_length=plan.sequence_length, tokenizer=tokenizer,
                provenance="public",
            ),
            optim=plan.public_optim,
            train=TrainSpec(
                rounds=plan.public_rounds, batch_size=plan.public_batch, micro_batch=plan.public_batch, seed=job.seed,
                eval_every=0, checkpoint_every=0,
            ),
            run_dir=self._public_run(job.seed),
            device="cpu",
        )  # fmt: skip
        run.start(config)
        return self._losses(config.run_dir, DOMAINS, job.seed), [], {}

    def _single(self, job: Job, where: Path) -> tuple[dict[str, float], list[Any], dict[str, Any]]:
        rules, names = self._rules(job), job.names
        train = self._length(job, len(names))
        privacy = None
        if rules is not None:
            own = {**rules.model_dump(), "lot_size": train.batch_size, **self._local(where)}
            privacy = PrivacySpec(**own)
        config = TrainConfig(
            model=self._model(job.seed),
            data=self._data(job, names),
            optim=self._plan.private.optim if job.epsilon else self._plan.optim,
            train=train,
            privacy=privacy,
            run_dir=where / "run",
            device="cpu",
        )
        curve: list[tuple[int, float, float]] = []
        began = time.perf_counter()

        def watch(done: int, step: Step, evaluation: Evaluation | None) -> None:
            if evaluation is not None:
                curve.append((done, round(evaluation.loss, 5), round(time.perf_counter() - began, 2)))

        result = run.start(config, watch=watch)
        return (
            self._losses(config.run_dir, self._tested(job, names), job.seed),
            curve,
            _spent({names[0]: result.privacy} if result.privacy else {}),
        )

    def _federation(self, job: Job, where: Path) -> tuple[dict[str, float], list[Any], dict[str, Any]]:
        config = self._federation_config(job)
        model = build_model(config.model, meta=True)
        counts = [layer.num_experts for layer in expert_layers(model)]
        split(config.model, Placement.round_robin(job.names, counts), where / "weights")
        federation = InProcessFederation(config, where / "coordinator")
        federation.coordinate()
        for name in job.names:
            federation.up(prepare_party(self._party(job, name, where), config))
        federation.join(_WAIT_S)
        for end in federation.ends.values():
            if isinstance(end, BaseException):
                raise end
        runs = {name: where / name for name in job.names}
        return self._losses_of_all(job, runs), _mean_curve(list(runs.values())), _spent(_promises(runs))

    def _federation_config(self, job: Job) -> FederationConfig:
        tokens = job.arm == "tokens"
        return FederationConfig(
            name="quality",
            model=self._model(job.seed),
            parties={name: MemberAddress(endpoint=f"127.0.0.1:{7000 + i}") for i, name in enumerate(job.names)},
            coordinator=MemberAddress(endpoint="127.0.0.1:7999"),
            optim=self._plan.private.optim if job.epsilon else self._plan.optim,
            train=FederationTrainSpec(**self._length(job, 1).model_dump()),
            exchange="tokens" if tokens else "experts",
            privacy=self._rules(job) or (None if tokens else "none"),
            trunk="shared" if job.arm == "experts" else "private",
            deadline_s=3600.0,
            round_deadline_s=_WAIT_S,
            join_deadline_s=_WAIT_S,
        )

    def _party(self, job: Job, name: str, where: Path) -> PartyConfig:
        local = self._local(where / name)
        (where / name).mkdir(parents=True)
        return PartyConfig(
            party=name,
            federation=where / "federation.yaml",  # everything is handed over in memory
            kit=where / "kit",
            data=self._data(job, (name,)),
            trunk=where / "weights" / TRUNK_FILE,
            shard=where / "weights" / shard_file(name),
            run_dir=where / name,
            device="cpu",
            privacy=PartyPrivacy(**local) if job.epsilon is not None else None,
            ledger=None if job.epsilon is not None else local["ledger"],
        )

    def _rules(self, job: Job) -> PrivacyRules | None:
        if job.epsilon is None:
            return None
        private = self._plan.private
        return PrivacyRules(
            epsilon=job.epsilon, delta=self._sizes.delta, clip_norm=private.clip_norm, lot_size=private.lot_size,
            isolation=_ISOLATION,
        )  # fmt: skip

    def _local(self, where: Path) -> dict[str, Any]:
        """A ledger for every job: what all jobs spend together on public text is of no interest."""
        return {"physical_batch": self._plan.private.physical_batch, "ledger": where / "ledger"}

    def _length(self, job: Job, shares_at_once: int) -> TrainSpec:
        plan, private = self._plan, job.epsilon is not None
        rounds = plan.private.rounds if private else plan.rounds
        every = plan.private.eval_every if private else plan.eval_every
        return TrainSpec(
            rounds=rounds,
            batch_size=shares_at_once * (plan.private.lot_size if private else plan.batch),
            micro_batch=2 * plan.micro_batch,
            seed=job.seed,
            eval_every=0 if job.split == "iid" else every,
            checkpoint_every=rounds,
        )

    def _model(self, seed: int) -> ModelSpec:
        return ModelSpec(path=self._public_run(seed) / "model", provenance="public")

    def _public_run(self, seed: int) -> Path:
        return public_run(self._folder, seed)

    def _data(self, job: Job, names: Sequence[str]) -> DataSpec:
        return DataSpec(
            train=tuple(self._folder / "text" / job.split / f"{name}.jsonl" for name in names),
            test=tuple(self._test(name) for name in self._tested(job, names)),
            sequence_length=self._plan.sequence_length,
        )

    def _tested(self, job: Job, names: Sequence[str]) -> tuple[str, ...]:
        """A party that holds a part of every set is measured on all of them."""
        return DOMAINS if job.split == "iid" else tuple(names)

    def _test(self, name: str) -> Path:
        return self._folder / "text" / "test" / f"{name}.jsonl"

    def _losses_of_all(self, job: Job, runs: Mapping[str, Path]) -> dict[str, float]:
        """Each party's loss on its domain; where all are measured on every domain, the parties' mean on each."""
        if job.split != "iid":
            return {name: self._losses(where, (name,), job.seed)[name] for name, where in runs.items()}
        each = [self._losses(where, DOMAINS, job.seed) for where in runs.values()]
        return {name: sum(losses[name] for losses in each) / len(each) for name in DOMAINS}

    def _losses(self, run_dir: Path, names: Sequence[str], seed: int) -> dict[str, float]:
        """A run's held-out loss by domain: it measured the domains' files one after the other."""
        found, start = {}, 0
        whole = Evaluation.load(private_folder(run_dir) / "evaluation.safetensors")
        for name in names:
            rows = slice(start, start + self._sequences(name, seed))
            start = rows.stop
            found[name] = round(Evaluation(whole.loss_S[rows], whole.tokens_S[rows]).loss, 5)
        if start != len(whole.loss_S):
            raise SystemExit(
                f"{run_dir} measured {len(whole.loss_S)} sequences where the domains' files hold {start}"
            )
        return found

    def _sequences(self, name: str, seed: int) -> int:
        spec = DataSpec(train=(self._test(name),), sequence_length=self._plan.sequence_length)
        tokenizer = get_tokenizer(TokenizerSpec(), self._model(seed), spec)
        return len(tokenize(read_documents(spec.train, spec), spec, tokenizer))


def _curve(run_dir: Path) -> list[tuple[int, float, float]]:
    """(finished rounds, held-out loss, seconds of the rounds until then)."""
    rows, seconds, found = read_metrics(private_folder(run_dir)), 0.0, []
    for row in rows:
        seconds += row.get("seconds") or 0.0
        loss = row.get("test_loss")
        if loss is not None:
            found.append((int(row["round"] or 0), round(loss, 5), round(seconds, 2)))
    return found


def _mean_curve(run_dirs: Sequence[Path]) -> list[tuple[int, float, float]]:
    """The parties' curves as one, each party weighing the same."""
    return [
        (rows[0][0], round(sum(row[1] for row in rows) / len(rows), 5), max(row[2] for row in rows))
        for rows in zip(*(_curve(run_dir) for run_dir in run_dirs), strict=True)
    ]


def _promises(runs: Mapping[str, Path]) -> dict[str, Mapping[str, Any]]:
    found = {
        name: json.loads((private_folder(run_dir) / "result.json").read_text("utf-8")).get("privacy")
        for name, run_dir in runs.items()
    }
    return {name: facts for name, facts in found.items() if facts}


def _spent(promises: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Epsilon and noise as the ledgers have them."""
    if not promises:
        return {}
    return {
        "spent": {
            name: {"epsilon": round(facts["epsilon"], 4), "noise_multiplier": round(facts["noise_multiplier"], 4)}
            for name, facts in promises.items()
            if "epsilon" in facts
        }
    }
