"""What came out: every arm's losses on every party's own held-out text, memory, and bytes on the wire.

Read from what the runs left in the folder. Imports torch; the demo loads it when all processes have ended.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from coterie.audit.findings import Findings
from coterie.demonstration.folder import Folder
from coterie.demonstration.plan import ARMS, Arm, DemoPlan
from coterie.demonstration.screen import Screen
from coterie.errors import DataError
from coterie.revision import software
from coterie.training.evaluate import Difference, Evaluation, paired_bootstrap
from coterie.training.folders import private_folder
from coterie.training.metrics import read_metrics
from coterie.training.planning.measured import model_state_bytes, peak_rss_bytes
from coterie.training.single.trained import evaluate_run, load_trained


@dataclass(frozen=True)
class Promise:
    """What one party spent in a private arm, as its own ledger has it."""

    epsilon: float
    delta: float
    noise_multiplier: float
    rounds: int


@dataclass(frozen=True)
class Figures:
    """One arm for one party. Memory is that of the process that trained (for the pooled arm one for all parties).

    Attributes:
        promise: of a private arm.
    """

    evaluation: Evaluation
    model_state_bytes: int
    peak_rss_bytes: int
    promise: Promise | None = None

    @property
    def loss(self) -> float:
        return self.evaluation.loss


@dataclass(frozen=True)
class Wire:
    """Bytes that all parties sent together, encryption apart.

    Attributes:
        payload_bytes: everything, with headers and control messages.
        tensor_bytes: the tensors in it.
    """

    payload_bytes: int
    tensor_bytes: int

    @property
    def ratio(self) -> float:
        return self.payload_bytes / self.tensor_bytes if self.tensor_bytes else math.nan


@dataclass(frozen=True)
class Results:
    """Everything the closing screen, the plot and the report are made of.

    Attributes:
        arms: arm, then party, in the order of the table.
        curves: arm, then [(finished rounds, held-out loss over the text of all parties)].
        best: arm, then party, then (finished rounds, loss) of its best evaluation on the way; arms with one run
            per party only.
        wire: of each federation.
        audit: of the federations, by attacks on what the other parties received; None without a federation.
    """

    plan: DemoPlan
    subjects: Mapping[str, str]
    arms: Mapping[str, Mapping[str, Figures]]
    curves: Mapping[str, Sequence[tuple[int, float]]]
    best: Mapping[str, Mapping[str, tuple[int, float]]]
    wire: Mapping[str, Wire]
    audit: Findings | None = None
    _compared: dict[tuple[str, str, str], Difference] = field(default_factory=dict, repr=False, compare=False)

    @property
    def parties(self) -> tuple[str, ...]:
        return self.plan.parties

    def difference(self, arm: str, other: str, party: str) -> Difference | None:
        """How much lower ``arm`` is than ``other`` on a party's text, with its interval; None if one was not run."""
        if arm not in self.arms or other not in self.arms:
            return None
        key = (arm, other, party)
        if key not in self._compared:
            ours, theirs = self.arms[arm][party].evaluation, self.arms[other][party].evaluation
            self._compared[key] = paired_bootstrap(ours, theirs)
        return self._compared[key]

    def as_json(self) -> dict[str, Any]:
        """The figures for `--json`."""
        audit = {} if self.audit is None else {"audit": dict(self.audit.as_json())}
        return {
            **software(),
            **audit,
            "parties": list(self.parties),
            "rounds": self.plan.rounds,
            "arms": {arm: self._arm(arm) for arm in self.arms},
            "wire": self._wire(),
            "memory": {
                arm: {
                    party: {"model_state_bytes": f.model_state_bytes, "peak_rss_bytes": f.peak_rss_bytes}
                    for party, f in by_party.items()
                }
                for arm, by_party in self.arms.items()
            },
        }

    def _arm(self, arm: str) -> dict[str, Any]:
        by_party = self.arms[arm]
        found: dict[str, Any] = {
            "loss": {party: f.loss for party, f in by_party.items()},
            "perplexity": {party: f.evaluation.perplexity for party, f in by_party.items()},
        }
        promises = {party: asdict(f.promise) for party, f in by_party.items() if f.promise is not None}
        if promises:
            found["privacy"] = promises
        for role, name in (("isolated", ARMS[arm].alone), ("centralised", ARMS[arm].pooled)):
            if arm not in ("public", name) and name in self.arms:
                differences = {party: self.difference(arm, name, party) for party in by_party}
                found[f"minus_{role}"] = {
                    party: {"mean": d.mean, "low": d.low, "high": d.high, "tie": d.is_tie}
                    for party, d in differences.items()
                    if d is not None
                }
        return found

    def _wire(self) -> dict[str, Any]:
        """Of all federations together, and of each; a demo without one moves nothing."""
        total = Wire(
            sum(wire.payload_bytes for wire in self.wire.values()),
            sum(wire.tensor_bytes for wire in self.wire.values()),
        )
        return {**_wire_json(total), "arms": {arm: _wire_json(wire) for arm, wire in self.wire.items()}}


