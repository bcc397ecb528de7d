"""What a transcript's head and entries must be before anything computes with them.

A party records messages before it looks at them, and a transcript comes from somebody else's disk: nothing in it is
trusted. What does not fit is refused with ``transcript-damaged``, here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError
from torch import Tensor

from coterie.errors import CheckpointError, ConfigError, MessageError
from coterie.federation.experts.masking.grid import MOST_BYTES, MaskGrid
from coterie.federation.experts.parts import Part, chunks_in, span
from coterie.federation.rounds.attempt import Attempt
from coterie.federation.wire.frame import FrameType
from coterie.federation.wire.frame_log import Logged
from coterie.federation.wire.messages import LARGEST, TABLE, Form, check_form
from coterie.federation.wire.recording import OWN_MASKS
from coterie.federation.wire.transport import Address, Message
from coterie.federation.wire.values import largest

_MOST_AXES = 8
_FORMS: Mapping[tuple[str, str, bool], Form] = {
    **{(row.topic, row.request.kind, False): row.request for row in TABLE},
    **{(row.topic, form.kind, True): form for row in TABLE for form in row.replies},
}
_NUMBERS: Mapping[tuple[str, str], tuple[str, ...]] = {
    (row.topic, form.kind): row.numbers for row in TABLE for form in (row.request, *row.replies)
}


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    number: int
    host: str
    layer: int
    experts: list[int]
    shapes: list[tuple[str, list[PositiveInt]]]
    trained: bool


OF_THE_LOG = ("format", "names", "kind")
"""Of the head of every log of frames, and checked there."""


class TranscriptHead(BaseModel):
    """The head of a transcript; see `coterie.audit.transcript.Transcript`."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    party: str
    run: str
    agreement: str
    federation: str
    parties: list[str] = Field(min_length=1)
    exchange: Literal["tokens", "experts"]
    placement: list[list[int]]
    parts: list[dict[str, Any]]
    rounds: PositiveInt | None
    push_dtype: Literal["float32", "bfloat16"]
    aggregation: Literal["plain", "masked"] = "plain"
    weights_dtype: Literal["float32", "bfloat16"]

    def owners(self) -> tuple[tuple[str, ...], ...]:
        """For each MoE layer the host of each expert."""
        if any(not 0 <= host < len(self.parties) for layer in self.placement for host in layer):
            raise ValueError("placement")
        return tuple(tuple(self.parties[host] for host in layer) for layer in self.placement)

    def pieces(self) -> tuple[Part, ...]:
        """The parts, each where its number says and of experts that its host has."""
        return tuple(self._piece(number, saved) for number, saved in enumerate(self.parts))

    def _piece(self, number: int, saved: Mapping[str, Any]) -> Part:
        found = _Part.model_validate({**saved, "shapes": [tuple(pair) for pair in saved["shapes"]]})
        owners = self.owners()[found.layer] if 0 <= found.layer < len(self.placement) else ()
        hosted = [expert for expert, host in enumerate(owners) if host == found.host]
        rows = {shape[0] if shape else 0 for _, shape in found.shapes} if hosted else set()
        names = {name for name, _ in found.shapes}
        if (
            found.number != number
            or found.host not in self.parties
            or not -1 <= found.layer < len(self.placement)
            or found.experts != hosted
            or rows - {len(hosted)}
            or not 0 < len(names) == len(found.shapes)
            or any(len(shape) > _MOST_AXES for _, shape in found.shapes)
        ):
            raise ValueError(f"part {number}")
        shapes = tuple((name, tuple(shape)) for name, shape in found.shapes)
        part = Part(number, found.host, found.layer, tuple(found.experts), shapes, found.trained)
        if part.num_values > LARGEST:
            raise ValueError(f"part {number}")
        return part


def head_of(
    place: Path, saved: Mapping[str, Any]
) -> tuple[TranscriptHead, tuple[tuple[str, ...], ...], tuple[Part, ...]]:
    """The head of a transcript with its placement and parts.

    Raises:
        CheckpointError: ``transcript-damaged``.
    """
    try:
        head = TranscriptHead.model_validate({name: value for name, value in saved.items() if name not in OF_THE_LOG})
        owners, pieces = head.owners(), head.pieces()
        if head.party not in head.parties or len(set(head.parties)) != len(head.parties):
            raise ValueError("parties")
    except ValidationError as error:
        raise unfit(f"The head of the transcript in {place}", str(error.errors()[0]["loc"][0])) from None
    except (ValueError, TypeError, KeyError):
        raise unfit(f"The head of the transcript in {place}", "placement, parts or parties") from None
    return head, owners, pieces


