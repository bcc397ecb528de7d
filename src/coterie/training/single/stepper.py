"""How a run does its rounds: the interface, and plain training behind it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from coterie.checkpoints import Checkpoint, Content, changing_tensors, load_weights, model_tensors
from coterie.dp.accounting.budget import Spent
from coterie.dp.accounting.statement import Statement
from coterie.models.split.trainings import Training
from coterie.models.streaming.beside_adapters import without_merging
from coterie.training.data.packing import RoundOrder
from coterie.training.loop import train_round
from coterie.training.optim import Float32Optimizer, lr_at, make_optimizer
from coterie.training.seeds import derived_seed
from coterie.training.single.prepared import Prepared


@dataclass(frozen=True)
class Step:
    """What a round did, for the owner's eyes.

    Attributes:
        loss: mean over the round's text, nats, before the step; NaN where nothing was learnt. Of a private run it is
            NOT private.
        metrics: what `metrics.jsonl` keeps of the round.
        nothing_learnt: why the round's gradient was noise alone; None where it was not.
        spent: what the run has spent so far; None in most rounds, and without privacy.
    """

    loss: float
    metrics: Mapping[str, float]
    nothing_learnt: str | None = None
    spent: Spent | None = None


class Stepper(Protocol):
    """The rounds of one run: plain, or within a privacy budget."""

    @property
    def optimizer(self) -> Float32Optimizer: ...

    @property
    def round(self) -> int:
        """Finished rounds."""

    @property
    def finished(self) -> bool:
        """No round is left."""

    def step(self) -> Step:
        """Do one round."""

    def content(self) -> tuple[Content, Mapping[str, Any]]:
        """Tensors and JSON values of a checkpoint from which a resumed run goes on."""

    def parts(self, folder: Path) -> tuple[str, ...]:
        """Let other ranks write what they alone hold of the checkpoint that comes to ``folder`` next; its digests."""

    def saved(self, folder: Path) -> None:
        """Everything up to now is durable in ``folder``."""

    def marker(self) -> Mapping[str, str]:
        """What `run.json` says of the run beside its settings."""

    def training(self) -> Training:
        """What a saved model says of this run."""

    def statement(self) -> Statement | None:
        """The privacy statement as of now; None without privacy."""

    def close(self) -> None:
        """Let another process go on with the run."""


class PlainStepper:
    """Rounds without privacy. They follow from the seed, so that a resumed run repeats an uninterrupted one.

    Args:
        prepared: what to train on what.
        checkpoint: go on from here.
    """

    def __init__(self, prepared: Prepared, checkpoint: Checkpoint | None = None) -> None:
        spec = prepared.config.train
        self.optimizer = make_optimizer(prepared.stepped.values(), prepared.config.optim)
        self.round = 0
        self._prepared = prepared
        self._order = RoundOrder(len(prepared.train), spec.batch_size, spec.seed)
        prepared.model.train()
        if checkpoint is not None:
            self._restore(checkpoint)

    @property
    def finished(self) -> bool:
        return self.round == self._prepared.config.train.rounds

    def step(self) -> Step:
        began = time.monotonic()
        config, model, train = self._prepared.config, self._prepared.model, self._prepared.train
        torch.manual_seed(derived_seed(config.train.seed, self.round))
        rate = lr_at(self.round + 1, config.optim, config.train.rounds)
        batches = (train.batch(rows) for rows in self._order.micro_batches(self.round + 1, config.train.micro_batch))
        with without_merging(model):
            result = train_round(model, self.optimizer, batches, lr=rate, words=train.words)
        self.round += 1
        seconds = time.monotonic() - began
        metrics = {"loss": result.loss, "lr": rate, "tokens": result.tokens, "seconds": seconds}
        return Step(result.loss, metrics)

    def content(self) -> tuple[Content, Mapping[str, Any]]:
        model = self._prepared.model
        return {
            "weights": changing_tensors(model) if self._prepared.base else model_tensors(model),
            "optimizer": self.optimizer.tensors(self._prepared.stepped),
        }, {}

    def parts(self, folder: Path) -> tuple[str, ...]:
        return ()

    def saved(self, folder: Path) -> None: ...

    def marker(self) -> Mapping[str, str]:
        return {"data": self._prepared.train.digest()}

    def training(self) -> Training:
        public = self._prepared.config.data.provenance == "public"
        return Training(self._prepared.run_id[:12], "public" if public else "none")

    def statement(self) -> None:
        return None

    def close(self) -> None: ...

    def _restore(self, checkpoint: Checkpoint) -> None:
        load_weights(checkpoint, self._prepared.model)
        self.optimizer.load_tensors(self._prepared.stepped, checkpoint.load("optimizer"))
        self.round = checkpoint.round
