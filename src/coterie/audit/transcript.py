"""What one party received from the others, as it recorded it (`coterie.federation.wire.recording`), in order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from coterie.audit.fitting import Fitting, head_of, unfit
from coterie.errors import CheckpointError
from coterie.federation.experts.masking.grid import MaskGrid
from coterie.federation.experts.parts import Part, chunks_in, span
from coterie.federation.wire.frame import FrameType
from coterie.federation.wire.frame_log import Logged, files_in, read_entries, read_head
from coterie.federation.wire.messages import TABLE, TensorRule
from coterie.federation.wire.recording import OWN_MASKS, STOPPED, TRANSCRIPT
from coterie.federation.wire.values import largest
from coterie.models.seam import expert_layers
from coterie.training.folders import private_folder

Phase = Literal["train", "evaluation"]


@dataclass(frozen=True)
class ReceivedMessage:
    """One message that arrived.

    Attributes:
        number: place in the transcript, from 0.
        peer: who sent it, by its certificate.
        kind: of the message, as in docs/reference/wire.md.
        reply: it answers a request of the recording party's.
        lane: control, forward or backward.
        round: being made, from 1; in an evaluation the number of rounds behind the model.
        attempt: from 1; 0 in an evaluation.
        micro_batch, layer, call, part, chunk: the other numbers of the address; 0 where the kind has none.
        phase: a host knows it by the attempt's number alone.
        body: small facts of the header.
        tensors: by the names of docs/reference/wire.md, with ``_`` for a space; on the CPU, as they came.
    """

    number: int
    peer: str
    kind: str
    reply: bool
    lane: str
    round: int
    attempt: int
    micro_batch: int
    layer: int
    call: int
    part: int
    chunk: int
    phase: Phase
    body: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Dispatch:
    """Rows of one experts call of the `tokens` exchange, as a host sees them. M rows, P (row, expert) pairs.

    Attributes:
        hidden_MD: the tokens' hidden vectors.
        counts_M: hosted experts of each row.
        ids_P: global expert ids, row after row.
        weights_P: routing weights; None where the owner combines.
        gradient: what came back at the outputs, [M, O] or [P, O]; None in an evaluation or if it never came.
    """

    peer: str
    round: int
    attempt: int
    micro_batch: int
    layer: int
    call: int
    phase: Phase
    hidden_MD: Tensor
    counts_M: Tensor
    ids_P: Tensor
    weights_P: Tensor | None
    gradient: Tensor | None


@dataclass(frozen=True)
class ReceivedPush:
    """One part of a party's sum in the `experts` exchange, whole.

    Attributes:
        peer: whose sum it is.
        part: which piece of the model: layer (-1: trunk), experts, shapes.
        weights: digest of the weights that it was computed on.
        sums: float32 by tensor name; expert parameters are [experts of the part, ...].
    """

    peer: str
    round: int
    attempt: int
    part: Part
    weights: str
    sums: Mapping[str, Tensor]


@dataclass(frozen=True)
class MaskedPart:
    """One part of a party's masked push, whole; or what the recording party added to its own.

    Attributes:
        peer: whose push it is.
        part: which piece of the model.
        weights: digest of the weights that it was computed on; empty for the party's own masks.
        masked: uint8 [V * width]: integers under masks, or masks alone.
        grid: that the integers lie on; None where it is somebody else's push.
    """

    peer: str
    round: int
    attempt: int
    part: Part
    weights: str
    masked: Tensor
    grid: MaskGrid | None = None


@dataclass(frozen=True)
class Transcript:
    """What ``party`` recorded; iterating reads it from the disk, one entry in memory at a time.

    Attributes:
        party: who received.
        run: name of the run.
        agreement: hash of the signed federation.yaml.
        federation: name.
        parties: everybody, in roster order.
        exchange: `tokens` or `experts`.
        placement: for each MoE layer the host of each expert.
        parts: the pieces of the model that cross in `experts`; empty in `tokens`.
        rounds: rounds that were to be recorded; None: all.
        stopped: first round that is not here, or not whole, because the recording grew too large; None: nothing is
            missing.
        sender: only what this party sent; None: everybody.
        masked: pushes were masked.
    """

    party: str
    run: str
    agreement: str
    federation: str
    parties: tuple[str, ...]
    exchange: Literal["tokens", "experts"]
    placement: tuple[tuple[str, ...], ...]
    parts: tuple[Part, ...]
    rounds: int | None
    files: tuple[Path, ...]
    push_dtype: torch.dtype = torch.float32
    weights_dtype: torch.dtype = torch.bfloat16
    sender: str | None = None
    masked: bool = False

    @classmethod
    def read(cls, folder: Path, sender: str | None = None) -> Transcript:
        """A party's transcript.

        Args:
            folder: the party's run folder, or the folder of the transcript itself.
            sender: see `Transcript`.

        Raises:
            CheckpointError: ``transcript-none``: nothing was recorded here; ``transcript-mixed``: files of several
                runs lie together; ``transcript-damaged``; ``format-unknown``.
        """
        inside = private_folder(folder) / TRANSCRIPT
        place = inside if inside.is_dir() else folder
        found = [(path, head) for path in files_in(place) if (head := read_head(path)) is not None]
        if not found or any(head.get("kind") != TRANSCRIPT for _, head in found):
            raise CheckpointError(
                f"{folder} holds no transcript.",
                code="transcript-none",
                why="what others received can be attacked only where they recorded it",
                fix="agree on `transcript:` in federation.yaml and run again; the parties' run folders then hold it",
            )
        first = found[0][1]
        if any(head != first for _, head in found):
            raise CheckpointError(
                f"{place} holds transcripts of several runs or settings.",
                code="transcript-mixed",
                fix="keep the transcript of each run in a folder of its own",
            )
        agreed, placement, parts = head_of(place, first)
        return cls(
            party=agreed.party,
            run=agreed.run,
            agreement=agreed.agreement,
            federation=agreed.federation,
            parties=tuple(agreed.parties),
            exchange=agreed.exchange,
            placement=placement,
            parts=parts,
            rounds=agreed.rounds,
            files=tuple(path for path, _ in found),
            push_dtype=getattr(torch, agreed.push_dtype),
            weights_dtype=getattr(torch, agreed.weights_dtype),
            sender=sender,
            masked=agreed.aggregation == "masked",
        )

    def of(self, sender: str) -> Transcript:
        """The same transcript, with what one party sent alone."""
        return replace(self, sender=sender)

    def __iter__(self) -> Iterator[ReceivedMessage]:
        """Every message in the order of arrival.

        Raises:
            CheckpointError: ``transcript-damaged`` at the first entry that was changed, or does not fit.
        """
        fitting = Fitting(
            self.party,
            self.exchange,
            self.placement,
            self.parts,
            len(self.parties),
            self.push_dtype,
            self.weights_dtype,
            self.masked,
        )
        for number, logged in enumerate(self._logged()):
            if logged.name in self.parties and self.sender in (None, logged.name):
                fitting.check(logged)
                yield _entry(number, logged)

    def check(self) -> None:
        """Read everything once, as attacks do.

        Raises:
            CheckpointError: ``transcript-damaged``, ``transcript-read``.
        """
        if self.exchange == "tokens":
            found: Iterator[object] = self.dispatches()
        else:
            found = self.masked_parts() if self.masked else self.pushes()
        for _ in found:
            pass

    def check_start(self, model: nn.Module) -> None:
        """Make sure that the head speaks of a model like the one that all started from.

        Raises:
            CheckpointError: ``transcript-damaged``.
        """
        layers, own = expert_layers(model), dict(model.named_parameters())
        told = f"The head of the transcript of {self.party}"
        if [len(hosts) for hosts in self.placement] != [layer.num_experts for layer in layers]:
            raise unfit(told, "the starting checkpoint has other MoE layers or other numbers of experts")
        for part in self.parts:
            held = layers[part.layer].parameters() if part.layer >= 0 else own
            hosted = (len(part.experts),) if part.layer >= 0 else ()
            for name, shape in part.shapes:
                if name not in held or shape != (*hosted, *held[name].shape[len(hosted) :]):
                    raise unfit(told, f"the starting checkpoint has no such {part}")

    def holds(self, part: Part, dtype: torch.dtype) -> bool:
        """Whether the files are large enough for a whole part: a head may name any size, and nobody makes room."""
        return part.num_bytes(dtype) <= self._bytes

    @cached_property
    def _bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)

    @cached_property
    def stopped(self) -> int | None:
        """See `Transcript`."""
        ends = [logged.frame.message for logged in self._logged() if logged.name == STOPPED]
        return min((int(message.address.round) for message in ends), default=None)

    def dispatches(self) -> Iterator[Dispatch]:
        """Rows that came to this host in `tokens`, each with the gradient that followed.

        An evaluation's come at once; a training micro-batch's when its gradient has come, or the round has gone.
        """
        waiting: dict[tuple[object, ...], ReceivedMessage] = {}
        for entry in self:
            key = (entry.peer, entry.round, entry.attempt, entry.micro_batch, entry.layer, entry.call)
            if entry.kind == "dispatch" and not entry.reply and len(entry.tensors["hidden"]):
                if entry.phase == "evaluation":
                    yield _dispatch(entry, None)
                else:
                    waiting[key] = entry
            elif entry.kind == "gradient" and not entry.reply and key in waiting:
                sent, gradient = waiting.pop(key), entry.tensors["at_outputs"]
                lines = sent.tensors["counts" if "weights" in sent.tensors else "ids"]
                if len(gradient) != len(lines):
                    raise unfit(f"A gradient of {entry.peer} in round {entry.round}", "it has another number of rows")
                yield _dispatch(sent, gradient)
        for entry in waiting.values():
            yield _dispatch(entry, None)

    def pushes(self) -> Iterator[ReceivedPush]:
        """Sums that came to this host in `experts`, each part when it was whole; where they were not masked."""
        for entry, part, weights, blob in self._whole_parts():
            sums = {name: values.float() for name, values in part.decode(blob, self.push_dtype).items()}
            if not all(largest(values) < torch.inf for values in sums.values()):
                raise unfit(f"A sum of {entry.peer} in round {entry.round}", "it holds NaN or infinity")
            yield ReceivedPush(entry.peer, entry.round, entry.attempt, part, weights, sums)

    def masked_parts(self) -> Iterator[MaskedPart]:
        """Masked pushes that came to this host, each part when it was whole, and this party's own masks."""
        for entry, part, weights, blob in self._whole_parts():
            yield MaskedPart(entry.peer, entry.round, entry.attempt, part, weights, blob)
        for entry in replace(self, sender=self.party):
            if entry.kind == OWN_MASKS:
                grid, part = MaskGrid.from_json(entry.body["grid"]), self.parts[entry.part]
                (masks,) = entry.tensors.values()
                yield MaskedPart(self.party, entry.round, entry.attempt, part, "", masks, grid)

    def _whole_parts(self) -> Iterator[tuple[ReceivedMessage, Part, str, Tensor]]:
        """What ended a part, the part, the digest of its weights, its bytes."""
        begun: dict[tuple[str, int], tuple[Mapping[str, Any], Tensor, set[int]]] = {}
        for entry in self:
            key = (entry.peer, entry.part)
            if entry.reply or not entry.kind.startswith("push-"):
                continue
            if entry.kind == "push-begin":
                if entry.body["size"] > self._bytes:  # a head may name any size, and nobody makes room
                    continue
                held = begun.get(key)
                if held is None or held[0]["digest"] != entry.body["digest"]:
                    begun[key] = (entry.body, torch.empty(entry.body["size"], dtype=torch.uint8), set())
            elif entry.kind == "push-chunk" and key in begun:
                _, blob, seen = begun[key]
                blob[span(blob.numel(), entry.chunk)] = entry.tensors["bytes"]
                seen.add(entry.chunk)
            elif entry.kind == "push-end" and key in begun:
                body, blob, seen = begun[key]
                if len(seen) == chunks_in(blob.numel()):
                    yield entry, self.parts[entry.part], str(body["weights"]), blob

    def weights(self, round_no: int, attempt: int) -> dict[int, Mapping[str, Tensor]]:
        """Parts of the model that other hosts served this party for an attempt, by part number, in `weights_dtype`.

        With a shared trunk an adversary knows by them the model that a round's pushes were computed on, but for the
        parts that it hosts itself.
        """
        offered: dict[int, str] = {}
        due: dict[int, str] = {}
        blobs: dict[tuple[int, str], tuple[Tensor, set[int]]] = {}
        for entry in replace(self, sender=None):
            if not entry.reply or not entry.kind.startswith("weights-"):
                continue
            part = self.parts[entry.part]
            if not self.holds(part, self.weights_dtype):
                continue
            if entry.kind == "weights-offer":
                offered[part.number] = entry.body["digest"]
                if (entry.round, entry.attempt) == (round_no, attempt):
                    due[part.number] = entry.body["digest"]
            elif entry.kind == "weights-chunk" and part.number in offered:
                fresh = torch.empty(part.num_bytes(self.weights_dtype), dtype=torch.uint8)
                blob, seen = blobs.setdefault((part.number, offered[part.number]), (fresh, set()))
                blob[span(blob.numel(), entry.chunk)] = entry.tensors["bytes"]
                seen.add(entry.chunk)
        found: dict[int, Mapping[str, Tensor]] = {}
        for number, digest in due.items():
            blob, seen = blobs.get((number, digest), (torch.empty(0), set()))
            if seen and len(seen) == chunks_in(blob.numel()):
                found[number] = self.parts[number].decode(blob, self.weights_dtype)
        return found

    def _logged(self) -> Iterator[Logged]:
        for path in self.files:
            yield from read_entries(path)


