"""What people and programs read beside an exported model: its card, and what is promised about the text behind it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from coterie.models.split.trainings import Training, read_trainings
from coterie.revision import software
from coterie.storage import write_json, write_whole

CARD_FILE, STATEMENT_FILE = "README.md", "privacy.json"
_FORMAT = 1

Promise = Literal["budget", "public", "none", "unknown"]

_WORDS: dict[Promise, str] = {
    "budget": "Every run behind this model read private text within a privacy budget, or public text. For one "
    "record (or one user: the run's own statement says which) of the text that a ledger stands for, the "
    "runs below that are counted in that ledger are differentially private: together at most with the sum "
    "of their epsilons and deltas. People whose text is in several ledgers, or several times in one, are "
    "protected less. What other runs spent on the same text, and what is not covered, is in each party's "
    "own statement.",
    "public": "Every run behind this model read text that its owner declared public. Nothing is promised about it.",
    "none": "A run behind this model read text without a privacy budget, or under noise that was not secret. The "
    "model may give that text away, and nothing is promised about it.",
    "unknown": "No training is recorded: the weights are those that were split, or whatever trained them left no "
    "record. Nothing is promised.",
}
_CARD = """---
library_name: {library}
tags: [{tags}]
---

# {name}

Written by coterie {version} in the format that transformers reads{size}. Nothing of coterie is
needed to load it.

## Privacy

{promise}
{table}
The same for programs: `{statement}`.
"""


def promise_of(trainings: Sequence[Training]) -> Promise:
    """What may be said of a model with these trainings behind it: no more than of the weakest."""
    if not trainings:
        return "unknown"
    if not all(training.protected for training in trainings):
        return "none"
    return "budget" if any(training.privacy == "budget" for training in trainings) else "public"


def write_card(folder: Path) -> None:
    """Put ``README.md`` and ``privacy.json`` beside an exported model or adapter, by what lies there.

    Args:
        folder: as `exporter.export` fills it, its trainings written.

    Raises:
        OSError: the disk is full or broken.
    """
    trainings = read_trainings(folder)
    promise = promise_of(trainings)
    listed = [asdict(training) for training in trainings]
    content = {"format": _FORMAT, **software(), "promise": promise, "words": _WORDS[promise], "trainings": listed}
    write_json(folder / STATEMENT_FILE, content)
    adapter = (folder / "adapter_config.json").is_file()
    tags = ["coterie", "mixture-of-experts", *(["differential-privacy"] if promise == "budget" else [])]
    text = _CARD.format(
        library="peft" if adapter else "transformers",
        tags=", ".join(tags),
        name="Adapters for a Mixture-of-Experts model" if adapter else _name(folder),
        version=software()["coterie"],
        size=_size(folder),
        promise=_WORDS[promise],
        table=_table(trainings),
        statement=STATEMENT_FILE,
    )
    write_whole(folder / CARD_FILE, text.encode())


def _name(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    return str((config.get("architectures") or [config.get("model_type", "model")])[0])


def _size(folder: Path) -> str:
    sizes = [file.stat().st_size for file in folder.glob("*.safetensors")]
    return f": {len(sizes)} safetensors file{'s' * (len(sizes) > 1)}, {sum(sizes) / 1e6:.1f} MB"


def _table(trainings: Sequence[Training]) -> str:
    if not trainings:
        return ""
    rows = ["", "| run | privacy | ledger | epsilon | delta |", "|---|---|---|---|---|"]
    for training in trainings:
        values = (training.run, training.privacy, training.ledger, training.epsilon, training.delta)
        rows.append("| " + " | ".join("-" if value is None else str(value) for value in values) + " |")
    return "\n".join([*rows, ""])
