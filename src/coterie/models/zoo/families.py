"""Which families coterie trains, how each stores and chooses its experts, and why the others stay out.

The table is made from the installed transformers: every row comes from a tiny model that was built and looked at.
Only what a look at a model cannot tell (why a family stays out, what is peculiar about one) is written down here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from coterie.errors import ModelError
from coterie.models.seam import ExpertLayer, ExpertsLayout, expert_layers
from coterie.models.sizes import experts_per_token
from coterie.models.zoo.catalogue import causal_lm_types, is_installed, modeling_files, modules_without_causal_lm
from coterie.models.zoo.tiny import tiny_model


@dataclass(frozen=True)
class Family:
    """One model type that coterie trains.

    Paths have ``*`` for the decoder layer's number.

    Attributes:
        model_type: transformers' name, the ``family`` of a model spec.
        model_class: the causal LM class.
        layout: how the expert weights are stored.
        experts_path: the experts module.
        router_path: the module that chooses experts.
        router_parameters: its parameters, relative to its path.
        correction_biases: tensors that shift the choice of experts and get no gradient, relative to the experts'
            parent. Some families' own training loops change them from batch statistics; coterie leaves them alone.
        shared_experts: modules beside the experts that every token goes through.
        layers, moe_layers, num_experts, top_k: of the tiny model.
        tied: whether the config's default ties the output head to the embedding.
        notes: what is peculiar.
    """

    model_type: str
    model_class: str
    layout: ExpertsLayout
    experts_path: str
    router_path: str
    router_parameters: tuple[str, ...]
    correction_biases: tuple[str, ...]
    shared_experts: tuple[str, ...]
    layers: int
    moe_layers: int
    num_experts: int
    top_k: int
    tied: bool
    notes: str


@dataclass(frozen=True)
class Excluded:
    """A family that stays out, and why."""

    name: str
    reason: str


_NOTES: Mapping[str, str] = {
    "deepseek_v4": "some layers route by a fixed table of token ids; hyper-connections between layers",
    "gemma4": "the experts stand beside a dense MLP; image and audio towers are left out",
    "gemma4_text": "the experts stand beside a dense MLP",
    "inkling_text": "the router weighs the shared experts, too",
    "minimax_m2": "router input is jittered in training when the config says so",
    "minimax": "lightning attention; router input is jittered in training when the config says so",
    "mixtral": "router input is jittered in training when the config says so",
    "mistral4": "not listed in AutoModelForCausalLM; coterie takes the class itself",
    "nemotron_h": "experts without a gate; MoE layers alternate with Mamba and attention layers",
    "phimoe": "chooses experts at random in training (sparse mixer)",
    "zaya": "one expert per token or none; a layer's router also reads the router state of the layer before",
}

_VISION = "a vision-language model: transformers has no causal LM class for its text part"
_OUTSIDE: Mapping[str, str] = {
    "dbrx": "its experts do not go through transformers' experts interface: all of a layer's experts lie in one "
    "[E * F, D] matrix",
    "doge": "product-key retrieval of single-neuron experts outside the interface, and its router mixes the tokens "
    "of a batch, so a record's routing depends on the other records",
    "jetmoe": "its experts do not go through the interface: the feed-forward and the attention heads are each a "
    "mixture, computed by two separate expert modules",
    "llama4": "its experts do not go through the interface: every expert computes every token and the router "
    "scales the input instead of the output",
    "longcat_flash": "its experts do not go through the interface: some are identity functions without weights",
    "nllb_moe": "an encoder-decoder whose experts have a capacity over the whole batch: tokens beyond it are "
    "dropped, so a record's output depends on the other records",
    "step3p7": "its experts do not go through the interface, and there is no causal LM class for its text part",
    "switch_transformers": "an encoder-decoder whose experts have a capacity and drop tokens beyond it (before "
    "transformers 5.23 over the whole batch, so that records influenced each other), outside the interface",
}
_WITHOUT_CAUSAL_LM: Mapping[str, str] = {
    "deepseek_ocr2": _VISION,
    "diffusion_gemma": "a block-diffusion model: it does not predict the next token",
    "ernie4_5_vl_moe": _VISION,
    "glm4v_moe": _VISION,
    "glm5_next": _VISION,
    "mistral_large4": _VISION,
    "muse_spark": "a model of text, images and audio: transformers has no causal LM class for its text part",
    "openai_privacy_filter": "a token classifier with attention in both directions",
    "qwen3_omni_moe": "a model of text, images, audio and speech: transformers has no causal LM class for its text",
    "qwen3_vl_moe": _VISION,
    "unlimited_ocr": _VISION,
}
_NO_CLASS = "transformers has no causal LM class for it"


@cache
def moe_families() -> tuple[Family, ...]:
    """Every family that the installed transformers lets coterie train, by model type. Builds a tiny model of each."""
    return tuple(describe(model_type, tiny_model(model_type)) for model_type in causal_lm_types())


def excluded_families() -> tuple[Excluded, ...]:
    """Mixture-of-Experts families of the installed transformers that coterie refuses, by name."""
    found = {name: reason for name, reason in _OUTSIDE.items() if is_installed(name)}
    found |= {name: _WITHOUT_CAUSAL_LM.get(name, _NO_CLASS) for name in modules_without_causal_lm()}
    return tuple(Excluded(name, reason) for name, reason in sorted(found.items()))


def why_excluded(config: PretrainedConfig) -> str | None:
    """Why a model with this config cannot be exchanged, if it is of a family that stays out; otherwise None."""
    reasons = {family.name: family.reason for family in excluded_families()}
    model_type = config.model_type
    for name, reason in reasons.items():
        if model_type == name or model_type.startswith(f"{name}_"):
            return reason
    return None


def describe(model_type: str, model: PreTrainedModel) -> Family:
    """Look at a built model and note where its experts, routers and shared experts are."""
    layers = expert_layers(model)
    text = model.config.get_text_config()
    block_name = layers[-1].name.rpartition(".")[0]
    block = model.get_submodule(block_name)
    router = next(name for name in ("router", "gate") if hasattr(block, name))
    return Family(
        model_type=model_type,
        model_class=type(model).__name__,
        layout=layers[0].layout,
        experts_path=_pattern(layers[-1].name),
        router_path=_pattern(f"{block_name}.{router}"),
        router_parameters=tuple(name for name, _ in block.get_submodule(router).named_parameters()),
        correction_biases=_correction_biases(block),
        shared_experts=_shared_experts(model, layers[-1]),
        layers=text.num_hidden_layers,
        moe_layers=len(layers),
        num_experts=layers[0].num_experts,
        top_k=experts_per_token(text),
        tied=bool(getattr(text, "tie_word_embeddings", False)),
        notes=_NOTES.get(model_type, ""),
    )


def _pattern(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _correction_biases(block: nn.Module) -> tuple[str, ...]:
    tensors = [name for name, _ in (*block.named_parameters(), *block.named_buffers())]
    return tuple(name for name in tensors if re.search(r"(correction_bias|expert_bias|balancing_biases)$", name))


def _shared_experts(model: nn.Module, layer: ExpertLayer) -> tuple[str, ...]:
    """Modules of the same decoder layer that call themselves shared (a gate in front of one is not one)."""
    prefix = re.split(r"(?<=\.\d)\.", layer.name)[0] + "."
    names = [name for name, _ in model.named_modules() if name.startswith(prefix)]
    return tuple(_pattern(name) for name in names if re.search(r"\.shared_(experts?|mlp)$", name))


Columns = Mapping[str, Mapping[str, object]]
"""More figures for the table, {title: {model_type: cell}}; other packages measure them."""


def read_columns(folder: Path) -> dict[str, dict[str, object]]:
    """Columns from a folder of JSON files ``{"title": ..., "cells": {model_type: figure}}``, by file name.

    Raises:
        ModelError: a file is not of that form.
    """
    columns = {}
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            columns[str(content["title"])] = dict(content["cells"])
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"{path} is not a column of the table of models.",
                code="model-bad-column",
                fix='write {"title": "...", "cells": {"qwen3_moe": 1e-7}}',
            ) from error
    return columns


def as_records(columns: Columns | None = None) -> list[dict[str, Any]]:
    """The table as plain data, one dict a family."""
    return [
        {
            "model_type": family.model_type,
            "class": family.model_class,
            "experts": family.experts_path,
            "layout": {name: getattr(family.layout, name) for name in ExpertsLayout.__annotations__},
            "router": family.router_path,
            "router_parameters": list(family.router_parameters),
            "correction_biases": list(family.correction_biases),
            "shared_experts": list(family.shared_experts),
            "tiny": {
                "layers": family.layers,
                "moe_layers": family.moe_layers,
                "experts": family.num_experts,
                "top_k": family.top_k,
            },
            "tied_by_default": family.tied,
            "notes": family.notes,
            **{title: cells.get(family.model_type) for title, cells in (columns or {}).items()},
        }
        for family in moe_families()
    ]


def layout_words(layout: ExpertsLayout) -> str:
    """The storage of a family's experts in a few words."""
    words = ["gate and up" if layout.has_gate else "up only"]
    words.append("[E, in, out]" if layout.is_transposed else "[E, out, in]")
    words += ["bias"] if layout.has_bias else []
    words += [] if layout.is_concatenated else ["interleaved"]
    words += ["norm after"] if layout.has_post_expert_norm else []
    return ", ".join(words)


