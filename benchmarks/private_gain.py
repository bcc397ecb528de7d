"""What a budget buys each party: alone, together with whole noise, with shared noise, all text in one place.

    python benchmarks/private_gain.py --work gain --json gain.jsonl --seeds 0 1 2 3 4 5 6 7 8 9
    python benchmarks/private_gain.py --work gain --json gain.jsonl --parties 6
    python benchmarks/private_gain.py --work gain --json gain.jsonl --data ag_news
    python benchmarks/private_gain.py --work gain --json gain.jsonl --no-precondition --lr 5e-3
    python benchmarks/private_gain.py --json gain.jsonl --summary

Arms: ``isolated_dp``, ``experts_dp``, ``experts_dp_shared`` (t = 1) and ``centralised_dp``, as in `coterie demo`.
Every party draws its records with the same probability ``--rate``, so all arms need the same noise multiplier;
rounds, optimiser and decay are the same, too. Lots, clipping, noise, spool and ledger are the product's
(`coterie.dp.open_run`), one for each party; what differs from a federation is that all run in one process on one copy
of the model, which adds up what the parties release, and that pushes are not masked: sums are the same either way.
That a federation computes the same is tests/training/experts/test_private_exchange.py. Lots and noise follow from the
seed: these figures are measurements, and no model of this benchmark is private.

Every finished arm of a seed is one line of the file and is not computed again, so a stopped benchmark goes on where
it was. Gains are nats per token by which a party's held-out loss lies below the public model's.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import resource
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from coterie.config import DataSpec, ModelSpec, OptimSpec, TokenizerSpec, TrainConfig, TrainSpec
from coterie.demonstration.corpus import PUBLIC, build
from coterie.demonstration.folder import Folder
from coterie.demonstration.plan import NAMES, make_plan
from coterie.demonstration.processes import Processes
from coterie.dp.accounting.budget import Budget
from coterie.dp.losses import default_loss
from coterie.dp.noise.pooled import PooledNoise
from coterie.dp.open_run import OpenRun, RunEntry, open_run
from coterie.dp.plan import ComputeOptions, PrivacyPlan
from coterie.dp.private_data import PrivateData
from coterie.models.preconditioner import attach
from coterie.models.second_moments import measure
from coterie.training.data.packing import Sequences
from coterie.training.evaluate import Evaluation, evaluate, paired_bootstrap
from coterie.training.optim import lr_at, make_optimizer, set_lr
from coterie.training.single.prepared import Prepared, prepare

ARMS = ("isolated_dp", "experts_dp", "experts_dp_shared", "centralised_dp")
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
"""By how many seeds: how many standard errors a 95 % interval of their mean reaches."""
HELD_OUT = 0.1
PUBLIC_RECORDS = 600
"""From which the preconditioner is measured."""


@dataclass(frozen=True)
class Recipe:
    """What all arms share.

    Attributes:
        data: ``demo`` or ``ag_news``.
        parties: how many.
        rounds: of every arm.
        rate: q, the probability with which a record joins a lot.
        lr, schedule, beta: of AdamW, whose second beta is 0.99.
        clip_norm: C.
        epsilon, delta: the budget of a record.
        colluding: t of ``experts_dp_shared``.
        preconditioned: the start is trained in the coordinates of `coterie.models.preconditioner`, from public text.
    """

    data: str
    parties: int
    rounds: int
    rate: float
    lr: float
    schedule: str
    beta: float
    clip_norm: float
    epsilon: float
    delta: float
    colluding: int
    preconditioned: bool

    @property
    def names(self) -> tuple[str, ...]:
        return NAMES[: self.parties]


@dataclass(frozen=True)
class Party:
    """Its records."""

    train: Sequences
    test: Sequences


# ---- text and start ----


def make_start(work: Path, recipe: Recipe, source: Path | None) -> Path:
    """Make the demo's public model, and every party's text, in ``work``, once. Returns the folder of the text."""
    public = make_plan(3, arms=("public",))
    if not (work / PUBLIC / "run" / "model" / "config.json").exists():
        work.mkdir(parents=True, exist_ok=True)
        build(public.parties, public.size).write(work / "data")
        with Processes(work) as processes:
            processes.run_all([Folder(work, public).public()], 1, lambda: None)
    folder = work / f"{recipe.data}-{recipe.parties}"
    if not folder.exists():
        aside = folder.with_suffix(".part")
        if recipe.data == "demo":
            build(recipe.names, public.size).write(aside)
        else:
            write_news(aside, recipe.names, cast("Path", source))
        aside.rename(folder)
    return folder


def write_news(folder: Path, names: Sequence[str], source: Path) -> None:
    """AG News dealt to the parties in turn; a tenth of each is held out."""
    lines = [
        line.split("\t")[0]
        for file in sorted(source.glob("*.tsv"))
        for line in file.read_text("utf-8").splitlines()
        if line.strip()
    ]
    texts = list(dict.fromkeys(lines))  # a text that stands twice is one record
    for number, name in enumerate(names):
        own = texts[number :: len(names)]
        held_out = round(HELD_OUT * len(own))
        (folder / name).mkdir(parents=True, exist_ok=True)
        for side, some in (("test", own[:held_out]), ("all", own[held_out:])):
            rows = [json.dumps({"text": text}, ensure_ascii=False) for text in some]
            (folder / name / f"{side}.jsonl").write_text("\n".join(rows) + "\n", "utf-8")


def read(work: Path, text: Path, name: str) -> tuple[nn.Module, Party]:
    """The public model, and a party's training and held-out records."""
    prepared = prepared_for(work, text / name / "all.jsonl", text / name / "test.jsonl")
    if prepared.test is None:
        raise SystemExit(f"{name} has no held-out text")
    return prepared.model, Party(prepared.train, prepared.test)


