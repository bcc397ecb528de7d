"""The key to what others received of the owner (`coterie.training.party.answer_key`): to score with, not to guess."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from coterie.audit.fitting import OF_THE_LOG, TranscriptHead
from coterie.audit.transcript import Dispatch, ReceivedMessage, ReceivedPush
from coterie.errors import CheckpointError
from coterie.federation.wire.frame_log import files_in, read_entries, read_head
from coterie.federation.wire.recording import ANSWERS
from coterie.storage import check_keys, check_known
from coterie.training.folders import private_folder
from coterie.training.party.answer_key import ATTEMPT, BATCH, LOT, SENT

_KINDS = (ATTEMPT, BATCH, LOT, SENT)


@dataclass(frozen=True)
class KnownRows:
    """What the rows of one dispatch are, in their order; -1 where a row is padding.

    Attributes:
        ids_M: the token that each row is.
        next_M: the token behind it in its record; -1 at the end of a record.
        record_M: its record: a row of the training data, in an evaluation of the held-out data.
        document_M: the document that the record was cut from, in the same data.
        position_M: its place in the record, from 0.
    """

    ids_M: Tensor
    next_M: Tensor
    record_M: Tensor
    document_M: Tensor
    position_M: Tensor


@dataclass(frozen=True)
class Record:
    """A record that a sum was made of: its row in the training data, the document it was cut from, its token ids."""

    row: int
    document: int
    ids: tuple[int, ...]


@dataclass(frozen=True)
class _Batch:
    rows_B: Tensor
    document_B: Tensor
    ids_BT: Tensor
    mask_BT: Tensor

    def rows(self, token_M: Tensor) -> KnownRows:
        width = self.ids_BT.shape[1]
        row_M, position_M = token_M // width, token_M % width
        ids_BT = torch.where(self.mask_BT, self.ids_BT.long(), -1)
        after_BT = torch.cat([ids_BT[:, 1:], torch.full_like(ids_BT[:, :1], -1)], 1)
        real_M = self.mask_BT[row_M, position_M]
        return KnownRows(
            ids_BT[row_M, position_M],
            after_BT[row_M, position_M],
            *(torch.where(real_M, of_M, -1) for of_M in (self.rows_B[row_M], self.document_B[row_M], position_M)),
        )


_Call = tuple[str, int, int, int, int, int]


@dataclass(frozen=True)
class Answers:
    """The key of one owner; see `Answers.read`.

    Attributes:
        owner: whose key it is.
        run: name of the run.
        agreement: hash of the signed federation.yaml.
    """

    owner: str
    run: str
    agreement: str
    _batches: Mapping[tuple[int, int, int, int], _Batch] = field(repr=False)
    _sent: Mapping[_Call, Tensor] = field(repr=False)
    _lots: Mapping[tuple[int, int], tuple[Record, ...]] = field(repr=False)

    @classmethod
    def read(cls, folder: Path) -> Answers:
        """The key in a run folder (or in the folder itself), whole in memory.

        Raises:
            CheckpointError: ``answers-none``: there is none; ``transcript-mixed``, ``transcript-damaged``,
                ``format-unknown``: see `Transcript.read`.
        """
        inside = private_folder(folder) / ANSWERS
        place = inside if inside.is_dir() else folder
        found = [(path, head) for path in files_in(place) if (head := read_head(path)) is not None]
        if not found or any(head.get("kind") != ANSWERS for _, head in found):
            raise CheckpointError(
                f"{folder} holds no key to what was sent.",
                code="answers-none",
                why="without it nobody can tell whether what an attack read is right",
                fix="agree on `transcript:` in federation.yaml and run again; the owner's run folder then holds it",
            )
        first = found[0][1]
        check_keys(found[0][0], "key", first, (*OF_THE_LOG, *TranscriptHead.model_fields), CheckpointError)
        if any(head != first for _, head in found):
            raise CheckpointError(
                f"{place} holds keys of several runs or settings.",
                code="transcript-mixed",
                fix="keep the key of each run in a folder of its own",
            )
        batches: dict[tuple[int, int, int, int], _Batch] = {}
        sent: dict[_Call, Tensor] = {}
        lots: dict[tuple[int, int], tuple[Record, ...]] = {}
        newest: dict[int, tuple[Record, ...]] = {}
        begun: Counter[int] = Counter()
        for path, _ in found:
            for logged in read_entries(path):
                message = logged.frame.message
                check_known(path, "kind of entry", message.kind, _KINDS, CheckpointError)
                at, tensors = message.address, message.tensors
                if message.kind == BATCH:
                    batches[at.round, at.attempt, at.micro_batch, at.call] = _Batch(*tensors)
                elif message.kind == SENT:
                    call = (logged.name, at.round, at.attempt, at.micro_batch, at.layer, at.call)
                    twice = call in sent  # an evaluation that was tried again: which order went first is not known
                    sent[call] = torch.empty(0, dtype=torch.int64) if twice else tensors[0].long()
                elif message.kind == ATTEMPT:
                    begun[at.round] = at.attempt
                    if at.round in newest:
                        lots[at.round, at.attempt] = newest[at.round]
                elif message.kind == LOT:
                    newest[at.round] = lots[at.round, begun[at.round]] = _records(*tensors)
        return cls(first["party"], first["run"], first["agreement"], batches, sent, lots)

    def rows(self, host: str, dispatch: Dispatch | ReceivedMessage) -> KnownRows:
        """What the rows of a dispatch are that ``host`` received.

        Raises:
            CheckpointError: ``answers-missing``: the key has no such dispatch, or another number of rows.
        """
        at = dispatch
        token_M = self._sent.get((host, at.round, at.attempt, at.micro_batch, at.layer, at.call))
        batch = self._batches.get((at.round, at.attempt, at.micro_batch, 0 if at.attempt else at.call))
        hidden_MD = dispatch.hidden_MD if isinstance(dispatch, Dispatch) else dispatch.tensors["hidden"]
        if token_M is None or batch is None or len(token_M) != len(hidden_MD):
            raise _missing(f"a dispatch of round {at.round} to {host}, layer {at.layer}")
        return batch.rows(token_M)

    def whole(self, dispatch: Dispatch | ReceivedMessage) -> KnownRows:
        """All rows of the forward behind a dispatch in the text's order, whoever received them.

        Raises:
            CheckpointError: ``answers-missing``.
        """
        at = dispatch
        batch = self._batches.get((at.round, at.attempt, at.micro_batch, 0 if at.attempt else at.call))
        if batch is None:
            raise _missing(f"a forward of round {at.round}")
        return batch.rows(torch.arange(batch.ids_BT.numel()))

    def records(self, push: ReceivedPush) -> tuple[Record, ...]:
        """The records whose gradients are in a sum.

        Raises:
            CheckpointError: ``answers-missing``.
        """
        found = self._lots.get((push.round, push.attempt))
        if found is None:
            raise _missing(f"a sum of round {push.round}, attempt {push.attempt}")
        return found


def _records(rows_S: Tensor, document_S: Tensor, lengths_S: Tensor, ids: Tensor) -> tuple[Record, ...]:
    pieces = torch.split(ids.long(), lengths_S.tolist())
    each = zip(rows_S.tolist(), document_S.tolist(), pieces, strict=True)
    return tuple(Record(row, document, tuple(piece.tolist())) for row, document, piece in each)


def _missing(what: str) -> CheckpointError:
    return CheckpointError(
        f"The owner's key does not know {what}.",
        code="answers-missing",
        why="what an attack read there can be neither right nor wrong",
        fix="use key and transcript of one run; where the key stopped earlier, raise `transcript.max_gib`",
    )
