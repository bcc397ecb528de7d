"""Types of the numbers that settings files and the Python API share, so that both refuse the same values.

Whole numbers may come as Python's or numpy's; a truth value, text, or a number with a fraction is none. Other numbers
are finite.
"""

from __future__ import annotations

import math
import numbers
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

LARGEST_EPSILON = 1000.0
"""Beyond this a budget is refused: it promises nothing, and accounting takes long."""

LARGEST = 2**63 - 1
"""Largest whole number: what a signed 64-bit integer holds."""


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise PydanticCustomError("whole_number", "must be a whole number")
    if abs(int(value)) > LARGEST:
        raise PydanticCustomError("whole_number", "must be a whole number of at most 63 bits")
    return int(value)


def _real(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise PydanticCustomError("real_number", "must be a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise PydanticCustomError("real_number", "must be a finite number")
    return number


Count = Annotated[int, Field(gt=0), BeforeValidator(_whole)]
Bands = Annotated[int, Field(ge=1, le=64), BeforeValidator(_whole)]
NotNegative = Annotated[int, Field(ge=0), BeforeValidator(_whole)]
Epsilon = Annotated[float, Field(gt=0, le=LARGEST_EPSILON), BeforeValidator(_real)]
Positive = Annotated[float, Field(gt=0), BeforeValidator(_real)]
Fraction = Annotated[float, Field(gt=0, lt=1), BeforeValidator(_real)]
Smoothing = Annotated[float, Field(ge=0, lt=1), BeforeValidator(_real)]
