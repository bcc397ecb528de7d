"""A run's preconditioner, from public text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coterie.config import FederationConfig, PartyConfig, TrainConfig, TrainSpec, load_yaml, party_privacy
from coterie.config.load import names_setting
from coterie.dp.losses import default_loss
from coterie.errors import ConfigError, ModelError
from coterie.models.preconditioner import Preconditioner
from coterie.models.second_moments import measure
from coterie.training.data.documents import read_documents
from coterie.training.data.packing import Sequences
from coterie.training.data.public_text import check_not_private, read_public
from coterie.training.data.tokenizer import get_tokenizer, tokenize
from coterie.training.loop import to_device
from coterie.training.single.setup import build_for


@dataclass(frozen=True)
class PublicRecords:
    """Public text as a run's model would be trained on it.

    Attributes:
        model: without a preconditioner, in eval mode.
        sequences: of all the text.
        drawn: which of them are measured.
    """

    model: nn.Module
    sequences: Sequences
    drawn: Sequence[int]

    @classmethod
    def of(cls, config: TrainConfig, text: Sequence[Path], most: int) -> PublicRecords:
        """Read text as the run's own is read.

        Args:
            config: of a train.yaml; its preconditioner is not read, and its own text only to see that this is none
                of it.
            text: files.
            most: how many records are drawn, by `train.seed`.

        Raises:
            ConfigError: the model does not fit the tokenizer or the sequence length.
            DataError: the text cannot be used, or the run trains on it.
        """
        data = config.data
        public = read_public(text, data, "--text")
        here = [file for file in data.train if file.exists()]  # who makes it for a federation may have no own text
        if here:
            check_not_private(
                public, text, read_documents(here, data, classes_needed=False), here, "--text",
                "name text that is nobody's secret",
            )  # fmt: skip
        tokenizer = get_tokenizer(data.tokenizer, config.model, data)
        sequences = tokenize(public, data, tokenizer)
        order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(config.train.seed))
        return cls(build_for(config, tokenizer).eval(), sequences, order[:most].tolist())

    def preconditioner(self, power: float, damping: float, done: Callable[[], None]) -> Preconditioner:
        """Measure; see `coterie.models.second_moments.measure`.

        Args:
            power: see there.
            damping: see there.
            done: called after each record.
        """
        device = next(self.model.parameters()).device
        words = self.sequences.words

        def batches() -> Iterator[dict[str, Any]]:
            for number in self.drawn:
                yield to_device(self.sequences.collate([self.sequences[number]]), device)
                done()

        return measure(self.model, batches(), default_loss if words is None else words.loss, power, damping)


def settings_for(file: Path) -> TrainConfig:
    """What a train.yaml says of model, text and privacy, or a party.yaml with its federation.

    Raises:
        ConfigError: the file is neither, or does not fit its federation.
    """
    if not names_setting(file, "party"):
        return load_yaml(file, TrainConfig)
    party = load_yaml(file, PartyConfig)
    federation = load_yaml(party.federation, FederationConfig)
    train = TrainSpec(rounds=federation.train.rounds, seed=federation.train.seed)
    return TrainConfig(
        model=federation.model, data=party.data, train=train, privacy=party_privacy(federation, party),
        run_dir=party.run_dir, device=party.device,
    )  # fmt: skip


def place_of(config: TrainConfig) -> Path:
    """The file that the settings name, to be written.

    Raises:
        ConfigError: they name none, or a file that is something else.
    """
    spec = config.preconditioner
    if spec is None:
        raise ConfigError(
            "The settings name no preconditioner.",
            code="config-no-preconditioner",
            fix="add to `privacy`: `preconditioner: {path: preconditioner.safetensors, provenance: public}`",
        )
    if spec.path.exists():
        try:
            Preconditioner.load(spec.path)
        except ModelError as error:
            raise ConfigError(
                f"`privacy.preconditioner` names {spec.path}, which is there and is something else.",
                code="config-preconditioner-taken",
                why="the factors would take its place",
                fix="name another file, or remove this one",
            ) from error
    return spec.path
