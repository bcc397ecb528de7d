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


IMPORTED_FIRST = """
import importlib, os, sys
import torch, transformers  # what takes long is imported once; of coterie every child has nothing but its root
import coterie
for earlier, now in coterie._MOVED.items():
    for first, second in ((earlier, now), (now, earlier)):
        child = os.fork()
        if not child:
            a, b = importlib.import_module(first), importlib.import_module(second)
            sound = a is b and b.__name__ == b.__spec__.name == now
            os._exit(not sound)
        if os.waitpid(child, 0)[1]:
            print(first, second)
"""


def test_an_earlier_path_is_the_same_module_whichever_is_imported_first() -> None:
    assert coterie._MOVED
    done = subprocess.run([sys.executable, "-c", IMPORTED_FIRST], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize(("package", "name"), [(p, n) for p, names in NAMES.items() for n in names])
def test_a_name_of_an_earlier_file_can_be_taken_from_its_folder(package: str, name: str) -> None:
    assert getattr(import_module(package), name).__module__.startswith(f"{package}.")


@pytest.mark.parametrize("package", NAMES)
def test_any_other_name_is_none(package: str) -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        import_module(package).nothing  # noqa: B018
