"""Dimensions of published models, by the number of parameters that their makers state."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from coterie.cli.app import main
from coterie.config import ModelSpec
from coterie.errors import ConfigError, ModelError
from coterie.models.seam import expert_layers
from coterie.models.zoo.build import build_model
from coterie.models.zoo.presets import PRESETS, preset
from coterie.training.planning.plan import make_plan, preset_federation

# Billions of parameters, as model cards and reports state them.
STATED = {
    "Mixtral-8x7B": 46.7,
    "OLMoE-1B-7B": 6.92,
    "Qwen3-30B-A3B": 30.5,
    "DeepSeek-V2-Lite": 15.7,
    "gpt-oss-20b": 20.91,
}
MOE_LAYERS = {"Mixtral-8x7B": 32, "OLMoE-1B-7B": 16, "Qwen3-30B-A3B": 48, "DeepSeek-V2-Lite": 26, "gpt-oss-20b": 24}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_published_number_of_parameters(name: str) -> None:
    model = build_model(preset(name), meta=True)
    assert sum(param.numel() for param in model.parameters()) / 1e9 == pytest.approx(STATED[name], rel=2e-3)
    assert len(expert_layers(model)) == MOE_LAYERS[name]


def test_names_are_found_in_any_case_and_others_are_refused_with_the_nearest() -> None:
    assert preset("olmoe-1b-7b") == preset("OLMoE-1B-7B")
    for given, meant in (("olmo", "OLMoE-1B-7B"), ("Mixtral-8x7", "Mixtral-8x7B"), ("qwen3-30b", "Qwen3-30B-A3B")):
        with pytest.raises(ModelError, match=f"did you mean {meant}") as error:
            preset(given)
        assert error.value.code == "model-preset"
    with pytest.raises(ModelError, match="choose one of Mixtral"):
        preset("nothing like it")
    with pytest.raises(ModelError, match="cannot be trained here"):
        preset("Switch-large-128")


def test_the_plan_of_a_preset_counts_its_parameters_and_shares_its_experts() -> None:
    plan = make_plan(preset_federation("OLMoE-1B-7B", 4))
    assert (plan.trunk + plan.experts) / 1e9 == pytest.approx(STATED["OLMoE-1B-7B"], rel=1e-3)
    assert [each.hosted for each in plan.parties if each.exchange == "experts"] == [plan.experts // 4] * 4
    assert plan.centralised_bytes > 18 * STATED["OLMoE-1B-7B"] * 1e9  # weights, master, gradient, moments
    with pytest.raises(ConfigError) as error:
        preset_federation("OLMoE-1B-7B", 1)
    assert error.value.code == "plan-parties"


def test_the_command_takes_a_file_or_a_preset_and_not_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--preset", "OLMoE-1B-7B", "--parties", "2", "--json", str(tmp_path / "plan.json")])
    assert ended.value.code == 0
    assert len(json.loads((tmp_path / "plan.json").read_text("utf-8"))["parties"]) == 4
    for arguments in (["plan"], ["plan", "federation.yaml", "--preset", "OLMoE-1B-7B"]):
        with pytest.raises(SystemExit) as refused:
            main(arguments)
        assert refused.value.code == 1
        assert "plan-what" in capsys.readouterr().err


def test_switch_cannot_be_trained_and_its_plan_says_what_is_nearest_and_what_it_would_need(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--preset", "switch-base-8", "--json", str(path)])
    assert ended.value.code == 0
    said, found = capsys.readouterr().out, json.loads(path.read_text("utf-8"))
    assert "cannot be trained here: it is an encoder-decoder" in said
    trunk, experts = found["shape"]["trunk"], found["shape"]["experts"]
    assert (trunk + experts) / 1e9 == pytest.approx(0.62, rel=2e-3)
    assert experts == 12 * 8 * 2 * 768 * 3072, "an expert is two matrices"
    assert found["centralised"]["device"] == 18 * (trunk + experts) + 2 * 8 * 768 * 3072
    nearest = yaml.safe_load(said[said.index("`config: ") + len("`config: ") :].partition("`")[0])
    model = build_model(ModelSpec(family="mixtral", config=nearest), meta=True)
    assert {layer.num_experts for layer in expert_layers(model)} == {8}
    with pytest.raises(SystemExit):
        main(["plan", "--preset", "Switch-base-8", "--parties", "1"])
    assert "plan-parties" in capsys.readouterr().err
