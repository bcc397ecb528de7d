"""Every expert has exactly one host, and whoever says otherwise is told which expert."""

from __future__ import annotations

import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from coterie.errors import PlacementError
from coterie.models.split.placement import Placement
from coterie.models.zoo.tiny import EXPERTS, tiny_model

PARTIES = ["alder", "birch", "cedar"]


def complete() -> dict[str, dict[int, list[int]]]:
    return {"alder": {0: [0, 1], 1: [3]}, "birch": {0: [2], 1: [0, 1]}, "cedar": {0: [3], 1: [2]}}


@given(st.integers(1, 6), st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_round_robin_gives_each_expert_one_host_and_every_party_as_many_as_another_give_or_take_one(parties, experts):
    assume(parties <= sum(experts))
    names = [f"party{i}" for i in range(parties)]
    placement = Placement.round_robin(names, experts)
    assert placement.num_experts == tuple(experts)
    counts = [sum(len(x) for x in placement.hosted(name).values()) for name in names]
    assert sum(counts) == sum(experts)
    assert max(counts) - min(counts) <= 1
    for layer, count in enumerate(experts):
        claimed = sorted(e for name in names for e in placement.hosted(name).get(layer, []))
        assert claimed == list(range(count))
        assert [names[host] for host in placement.host_of(layer)] == [
            placement.host_name(layer, e) for e in range(count)
        ]


def test_more_parties_than_experts_are_named():
    with pytest.raises(PlacementError, match="5 parties cannot share 3 experts: d, e would host none") as caught:
        Placement.round_robin(list("abcde"), [2, 1])
    assert caught.value.code == "placement-too-few"


def test_a_table_and_a_list_by_party_say_the_same():
    by_party = Placement.of_hosted(complete(), PARTIES, [4, 4])
    table = {
        0: {0: "alder", 1: "alder", 2: "birch", 3: "cedar"},
        1: {0: "birch", 1: "birch", 2: "cedar", 3: "alder"},
    }
    assert Placement.of_table(table, PARTIES, [4, 4]) == by_party
    assert by_party.hosted("alder") == {0: [0, 1], 1: [3]}
    assert by_party.host_of(0) == (0, 0, 1, 2)


def test_a_party_may_host_nothing():
    placement = Placement.of_hosted({"alder": {0: [0, 1]}}, ["alder", "birch"], [2])
    assert placement.hosted("birch") == {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h: h["alder"].pop(1), "layer 1 expert 3 hosted by nobody"),
        (lambda h: h.pop("birch"), "layer 0 expert 2 hosted by nobody; layer 1 experts 0, 1 hosted by nobody"),
        (lambda h: h["cedar"][0].append(2), "layer 0 expert 2 is hosted by birch and by cedar"),
        (lambda h: h["cedar"][0].append(3), "layer 0 expert 3 is hosted by cedar and by cedar"),
        (lambda h: h["cedar"][0].append(4), "cedar hosts layer 0 expert 4, but its experts are 0 to 3"),
        (lambda h: h["cedar"][0].append(-1), "cedar hosts layer 0 expert -1"),
        (lambda h: h["cedar"].update({2: [0]}), "cedar hosts layer 2, but the MoE layers are 0 to 1"),
        (lambda h: h.update(dogwood={0: [0]}), "party dogwood is not in the federation"),
    ],
)
def test_a_placement_that_does_not_fit_is_refused_and_names_the_expert(change, words):
    hosted = complete()
    change(hosted)
    with pytest.raises(PlacementError) as error:
        Placement.of_hosted(hosted, PARTIES, [4, 4])
    assert words in error.value.message
    assert error.value.code == "placement-invalid"


def test_all_problems_are_named_at_once():
    with pytest.raises(PlacementError) as error:
        Placement.of_hosted({"alder": {0: [0, 0], 5: [1]}, "elm": {}}, PARTIES, [2])
    for words in ("layer 5", "elm", "alder and by alder", "expert 1 hosted by nobody"):
        assert words in error.value.message


@pytest.mark.parametrize("parties", [[], ["alder", "alder"]])
def test_parties_must_exist_and_differ(parties):
    with pytest.raises(PlacementError, match="at least one party"):
        Placement.round_robin(parties, [2])


def test_asking_for_an_unknown_party_names_the_known_ones():
    with pytest.raises(PlacementError, match="Party elm") as error:
        Placement.round_robin(PARTIES, [3]).hosted("elm")
    assert "alder, birch, cedar" in (error.value.fix or "")


def test_json_round_trip_keeps_content_and_hash_and_checks_again():
    placement = Placement.of_hosted(complete(), PARTIES, [4, 4])
    again = Placement.from_json(json.loads(json.dumps(placement.to_json())))
    assert again == placement
    assert again.content_hash() == placement.content_hash()
    data = placement.to_json()
    data["hosted"]["alder"]["0"] = [0]
    with pytest.raises(PlacementError, match="layer 0 expert 1 hosted by nobody"):
        Placement.from_json(data)
    for broken in ({}, [], {"parties": ["a"], "experts": [1], "hosted": {"a": [0]}}):
        with pytest.raises(PlacementError) as error:
            Placement.from_json(broken)
        assert error.value.code == "placement-format"


def test_the_hash_changes_with_any_host_and_with_the_order_of_parties():
    base = Placement.of_hosted(complete(), PARTIES, [4, 4])
    moved = complete()
    moved["alder"][0].remove(1)
    moved["birch"][0].append(1)
    assert Placement.of_hosted(moved, PARTIES, [4, 4]).content_hash() != base.content_hash()
    assert Placement.of_hosted(complete(), PARTIES[::-1], [4, 4]).content_hash() != base.content_hash()


def test_a_placement_is_made_for_a_model_and_checked_against_one():
    model = tiny_model("nemotron_h")
    placement = Placement.of_spec("round_robin", PARTIES, model)
    assert placement.num_experts == (EXPERTS, EXPERTS)
    placement.check_model(model)
    with pytest.raises(PlacementError, match="2 MoE layers of 8 experts, the model has 3 MoE layers"):
        placement.check_model(tiny_model("mixtral"))
    with pytest.raises(PlacementError, match="hosted by nobody"):
        Placement.of_spec({0: {0: "alder"}}, PARTIES, model)
