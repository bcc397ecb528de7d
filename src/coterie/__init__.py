"""coterie trains Mixture-of-Experts language models on private text, alone or together.

Importing this package does not load torch: submodules do, when they are imported.

From the bottom: `coterie.errors`, `coterie.revision`, `coterie.storage`, `coterie.ranks`, `coterie.pages`,
`coterie.config`, `coterie.models`, `coterie.checkpoints`, then `coterie.dp` (privacy) and `coterie.federation`
(several organisations) side by side, `coterie.training` which joins them, `coterie.hf`, `coterie.audit`,
`coterie.demonstration`, `coterie.flare`, `coterie.cli`, which `coterie.__main__` starts. Each package's docstring
names its modules in reading order.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__version__ = "0.1.0"

_MOVED = {
    "coterie.dp.budget": "coterie.dp.accounting.budget",
    "coterie.dp.ledger": "coterie.dp.accounting.ledger",
    "coterie.federation.files": "coterie.storage",
    "coterie.federation.grpc_transport": "coterie.federation.wire.grpc_transport",
    "coterie.federation.kit": "coterie.federation.identity.kit",
    "coterie.federation.provision": "coterie.federation.identity.provision",
    "coterie.federation.roster": "coterie.federation.identity.roster",
    "coterie.training.tokenizer": "coterie.training.data.tokenizer",
}
"""Modules that scripts outside this repository import, by their path before the folders; see decision 0035."""


class _Moved(MetaPathFinder, Loader):
    """Gives a module under its earlier path: the same object, not a copy."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in _MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(_MOVED[spec.name])
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        if spec is not None and isinstance(spec.loader, _Moved):
            module.__spec__ = spec.loader_state


sys.meta_path.append(_Moved())
