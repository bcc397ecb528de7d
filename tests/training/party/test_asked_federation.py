"""A finished federation is asked: its answers are those of the whole model, nothing is trained, and who may ask."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from coterie.config import DataSpec, FederationConfig, PartyConfig
from coterie.errors import CheckpointError, ConfigError, RoundError
from coterie.models.seam import expert_layers
from coterie.models.zoo.tiny import VOCAB, tiny_model
from coterie.training.party.in_process import InProcessFederation, run_in_process
from coterie.training.party.inputs import PartyInputs
from coterie.training.party.questions import Questions, check_questions
from helpers.federations import PARTIES, experts_settings, full_models, make_parts, settings

IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module", params=["tokens", "experts"])
def finished(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[FederationConfig, dict[str, PartyInputs], Path]:
    """Two rounds of a federation of three, done; each party has another trunk."""
    config = (settings if request.param == "tokens" else experts_settings)(train__rounds=2)
    folder = tmp_path_factory.mktemp(request.param)
    parts = make_parts(config, full_models(), folder)
    run_in_process(config, list(parts.values()), folder / "coordinator")
    return config, parts, folder


def tensors(folder: Path, party: str, stem: str) -> Mapping[str, Tensor]:
    """What a party's newest checkpoint holds."""
    from safetensors.torch import load_file

    (path,) = (folder / party).glob(f"private/checkpoints/round-00000002/{stem}.safetensors")
    return load_file(path)


def joined(folder: Path, party: str) -> nn.Module:
    """One party's trunk with everybody's experts, from their checkpoints, as plain transformers computes it."""
    model = tiny_model("olmoe")
    values = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in tensors(folder, party, "trunk").items():
            if name in values:
                values[name].copy_(value)
        for host in PARTIES:
            for key, value in tensors(folder, host, "experts").items():
                _, layer, _, expert, name = key.split(".")
                expert_layers(model)[int(layer)].parameters()[name][int(expert)].copy_(value)
    return model.eval()


def session(
    config: FederationConfig, parts: Mapping[str, PartyInputs], folder: Path, ask: Mapping[str, Callable[..., None]]
) -> InProcessFederation:
    """The finished federation once more; some parties ask."""
    federation = InProcessFederation(config, folder / "coordinator")
    federation.coordinate(questions=True)
    for name, inputs in parts.items():
        federation.up(replace(inputs, questions=Questions((), ask[name]) if name in ask else None))
    federation.join()
    for end in federation.ends.values():
        if isinstance(end, BaseException):
            raise end
    return federation


def test_answers_are_those_of_everybodys_parts_in_one_model(finished) -> None:
    config, parts, folder = finished
    before = {path: path.read_bytes() for path in folder.rglob("*.safetensors")}
    found: dict[str, Tensor] = {}

    def asking(name: str) -> Callable[..., None]:
        def ask(model: nn.Module) -> None:
            assert not model.training
            found[name] = model(input_ids=IDS).logits

        return ask

    federation = session(config, parts, folder, {name: asking(name) for name in PARTIES[:2]})
    for name in PARTIES[:2]:
        with torch.no_grad():
            expected = joined(folder, name)(input_ids=IDS).logits
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found["alder"], found["birch"], atol=1e-3)  # with trunks of their own
    assert {path: path.read_bytes() for path in folder.rglob("*.safetensors")} == before
    assert federation.coordinator is not None
    notes = [status.state for status in federation.statuses]
    assert {state.phase for state in notes} <= {"gather", "restore", "evaluate", "end"}
    assert (notes[-1].ending, notes[-1].committed) == ("finished", 2)


def test_in_experts_asking_sends_what_not_asking_sends(finished) -> None:
    """In `tokens` it does not: the text goes out as hidden vectors."""
    config, parts, folder = finished

    def sent(ask: Mapping[str, Callable[..., None]]) -> int:
        federation = session(config, parts, folder, ask)
        wire = federation.runs["alder"].wire()
        return sum(wire[name]["tensors_sent"] for name in PARTIES if name in wire)

    quiet, asking = sent({}), sent({"alder": lambda model: model(input_ids=IDS)})
    if config.exchange == "experts":
        assert asking == quiet
    else:
        assert quiet == 0
        assert asking > IDS.numel() * 4


def test_what_fails_in_asking_is_asked_again(finished) -> None:
    config, parts, folder = finished
    asked = []

    def ask(model: nn.Module) -> None:
        asked.append(len(asked))
        if len(asked) == 1:
            raise RoundError("something went wrong", code="round-test")

    session(config, parts, folder, {"birch": ask})
    assert asked == [0, 1]


def test_an_unfinished_run_is_not_taken_up_for_questions(tmp_path: Path) -> None:
    federation = InProcessFederation(settings(), tmp_path)
    federation.coordinate(questions=True)
    federation.join()
    error = federation.ends["coordinator"]
    assert isinstance(error, RoundError)
    assert error.code == "questions-unfinished"


@pytest.fixture
def party(tmp_path: Path) -> PartyConfig:
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "result.json").write_text(json.dumps({"rounds": 4}))
    paths = dict.fromkeys(("federation", "kit", "trunk", "shard"), tmp_path / "none")
    return PartyConfig(party="alder", data=DataSpec(train=(tmp_path / "text.txt",)), run_dir=tmp_path, **paths)


@pytest.mark.parametrize(
    ("changes", "code"),
    [({"evaluate": False}, "questions-agreed"), ({"transcript": {"rounds": 1}}, "questions-recorded")],
)
def test_in_tokens_the_agreement_decides_what_may_be_asked(party: PartyConfig, changes: dict, code: str) -> None:
    check_questions(party, settings(), ("a question",))
    with pytest.raises(ConfigError) as caught:
        check_questions(party, settings(**changes), ("a question",))
    assert caught.value.code == code
    check_questions(party, experts_settings(**changes), ("a question",))  # no text leaves there


def test_an_unfinished_run_says_how_it_goes_on(party: PartyConfig) -> None:
    with pytest.raises(CheckpointError, match="coterie resume") as caught:
        check_questions(party, settings(train__rounds=5), ("a question",))
    assert caught.value.code == "run-unfinished"