_RULES: Mapping[tuple[str, bool], tuple[TensorRule, ...]] = {
    **{(row.request.kind, False): row.request.tensors for row in TABLE},
    **{(form.kind, True): form.tensors for row in TABLE for form in row.replies},
}


def _entry(number: int, logged: Logged) -> ReceivedMessage:
    frame, message = logged.frame, logged.frame.message
    reply = frame.type is FrameType.REPLY
    rules = _RULES.get((message.kind, reply), ())
    names = [rule.name.replace(" ", "_") for rule in rules]
    names += [f"tensor_{place}" for place in range(len(names), len(message.tensors))]
    at = message.address
    return ReceivedMessage(
        number=number,
        peer=logged.name,
        kind=message.kind,
        reply=reply,
        lane=frame.lane.name.lower(),
        **vars(at),
        phase="train" if at.attempt else "evaluation",
        body=message.body,
        tensors=dict(zip(names, message.tensors, strict=False)),
    )


def _dispatch(entry: ReceivedMessage, gradient: Tensor | None) -> Dispatch:
    found = entry.tensors
    return Dispatch(
        entry.peer,
        entry.round,
        entry.attempt,
        entry.micro_batch,
        entry.layer,
        entry.call,
        entry.phase,
        found["hidden"],
        found["counts"].long(),
        found["ids"].long(),
        found.get("weights"),
        gradient,
    )
