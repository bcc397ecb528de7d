"""What models of `quality.py` answer to the questions of the commonsense sets, beside guessing.

    python benchmarks/quality_tasks.py quality --limit 500

Needs ``pip install 'coterie[eval]'``, and the first seed's ``public`` and ``centralised`` jobs of all parties. Leaves
``commonsense.json`` in the folder, of which `quality_report.py` makes a table. A set with choices that are longer
than what the model reads is left out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from coterie.errors import DataError
from coterie.training.tasks.harness import ask
from coterie.training.tasks.questions import SETS
from quality_jobs import kept_model, public_run
from quality_text import data_folder

ANSWERS = "commonsense.json"


def answers(model: Path, data: Path, limit: int) -> list[dict[str, Any]]:
    """A model's shares of right answers, a row for each set."""
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = []
    for task in SETS:
        try:
            found += ask(loaded, tokenizer, [task], data / "commonsense_qa", limit=limit)
        except DataError as error:
            if error.code != "eval-choice-too-long":
                raise
            print(f"{task} is left out: {error.message}")
    return [one.as_json() for one in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of quality.py")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--limit", type=int, default=500, help="questions of each set")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    seed = json.loads((asked.folder / "about.json").read_text("utf-8"))["sizes"]["seeds"][0]
    models = {"public": public_run(asked.folder, seed) / "model", "centralised": kept_model(asked.folder)}
    data = data_folder(asked.data)
    found = {name: answers(path, data, asked.limit) for name, path in models.items()}
    (asked.folder / ANSWERS).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
