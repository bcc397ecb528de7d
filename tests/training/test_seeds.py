"""Seeds that figures rest on: each a number worked out by hand."""

from __future__ import annotations

import pytest

from coterie.training.seeds import derived_seed


@pytest.mark.parametrize(
    ("seed", "path", "wanted"),
    [
        (5, (), 5),
        (0, (0,), 0),
        (0, (17,), 17),
        (7, (3,), 7_000_024),
        (7, (3, 2), 7_000_045_000_074),
        (-1, (0,), 9_223_372_036_853_775_805),
        (2**62, (1,), 4_611_686_018_427_387_905),
    ],
)
def test_a_seed_follows_from_its_place_in_the_run(seed: int, path: tuple[int, ...], wanted: int) -> None:
    assert derived_seed(seed, *path) == wanted


def test_neighbouring_runs_and_places_have_seeds_of_their_own() -> None:
    rounds = [(number,) for number in range(1, 30)]
    places = [(), *rounds, *((*place, number) for place in rounds for number in range(9))]
    found = {derived_seed(seed, *place) for seed in range(1, 20) for place in places}
    assert len(found) == 19 * len(places)
    assert all(0 <= seed < 2**63 for seed in found), "torch.manual_seed takes it"
