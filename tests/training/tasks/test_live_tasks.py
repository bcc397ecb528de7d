"""Tasks asked through a federation against the same tasks asked of everybody's parts in one model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedTokenizerFast

from coterie.models.seam import expert_layers
from coterie.models.zoo.tiny import tiny_model
from coterie.training.data.tokenizer import train_tokenizer
from coterie.training.party.in_process import InProcessFederation, run_in_process
from coterie.training.party.questions import Questions
from coterie.training.tasks.harness import Answers, ask
from coterie.training.tasks.questions import SETS
from helpers.federations import PARTIES, experts_settings, full_models, make_parts, settings

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

SIZES = {"vocab_size": 300, "max_position_embeddings": 256}


def questions(folder: Path) -> Path:
    """Made-up questions, short enough for the model."""
    rows = [
        {
            "instruction": f"Please answer the following question with true or false, question: is {i} {i * 7 % 5}?"
            "\n\nAnswer format: true/false",
            "answer": "true" if i % 3 else "false",
        }
        for i in range(24)
    ]
    path = folder / SETS["boolq"] / "test.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(rows), encoding="utf-8")
    return folder


def joined(folder: Path, party: str) -> nn.Module:
    """One party's trunk with everybody's experts, from their checkpoints, as plain transformers computes it."""
    model = tiny_model("olmoe", **SIZES)
    values, layers = dict(model.named_parameters()), expert_layers(model)
    newest = "private/checkpoints/round-00000002"
    with torch.no_grad():
        for name, value in load_file(folder / party / newest / "trunk.safetensors").items():
            if name in values:
                values[name].copy_(value)
        for host in PARTIES:
            for key, value in load_file(folder / host / newest / "experts.safetensors").items():
                _, layer, _, expert, name = key.split(".")
                layers[int(layer)].parameters()[name][int(expert)].copy_(value)
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["tokens", "experts"])
def test_a_live_federation_answers_as_its_parts_in_one_model(exchange: str, tmp_path: Path) -> None:
    words = "Question: is true or false Answer: 0 1 2 3 4 5 6 7 8 9"
    tokenizer: PreTrainedTokenizerFast = train_tokenizer([words] * 20, SIZES["vocab_size"])
    config = (settings if exchange == "tokens" else experts_settings)(train__rounds=2)
    parts = make_parts(config, full_models(**SIZES), tmp_path)
    run_in_process(config, list(parts.values()), tmp_path / "coordinator")
    folder = questions(tmp_path / "questions")
    found: list[Answers] = []

    def put(model: nn.Module) -> None:
        found.extend(ask(model, tokenizer, ["boolq"], folder, batch_size=4))  # type: ignore[arg-type]

    federation = InProcessFederation(config, tmp_path / "coordinator")
    federation.coordinate(questions=True)
    for name, inputs in parts.items():
        federation.up(replace(inputs, questions=Questions((), put) if name == "birch" else None))
    federation.join()
    errors = [end for end in federation.ends.values() if isinstance(end, BaseException)]
    assert not errors
    expected = ask(joined(tmp_path, "birch"), tokenizer, ["boolq"], folder, batch_size=4)  # type: ignore[arg-type]
    assert found == expected
    assert 0 < found[0].accuracy < 1
