"""Whether the numbers in a message, or in this process's own parameters, can be computed with."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from coterie.errors import MessageError, RoundError


def largest(values: Tensor) -> float:
    """The largest size of a value: NaN or infinity where there is one, 0 of nothing. One pass, without a copy."""
    if values.numel() == 0:
        return 0.0
    low, high = torch.aminmax(values.detach())
    return float(torch.maximum(-low, high))


def check_received(
    peer: str, kind: str, name: str, values: Tensor, limit: float, *, where: str | None = None
) -> None:
    """Make sure that what came from a member is finite and at most ``limit`` in size.

    Args:
        peer: who sent it.
        kind: of the message.
        name: of the tensor in it.
        values: any shape and dtype.
        limit: largest size of one value.
        where: round and part, for the error text.

    Raises:
        MessageError: ``message-not-finite`` or ``message-too-large``; no value is repeated.
    """
    size = largest(values)
    if not math.isfinite(size):
        raise MessageError(
            f"{peer} sent `{kind}` with NaN or infinity in its {name}.",
            code="message-not-finite",
            where=where,
            why="it would ruin the parameters of everybody who computes with it",
            fix=f"nothing of it was used; {peer} should look at its own log and data",
            field=name.replace(" ", "_"),
            peer=peer,
        )
    if size > limit:
        raise MessageError(
            f"{peer} sent `{kind}` with a value beyond {limit:.4g} in its {name}.",
            code="message-too-large",
            where=where,
            why="one such value moves what is shared more than everybody's text together",
            fix="nothing of it was used; if the model honestly has such values, agree on a higher `value_limit`",
            field=name.replace(" ", "_"),
            peer=peer,
        )


def check_own(what: str, tensors: Iterable[Tensor], limit: float = math.inf, *, where: str | None = None) -> None:
    """Make sure that what this process computed is finite and at most ``limit``, before anybody else sees it.

    So a run that diverges says so where it does, and no member is blamed for what it was given.

    Raises:
        RoundError: ``run-diverged``.
    """
    for values in tensors:
        if not values.is_floating_point():
            continue
        size = largest(values)
        if not size <= limit or math.isinf(size):
            raise RoundError(
                f"training has diverged: {what} "
                + (f"grew beyond {limit:.4g}." if math.isfinite(size) else "hold NaN or infinity."),
                code="run-diverged",
                where=where,
                why="going on would only spread it; what was saved before is kept",
                fix="go on from the newest checkpoint with a lower `optim.lr` or more warm-up",
            )
