"""Private training for people who live in `transformers.Trainer`. Names are loaded when they are first used.

`coterie.hf.trainer` is a Trainer whose steps are rounds of a private session; `coterie.hf.arguments` is what it is
told and what it refuses; `coterie.hf.choices` keeps private figures from deciding anything; `coterie.hf.shared` makes
one trainer of a launcher's processes; `coterie.hf.extras` names what is not installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and the reference pages
    from coterie.hf.arguments import PrivacyArguments as PrivacyArguments
    from coterie.hf.trainer import PrivateTrainer as PrivateTrainer

_MODULES = {"PrivateTrainer": "trainer", "PrivacyArguments": "arguments"}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module(f"{__name__}.extras").check_installed()
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
