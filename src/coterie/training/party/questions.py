"""Asking the model of a finished federation, whose experts lie with their hosts: what may be asked, and what crosses.

Nothing is trained and no budget is spent. In `experts` the hosts' weights come to whoever asks, each layer once, and
no text leaves. In `tokens` the text that is asked about goes to the hosts as hidden vectors, which they can read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from coterie.config import FederationConfig, PartyConfig
from coterie.errors import CheckpointError, ConfigError, RoundError, as_argument
from coterie.storage import json_object
from coterie.training.data.documents import Documents
from coterie.training.folders import private_folder
from coterie.training.party.after_private import check_after_private


@dataclass(frozen=True)
class Questions:
    """What one party asks.

    Attributes:
        texts: everything that the model will read; in `tokens` it crosses.
        ask: called with the model, in eval mode, while all hosts answer; again from the start where an attempt is
            given up.
    """

    texts: tuple[str, ...]
    ask: Callable[[PreTrainedModel], None]

    @torch.no_grad()
    def put_to(self, model: Any) -> None:
        """Ask a party's model, behind peft's wrapper where it has one, and leave it in the mode that it was in."""
        was_training = model.training
        model.eval()
        try:
            self.ask(model.get_base_model() if hasattr(model, "get_base_model") else model)
        finally:
            model.train(was_training)


def check_questions(party: PartyConfig, federation: FederationConfig, texts: tuple[str, ...]) -> None:
    """Make sure that a party may ask about some texts. Called before anything is sent.

    Raises:
        CheckpointError: the party's run is not finished.
        ConfigError: what was agreed on lets no such text cross.
        LedgerError: in `tokens`, some of it was trained on privately before.
    """
    _check_finished(party.run_dir, federation)
    if federation.exchange != "tokens":
        return
    if not federation.evaluate:
        raise ConfigError(
            "In this federation no text but the training text crosses: federation.yaml says `evaluate: false`.",
            code="questions-agreed",
            why="in `tokens` whatever the model reads goes to the hosts of its experts",
            fix="ask an export of everybody's parts (`coterie export`), or agree on `evaluate: true`",
        )
    if federation.transcript is not None:
        raise ConfigError(
            "This federation records what crosses for an audit, so nothing is asked through it.",
            code="questions-recorded",
            why="hosts would keep the questions beside the training text, and the audit would take one for the other",
            fix="ask an export of everybody's parts (`coterie export`)",
        )
    check_after_private(party, federation, Documents(texts), what="what is asked about")


def unasked(federation: FederationConfig) -> RoundError:
    """The federation ended without an answer: its coordinator did not take it up for questions."""
    return RoundError(
        f"{federation.name} ended before anything could be asked.",
        code="questions-not-taken",
        why="a finished federation answers only while its coordinator keeps it up for that",
        fix="start the coordinator with --questions, and every other party with `coterie resume`",
    )


def _check_finished(run_dir: Path, federation: FederationConfig) -> None:
    path = private_folder(run_dir) / "result.json"
    try:
        finished = json_object(path.read_bytes()).get("rounds") == federation.train.rounds
    except (OSError, ValueError):
        finished = False
    if not finished:
        raise CheckpointError(
            f"The run in {run_dir} has not finished its {federation.train.rounds} rounds.",
            code="run-unfinished",
            why="questions are for the model that all parties ended with",
            fix=f"go on with `coterie resume {as_argument(run_dir)}`, and ask afterwards",
        )
