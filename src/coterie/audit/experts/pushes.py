"""From transcripts to what an adversary holds: the sums that it opens, and the weights that they were made with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from coterie.audit.experts.masked import open_together
from coterie.audit.experts.opened import ExpertSum, Opened
from coterie.audit.transcript import ReceivedPush, Transcript
from coterie.federation.experts.parts import Part, span
from coterie.federation.experts.serve_weights import CHUNK
from coterie.models import seam
from coterie.models.grouped import as_EIO
from coterie.models.seam import ExpertLayer

BFLOAT16_ROUNDING = 2.0**-7 / 6**0.5
"""Largest standard deviation of a value's rounding over the value, to one of two neighbours by coin."""


def open_pushes(pushes: Iterable[ReceivedPush], layers: Sequence[ExpertLayer], rounding: float = 0.0) -> Opened:
    """All that some parts of one push say together.

    Args:
        pushes: parts of one owner's sum of one round, received by whoever works together.
        layers: of the model.
        rounding: see `coterie.audit.experts.opened.Spectrum`.
    """
    experts: dict[tuple[int, int], ExpertSum] = {}
    trunk: dict[str, Tensor] = {}
    for push in pushes:
        if push.part.layer < 0:
            trunk |= push.sums
            continue
        layout = layers[push.part.layer].layout
        if layout.up_name not in push.sums:  # adapters' sums travel with the trunk
            continue
        sums = (as_EIO(push.sums[name], layout.is_transposed) for name in (layout.up_name, "down_proj"))
        for expert, first_DG, second_FD in zip(push.part.experts, *sums, strict=True):
            experts[push.part.layer, expert] = ExpertSum(first_DG, second_FD, rounding=rounding)
    return Opened(experts, trunk)


def rounding_of(transcript: Transcript) -> float:
    """What its sums were rounded by on their way; see `coterie.audit.experts.opened.Spectrum`."""
    return BFLOAT16_ROUNDING if transcript.push_dtype == torch.bfloat16 else 0.0


def by_round(transcripts: Iterable[Transcript]) -> dict[int, list[ReceivedPush]]:
    """The parts of the owner's sum of every round, of its last attempt that anybody received whole; where pushes were
    masked, of the sum that those who recorded these open together.

    Parts of earlier attempts are left out, though an adversary has them: without a budget they may be of the same
    records, and under one they are the same bytes.
    """
    found: dict[int, dict[tuple[int, str], ReceivedPush]] = {}
    for push in _opened_by(list(transcripts)):
        held = found.setdefault(push.round, {})
        if push.attempt >= max((other.attempt for other in held.values()), default=0):
            held = {key: other for key, other in held.items() if other.attempt == push.attempt}
            held[push.part.number, push.part.host] = push
            found[push.round] = held
    return {number: [held[key] for key in sorted(held)] for number, held in sorted(found.items())}


def _opened_by(transcripts: Sequence[Transcript]) -> Iterator[ReceivedPush]:
    owner = transcripts[0].sender if transcripts else None
    if owner is not None and transcripts[0].masked:
        yield from open_together(transcripts, owner)
    else:
        for transcript in transcripts:
            yield from transcript.pushes()


def standard_deviation(opened: Opened) -> float:
    """Of the noise in sums that are mostly noise, from the sums: the middle of their sizes."""
    sizes = [value.abs().flatten() for each in opened.experts.values() for value in (each.first_DG, each.second_FD)]
    return float(torch.cat(sizes).median()) / 0.6744897501960817 if sizes else 0.0


def noised(opened: Opened, noise: float) -> Opened:
    """The same sums, with what their noise is known to be."""
    experts = {key: replace(each, noise=noise) for key, each in opened.experts.items()}
    return Opened(experts, opened.trunk, noise)


# ---- weights that were served ----


def served(transcripts: Sequence[Transcript]) -> Iterator[tuple[int, dict[int, dict[str, Tensor]]]]:
    """Round by round, the parts of the model that hosts served anew: {part number: tensors}.

    Every party is served the whole model in order to compute; what one party stores itself stands in the transcripts
    of the others, and the party knows it.

    Args:
        transcripts: of all who work together; everything that they received is read, whoever sent it.
    """
    blobs: dict[int, dict[int, tuple[Part, Tensor]]] = {}
    for transcript in transcripts:
        for entry in replace(transcript, sender=None):
            if entry.kind != CHUNK or not entry.reply or entry.attempt < 1:
                continue
            part, dtype = transcript.parts[entry.part], transcript.weights_dtype
            if not transcript.holds(part, dtype):
                continue
            held = blobs.setdefault(entry.round, {})
            blob = held.setdefault(part.number, (part, torch.zeros(part.num_bytes(dtype), dtype=torch.uint8)))[1]
            blob[span(blob.numel(), entry.chunk)] = entry.tensors["bytes"]
    dtype = transcripts[0].weights_dtype if transcripts else torch.float32
    for number in sorted(blobs):
        parts = {key: part.decode(blob, dtype) for key, (part, blob) in blobs[number].items()}
        yield number, {key: {name: value.float() for name, value in each.items()} for key, each in parts.items()}


@torch.no_grad()
def put(model: nn.Module, parts: Sequence[Part], tensors: Mapping[int, Mapping[str, Tensor]]) -> None:
    """Put served parts into a model."""
    own = dict(model.named_parameters())
    layers = seam.expert_layers(model)
    for part in parts:
        for name, value in tensors.get(part.number, {}).items():
            if part.layer >= 0:
                layers[part.layer].parameters()[name][list(part.experts)] = value
            elif name in own:
                own[name].copy_(value)


@torch.no_grad()
def round_as_served(model: nn.Module, dtype: torch.dtype, trunk: bool) -> None:
    """Round a starting model as everybody computes with it in the first round.

    Args:
        model: in float32.
        dtype: what weights travel as.
        trunk: the trunk travels, too.
    """
    experts = {id(param) for layer in seam.expert_layers(model) for param in layer.parameters().values()}
    for param in model.parameters():
        if trunk or id(param) in experts:
            param.copy_(param.to(dtype))