def prepared_for(work: Path, train: Path, test: Path) -> Prepared:
    """The public model with records of two files."""
    config = TrainConfig(
        model=ModelSpec(path=work / PUBLIC / "run" / "model", provenance="public"),
        data=DataSpec(
            train=(train,), test=(test,), sequence_length=64, tokenizer=TokenizerSpec(), provenance="private"
        ),
        train=TrainSpec(rounds=1), run_dir=work / "none", device="cpu",
    )  # fmt: skip
    return prepare(config)[0]


def precondition(work: Path, start: nn.Module) -> None:
    """Put the public model into coordinates that its own public text gives."""
    records = prepared_for(work, *(work / "data" / PUBLIC / f"{side}.jsonl" for side in ("train", "test"))).train
    drawn = torch.randperm(len(records), generator=torch.Generator().manual_seed(0))[:PUBLIC_RECORDS].tolist()
    attach(start, measure(start, (records.collate([records[number]]) for number in drawn), default_loss))


# ---- training ----


class Group:
    """Parties that train one model together; each releases noised sums of its own.

    Args:
        start: is copied.
        members: records of each, by name.
        recipe: how.
        seed: of lots and noise.
        pooled: each adds only its share of the noise; None: all of it.
        ledger: folder of the ledgers.
    """

    def __init__(
        self,
        start: nn.Module,
        members: Mapping[str, Sequences],
        recipe: Recipe,
        seed: int,
        pooled: PooledNoise | None,
        ledger: Path,
    ) -> None:
        self.model = copy.deepcopy(start).train()
        self._recipe = recipe
        self._spec = OptimSpec(lr=recipe.lr, betas=(recipe.beta, 0.99), schedule=recipe.schedule)  # type: ignore[arg-type]
        self._params = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self._optimizer = make_optimizer(self._params.values(), self._spec)
        self._runs = [
            self._open(name, records, seed * 1000 + number_of(name, recipe), pooled, ledger)
            for name, records in members.items()
        ]
        self.noise_multiplier = self._runs[0].noise_multiplier
        self._divisor = sum(run.plan.lot_size for run in self._runs)

    def _open(self, name: str, records: Sequences, seed: int, pooled: PooledNoise | None, ledger: Path) -> OpenRun:
        recipe = self._recipe
        plan = PrivacyPlan(
            Budget(recipe.epsilon, recipe.delta), recipe.rounds, round(recipe.rate * len(records)),
            clip_norm=recipe.clip_norm, seed=seed, pooled=pooled,
        )  # fmt: skip
        options = ComputeOptions("book_keeping", physical_batch=128)
        engine = options.engine(plan, self.model, None)
        data = PrivateData.of(records, records.collate)
        return open_run(plan, options, data, self.model, engine, None, RunEntry(ledger / name, name))

    def train(self) -> None:
        """All rounds."""
        for round_no in range(1, self._recipe.rounds + 1):
            set_lr(self._optimizer, lr_at(round_no, self._spec, self._recipe.rounds))
            total = self._released(round_no)
            for name, parameter in self._params.items():
                parameter.grad = total[name] / self._divisor
            self._optimizer.step()
            self._optimizer.zero_grad()

    def _released(self, round_no: int) -> dict[str, Tensor]:
        """What the parties' releases of a round add up to."""
        total: dict[str, Tensor] = {}
        for run in self._runs:
            pending = run.begin(round_no, {"round": str(round_no)})
            noised, _ = run.publish(cast("Any", pending))  # a run that was never stopped has nothing released yet
            run.releases.spool.drop_releases(round_no)
            for name, value in noised.items():
                total[name] = value if name not in total else total[name] + value
        return total

    def close(self) -> None:
        """Close the ledgers."""
        for run in self._runs:
            run.close()


