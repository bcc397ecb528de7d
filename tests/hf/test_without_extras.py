"""What is missing from an installation is named with the extra that brings it."""

from __future__ import annotations

import sys

import pytest

import coterie.hf
from coterie.errors import ModelError


@pytest.mark.parametrize("name", coterie.hf.__all__)
def test_without_accelerate_the_extra_is_named_before_anything_else_misses_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ModelError, match="accelerate") as missing:
        getattr(coterie.hf, name)
    assert missing.value.code == "hf-no-accelerate"
    assert "pip install 'coterie[hf]'" in str(missing.value.fix)
