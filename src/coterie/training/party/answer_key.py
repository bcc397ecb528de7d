"""The owner's own key to what others record of it: which token each row was, and which records each sum was made of.

It is there for scoring an audit alone, and only where the agreement records transcripts. It holds token ids, in the
private part of the owner's run folder; nothing of it ever leaves the process.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coterie.federation.wire.frame import FrameType
from coterie.federation.wire.recording import Recorder
from coterie.federation.wire.transport import Address, Lane, Message
from coterie.training.data.packing import Sequences

OWN = "own"
BATCH, SENT, ATTEMPT, LOT = "batch", "sent", "attempt", "lot"
"""Kinds of entries: the sequences of a micro-batch (``call`` counts those of an evaluation); the places of its tokens
that went to a host, as they left; an attempt begins; the lot that this attempt and later ones send."""


class AnswerKey:
    """Writes the key of one party.

    Args:
        recorder: see `Recorder`; entries are filed under a host's name, or `OWN`.
        records: the party's training sequences.
    """

    def __init__(self, recorder: Recorder, records: Sequences) -> None:
        self._recorder, self._records = recorder, records

    def batch(self, address: Address, rows: Sequence[int], of: Sequences) -> None:
        """A micro-batch of the `tokens` exchange is about to cross.

        Args:
            address: its round, attempt and number; in an evaluation ``call`` is its place.
            rows: its sequences.
            of: the data that they are rows of.
        """
        batch, rows_B = of.batch(rows), torch.tensor(rows, dtype=torch.int64)
        tensors = (rows_B, of.document_S[rows_B], batch["input_ids"].int(), batch["attention_mask"].bool())
        self._keep(OWN, BATCH, address, tensors)

    def sent(self, host: str, address: Address, token_M: Tensor) -> None:
        """Rows leave for a host: places in the flattened micro-batch, in their order."""
        self._keep(host, SENT, address, (token_M.cpu().int(),))

    def attempt(self, round_no: int, attempt: int) -> None:
        """An attempt of the `experts` exchange begins."""
        self._keep(OWN, ATTEMPT, Address(round=round_no, attempt=attempt))

    def lot(self, round_no: int, rows: Sequence[int]) -> None:
        """What this attempt, and those after it until there is another lot, bring to the hosts is made of these."""
        rows_S = torch.tensor(rows, dtype=torch.int64)
        ids = [self._records[row]["input_ids"].int() for row in rows]
        lengths_S = torch.tensor([len(each) for each in ids], dtype=torch.int64)
        ids_T = torch.cat([torch.empty(0, dtype=torch.int32), *ids])
        self._keep(OWN, LOT, Address(round=round_no), (rows_S, self._records.document_S[rows_S], lengths_S, ids_T))

    def _keep(self, name: str, kind: str, address: Address, tensors: tuple[Tensor, ...] = ()) -> None:
        self._recorder.keep(name, FrameType.ONE_WAY, Lane.CONTROL, Message(kind, address, {}, tensors))