def evaluations(
    arm: str, start: nn.Module, parties: Mapping[str, Party], recipe: Recipe, seed: int
) -> tuple[dict[str, Evaluation], float]:
    """Each party's held-out losses after an arm, and the noise multiplier."""
    everybody = {name: party.train for name, party in parties.items()}
    shared = PooledNoise(len(parties), recipe.colluding) if arm == "experts_dp_shared" else None
    groups: list[tuple[dict[str, Sequences], Sequence[str]]]
    if arm == "isolated_dp":
        groups = [({name: records}, (name,)) for name, records in everybody.items()]
    elif arm == "centralised_dp":
        groups = [({"all": joined(list(everybody.values()))}, tuple(parties))]
    else:
        groups = [(everybody, tuple(parties))]
    found: dict[str, Evaluation] = {}
    sigma = math.nan
    for members, measured in groups:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            group = Group(start, members, recipe, seed, shared, folder)
            stack.callback(group.close)
            group.train()
            sigma = group.noise_multiplier
            for name in measured:
                found[name] = evaluate(group.model, parties[name].test, batch_size=64)
    return found, sigma


def joined(some: Sequence[Sequences]) -> Sequences:
    """Everybody's records as one party's."""
    tokens, starts, documents = [], [torch.zeros(1, dtype=some[0].starts.dtype)], []
    before = documents_before = 0
    for each in some:
        tokens.append(each.tokens)
        starts.append(each.starts[1:] + before)
        documents.append(each.document_S + documents_before)
        before += int(each.starts[-1])
        documents_before += int(each.document_S.max()) + 1
    return Sequences(torch.cat(tokens), torch.cat(starts), torch.cat(documents), some[0].pad_id)


def number_of(name: str, recipe: Recipe) -> int:
    """Of a party, the same in every arm; all text in one place is nobody's."""
    return recipe.names.index(name) if name in recipe.names else recipe.parties


# ---- figures ----


def kept_alone(file: Path, recipe: Recipe, seed: int) -> Path:
    """Where the losses of parties alone are kept, for the arms that are compared with them."""
    name = hashlib.sha256(json.dumps(asdict(recipe), sort_keys=True).encode()).hexdigest()[:12]
    return file.with_suffix(f".alone-{name}-{seed}.pt")


