"""Classes of texts, by a run whose text was learnt by label words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from coterie.errors import ConfigError
from coterie.training.data.documents import read_documents
from coterie.training.data.tokenizer import tokenize
from coterie.training.evaluate import batches_of
from coterie.training.loop import to_device
from coterie.training.single.trained import TrainedRun


@dataclass(frozen=True)
class Predictions:
    """What a model says of texts, in file order; blank ones are left out.

    Attributes:
        classes: names, as the settings have them.
        chances: [texts, classes] float32, a softmax over the words of the classes.
        places: file and row of each text.
    """

    classes: tuple[str, ...]
    chances: torch.Tensor
    places: tuple[tuple[Path, str], ...]

    def rows(self) -> list[dict[str, object]]:
        """One JSON object a text: where it stands, its likeliest class, and how likely each is."""
        best = self.chances.argmax(1).tolist()
        return [
            {
                "file": str(file),
                "row": row,
                "class": self.classes[at],
                "chances": dict(zip(self.classes, map(float, chances), strict=True)),
            }
            for (file, row), at, chances in zip(self.places, best, self.chances.tolist(), strict=True)
        ]


@torch.no_grad()
def predict(trained: TrainedRun, files: Sequence[Path]) -> Predictions:
    """The class of every text of some files; a column with classes is not needed, and not read.

    Raises:
        ConfigError: the run did not learn classes.
        DataError: the text cannot be used.
    """
    data, model = trained.config.data, trained.model
    if data.label_words is None:
        raise ConfigError(
            f"{trained.config.run_dir} did not learn classes.",
            code="config-task",
            why="without `data.task: label_words` nothing says which words stand for which classes",
            fix="train with label words, or use `coterie generate`",
        )
    documents = read_documents(files, data, classes_needed=False)
    sequences = tokenize(documents, data, trained.tokenizer)
    device, found = next(model.parameters()).device, []
    model.eval()
    for rows in batches_of(len(sequences), trained.config.train.micro_batch):
        if sequences.words is not None:
            scores = sequences.words.scores(model, to_device(sequences.batch(rows), device))
            found.append(scores.softmax(1).cpu())
    return Predictions(tuple(data.label_words.words), torch.cat(found), documents.places or ())
