"""What hosts received in the exchange `tokens`, side by side: one table for each MoE layer, and the key to score it.

Shape letters: R rows received at one layer, D model width, E experts, P places of the owner's text.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from coterie.audit.answers import KnownRows
from coterie.audit.transcript import Dispatch

Call = tuple[int, int, int, int]
"""Round, attempt, micro-batch, call: the experts calls of all layers that belong to one forward share it."""


@dataclass(frozen=True)
class Received:
    """The rows of one layer that one host, or several together, received.

    Attributes:
        hidden_RD: float32.
        gradient_RD: gradient at the row's output; zeros where none came.
        has_gradient_R: bool.
        routed_RE: routing weight of each expert that is known to be chosen; 1 where weights did not travel.
        call_R: index into ``calls``.
        calls: the forwards, in order of arrival.
    """

    hidden_RD: Tensor
    gradient_RD: Tensor
    has_gradient_R: Tensor
    routed_RE: Tensor
    call_R: Tensor
    calls: tuple[Call, ...]

    def __len__(self) -> int:
        return len(self.hidden_RD)

    @property
    def round_R(self) -> Tensor:
        """The round of each row."""
        return torch.tensor([call[0] for call in self.calls])[self.call_R]

    @property
    def evaluated_R(self) -> Tensor:
        """Which rows came in an evaluation, bool."""
        return torch.tensor([call[1] == 0 for call in self.calls])[self.call_R]


@dataclass(frozen=True)
class Truth:
    """What the rows of one `Received` are; -1 is padding, or the end of a text.

    Attributes:
        token_R, next_R: ids.
        place_R: index into `Places`.
    """

    token_R: Tensor
    next_R: Tensor
    place_R: Tensor


@dataclass(frozen=True)
class Places:
    """All places of the owner's text behind the recorded forwards, whether they reached a host or not.

    Attributes:
        token_P: ids.
        previous_P: the place before it in its record; -1 at the beginning.
        document_P: its document; those of held-out text are numbered apart.
        record_P, position_P: where it stands.
        evaluated_P: it crossed in an evaluation, bool.
        call_P: index into the calls.
    """

    token_P: Tensor
    previous_P: Tensor
    document_P: Tensor
    record_P: Tensor
    position_P: Tensor
    evaluated_P: Tensor
    call_P: Tensor


@dataclass
class ReceivedRows:
    """Everything that some hosts received of one owner, and the key to it.

    Attributes:
        layers: by layer index.
        truth: likewise; empty without a key.
        places: None without a key.
    """

    layers: dict[int, Received] = field(default_factory=dict)
    truth: dict[int, Truth] = field(default_factory=dict)
    places: Places | None = None


class KeyOf:
    """Where the truth comes from: the rows of a dispatch, and the whole text behind it."""

    def __init__(self, rows: Callable[[str, Dispatch], KnownRows], whole: Callable[[Dispatch], KnownRows]) -> None:
        self.rows, self.whole = rows, whole


def table(
    received: Mapping[str, Iterable[Dispatch]], experts: Sequence[int], key: KeyOf | None, *, most: int = 15_000
) -> ReceivedRows:
    """Join what hosts received; rows of one token at several hosts are equal bytes, and become one.

    Args:
        received: dispatches of one owner, by host.
        experts: experts of each layer.
        key: for scoring; None: nothing can be scored.
        most: rows of one layer beyond which later forwards of evaluations are left out; of training, twice as many.
    """
    joined: dict[int, dict[tuple[Call, bytes, int], _Row]] = defaultdict(dict)
    calls: dict[Call, int] = {}
    firsts: list[Dispatch] = []
    for host, dispatches in received.items():
        for each in dispatches:
            call = (each.round, each.attempt, each.micro_batch, each.call)
            if call not in calls:
                if max((len(rows) for rows in joined.values()), default=0) > (2 * most if each.attempt else most):
                    continue
                calls[call] = len(calls)
                firsts.append(each)
            rows = None if key is None else key.rows(host, each)
            _join(joined[each.layer], call, each, rows)
    found = ReceivedRows()
    places = _Places()
    if key is not None:
        for number, first in enumerate(firsts):
            places.add(number, first, key.whole(first))
        found.places = places.all()
    for layer in sorted(joined):
        rows_of = list(joined[layer].items())
        found.layers[layer] = _received(rows_of, calls, experts[layer])
        if key is not None:
            found.truth[layer] = places.truth(rows_of, calls)
    return found


@dataclass
class _Row:
    hidden_D: Tensor
    gradient_D: Tensor | None
    routed: dict[int, float]
    token: int = -1
    after: int = -1
    at: tuple[int, int] | None = None


def _join(into: dict[tuple[Call, bytes, int], _Row], call: Call, sent: Dispatch, rows: KnownRows | None) -> None:
    """The n-th row of some bytes at one host is the n-th of the same bytes at another: it is the same token."""
    times: dict[bytes, int] = defaultdict(int)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), sent.counts_M.cumsum(0)]).tolist()
    ids = sent.ids_P.tolist()
    weights = [1.0] * len(ids) if sent.weights_P is None else sent.weights_P.float().tolist()
    # Where the owner combines, a gradient comes for each (row, expert) pair; its direction is that of the first.
    slope = None if sent.gradient is None else sent.gradient[starts[:-1]] if sent.weights_P is None else sent.gradient
    for number, hidden_D in enumerate(sent.hidden_MD):
        content = hidden_D.contiguous().view(torch.uint8).numpy().tobytes()
        place = (call, content, times[content])
        times[content] += 1
        row = into.get(place)
        if row is None:
            row = into[place] = _Row(hidden_D.float(), None, {})
        if slope is not None:
            row.gradient_D = slope[number].float()
        row.routed |= {ids[pair]: weights[pair] for pair in range(starts[number], starts[number + 1])}
        if rows is not None and row.at is None and int(rows.record_M[number]) >= 0:
            row.token, row.after = int(rows.ids_M[number]), int(rows.next_M[number])
            row.at = (int(rows.record_M[number]), int(rows.position_M[number]))


def _received(
    rows: Sequence[tuple[tuple[Call, bytes, int], _Row]], calls: Mapping[Call, int], experts: int
) -> Received:
    hidden_RD = torch.stack([row.hidden_D for _, row in rows])
    width = next((len(row.gradient_D) for _, row in rows if row.gradient_D is not None), 0)
    routed_RE = torch.zeros(len(rows), experts)
    for number, (_, row) in enumerate(rows):
        routed_RE[number, list(row.routed)] = torch.tensor(list(row.routed.values()))
    nothing = torch.zeros(width)
    return Received(
        hidden_RD,
        torch.stack([nothing if row.gradient_D is None else row.gradient_D for _, row in rows]),
        torch.tensor([row.gradient_D is not None for _, row in rows]),
        routed_RE,
        torch.tensor([calls[place[0]] for place, _ in rows]),
        tuple(calls),
    )


class _Places:
    """Numbers the places of the text behind the forwards."""

    def __init__(self) -> None:
        self._number: dict[tuple[int, int, int], int] = {}
        self._values: list[tuple[int, int, int, int, bool, int]] = []

    def add(self, call: int, sent: Dispatch, whole: KnownRows) -> None:
        evaluated = sent.phase == "evaluation"
        columns = (whole.ids_M, whole.document_M, whole.record_M, whole.position_M)
        for token, document, record, position in zip(*(column.tolist() for column in columns), strict=True):
            if record >= 0:
                self._number[call, record, position] = len(self._values)
                self._values.append((token, document, record, position, evaluated, call))

    def all(self) -> Places:
        token, document, record, position, evaluated, call = (
            torch.tensor(column) for column in zip(*self._values, strict=True)
        )
        previous = [self._number.get((v[5], v[2], v[3] - 1), -1) for v in self._values]
        document = torch.where(evaluated, document + 1 + int(document.max()), document)
        return Places(token, torch.tensor(previous), document, record, position, evaluated, call)

    def truth(self, rows: Sequence[tuple[tuple[Call, bytes, int], _Row]], calls: Mapping[Call, int]) -> Truth:
        place = [-1 if row.at is None else self._number[(calls[at[0]], *row.at)] for at, row in rows]
        return Truth(
            torch.tensor([row.token for _, row in rows]),
            torch.tensor([row.after for _, row in rows]),
            torch.tensor(place),
        )