class Fitting:
    """Checks the entries of one transcript in order.

    Args:
        party: who received.
        exchange: as agreed.
        placement: for each MoE layer the host of each expert.
        parts: the pieces of the model that cross.
        parties: how many there are.
        push_dtype, weights_dtype: as agreed.
        masked: pushes are integers under masks.
    """

    def __init__(
        self,
        party: str,
        exchange: str,
        placement: Sequence[Sequence[str]],
        parts: Sequence[Part],
        parties: int,
        push_dtype: torch.dtype,
        weights_dtype: torch.dtype,
        masked: bool,
    ) -> None:
        self._parties, self._masked = parties, masked
        self._grids: dict[int, str] = {}  # by how many parties add up
        self._party, self._exchange, self._placement, self._parts = party, exchange, placement, parts
        self._push_dtype, self._weights_dtype = push_dtype, weights_dtype
        self._extents: dict[str, int] = {}
        self._kept: set[tuple[int, int, int]] = set()

    def check(self, logged: Logged) -> None:
        """Make sure that an entry is what the agreed exchange sends, or what the party itself kept of it.

        Raises:
            CheckpointError: ``transcript-damaged``.
        """
        message, reply = logged.frame.message, logged.frame.type is FrameType.REPLY
        key = (self._exchange, message.kind, reply)
        form, at, peer = _FORMS.get(key), message.address, logged.name
        told = f"What {peer} sent to {self._party} in round {at.round}, `{message.kind}`,"
        if self._masked and message.kind == OWN_MASKS and peer == self._party:
            self._own_masks(f"What {peer} kept of its masks in round {at.round}", message)
            return
        if form is None:
            raise unfit(told, "its kind")
        if form.body is None or at.round > LARGEST or at.call > LARGEST:
            raise unfit(told, "its numbers")
        try:
            check_form(form, peer, message, {})
        except MessageError as error:
            raise unfit(told, error.message) from None
        found = {rule.name: tensor for rule, tensor in zip(form.tensors, message.tensors, strict=False)}
        if any(tensor.is_floating_point() and not _finite(tensor) for tensor in found.values()):
            raise unfit(told, "it holds NaN or infinity")
        numbers = _NUMBERS[self._exchange, message.kind]
        if "layer" in numbers and at.layer >= len(self._placement):
            raise unfit(told, "there is no such layer")
        if "part" in numbers and at.part >= len(self._parts):
            raise unfit(told, "there is no such part")
        if not reply and message.kind == "dispatch":
            self._dispatch(told, at.layer, found)
        if not reply and message.kind == "gradient":
            self._same_extent(told, "gradients' width", found["at outputs"].shape[1])
        if "part" in numbers:
            self._piece(told, message.kind, reply, self._parts[at.part], at, message.body, found)

    def _dispatch(self, told: str, layer: int, found: Mapping[str, Tensor]) -> None:
        counts_M, ids_P = found["counts"].long(), found["ids"].long()
        owners = self._placement[layer]
        hosted = [expert for expert, host in enumerate(owners) if host == self._party]
        if bool((counts_M < 1).any()) or int(counts_M.sum()) != len(ids_P):
            raise unfit(told, "its counts do not add up to its ids")
        if not bool(torch.isin(ids_P, torch.tensor(hosted, dtype=torch.int64)).all()):
            raise unfit(told, f"its ids are not of experts that {self._party} hosts")
        self._same_extent(told, "vectors' width", found["hidden"].shape[1])

    def _piece(
        self, told: str, kind: str, reply: bool, part: Part, at: Address, body: Mapping[str, Any],
        found: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        if kind.startswith("weights") or not self._masked:
            size = part.num_bytes(self._weights_dtype if kind.startswith("weights") else self._push_dtype)
        else:
            size = self._masked_size(told, part, body, at)
        if "size" in body and body["size"] != size:
            raise unfit(told, f"it is of another size than {part}")
        if "bytes" in found:
            here = span(size, at.chunk)
            if at.chunk >= chunks_in(size) or found["bytes"].numel() != here.stop - here.start:
                raise unfit(told, f"it is no chunk of {part}")

    def _masked_size(self, told: str, part: Part, body: Mapping[str, Any], at: Address) -> int:
        """Bytes of a masked part in an attempt, by what its first message named; every later one names the same."""
        extent = f"bytes of {part}, {Attempt(at.round, at.attempt)},"
        if "size" in body:
            width, odd = divmod(body["size"], part.num_values)
            if odd or not 1 <= width <= MOST_BYTES:
                raise unfit(told, f"it is of another size than {part}")
            self._same_extent(told, extent, body["size"])
            self._same_extent(told, _width_in(at), width)
        return self._extents.get(extent, 0)

    def _own_masks(self, told: str, message: Message) -> None:
        at = message.address
        try:
            grid = MaskGrid.from_json(message.body["grid"])
            digest = grid.digest()
        except (ValueError, TypeError, KeyError, OverflowError, ConfigError):
            raise unfit(told, "its grid") from None
        if not 1 < grid.parties <= self._parties or self._grids.setdefault(grid.parties, digest) != digest:
            raise unfit(told, "its grid changed")
        if (place := (at.round, at.attempt, at.part)) in self._kept:
            raise unfit(told, "they are there twice")
        self._kept.add(place)
        if at.part >= len(self._parts) or at.round > LARGEST or at.attempt > LARGEST:
            raise unfit(told, "its numbers")
        (masks,) = message.tensors if len(message.tensors) == 1 else (None,)
        size = self._parts[at.part].num_values * grid.width
        if masks is None or masks.dtype != torch.uint8 or masks.dim() != 1 or masks.numel() != size:
            raise unfit(told, f"it is of another size than {self._parts[at.part]}")
        self._same_extent(told, _width_in(at), grid.width)

    def _same_extent(self, told: str, what: str, extent: int) -> None:
        if extent < 1 or self._extents.setdefault(what, extent) != extent:
            raise unfit(told, f"{what} changed")


def _width_in(at: Address) -> str:
    """How wide masked integers are follows from how many parties contribute to an attempt."""
    return f"bytes of an integer in {Attempt(at.round, at.attempt)}"


def _finite(values: Tensor) -> bool:
    return largest(values) <= torch.finfo(torch.float32).max


def unfit(what: str, why: str) -> CheckpointError:
    """The refusal of what is in a transcript and could not have crossed as agreed."""
    return CheckpointError(
        f"{what} does not fit what was agreed: {why.rstrip('.')}.",
        code="transcript-damaged",
        why="messages are recorded before anybody looks at them; one that does not fit was refused, or changed later",
        fix="leave this transcript out, or copy it again from the party that recorded it",
    )
