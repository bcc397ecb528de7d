"""A round is one exact step: however it is cut into micro-batches, and never with the model's own loss."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from coterie.config import OptimSpec
from coterie.dp.losses import default_loss
from coterie.errors import ModelError
from coterie.training.data.packing import Batch, Sequences, pack
from coterie.training.loop import (
    finish_round,
    loss_sum,
    sequence_losses,
    train_round,
    use_checkpointing,
)
from coterie.training.optim import make_optimizer
from helpers.comparing import relative

MakeTiny = Callable[..., PreTrainedModel]
SPEC = OptimSpec(lr=1e-2, weight_decay=0.1)


@pytest.fixture(scope="module")
def sequences() -> Sequences:
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 90, (length,), generator=generator).tolist() for length in (12, 5, 9, 3, 12, 7, 2, 10)]
    return pack(texts, sequence_length=12, packing="chunks", end_id=2)


def gradients(model: nn.Module, batches: list[Batch]) -> dict[str, torch.Tensor]:
    """Reference: mean over all tokens of the round, by autograd on one sequence at a time."""
    total, tokens = torch.zeros(()), 0
    for batch in batches:
        for row in range(batch["input_ids"].shape[0]):
            length = int(batch["attention_mask"][row].sum())
            ids = batch["input_ids"][row : row + 1, :length]
            logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            total = total - logprobs.gather(1, ids[0, 1:, None]).sum()
            tokens += length - 1
    names = dict(model.named_parameters())
    found = torch.autograd.grad(total / tokens, list(names.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(names.items(), found, strict=True)}


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "mixtral"])
def test_a_round_moves_by_the_mean_gradient_over_all_its_tokens(
    make_tiny: MakeTiny, sequences: Sequences, family: str
) -> None:
    model = make_tiny(family)
    batches = [sequences.batch(rows) for rows in ([0, 1, 2], [3, 4], [5])]
    expected = gradients(model, batches)
    spec = OptimSpec(lr=1e-2, weight_decay=0.1, eps=1e-3)  # a smaller one blows rounding of tiny gradients up
    optimizer = make_optimizer(model.parameters(), spec)
    reference_model = make_tiny(family)
    reference = torch.optim.AdamW(reference_model.parameters(), 1e-2, spec.betas, spec.eps, 0.1)
    for name, parameter in reference_model.named_parameters():
        parameter.grad = expected[name]
    reference.step()
    for batch in batches:
        loss, _ = loss_sum(model, batch)
        loss.backward()
    tokens = sum(int(sequences.lengths[row]) - 1 for row in range(6))
    for name, parameter in model.named_parameters():
        grad = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        assert relative(grad / tokens, expected[name]) < 1e-5 or expected[name].norm() < 1e-7, name
    finish_round(optimizer, tokens, lr=1e-2)
    for (name, ours), theirs in zip(model.named_parameters(), reference_model.parameters(), strict=True):
        assert relative(ours.detach(), theirs.detach()) < 1e-5, name


def test_micro_batches_do_not_change_a_round(make_tiny: MakeTiny, sequences: Sequences) -> None:
    results = []
    for groups in ([[0, 1, 2, 3, 4, 5]], [[0], [1, 2], [3, 4, 5]]):
        model = make_tiny()
        done = train_round(
            model,
            make_optimizer(model.parameters(), OptimSpec(eps=1e-3)),
            [sequences.batch(rows) for rows in groups],
            lr=1e-2,
        )
        results.append((done, dict(model.named_parameters())))
    (one, whole), (many, parts) = results
    assert one.tokens == many.tokens
    assert one.loss == pytest.approx(many.loss, rel=1e-6)
    for name in whole:
        assert relative(parts[name].detach(), whole[name].detach()) < 1e-5, name


def test_padding_neither_counts_nor_changes_a_sequence(make_tiny: MakeTiny, sequences: Sequences) -> None:
    model = make_tiny()
    losses, tokens = sequence_losses(model, sequences.batch([0, 1, 6]))
    assert tokens.tolist() == [int(sequences.lengths[row]) - 1 for row in (0, 1, 6)]
    for position, row in enumerate((0, 1, 6)):
        alone, _ = sequence_losses(model, sequences.batch([row]))
        torch.testing.assert_close(losses[position], alone[0], rtol=1e-5, atol=1e-5)


def test_the_loss_is_the_families_own_mean_times_its_tokens(make_tiny: MakeTiny, sequences: Sequences) -> None:
    model = make_tiny()
    batch = sequences.batch([0, 1, 2])
    total, tokens = loss_sum(model, batch)
    theirs = model(**batch).loss
    assert total.item() / tokens == pytest.approx(theirs.item(), rel=1e-5)


def test_gradient_checkpointing_does_not_change_a_round(make_tiny: MakeTiny, sequences: Sequences) -> None:
    plain, saving = make_tiny().train(), make_tiny().train()
    use_checkpointing(saving)
    for model in (plain, saving):
        train_round(model, make_optimizer(model.parameters(), SPEC), [sequences.batch([0, 1, 2])], lr=1e-2)
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_bfloat16_learns_like_float32(make_tiny: MakeTiny, sequences: Sequences) -> None:
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = make_tiny(dtype=dtype)
        optimizer = make_optimizer(model.parameters(), OptimSpec())
        rounds = [train_round(model, optimizer, [sequences.batch(range(8))], lr=5e-3).loss for _ in range(30)]
        assert rounds[-1] < rounds[0] - 1
        losses[dtype] = rounds[-1]
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], rel=0.1)


def test_bfloat16_micro_batches_are_summed_in_float32(make_tiny: MakeTiny, sequences: Sequences) -> None:
    model = make_tiny(dtype=torch.bfloat16)
    batches = [sequences.batch([row]) for row in range(8)] * 4
    sums = {name: torch.zeros_like(param, dtype=torch.float32) for name, param in model.named_parameters()}
    tokens = 0
    for batch in batches:
        loss, counted = loss_sum(model, batch)
        tokens += counted
        for (name, _), grad in zip(
            model.named_parameters(),
            torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True),
            strict=True,
        ):
            sums[name] += grad.float()
    masters = {name: param.detach().float().requires_grad_() for name, param in model.named_parameters()}
    spec = OptimSpec(eps=1e-3)
    reference = torch.optim.AdamW(masters.values(), 1e-2, spec.betas, spec.eps, 0.0)
    for name, master in masters.items():
        master.grad = sums[name] / tokens
    reference.step()
    optimizer = make_optimizer(model.parameters(), spec)
    train_round(model, optimizer, batches, lr=1e-2)
    for name, param in model.named_parameters():
        assert relative(optimizer.state[param]["master"], masters[name].detach()) < 1e-6, name


def test_a_model_whose_experts_bypass_coterie_is_not_trained(make_tiny: MakeTiny, sequences: Sequences) -> None:
    model = make_tiny()
    model.set_experts_implementation("eager")
    with pytest.raises(ModelError, match="not through coterie"):
        train_round(model, make_optimizer(model.parameters(), SPEC), [sequences.batch([0])], lr=1e-2)


@pytest.mark.parametrize("left", [False, True])
def test_plain_and_private_training_have_one_loss(make_tiny: MakeTiny, left: bool) -> None:
    """Sums and means over the same tokens, for padding on either side: each record by log-probabilities, alone."""
    model = make_tiny("qwen3_moe").eval()
    ids_BT = torch.tensor([[5, 9, 8, 7, 6], [4, 3, 11, 12, 13], [21, 22, 23, 24, 25]])
    mask_BT = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    labels_BT = ids_BT.masked_fill(mask_BT == 0, -100)
    labels_BT[0, 2] = -100
    batch = {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels_BT}
    if left:
        batch = {name: value.flip(1) for name, value in batch.items()}
    with torch.no_grad():
        sums_B, counts_B = sequence_losses(model, batch)
        means_B = default_loss(model, batch)
        logprobs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    for row in range(3):
        ids, mask, labels = (batch[name][row].tolist() for name in ("input_ids", "attention_mask", "labels"))
        counted = [t for t in range(1, 5) if labels[t] != -100 and mask[t - 1]]
        wanted = sum(-float(logprobs[row, t - 1, ids[t]]) for t in counted)
        assert int(counts_B[row]) == len(counted)
        assert float(sums_B[row]) == pytest.approx(wanted, rel=1e-5)
        assert float(means_B[row]) == pytest.approx(wanted / max(len(counted), 1), rel=1e-5)