def table_rows(columns: Columns | None = None) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table people read; an absent cell shows as a dash."""
    extra = columns or {}
    header = ["family", "class", "experts stored as", "router", "shared experts", *extra, "notes"]
    rows = [
        [
            family.model_type,
            family.model_class,
            layout_words(family.layout),
            family.router_path,
            ", ".join(name.rpartition(".")[2] for name in family.shared_experts) or "-",
            *[_cell(cells.get(family.model_type)) for cells in extra.values()],
            family.notes or "-",
        ]
        for family in moe_families()
    ]
    return header, rows


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.1e}" if isinstance(value, float) else str(value)


def markdown(columns: Columns | None = None) -> str:
    """The page docs/models.md."""
    header, rows = table_rows(columns)
    code = {0, 1, 3}
    lines = [[f"`{cell}`" if index in code else cell for index, cell in enumerate(row)] for row in rows]
    outside = [[f"`{item.name}`", item.reason] for item in excluded_families()]
    return "\n".join(
        [
            "# Models",
            "",
            f"Made by `coterie models --markdown docs/models.md` from transformers {transformers.__version__}; "
            "a test checks that it is current.",
            "",
            f"coterie trains {len(rows)} model types: every causal language model of this release whose experts go "
            f"through transformers' experts interface ({len(modeling_files())} modeling files use it). Each is held "
            "to its own `eager` and `grouped_mm` code, forward and every gradient: 1e-5 in float32, 2e-2 in "
            "bfloat16 (norm of the difference over the norm, per tensor). See [the seam](concepts/seam.md).",
            "",
            *_markdown_table(header, lines),
            "",
            "## Families that stay out",
            "",
            *_markdown_table(["family", "why"], outside),
            "",
        ]
    )


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *["| " + " | ".join(row) + " |" for row in rows],
    ]
