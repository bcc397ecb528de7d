"""How an epsilon is printed, everywhere."""

from __future__ import annotations


def epsilon_digits(epsilon: float) -> str:
    """Three decimals, and below 0.1 three significant digits: a small one is never printed as nothing.

    >>> epsilon_digits(2.5), epsilon_digits(0.00012345), epsilon_digits(0.0)
    ('2.500', '0.000123', '0')
    """
    return f"{epsilon:.3f}" if epsilon >= 0.1 else f"{epsilon:.3g}"
