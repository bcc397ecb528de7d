"""Scripts around `PrivateTrainer` that a launcher starts several times; they know nothing of that."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from coterie.hf import PrivateTrainer
from coterie.models.zoo.tiny import VOCAB, tiny_model
from helpers import rank_tasks

LOT, BATCH, ROUNDS = 8, 3, 4
"""LOT is of all processes together, BATCH what one computes at once."""


def rows(count: int = 24) -> list[dict[str, Tensor]]:
    ids = torch.randint(3, VOCAB, (count, 6), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": own, "labels": own.clone()} for own in ids]


class Collating:
    """Stacks items, and knows the largest number of them since training began."""

    def __init__(self) -> None:
        self.most = 0

    def __call__(self, items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        self.most = max(self.most, len(items))
        return rank_tasks.stacked(items)


class Watches(TrainerCallback):
    """Ends one process in its third step, the first time that the launcher has started it."""

    def __init__(self, fails: int | None, collating: Collating) -> None:
        self.fails, self.collating = fails, collating

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.collating.most = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if first and state.global_step == 3 and os.environ.get("RANK") == str(self.fails):
            raise ValueError("the callback of this rank")


def made(folder: Path, fails: int | None = None, seed: int | None = 7, **options: Any) -> PrivateTrainer:
    """A trainer on a model whose head each process has made at random for itself."""
    rank_tasks.quiet()
    model = tiny_model("olmoe", num_hidden_layers=1)
    torch.manual_seed(int(os.environ.get("RANK", "0")))
    torch.nn.init.normal_(model.lm_head.weight, std=0.02)
    arguments = {
        "max_steps": ROUNDS, "per_device_train_batch_size": BATCH, "learning_rate": 1e-2, "logging_steps": 1,
        "report_to": [], "save_strategy": "steps", "save_steps": 2, "use_cpu": True, "disable_tqdm": True,
        "max_grad_norm": 0,
    }  # fmt: skip
    (epsilon, delta), collating = rank_tasks.BUDGET, Collating()
    return PrivateTrainer(
        model,
        TrainingArguments(str(folder / "out"), **arguments | options),
        train_dataset=rows(),
        eval_dataset=rows(5),
        data_collator=collating,
        callbacks=[Watches(fails, collating)],
        privacy={
            "epsilon": epsilon, "delta": delta, "lot_size": LOT, "clip_norm": 0.5, "ledger": folder / "ledger",
            "seed": seed, "provenance": {"weights": "public"},
        },
    )  # fmt: skip


def train(folder: Path, fails: int | None = None, **options: Any) -> dict[str, Any]:
    """A whole script: train, evaluate, say what it cost, save."""
    trainer = made(folder, fails, **options)
    trainer.train()
    most = trainer.data_collator.most
    evaluation = trainer.evaluate()
    trainer.save_model()
    return {
        "weights": {name: p.tolist() for name, p in trainer.model.named_parameters()},
        "wrapped": trainer.model_wrapped is not trainer.model,
        "most": most,
        "private": str(folder / "out/private"),
        "evaluated": evaluation["eval_loss"],
        "statement": str(trainer.statement()),
        "spent": trainer.spent().epsilon,
        "losses": [entry["loss_not_private"] for entry in trainer.state.log_history if "loss_not_private" in entry],
        "epsilons": [entry["epsilon"] for entry in trainer.state.log_history if "epsilon" in entry],
    }


def published(folder: Path) -> str:
    """Train in secret, then publish; where."""
    trainer = made(folder, seed=None, max_steps=1, save_strategy="no")
    trainer.train()
    return str(trainer.publish())


def with_another_model(folder: Path) -> None:
    """Rank 1 has made a longer vocabulary."""
    trainer = made(folder)
    if os.environ["RANK"] == "1":
        trainer.model.resize_token_embeddings(VOCAB + 3)
    trainer.train()


def with_experts_apart(folder: Path) -> None:
    """The model's experts were spread before."""
    from coterie import dp

    trainer = made(folder)
    with dp.join_ranks() as ranks:
        dp.spread_experts(trainer.model, ranks)
    trainer.train()
