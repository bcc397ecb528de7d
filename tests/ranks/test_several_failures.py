"""Where several ranks fail at once all raise one error: one that ends them together, if there is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from coterie.errors import CoterieError, RankError, RoundError
from coterie.ranks.ranks import outcome, read_outcomes
from helpers import rank_tasks
from helpers.rank_processes import run_ranks, values

MILD = RoundError("the attempt was given up.", code="round-abandoned")
FOR_GOOD = RankError("rank 2 left an exchange.", code="ranks-failed")


def failing(error: Exception) -> Callable[[], Any]:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize("last", [FOR_GOOD, MemoryError("no room")])
@pytest.mark.parametrize("own", [0, 1, 2])
def test_what_ends_ranks_for_good_is_not_hidden_by_what_a_rank_before_it_raised(own: int, last: Exception) -> None:
    made = [outcome("lot", make) for make in (failing(MILD), lambda: 1, failing(last))]
    with pytest.raises((RankError, MemoryError)) as caught:
        read_outcomes("lot", [packed.encode() for packed, _ in made], own, made[own][1])
    assert isinstance(caught.value, RankError) or own == 2


def test_otherwise_it_is_what_the_first_of_them_raised() -> None:
    made = [outcome("lot", make) for make in (lambda: 1, failing(MILD), failing(CoterieError("later", code="x")))]
    with pytest.raises(RoundError, match="given up"):
        read_outcomes("lot", [packed.encode() for packed, _ in made], 0, None)


@pytest.mark.ranks
def test_a_group_finishes_the_batch_at_which_another_group_gave_the_lot_up() -> None:
    """Else ranks 2 and 3, gone after unlike numbers of exchanges, would take rows of this attempt for the next's."""
    for rank, (given_up, again) in enumerate(values(run_ranks(4, rank_tasks.given_up_by_another_group))):
        pair = rank // 2 * 2
        assert given_up == ("RoundError", [] if rank < 2 else [162, 163])
        assert again == ("", [260 + pair, 261 + pair])