def _wire_json(wire: Wire) -> dict[str, Any]:
    ratio = wire.ratio if wire.tensor_bytes else None
    return {"payload_bytes": wire.payload_bytes, "tensor_bytes": wire.tensor_bytes, "ratio": ratio}


def collect(
    plan: DemoPlan, root: Path, subjects: Mapping[str, str], screen: Screen, audit: Findings | None = None
) -> Results:
    """Read every run, and measure the public checkpoint on each party's held-out text."""
    torch.set_num_threads(1)  # small matrices; several threads only get into each other's way
    folder = Folder(root, plan)
    public = {}
    trained = load_trained(root / "public" / "run")
    for party in plan.parties:
        screen.progress(f"the public model on {party}'s held-out text")
        evaluation = evaluate_run(trained, [folder.test_file(party)])
        public[party] = Figures(evaluation, _weight_bytes(trained.model), peak_rss_bytes())
    sizes = {party: len(figures.evaluation.tokens_S) for party, figures in public.items()}
    arms: dict[str, dict[str, Figures]] = {}
    curves: dict[str, list[tuple[int, float]]] = {}
    best: dict[str, dict[str, tuple[int, float]]] = {}
    wire: dict[str, Wire] = {}
    for arm in (ARMS[name] for name in plan.arms):
        screen.progress(f"reading {arm.title}")
        if arm.kind == "public":
            arms[arm.name] = public
        elif arm.kind == "pooled":
            arms[arm.name] = _shares(folder.run_dir(arm, ""), sizes)
            curves[arm.name] = _evaluations(folder.run_dir(arm, ""))
        else:
            runs = {party: folder.run_dir(arm, party) for party in plan.parties}
            arms[arm.name] = {party: _figures(run) for party, run in runs.items()}
            each = {party: _evaluations(run) for party, run in runs.items()}
            weights = {party: figures.evaluation.tokens for party, figures in arms[arm.name].items()}
            curves[arm.name] = _mean(each, weights)
            best[arm.name] = {party: min(points, key=lambda point: point[1]) for party, points in each.items()}
            if arm.kind == "federation":
                wire[arm.name] = _wire_of(runs.values())
        _check_paired(arm, arms[arm.name], public)
    return Results(plan, dict(subjects), arms, curves, best, wire, audit)


def _weight_bytes(model: Any) -> int:
    """Nothing is trained, so the model is its weights."""
    return model_state_bytes(model.requires_grad_(False))


def _figures(run_dir: Path) -> Figures:
    result = json.loads((private_folder(run_dir) / "result.json").read_text("utf-8"))
    evaluation = Evaluation.load(private_folder(run_dir) / "evaluation.safetensors")
    facts = result.get("privacy")
    promise = Promise(**{field.name: facts[field.name] for field in fields(Promise)}) if facts else None
    return Figures(evaluation, int(result["model_state_bytes"]), int(result["peak_rss_bytes"]), promise)


def _shares(run_dir: Path, sizes: Mapping[str, int]) -> dict[str, Figures]:
    """The pooled run measured all parties' held-out text one after the other; each gets its own part back."""
    whole = _figures(run_dir)
    found, start = {}, 0
    for party, size in sizes.items():
        rows = slice(start, start + size)
        part = Evaluation(whole.evaluation.loss_S[rows], whole.evaluation.tokens_S[rows])
        found[party] = Figures(part, whole.model_state_bytes, whole.peak_rss_bytes, whole.promise)
        start += size
    return found


def _check_paired(arm: Arm, figures: Mapping[str, Figures], public: Mapping[str, Figures]) -> None:
    for party, found in figures.items():
        ours, theirs = found.evaluation.tokens_S.tolist(), public[party].evaluation.tokens_S.tolist()
        if ours != theirs:
            raise DataError(
                f"the arm `{arm.name}` was not measured on {party}'s held-out sequences "
                f"({len(ours)} instead of {len(theirs)}).",
                code="demo-unpaired",
                why="losses on different text cannot be compared",
                fix="run the demo again in an empty folder; if it happens again, report it",
            )


def _evaluations(run_dir: Path) -> list[tuple[int, float]]:
    """(finished rounds, held-out loss) along a run."""
    rows = read_metrics(private_folder(run_dir))
    return [(int(row["round"] or 0), float(row["test_loss"])) for row in rows if row.get("test_loss") is not None]  # type: ignore[arg-type]


def _mean(each: Mapping[str, Sequence[tuple[int, float]]], weights: Mapping[str, int]) -> list[tuple[int, float]]:
    """The parties' curves as one, weighted by the tokens of their held-out text."""
    total = sum(weights.values())
    by_party = {party: dict(points) for party, points in each.items()}
    rounds = sorted(set.intersection(*(set(points) for points in by_party.values())))
    return [(at, sum(points[at] * weights[party] for party, points in by_party.items()) / total) for at in rounds]


def _wire_of(run_dirs: Any) -> Wire:
    peers = [
        peer
        for run_dir in run_dirs
        for peer in json.loads((private_folder(run_dir) / "result.json").read_text("utf-8"))["wire"].values()
    ]
    return Wire(sum(int(peer["sent"]) for peer in peers), sum(int(peer["tensors_sent"]) for peer in peers))
