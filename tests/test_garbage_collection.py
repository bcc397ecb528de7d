"""No Python runs while garbage is collected in these tests; conftest.py says why."""

from __future__ import annotations

import gc

from hypothesis import given
from hypothesis import strategies as st


@given(drawn=st.integers())
def test_hypothesis_does_not_look_on(drawn: int) -> None:
    assert gc.callbacks == []
