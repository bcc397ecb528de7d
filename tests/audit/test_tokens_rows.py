"""Rows as hosts receive them: joined over hosts, scored by the key, counted by size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from coterie.audit.answers import KnownRows
from coterie.audit.tokens.rows import KeyOf, table
from coterie.audit.tokens.sizes import row_bytes, rows_by_size, size
from coterie.audit.transcript import Dispatch

TEXT = torch.tensor([[5, 6, 5, 7], [5, 8, 9, -1]])  # two records; -1 is padding
HIDDEN = torch.arange(8.0)[:, None].expand(8, 3).clone()
HIDDEN[4] = HIDDEN[0]  # the same token at the beginning of two records


def sent(rows: list[int], experts: list[list[int]], *, attempt: int = 1, gradient: bool = True) -> Dispatch:
    """A dispatch of some of the eight tokens of `TEXT`."""
    counts = torch.tensor([len(each) for each in experts])
    ids = torch.tensor([expert for each in experts for expert in each])
    slope = HIDDEN[rows] + 100 if gradient else None
    phase = "train" if attempt else "evaluation"
    weights = ids.float() / 10
    return Dispatch("alder", 1, attempt, 0, 0, 0, phase, HIDDEN[rows], counts, ids, weights, slope)  # type: ignore[arg-type]


def key(sent_rows: dict[str, list[int]]) -> KeyOf:
    def rows(token_M: Tensor) -> KnownRows:
        record, position = token_M // 4, token_M % 4
        after = torch.cat([TEXT[:, 1:], torch.full((2, 1), -1)], 1)
        real = TEXT[record, position] >= 0
        return KnownRows(
            TEXT[record, position],
            after[record, position],
            torch.where(real, record, -1),
            torch.where(real, record + 3, -1),
            torch.where(real, position, -1),
        )

    return KeyOf(lambda host, dispatch: rows(torch.tensor(sent_rows[host])), lambda dispatch: rows(torch.arange(8)))


def test_rows_of_one_token_at_two_hosts_become_one_with_the_experts_of_both() -> None:
    where = {"birch": [3, 4, 0], "cedar": [0, 1, 4, 7]}
    received = {
        "birch": [sent(where["birch"], [[2], [1], [1, 2]])],
        "cedar": [sent(where["cedar"], [[4], [5], [6], [4]])],
    }
    found = table(received, [8], key(where))
    rows, truth, places = found.layers[0], found.truth[0], found.places
    assert places is not None
    assert places.token_P.tolist() == [5, 6, 5, 7, 5, 8, 9], "padding is no place"
    assert places.previous_P.tolist() == [-1, 0, 1, 2, -1, 4, 5]
    assert places.document_P.tolist() == [3, 3, 3, 3, 4, 4, 4]
    assert len(rows) == 5  # tokens 3, 4, 0, 1, 7; the two equal rows stay two
    assert sorted(truth.place_R.tolist()) == [-1, 0, 1, 3, 4]
    assert truth.token_R[truth.place_R == -1].tolist() == [-1]
    chosen = (row.nonzero().squeeze(1).tolist() for row in rows.routed_RE)
    routed = dict(zip(truth.place_R.tolist(), chosen, strict=True))
    assert routed[3] == [2]
    assert routed[1] == [5]
    # The n-th of equal rows at one host is joined to the n-th at the other.
    assert routed[4] == [1, 4]
    assert routed[0] == [1, 2, 6]
    assert torch.equal(rows.gradient_RD, rows.hidden_RD + 100)
    assert rows.has_gradient_R.all()


def test_an_evaluation_has_rows_and_places_of_its_own() -> None:
    where = {"birch": [0, 1]}
    received = {"birch": [sent([0, 1], [[2], [1]]), sent([0, 1], [[2], [1]], attempt=0, gradient=False)]}
    found = table(received, [8], key(where))
    assert found.places is not None
    assert found.places.evaluated_P.tolist() == [False] * 7 + [True] * 7
    assert not set(found.places.document_P[:7].tolist()) & set(found.places.document_P[7:].tolist())
    rows = found.layers[0]
    assert rows.evaluated_R.tolist() == [False, False, True, True]
    assert rows.has_gradient_R.tolist() == [True, True, False, False]
    assert rows.round_R.tolist() == [1, 1, 1, 1]
    assert found.truth[0].place_R.tolist() == [0, 1, 7, 8]


def test_later_forwards_are_left_out_whole_when_there_are_too_many_rows() -> None:
    where = {"birch": [0, 1]}
    received = {"birch": [sent([0, 1], [[2], [1]]), sent([0, 1], [[2], [1]], attempt=0, gradient=False)]}
    found = table(received, [8], key(where), most=1)
    assert found.places is not None
    assert len(found.layers[0]) == 2
    assert len(found.places.token_P) == 7


def test_the_gradient_of_a_row_whose_owner_combines_is_that_of_its_first_pair() -> None:
    ids = torch.tensor([2, 1, 4])
    slope = torch.tensor([[1.0, 0, 0], [2.0, 0, 0], [3.0, 0, 0]])
    one = Dispatch("alder", 1, 1, 0, 0, 0, "train", HIDDEN[:2], torch.tensor([2, 1]), ids, None, slope)
    found = table({"birch": [one]}, [8], None)
    assert found.layers[0].gradient_RD[:, 0].tolist() == [1.0, 3.0]
    assert found.layers[0].routed_RE[0].nonzero().squeeze(1).tolist() == [1, 2]
    assert found.places is None


def test_a_size_tells_the_number_of_rows_where_no_other_number_fits() -> None:
    dispatch = sent([0, 1, 2], [[2], [1, 3], [1]])
    assert row_bytes(dispatch, 8) == (3 * 4 + 1, 1 + 4)
    assert row_bytes(dispatch, 300) == (3 * 4 + 1, 4 + 4)
    seen = size(dispatch, 8)
    assert seen == sum(t.nbytes for t in (dispatch.hidden_MD, dispatch.weights_P)) + 3 + 4  # type: ignore[union-attr]
    assert rows_by_size(seen, 13, 5, 2) == [3]


@pytest.mark.parametrize(("row", "pair", "most"), [(13, 5, 2), (385, 5, 2), (2, 1, 4)])
def test_every_number_of_rows_that_fits_a_size_is_found(row: int, pair: int, most: int) -> None:
    for seen in range(0, 12 * row, max(1, row // 9)):
        every = [m for m in range(13) for p in range(m, most * m + 1) if m * row + p * pair == seen]
        assert rows_by_size(seen, row, pair, most) == sorted(set(every))
