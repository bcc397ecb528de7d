"""How findings are told."""

from __future__ import annotations

import torch

from coterie.audit.metrics import Estimate, Scores, roc

_ROC_POINTS = 200


def can(value: Estimate) -> str:
    """How a sentence about an AUC begins."""
    return "It can be told" if value.low > 0.5 else "It could not be told"


def shown(value: Estimate) -> str:
    """A value with its interval."""
    return f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"


def thinned(scores: Scores) -> tuple[tuple[float, float], ...]:
    """The curve of false and true positives, with no more points than a picture shows."""
    false_P, true_P = roc(scores)
    kept = torch.linspace(0, len(false_P) - 1, min(len(false_P), _ROC_POINTS)).round().long()
    return tuple(zip(false_P[kept].tolist(), true_P[kept].tolist(), strict=True))
