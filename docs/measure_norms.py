"""How exact the engine is, family by family, on this machine's releases of torch and transformers.

``python docs/measure_norms.py`` writes the column of docs/models.md; then `coterie models --markdown docs/models.md`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from coterie.dp.losses import default_loss
from coterie.dp.per_sample.engine import Engine
from coterie.models.zoo.catalogue import causal_lm_types
from coterie.models.zoo.tiny import VOCAB, tiny_model

COLUMN = Path(__file__).parent / "models" / "norms.json"
_RECORDS, _TOKENS = 3, 7


def norm_errors(model_types: Iterable[str] | None = None) -> dict[str, float]:
    """Largest relative error of the per-sample norms of a tiny model of each family, against batches of one.

    Args:
        model_types: families; default: every causal LM behind the experts interface.

    Returns:
        Family to ``max_b | ||g_b|| / reference_b - 1 |`` over three random records, all parameters together.

    Cost: under a second a family.
    """
    return {family: _norm_error(tiny_model(family)) for family in model_types or causal_lm_types()}


def _norm_error(model: nn.Module) -> float:
    ids = torch.randint(3, VOCAB, (_RECORDS, _TOKENS), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    ours = Engine(model).norms(batch)
    theirs = torch.stack(
        [_alone(model, {name: value[i : i + 1] for name, value in batch.items()}) for i in range(_RECORDS)]
    )
    return float((ours.cpu() / theirs - 1).abs().max())


def _alone(model: nn.Module, one: dict[str, Tensor]) -> Tensor:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(default_loss(model, one).sum(), trained, allow_unused=True)
    return torch.stack([g.double().square().sum() for g in found if g is not None]).sum().sqrt()


def main() -> None:
    cells = {family: f"{error:.1e}" for family, error in norm_errors().items()}
    column = {"title": "per-sample norms, largest relative error", "cells": cells}
    COLUMN.write_text(json.dumps(column, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
