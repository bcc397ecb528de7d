"""One `PrivateTrainer` over the processes of torchrun or `accelerate launch`.

accelerate has joined the processes before a Trainer is made, and shares evaluation among them. In training nothing of
the kind is wanted: ranks meet in the session, so no model is wrapped to add up gradients and no record is dealt out
by a sampler. What is left: all begin with the same weights, all can say what the run cost, and processes that the
launcher starts again go on with the run that they had begun.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from coterie.dp import checkpoint
from coterie.dp.accounting.budget import Spent
from coterie.dp.accounting.statement import Statement
from coterie.dp.session import PrivateSession
from coterie.errors import CheckpointError, CoterieError, PrivacyError
from coterie.models.spread.spread import spread_of
from coterie.ranks.ranks import Ranks
from coterie.storage import json_object, remove, write_json

STATE = "private_session"
"""Folder of the session in a checkpoint."""
_RUN = "trainer.json"
_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


class Cost:
    """What a run has spent, for every rank to say: rank 0 looks into the ledger, the others know what it told last.

    Args:
        ranks: that share the run.
        session: of the run.
    """

    def __init__(self, ranks: Ranks, session: PrivateSession) -> None:
        self._ranks, self._session = ranks, session
        self._statement: Statement
        self._spent = self.tell_spent()
        self.tell_statement()

    def tell_spent(self) -> Spent:
        """What it spent until now; called by all ranks."""
        self._spent = Spent(**self._ranks.tell("what was spent", lambda: vars(self._session.spent())))
        return self._spent

    def tell_statement(self) -> None:
        """Let the others know its statement as of now; called by all ranks."""
        if self._ranks.world > 1:
            values = self._ranks.tell("the statement", lambda: self._session.statement().to_json())
            self._statement = Statement.from_json(values)

    def spent(self) -> Spent:
        """What it spent, as far as this rank knows."""
        return self._session.spent() if self._ranks.rank == 0 else self._spent

    def statement(self) -> Statement:
        """Its statement, as far as this rank knows."""
        return self._session.statement() if self._ranks.rank == 0 else self._statement


def hand_out_weights(model: nn.Module, ranks: Ranks) -> None:
    """Begin with rank 0's weights everywhere, as the wrapper for several devices does in other training.

    A head that was made at random differs between processes.

    Raises:
        PrivacyError: the experts are at different ranks.
        RankError: the models differ in more than their values.
    """
    if ranks.world == 1:
        return
    if spread_of(model) is not None:
        raise PrivacyError(
            "the model's experts are spread over ranks.",
            code="hf-option",
            why="Trainer's checkpoints hold whole models, written by one process",
            fix="set experts_over in train.yaml (`torchrun -m coterie train`), or use coterie.dp.make_private",
        )
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    ranks.agree("the model", lambda: {name: [str(each.dtype), *each.shape] for name, each in tensors.items()})
    for tensor in filter(torch.Tensor.numel, tensors.values()):
        own = tensor.detach()
        content = own.cpu().contiguous().reshape(-1).view(torch.uint8)
        ranks.hand_out([content], 0)
        own.copy_(content.view(own.dtype).view(own.shape))


@contextmanager
def failing_together(ranks: Ranks) -> Iterator[None]:
    """Raise what another rank failed with where torch only says that the connection to it was cut."""
    try:
        yield
    except RuntimeError:
        try:
            ranks.check_others()
        except CoterieError as theirs:
            raise theirs from None
        raise


def was_started_again() -> bool:
    """Whether the launcher started this process once more, after one had failed."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")


def note_run(private: Path, session: PrivateSession | None) -> None:
    """Write down which run the folder's trainer has begun; None: none yet."""
    if session is None:
        remove(private / _RUN)
    else:
        write_json(private / _RUN, {"run": session.run})


def begun_checkpoint(private: Path) -> str | None:
    """The newest whole checkpoint of the run that `note_run` names; its session is written last."""
    if not (private / _RUN).is_file():
        return None
    run = json_object((private / _RUN).read_bytes())["run"]
    named = ((_CHECKPOINT.fullmatch(folder.name), folder) for folder in private.parent.iterdir())
    found = {int(name[1]): folder for name, folder in named if name is not None}
    for step in sorted(found, reverse=True):
        try:
            if checkpoint.read(found[step] / STATE).facts["run"] == run:
                return str(found[step])
        except CheckpointError:
            continue
    return None
