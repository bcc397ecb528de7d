"""Runs whose start in the ledger is kept in ``first_format/``: what an existing ledger and checkpoint hold.

Made once by the first version that wrote them, and only ever added to:
``cd tests/dp && python start_examples.py`` writes what is not there yet.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coterie import dp
from coterie.dp.accounting.provenance import Artefact
from coterie.dp.open_run import OpenRun, RunEntry, open_run
from coterie.dp.plan import ComputeOptions, PrivacyPlan
from coterie.dp.private_data import PrivateData
from coterie.dp.session import PrivateSession
from coterie.models.zoo.tiny import tiny_model

FOLDER = Path(__file__).parents[1] / "dp" / "first_format"
SAVED_ROUNDS, ROUNDS = 2, 5


class Two(nn.Module):
    """Two layers, so that there are gradient groups."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(3, 4)
        self.outer = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x).tanh())[:, 0]


def loss_fn(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    return (model(batch["x"]) - 1.0).square()


def collate(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {"x": torch.stack([item["x"] for item in items])}


def records(count: int = 12) -> list[dict[str, Any]]:
    return [{"x": torch.tensor([1.0, i, -i]) / 5, "user": f"u{i % 5}"} for i in range(count)]


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "epochs": {"rounds": None, "epochs": 2.0, "seed": 3, "clip_norm": 0.5, "self_check": False},
    "truncated": {"sampler": "truncated_poisson", "max_lot": 7, "clipping": "per_layer", "method": "ghost"},
    "adaptive": {"adaptive_quantile": 0.5, "clipping": "per_group", "physical_batch": 3},
    "user column": {"user_column": "user", "records_per_user": 2, "lot_size": 2, "record": {"length": 3}},
    "users": {"users": [i % 4 for i in range(12)], "lot_size": 2, "isolation": "exact"},
    "declared": {"provenance": {"weights": "public"}, "clipping": "automatic", "half_precision": True},
}
"""Arguments of `make_private` by the name of the run."""

EXPERTS = {
    "loads": {"balance": dp.Balance("private_load", 0.03, 0.2, 0.25)},
    "sequences": {"balance": dp.Balance("per_sequence"), "isolation": "exact"},
}
"""The same, of a model with experts."""


def start(root: Path, run: str, **options: Any) -> PrivateSession:
    """A session of the small model."""
    model = Two()
    given: dict[str, Any] = {"budget": dp.Budget(8.0, 1e-3), "lot_size": 4, "rounds": 4, "ledger": root, "run": run}
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    return dp.make_private(model, optimizer, records(), collate, loss_fn, **given | options)


def start_with_experts(root: Path, run: str, **options: Any) -> PrivateSession:
    """A session of a model with experts."""
    model = tiny_model("olmoe", vocab_size=32, seed=1)
    data = [{"input_ids": torch.arange(i, i + 6) % 32} for i in range(12)]
    for item in data:
        item |= {"attention_mask": torch.ones(6, dtype=torch.int64), "labels": item["input_ids"].clone()}
    given: dict[str, Any] = {"budget": dp.Budget(8.0, 1e-3), "lot_size": 4, "rounds": 4, "ledger": root, "run": run}
    return dp.make_private(model, torch.optim.SGD(model.parameters(), 0.1), data, **given | options)


def start_party(root: Path, run: str, users: list[str] | None = None, **options: Any) -> OpenRun:
    """What a party of a federation opens."""
    model = Two()
    given: dict[str, Any] = {"budget": dp.Budget(4.0, 1e-3), "lot_size": 3, "rounds": 6, "clip_norm": 0.5}
    plan, how = PrivacyPlan(**given | options), ComputeOptions()
    data = PrivateData.of(records(), collate, users=users, records_per_user=plan.records_per_user, digest="a1" * 32)
    entry = RunEntry(root, run, [Artefact("weights", "public")], {"length": 3})
    return open_run(plan, how, data, model, how.engine(plan, model, loss_fn), None, entry)


def entry_of(run: PrivateSession | OpenRun) -> str:
    """What the ledger holds of a run's start, as text."""
    entry = json.dumps(run.ledger.run(run.run if isinstance(run, PrivateSession) else run.name))
    run.close()
    return entry


PARTIES: dict[str, dict[str, Any]] = {
    "party": {"sampler": "truncated_poisson", "max_lot": 5, "half_precision": True},
    "party of users": {
        "users": [f"u{i % 5}" for i in range(12)], "isolation": "exact", "records_per_user": 2,
    },
    "party in a test": {"seed": 4, "noise_multiplier": 0.25},
}  # fmt: skip
"""The same, of a federation's party."""


def starts() -> dict[str, Callable[[Path], PrivateSession | OpenRun]]:
    """All examples by name."""
    kinds: list[tuple[Any, dict[str, dict[str, Any]]]] = [
        (start, SETTINGS), (start_with_experts, EXPERTS), (start_party, PARTIES),
    ]  # fmt: skip
    return {run: partial(begin, run=run, **given) for begin, runs in kinds for run, given in runs.items()}


def seeded(root: Path) -> PrivateSession:
    """The run of which a checkpoint is kept."""
    return start(root, "saved", seed=7, rounds=ROUNDS, user_column="user", lot_size=2, records_per_user=3)


def _write() -> None:
    os.chdir(FOLDER)
    path = Path("starts.json")
    kept: dict[str, str] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    for name, begin in starts().items():
        if name not in kept:
            kept[name] = entry_of(begin(Path(tempfile.mkdtemp())))
    path.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")
    if not Path("saved").exists():
        with seeded(Path("ledger")) as session:
            for lot in session:
                session.step(lot)
                if session.round == SAVED_ROUNDS:
                    break
            session.save("saved")


if __name__ == "__main__":
    _write()
