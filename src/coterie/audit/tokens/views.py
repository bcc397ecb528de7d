"""What an attacker prepares by itself: public text through the public starting model, seen where a host would sit.

Shape letters: P places of the text, in its order; D model width; K experts chosen per token; B texts at once; T
places of a text; N = B * T.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coterie.models.seam import ExpertsCall, LocalExperts, computed_by, expert_layers

_BATCH, _WIDE = 16, 256
NOTHING = -1
"""The token behind the last one."""


@dataclass(frozen=True)
class TextRows:
    """One MoE layer's rows for known text.

    Attributes:
        hidden_PD: what experts are given, float32.
        gradient_PD: of the text's loss at the layer's output; empty [0, D] where it was not asked for.
        experts_PK, weights_PK: chosen experts and their routing weights.
        token_P: the row's token.
        next_P: the token behind it; `NOTHING` at the end of a text.
        text_P: which text it is of.
    """

    hidden_PD: Tensor
    gradient_PD: Tensor
    experts_PK: Tensor
    weights_PK: Tensor
    token_P: Tensor
    next_P: Tensor
    text_P: Tensor

    @property
    def follows_P(self) -> Tensor:
        """Whether place p + 1 is the next one of the same text, bool [P - 1]."""
        return self.text_P[1:] == self.text_P[:-1]


def views(model: PreTrainedModel, texts: Sequence[Sequence[int]], *, gradients: bool = True) -> list[TextRows]:
    """Run texts through a model and keep what each MoE layer is given, and the gradients at its output.

    Args:
        model: with local experts, in float32 or narrower; its mode, gradients and seam are left as they were.
        texts: token ids, at least one each.
        gradients: whether to run a backward, too.

    Returns:
        A view for each MoE layer, in the model's order; layers that are called several times in one forward show
        their first call.
    """
    kept = [_Kept() for _ in expert_layers(model)]
    with _frozen(model), torch.set_grad_enabled(gradients):
        for start in range(0, len(texts), _BATCH):
            _batch(model, list(texts[start : start + _BATCH]), start, kept, gradients)
    return [each.view() for each in kept]


@torch.no_grad()
def last_rows(model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> tuple[list[TextRows], Tensor]:
    """What each layer is given at the last place of texts of one length, and what the model expects behind it.

    Args:
        model: as in `views`.
        texts: token ids, equally many each.

    Returns:
        A view for each layer with one place per text, and the log probabilities of the next token, [texts, V].
    """
    device, kept = next(model.parameters()).device, [_Kept() for _ in expert_layers(model)]
    expected = []
    with _frozen(model):
        for start in range(0, len(texts), _WIDE):
            ids_BT = torch.tensor([list(text) for text in texts[start : start + _WIDE]])
            watching = _Watching()
            with computed_by(model, watching):
                logits_BTV = model(
                    input_ids=ids_BT.to(device), attention_mask=torch.ones_like(ids_BT).to(device)
                ).logits
            expected.append(logits_BTV[:, -1].float().log_softmax(-1).cpu())
            last_N = torch.zeros(ids_BT.shape, dtype=torch.bool)
            last_N[:, -1] = True
            nothing_B = torch.full((len(ids_BT),), NOTHING)
            labels = ids_BT[:, -1], nothing_B, start + torch.arange(len(ids_BT))
            for each, (call, out_ND) in zip(kept, watching.in_order(), strict=True):
                each.add(call, out_ND, last_N.reshape(-1), labels)
    return [each.view() for each in kept], torch.cat(expected)


def cover(texts: Sequence[Sequence[int]], vocabulary: int, least: int, generator: torch.Generator) -> list[list[int]]:
    """Copies of public texts in which tokens that are rare there stand at random places.

    A decoder knows only tokens that it has seen; whoever has the model can see any token in any text.

    Args:
        texts: public ones.
        vocabulary: ids are below it.
        least: times that every id is to occur in texts and copies together.
        generator: of the places.
    """
    length = max((len(text) for text in texts), default=0)
    if length < 2:
        return []
    counts_V = torch.bincount(torch.cat([torch.tensor(text) for text in texts]), minlength=vocabulary)
    lacking = torch.arange(vocabulary).repeat_interleave((least - counts_V).clamp_min(0))
    left: list[int] = lacking[torch.randperm(len(lacking), generator=generator)].tolist()
    copies: list[list[int]] = []
    long = [text for text in texts if len(text) >= max(2, length // 2)]
    while left:
        copy = list(long[int(torch.randint(len(long), (1,), generator=generator))])
        places = torch.randperm(len(copy), generator=generator)[: max(1, len(copy) // 4)].tolist()
        for place in places[: len(left)]:
            copy[place] = left.pop()
        copies.append(copy)
    return copies


@dataclass
class _Kept:
    parts: list[tuple[Tensor, ...]] = field(default_factory=list)

    def add(self, call: ExpertsCall, out_ND: Tensor, chosen_N: Tensor, labels: tuple[Tensor, Tensor, Tensor]) -> None:
        slope_ND = out_ND.new_empty(0, out_ND.shape[1]) if out_ND.grad is None else out_ND.grad[chosen_N]
        self.parts.append(
            (
                call.hidden_ND.detach()[chosen_N].float().cpu(),
                slope_ND.detach().float().cpu(),
                call.expert_ids_NK.detach()[chosen_N].cpu(),
                call.routing_weights_NK.detach()[chosen_N].float().cpu(),
                *labels,
            )
        )

    def view(self) -> TextRows:
        return TextRows(*(torch.cat(each) for each in zip(*self.parts, strict=True)))


class _Watching:
    """Computes experts from local weights and keeps the first call of each layer."""

    def __init__(self) -> None:
        self._experts = LocalExperts()
        self.calls: dict[int, tuple[ExpertsCall, Tensor]] = {}

    def __call__(self, call: ExpertsCall) -> Tensor:
        out_ND = self._experts(call)
        if call.layer.index not in self.calls:
            if out_ND.requires_grad:
                out_ND.retain_grad()
            self.calls[call.layer.index] = (call, out_ND)
        return out_ND

    def in_order(self) -> list[tuple[ExpertsCall, Tensor]]:
        """The calls by layer."""
        return [self.calls[index] for index in sorted(self.calls)]


def _batch(
    model: PreTrainedModel, texts: Sequence[Sequence[int]], first: int, kept: Sequence[_Kept], gradients: bool
) -> None:
    device = next(model.parameters()).device
    lengths_B = torch.tensor([len(text) for text in texts])
    ids_BT = torch.nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], True)
    mask_BT = torch.arange(ids_BT.shape[1]) < lengths_B[:, None]
    watching = _Watching()
    with computed_by(model, watching):
        logits_BTV = model(input_ids=ids_BT.to(device), attention_mask=mask_BT.long().to(device)).logits
        next_BT = torch.full_like(ids_BT, NOTHING)
        next_BT[:, :-1] = torch.where(mask_BT[:, 1:], ids_BT[:, 1:], NOTHING)
        if gradients:
            aim = next_BT.to(device).reshape(-1)
            loss = nn.functional.cross_entropy(
                logits_BTV.flatten(0, 1).float(), aim, ignore_index=NOTHING, reduction="sum"
            )
            torch.autograd.backward(loss)
    text_BT = (first + torch.arange(len(texts)))[:, None].expand(ids_BT.shape)
    mask_N = mask_BT.reshape(-1)
    labels = ids_BT.reshape(-1)[mask_N], next_BT.reshape(-1)[mask_N], text_BT.reshape(-1)[mask_N]
    for each, (call, out_ND) in zip(kept, watching.in_order(), strict=True):
        each.add(call, out_ND, mask_N, labels)


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """Inside, gradients flow from the embeddings on, and no parameter gets one."""
    wanted = {param: param.requires_grad for param in model.parameters()}
    training = model.training
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Module)
    hook = embedding.register_forward_hook(lambda module, inputs, out: out.requires_grad_(torch.is_grad_enabled()))
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        hook.remove()
        model.train(training)
        for param, wants in wanted.items():
            param.requires_grad_(wants)
