"""Text becomes sequences.

`coterie.training.data.documents` reads what settings name, `coterie.training.data.readers` each kind of file;
`coterie.training.data.chat` writes conversations by a template and knows the answers in them,
`coterie.training.data.label_words` texts by a prompt that asks for their class;
`coterie.training.data.public_text` holds what is called public against what is trained on;
`coterie.training.data.tokenizer` makes or loads one; `coterie.training.data.packing` cuts sequences and says which of
them a round takes. `coterie.training.data.check` shows what came out.
"""

from importlib import import_module
from typing import Any

_HERE = ("read_documents",)


def __getattr__(name: str) -> Any:
    if name not in _HERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("coterie.training.data.documents"), name)
