"""What a record's gradient is scaled by before it enters a private sum, by the project's own per-sample engine."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from coterie.audit.experts.simulate import by_length
from coterie.dp.per_sample.engine import Engine


def factors(model: nn.Module, records: Sequence[Sequence[int]], clip_norm: float) -> Tensor:
    """[records] float32: times the gradient of a record's *summed* next-token loss, what a private party adds.

    Args:
        model: everything that is trained requires a gradient in it or nothing does, which means everything.
        records: token ids, at least two each; a shorter one gets 0.
        clip_norm: C, over all trained parameters together.
    """
    copied = copy.deepcopy(model)
    if not any(param.requires_grad for param in copied.parameters()):
        copied.requires_grad_(True)
    engine = Engine(copied)
    found = torch.zeros(len(records))
    for numbers, ids_BT in by_length(records):
        predicted = ids_BT.shape[1] - 1
        if predicted:
            batch = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT), "labels": ids_BT}
            norms_B = engine.norms(batch).float()
            found[numbers] = (clip_norm / norms_B.clamp_min(1e-30)).clamp_max(1.0) / predicted
    return found
