"""An export says what was promised about the text behind it, and goes to a hub only where something was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from coterie.errors import ModelError, ProvenanceError
from coterie.models.split import pushing
from coterie.models.split.card import promise_of, write_card
from coterie.models.split.trainings import Training, write_trainings

BUDGET = Training("a1", "budget", ledger="alder-1", epsilon=8.0, delta=1e-5)
OTHER = Training("b2", "budget", ledger="birch-1", epsilon=3.0, delta=1e-6)
PUBLIC, OPEN, SEEDED = Training("c3", "public"), Training("d4", "none"), Training("e5", "seeded", epsilon=8.0)
CASES = {
    "unknown": [()],
    "public": [(PUBLIC,), (PUBLIC, PUBLIC)],
    "budget": [(BUDGET,), (PUBLIC, BUDGET, OTHER)],
    "none": [(OPEN,), (BUDGET, OPEN), (OPEN, PUBLIC), (SEEDED,), (SEEDED, BUDGET)],
}
EACH = [(promise, trainings) for promise, several in CASES.items() for trainings in several]


def exported(folder: Path, trainings: tuple[Training, ...]) -> Path:
    """What an export is to a card: config, weights, trainings."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["OlmoeForCausalLM"], "model_type": "olmoe"}))
    for name in ("a", "b"):
        (folder / f"{name}.safetensors").write_bytes(bytes(1_000_000))
    write_trainings(folder, trainings)
    write_card(folder)
    return folder


@pytest.mark.parametrize(("promise", "trainings"), EACH)
def test_a_card_promises_no_more_than_the_weakest_training(
    tmp_path: Path, promise: str, trainings: tuple[Training, ...]
) -> None:
    assert promise_of(trainings) == promise
    folder = exported(tmp_path / "out", trainings)
    statement = json.loads((folder / "privacy.json").read_text())
    card = (folder / "README.md").read_text()
    assert (statement["format"], statement["promise"]) == (1, promise)
    assert statement["words"] in card
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "transformers"
    assert ("differential-privacy" in head["tags"]) == (promise == "budget")
    for training in set(trainings):
        assert f"| {training.run} | {training.privacy} |" in card
    assert {entry["run"] for entry in statement["trainings"]} == {training.run for training in trainings}
    assert "2 safetensors files, 2.0 MB" in card
    assert str(tmp_path) not in card + json.dumps(statement)


def test_figures_of_every_budget_are_in_the_card(tmp_path: Path) -> None:
    card = (exported(tmp_path / "out", (BUDGET, OTHER)) / "README.md").read_text()
    assert "| a1 | budget | alder-1 | 8.0 | 1e-05 |" in card
    assert "| b2 | budget | birch-1 | 3.0 | 1e-06 |" in card


class Hub:
    """Notes what it is asked."""

    def __init__(self, broken: Exception | None = None) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self._broken = broken

    def create_repo(self, name: str, **options: Any) -> None:
        if self._broken is not None:
            raise self._broken
        self.asked.append((name, options))

    def upload_folder(self, **options: Any) -> str:
        self.asked.append(("upload", options))
        return "there"


@pytest.mark.parametrize("trainings", [(), (PUBLIC,), (BUDGET, PUBLIC)])
def test_an_export_goes_to_a_private_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainings: tuple[Training, ...]
) -> None:
    hub = Hub()
    monkeypatch.setattr(pushing, "HfApi", lambda: hub)
    folder = exported(tmp_path / "out", trainings)
    assert pushing.push(folder, "grove/model") == "there"
    (name, options), (_, upload) = hub.asked
    assert (name, options) == ("grove/model", {"private": True, "exist_ok": True})
    assert (upload["repo_id"], upload["folder_path"]) == ("grove/model", folder)


@pytest.mark.parametrize("trainings", CASES["none"])
def test_a_model_that_no_budget_protects_is_not_uploaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainings: tuple[Training, ...]
) -> None:
    hub = Hub()
    monkeypatch.setattr(pushing, "HfApi", lambda: hub)
    with pytest.raises(ProvenanceError) as refused:
        pushing.push(exported(tmp_path / "out", trainings), "grove/model")
    assert refused.value.code == "hub-unprotected"
    assert hub.asked == []


def test_a_hub_that_cannot_be_reached_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("HF_TOKEN", "hf_made_up")
    with pytest.raises(ModelError, match="could not be uploaded to grove/model") as refused:
        pushing.push(exported(tmp_path / "out", (PUBLIC,)), "grove/model")
    assert refused.value.code == "hub-unreachable"


@pytest.mark.parametrize(
    "broken", [ConnectionError("no way"), ValueError("a name has one slash\nat most"), OSError()]
)
def test_whatever_a_hub_says_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: Exception
) -> None:
    monkeypatch.setattr(pushing, "HfApi", lambda: Hub(broken))
    with pytest.raises(ModelError) as refused:
        pushing.push(exported(tmp_path / "out", ()), "a/b/c")
    assert refused.value.code == "hub-unreachable"
    assert "\n" not in str(refused.value).partition("  fix")[0].strip()
