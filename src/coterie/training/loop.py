"""One round of training, and the pieces the federated party and private training reuse.

The loss is a sum over tokens and the gradient is divided once, by the tokens of the whole round: so micro-batches,
parties and processes may share a round in any way without changing its gradient. Labels are never given to the model:
its own loss would be a mean over the micro-batch.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coterie.dp.label_words import LabelWords
from coterie.dp.losses import next_tokens, summed_token_losses
from coterie.errors import ModelError
from coterie.models.seam import check_selected
from coterie.training.data.packing import Batch
from coterie.training.optim import Float32Optimizer, set_lr


@dataclass(frozen=True)
class RoundResult:
    """What a round did.

    Attributes:
        loss_sum: summed cross-entropy in nats, before the step.
        tokens: predicted tokens it was summed over.
    """

    loss_sum: float
    tokens: int

    @property
    def loss(self) -> float:
        """Mean per token, nats."""
        return self.loss_sum / self.tokens


def sequence_losses(model: nn.Module, batch: Batch, words: LabelWords | None = None) -> tuple[Tensor, Tensor]:
    """Summed next-token cross-entropy of each sequence and its number of predicted tokens: [B] float32, [B] int64.

    With ``words`` the cross-entropy of each sequence's class among the words of all classes, one token each.

    Entry b depends on sequence b alone (up to rounding), and positions labelled -100 count nowhere.
    """
    if words is not None:
        losses_B = words.loss(model, batch)
        return losses_B, torch.ones_like(losses_B, dtype=torch.int64)
    outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    return summed_token_losses(outputs.logits[:, :-1], next_tokens(batch["labels"], batch["attention_mask"]))


def loss_sum(model: nn.Module, batch: Batch, words: LabelWords | None = None) -> tuple[Tensor, int]:
    """Summed next-token cross-entropy of a micro-batch (scalar, nats) and the tokens it counts."""
    losses_B, tokens_B = sequence_losses(model, batch, words)
    return losses_B.sum(), int(tokens_B.sum())


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def train_round(
    model: nn.Module,
    optimizer: Float32Optimizer,
    micro_batches: Iterable[Batch],
    *,
    lr: float,
    words: LabelWords | None = None,
) -> RoundResult:
    """One optimiser step from the micro-batches of a round.

    Raises:
        ModelError: something put other code than coterie's behind the model's experts.
    """
    check_selected(model)
    total, tokens = 0.0, 0
    device = next(model.parameters()).device
    optimizer.zero_grad()
    for batch in micro_batches:
        loss, counted = loss_sum(model, to_device(batch, device), words)
        torch.autograd.backward(loss)
        optimizer.gather()
        total += loss.item()
        tokens += counted
    finish_round(optimizer, tokens, lr=lr)
    return RoundResult(total, tokens)


@torch.no_grad()
def finish_round(optimizer: Float32Optimizer, tokens: float, *, lr: float) -> None:
    """Divide the summed gradients by the round's tokens and step every parameter, also those without a gradient."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.requires_grad:
                optimizer.gradient(param).div_(tokens)
    set_lr(optimizer, lr)
    optimizer.step()
    optimizer.zero_grad()


def use_checkpointing(model: PreTrainedModel) -> None:
    """Recompute activations in backward (non-reentrant: hooks and the seam see the second forward too).

    Raises:
        ModelError: the family does not offer it.
    """
    if not model.supports_gradient_checkpointing:
        raise ModelError(
            f"{type(model).__name__} cannot recompute activations.",
            code="model-no-checkpointing",
            fix="set model.gradient_checkpointing: false",
        )
    settings = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # its name from transformers 5.23 on
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


class StopFlag:
    """Remembers that someone asked the run to stop; the loop looks at it between rounds."""

    def __init__(self) -> None:
        self._event = threading.Event()

    @property
    def asked(self) -> bool:
        return self._event.is_set()

    def set(self) -> bool:
        """Ask for a stop after the current round, which can always be granted."""
        self._event.set()
        return True
