"""What is missing from an installation is named with the extra that brings it."""

from __future__ import annotations

import pytest

from coterie.errors import ModelError
from coterie.hf import extras


def test_private_trainer_without_accelerate_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    extras.check_installed()
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "accelerate" else object())
    with pytest.raises(ModelError, match="accelerate") as missing:
        extras.check_installed()
    assert missing.value.code == "hf-no-accelerate"
    assert "pip install 'coterie[hf]'" in str(missing.value.fix)
