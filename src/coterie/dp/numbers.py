"""The numbers of a private run, checked with the types of the settings files, whoever passes them."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from coterie.config.numbers import Bands, Count, Epsilon, Fraction, NotNegative, Positive, Smoothing
from coterie.errors import BudgetError


class _Rule(NamedTuple):
    kind: Any
    code: str
    why: str
    fix: str


_RULES = {
    "epsilon": _Rule(
        Epsilon, code="dp-epsilon", why="epsilon 0 allows nothing to be learned, and a huge one promises nothing",
        fix="choose an epsilon between about 0.5 and 10",
    ),
    "delta": _Rule(
        Fraction, code="dp-delta", why="delta is the probability with which the epsilon bound may fail",
        fix="choose a delta between 0 and 1, well below 1 / number of records",
    ),
    "clip_norm": _Rule(
        Positive, code="dp-clip-norm", why="it bounds what one record may contribute; without it no noise is enough",
        fix="set clip_norm to a positive number, such as 1.0",
    ),
    "lot_size": _Rule(
        Count, code="dp-lot-size", why="it is the number of units expected in one round",
        fix="choose a lot size; larger ones (hundreds to thousands) suit private training",
    ),
    "max_lot": _Rule(
        Count, code="dp-lot-limit", why="it is the largest lot of truncated sampling", fix="leave it to the default"
    ),
    "rounds": _Rule(
        Count, code="dp-rounds", why="the number of rounds is fixed in advance", fix="train for at least one round"
    ),
    "epochs": _Rule(
        Positive, code="dp-rounds", why="epochs and lot size fix the number of rounds in advance",
        fix="choose how often each unit is to be used, such as 3",
    ),
    "physical_batch": _Rule(
        Count, code="dp-physical-batch",
        why="it is the number of records computed at once; without any, noise alone is paid",
        fix="choose what fits in memory, such as 16; it never changes the result",
    ),
    "records_per_user": _Rule(
        Count, code="dp-user-cap", why="a user's records in a lot are capped so that one user cannot fill it",
        fix="set records_per_user to 1 or more",
    ),
    "adaptive_quantile": _Rule(
        Fraction, code="dp-quantile", why="it is the share of units whose gradient stays unclipped",
        fix="choose 0.5, or leave it out",
    ),
    "load_share": _Rule(
        Fraction, code="dp-balance", why="it is the part of the clip norm that the released loads take",
        fix="leave it at 0.1",
    ),
    "smoothing": _Rule(
        Smoothing, code="dp-balance", why="it is the weight of the past in an average", fix="leave it at 0.5"
    ),
    "coefficient": _Rule(
        Positive, code="dp-balance", why="it is the weight of the balance loss, or the step of the bias",
        fix="leave it out",
    ),
    "noise_bands": _Rule(
        Bands, code="dp-bands", why="it is the number of rounds over which noise hangs together",
        fix="choose 1 for independent noise, or 4 to 16; `coterie plan` compares them",
    ),
    "seed": _Rule(
        NotNegative, code="dp-seed", why="streams are named by it", fix="leave it out; a seeded run is not private"
    ),
}  # fmt: skip


def checked_number(name: str, value: Any) -> Any:
    """A number of the Python API as a Python ``int`` or ``float``.

    Args:
        name: of the setting, as in `coterie.dp.make_private`.
        value: whatever was passed.

    Raises:
        BudgetError: another type, or outside its range; one sentence that names the setting.
    """
    rule = _RULES[name]
    try:
        return _adapter(name).validate_python(value)
    except ValidationError as error:
        problem = str(error.errors()[0]["msg"]).replace("Input should be", "must be")
        raise BudgetError(
            f"`{name}` is {value!r}, it {problem}.", code=rule.code, why=rule.why, fix=rule.fix, field=name
        ) from None


@cache
def _adapter(name: str) -> TypeAdapter[Any]:
    return TypeAdapter(_RULES[name].kind)


def check_fields(owner: Any, *names: str) -> None:
    """Check and normalise these fields of a frozen dataclass; None stays where a field is optional.

    Raises:
        BudgetError: as `checked_number`.
    """
    for name in names:
        value = getattr(owner, name)
        if value is not None or name in _NEEDED:
            object.__setattr__(owner, name, checked_number(name, value))


_NEEDED = {"epsilon", "delta", "clip_norm", "lot_size", "rounds", "physical_batch", "records_per_user"}