def figures(
    work: Path, recipe: Recipe, source: Path | None, seeds: Sequence[int], arms: Sequence[str], file: Path
) -> None:
    """Compute what the file does not have yet, a line for each seed and arm."""
    text = make_start(work, recipe, source)
    parties, start = {}, None
    for name in recipe.names:
        start, parties[name] = read(work, text, name)
    start = cast("nn.Module", start)
    if recipe.preconditioned:
        precondition(work, start)
    public = {name: evaluate(start, party.test, batch_size=64) for name, party in parties.items()}
    for seed in seeds:
        alone: dict[str, Evaluation] = {}
        kept = kept_alone(file, recipe, seed)
        for arm in arms:
            if any(
                row["recipe"] == asdict(recipe) and (row["seed"], row["arm"]) == (seed, arm) for row in rows(file)
            ):
                continue
            began, cpu = time.monotonic(), time.process_time()
            found, sigma = evaluations(arm, start, parties, recipe, seed)
            if arm == "isolated_dp":
                torch.save({name: (e.loss_S, e.tokens_S) for name, e in found.items()}, kept)
            elif not alone and kept.exists():
                alone = {name: Evaluation(*values) for name, values in torch.load(kept, weights_only=True).items()}
            row = {
                "recipe": asdict(recipe),
                "units": {name: len(party.train) for name, party in parties.items()},
                "noise_multiplier": sigma,
                "seed": seed,
                "arm": arm,
                "gain": {name: public[name].loss - found[name].loss for name in found},
                "better_than_alone": {
                    name: paired_bootstrap(found[name], alone[name]).high < 0 for name in found if alone
                },
                "seconds": time.monotonic() - began,
                "cpu_s": time.process_time() - cpu,
                "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row) + "\n")
            shown = "  ".join(f"{name} {value:.3f}" for name, value in row["gain"].items())
            print(f"seed {seed} {arm:<18} {mean(row):.3f} ({shown}) in {row['seconds']:.0f} s", flush=True)


def rows(file: Path) -> list[dict[str, Any]]:
    """Every whole line of the file."""
    found = []
    if file.exists():
        for line in file.read_text("utf-8").splitlines():
            with suppress(ValueError):  # a line that was cut off is computed again
                found.append(json.loads(line))
    return found


def mean(row: Mapping[str, Any]) -> float:
    """Over the parties."""
    return sum(row["gain"].values()) / len(row["gain"])


def interval(values: Sequence[float]) -> str:
    """Mean over seeds and its 95 % interval by Student's t."""
    count = len(values)
    centre = sum(values) / count
    if count < 2:
        return f"{centre:.3f}"
    error = math.sqrt(sum((value - centre) ** 2 for value in values) / (count - 1) / count)
    reach = STUDENT.get(count, 1.96 if count > 30 else 2.23) * error
    return f"{centre:.3f} ({centre - reach:.3f} to {centre + reach:.3f})"


def summary(file: Path) -> None:
    """Gains of all arms over the seeds that have all of them, and what sharing the noise closes."""
    by_recipe: dict[str, dict[int, dict[str, dict[str, Any]]]] = {}
    for row in rows(file):
        by_recipe.setdefault(json.dumps(row["recipe"]), {}).setdefault(row["seed"], {})[row["arm"]] = row
    for recipe, seeds in by_recipe.items():
        whole = {seed: arms for seed, arms in seeds.items() if set(arms) == set(ARMS)}
        print(recipe)
        for arm in ARMS:
            some = [mean(arms[arm]) for arms in seeds.values() if arm in arms]
            if some:
                print(f"  {arm:<18} {len(some)} seeds  {interval(some)}")
        closed = []
        for arms in whole.values():
            low, high = mean(arms["experts_dp"]), mean(arms["centralised_dp"])
            closed.append((mean(arms["experts_dp_shared"]) - low) / (high - low))
        if closed:
            print(f"  of the distance from experts_dp to centralised_dp, shared noise closes {interval(closed)}")
        together = [arms["experts_dp_shared"] for arms in seeds.values() if "experts_dp_shared" in arms]
        # One that was computed before its seed's parties alone were is compared with nothing.
        compared = [all(row["better_than_alone"].values()) for row in together if row["better_than_alone"]]
        if compared:
            print(f"  every party better than alone beyond chance in {sum(compared)} of {len(compared)} seeds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("gain"), help="folder for text and public model")
    parser.add_argument("--json", type=Path, required=True, help="file of lines; added to")
    parser.add_argument("--summary", action="store_true", help="only say what the file has")
    parser.add_argument("--data", choices=("demo", "ag_news"), default="demo")
    parser.add_argument("--source", type=Path, default=Path("../shared/data/ag_news"), help="folder of AG News")
    parser.add_argument("--parties", type=int, default=3)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="only these")
    parser.add_argument("--rounds", type=int, default=80)
    parser.add_argument("--rate", type=float, default=0.3, help="probability with which a record joins a lot")
    parser.add_argument("--schedule", choices=("constant", "cosine", "linear"), default="linear")
    parser.add_argument("--lr", type=float, default=7e-3)
    parser.add_argument("--precondition", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--beta", type=float, default=0.5, help="AdamW's first")
    parser.add_argument("--clip-norm", type=float, default=1.0)
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--colluding", type=int, default=1, help="t of experts_dp_shared")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.summary:
        recipe = Recipe(
            args.data, args.parties, args.rounds, args.rate, args.lr, args.schedule, args.beta, args.clip_norm,
            args.epsilon, args.delta, args.colluding, args.precondition,
        )  # fmt: skip
        args.json.parent.mkdir(parents=True, exist_ok=True)
        figures(args.work, recipe, args.source, args.seeds, [arm for arm in ARMS if arm in args.arms], args.json)
    summary(args.json)


if __name__ == "__main__":
    main()
