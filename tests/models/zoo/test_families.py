"""The table of families says what the models really hold."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
from transformers import AutoConfig, PretrainedConfig

from coterie.cli.models import command
from coterie.errors import ConfigError, ModelError
from coterie.models.seam import expert_layers
from coterie.models.sizes import experts_per_token
from coterie.models.zoo import families
from coterie.models.zoo.catalogue import causal_lm_types, modules_without_causal_lm
from coterie.models.zoo.tiny import tiny_model

PAGE = Path(__file__).parents[3] / "docs" / "models.md"


def test_every_supported_type_has_a_row_whose_paths_exist():
    rows = {family.model_type: family for family in families.moe_families()}
    assert list(rows) == list(causal_lm_types())
    for family in rows.values():
        model = tiny_model(family.model_type)
        layer = expert_layers(model)[-1]
        number = next(part for part in layer.name.split(".") if part.isdigit())
        block = layer.name.rpartition(".")[0]
        assert family.experts_path.replace("*", number) == layer.name
        router = model.get_submodule(family.router_path.replace("*", number))
        assert {name for name, _ in router.named_parameters()} == set(family.router_parameters)
        held = {name for name, _ in model.get_submodule(block).named_parameters()}
        held |= {name for name, _ in model.get_submodule(block).named_buffers()}
        assert set(family.correction_biases) <= held
        for shared in family.shared_experts:
            assert list(model.get_submodule(shared.replace("*", number)).parameters())
        assert family.moe_layers >= 2
        assert family.top_k <= family.num_experts == layer.num_experts


def test_the_peculiar_layouts_are_read_from_their_flags():
    rows = {family.model_type: family for family in families.moe_families()}
    assert families.layout_words(rows["gpt_oss"].layout) == "gate and up, [E, in, out], bias, interleaved"
    assert families.layout_words(rows["nemotron_h"].layout) == "up only, [E, out, in]"
    assert rows["gpt_oss"].layout.parameter_names == (
        "gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias",
    )  # fmt: skip
    assert rows["deepseek_v3"].correction_biases == ("gate.e_score_correction_bias",)
    assert rows["qwen2_moe"].shared_experts == ("model.layers.*.mlp.shared_expert",)


def test_every_module_of_the_interface_is_either_in_the_table_or_excluded_with_a_reason():
    excluded = {family.name: family.reason for family in families.excluded_families()}
    assert set(modules_without_causal_lm()) <= set(excluded)
    assert not set(excluded) & set(causal_lm_types())
    assert all(reason for reason in excluded.values())
    assert {"dbrx", "jetmoe", "llama4", "nllb_moe", "switch_transformers"} <= set(excluded)


@pytest.mark.parametrize(
    ("model_type", "words"),
    [("switch_transformers", "capacity"), ("llama4_text", "every expert computes every token"), ("llama", None)],
)
def test_an_excluded_family_is_recognised_by_its_config(model_type, words):
    reason = families.why_excluded(AutoConfig.for_model(model_type))
    assert reason is None if words is None else words in reason


def test_a_supported_type_is_never_taken_for_an_excluded_one():
    class Named(PretrainedConfig):
        pass

    for model_type in causal_lm_types():
        config = Named()
        config.model_type = model_type
        assert families.why_excluded(config) is None, model_type


def test_more_columns_appear_in_the_page_the_table_and_the_records():
    columns = {"norm error": {"qwen3_moe": 1.25e-7}}
    header, rows = families.table_rows(columns)
    row = next(row for row in rows if row[0] == "qwen3_moe")
    assert row[header.index("norm error")] == "1.2e-07"
    assert next(row for row in rows if row[0] == "mixtral")[header.index("norm error")] == "-"
    assert "| norm error |" in families.markdown(columns)
    record = next(record for record in families.as_records(columns) if record["model_type"] == "qwen3_moe")
    assert record["norm error"] == 1.25e-7


def test_a_column_file_of_another_form_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"title": "x"}')
    with pytest.raises(ModelError, match="not a column") as error:
        families.read_columns(tmp_path)
    assert error.value.code == "model-bad-column"


def test_the_command_writes_the_table_as_json_and_as_a_page(tmp_path, capsys):
    page, figures = tmp_path / "models.md", tmp_path / "models.json"
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "speed.json").write_text('{"title": "speed", "cells": {"olmoe": "fast"}}')
    command(markdown_path=page, json_path=figures)
    assert "| speed |" in page.read_text()
    data = json.loads(figures.read_text())
    assert {item["model_type"] for item in data["families"]} == set(causal_lm_types())
    assert {item["name"] for item in data["excluded"]} >= {"dbrx"}
    capsys.readouterr()
    command()
    assert "qwen3_moe" in capsys.readouterr().out


def test_the_published_page_is_current():
    if f"transformers {transformers.__version__};" not in PAGE.read_text(encoding="utf-8"):
        pytest.skip("docs/models.md was made from another release of transformers")
    columns = families.read_columns(PAGE.with_suffix(""))
    assert PAGE.read_text(encoding="utf-8") == families.markdown(columns), (
        "run: coterie models --markdown docs/models.md"
    )


@pytest.mark.parametrize(
    "name", ["num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k", "num_experts_per_token"]
)
@pytest.mark.parametrize(("value", "wanted"), [(2, 2), ([1, 4, 2], 4)])
def test_how_many_experts_a_token_takes_is_read_under_every_name(name, value, wanted):
    assert experts_per_token(SimpleNamespace(**{"num_experts_per_tok": None, name: value})) == wanted


def test_a_config_that_does_not_say_how_many_is_refused():
    with pytest.raises(ConfigError, match="SimpleNamespace does not say how many experts") as caught:
        experts_per_token(SimpleNamespace(num_experts=8))
    assert caught.value.code == "plan-top-k"
