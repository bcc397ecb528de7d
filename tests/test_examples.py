"""The settings files in examples/ are valid and fit each other."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel

from coterie.config import FederationConfig, PartyConfig, TrainConfig, load_yaml
from coterie.config.federation import party_privacy

EXAMPLES = Path(__file__).parent.parent / "examples"
KINDS: dict[str, type[BaseModel]] = {
    "federation.yaml": FederationConfig,
    "party.yaml": PartyConfig,
    "train.yaml": TrainConfig,
}
FILES = sorted(path for path in EXAMPLES.rglob("*.yaml") if path.name in KINDS)


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(EXAMPLES)) for path in FILES])
def test_an_example_can_be_loaded(path: Path) -> None:
    load_yaml(path, KINDS[path.name])  # type: ignore[arg-type]


def test_there_is_an_example_of_every_kind() -> None:
    assert {path.name for path in FILES} == set(KINDS)


def test_an_example_party_belongs_to_its_federation() -> None:
    for path in EXAMPLES.rglob("party.yaml"):
        party = load_yaml(path, PartyConfig)
        federation = load_yaml(party.federation, FederationConfig)
        assert party.party in federation.parties
        party_privacy(federation, party)  # raises when the two do not fit
