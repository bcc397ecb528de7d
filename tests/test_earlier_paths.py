"""Scripts from before the folders still find what they import; decision 0035."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

import coterie

NAMES = {
    "coterie.dp.accounting": ("Mechanism", "epsilon", "noise_multiplier"),
    "coterie.federation.identity": ("Member", "Role", "cert_pem", "key_pem", "new_authority", "new_key"),
    "coterie.training.data": ("read_documents",),
}


@pytest.mark.parametrize("earlier", coterie._MOVED)
def test_an_earlier_path_is_the_same_module_whichever_is_imported_first(earlier: str) -> None:
    now = coterie._MOVED[earlier]
    for first, second in ((earlier, now), (now, earlier)):
        code = (
            f"import importlib; a, b = importlib.import_module({first!r}), importlib.import_module({second!r})\n"
            f"assert a is b and b.__name__ == b.__spec__.name == {now!r}, (a, b, b.__spec__)"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("package", "name"), [(p, n) for p, names in NAMES.items() for n in names])
def test_a_name_of_an_earlier_file_can_be_taken_from_its_folder(package: str, name: str) -> None:
    assert getattr(import_module(package), name).__module__.startswith(f"{package}.")


@pytest.mark.parametrize("package", NAMES)
def test_any_other_name_is_none(package: str) -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        import_module(package).nothing  # noqa: B018
