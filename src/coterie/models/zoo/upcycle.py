"""Sparse upcycling (Komatsuzaki et al. 2023, arXiv:2212.05055): an MoE checkpoint from a dense one.

Every feed-forward layer becomes E copies of itself behind a new router. As long as the copies are equal and a token's
routing weights sum to one, the model computes what the dense one computed; training then tells the copies apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel

from coterie.errors import ModelError
from coterie.models.split.saved import check_saved
from coterie.models.split.trainings import trainings_of, write_trainings
from coterie.models.zoo.build import ask_for_plain_weights, check_keys, check_one_model, make_plain

_LLAMA_NAMES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_BERT_NAMES = {
    "up_proj": "intermediate.dense.weight",
    "up_proj_bias": "intermediate.dense.bias",
    "down_proj": "output.dense.weight",
    "down_proj_bias": "output.dense.bias",
}


@dataclass(frozen=True)
class Recipe:
    """How one dense type becomes an MoE type.

    Attributes:
        prefix: start of the dense class names, and of the MoE ones.
        own: config settings of the MoE type that the dense one has under other names, or not at all.
        refuse: why a particular dense config cannot be turned, or None.
    """

    prefix: tuple[str, str]
    config_class: Callable[[], type[PretrainedConfig]]
    own: Callable[[PretrainedConfig, int, int, bool], dict[str, Any]]
    refuse: Callable[[PretrainedConfig, bool], str | None]


def _mixtral(dense: PretrainedConfig, experts: int, top_k: int, normalise: bool) -> dict[str, Any]:
    return {"num_local_experts": experts, "num_experts_per_tok": top_k}


def _qwen(dense: PretrainedConfig, experts: int, top_k: int, normalise: bool) -> dict[str, Any]:
    shared = {}
    if dense.model_type == "qwen2":
        # This type always has a shared expert; it starts with a zero output matrix, so it adds nothing.
        shared = {"shared_expert_intermediate_size": max(1, dense.intermediate_size // experts)}
    return {
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": dense.intermediate_size,
        "norm_topk_prob": normalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        **shared,
    }


def _bert(dense: PretrainedConfig, experts: int, top_k: int, normalise: bool) -> dict[str, Any]:
    return {"num_experts": experts, "num_experts_per_tok": top_k, "norm_topk_prob": normalise}


def _refuse_llama(dense: PretrainedConfig, normalise: bool) -> str | None:
    if getattr(dense, "attention_bias", False) or getattr(dense, "mlp_bias", False):
        return "it has biases, which Mixtral has no place for"
    return None if normalise else "Mixtral always normalises routing weights"


def _bert_config() -> type[PretrainedConfig]:
    from coterie.models.zoo.bert_moe import BertMoeConfig

    return BertMoeConfig


def _nothing(dense: PretrainedConfig, normalise: bool) -> str | None:
    return None


RECIPES: dict[str, Recipe] = {
    "llama": Recipe(("Llama", "Mixtral"), lambda: transformers.MixtralConfig, _mixtral, _refuse_llama),
    "qwen2": Recipe(("Qwen2", "Qwen2Moe"), lambda: transformers.Qwen2MoeConfig, _qwen, _nothing),
    "qwen3": Recipe(("Qwen3", "Qwen3Moe"), lambda: transformers.Qwen3MoeConfig, _qwen, _nothing),
    "bert": Recipe(("Bert", "BertMoe"), _bert_config, _bert, _nothing),
}


def upcycle(
    dense: PreTrainedModel, experts: int, top_k: int, noise: float = 0.0, *, normalise: bool = True, seed: int = 0
) -> PreTrainedModel:
    """An MoE model that starts where ``dense`` is.

    Args:
        dense: a Llama, Qwen2, Qwen3 or BERT model, with or without head.
        experts: E, copies of each feed-forward layer.
        top_k: K, experts per token.
        noise: standard deviation of what is added to each copy, relative to that of each matrix; 0 keeps the copies
            equal, and the router's first gradient then only comes from what training changes.
        normalise: a token's routing weights sum to one, so that the output stays the dense model's.
        seed: of router and noise; both are public.

    Returns:
        A model of transformers' class for the MoE type (or `coterie.models.zoo.bert_moe`), same dtype, on the CPU.

    Raises:
        ModelError: a type or head that cannot be turned, or impossible numbers.
    """
    config = dense.config
    recipe = _recipe(config, normalise)
    if not 1 <= top_k <= experts or experts < 2 or not 0 <= noise < math.inf:
        raise ModelError(
            f"{experts} experts, {top_k} per token, noise {noise} make no MoE model.",
            code="upcycle-numbers",
            fix="take at least 2 experts, between 1 and that many per token, and noise of at least 0",
        )
    moe_config = _moe_config(config, recipe, experts, top_k, normalise)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _class_of(type(dense).__name__, recipe)(moe_config).to(dense.dtype)
    source = {name: tensor.detach().cpu() for name, tensor in dense.state_dict().items()}
    target = model.state_dict()
    with torch.no_grad():
        for name, tensor in target.items():
            if name in source:
                tensor.copy_(source[name])
            elif ".experts." in name:
                whole = _dense_matrix(name, source)
                for copy in tensor:
                    copy.copy_(whole)
                    if noise:
                        copy.add_(
                            torch.randn(whole.shape, generator=generator).to(copy) * (noise * float(whole.std()))
                        )
            elif name.endswith("shared_expert.down_proj.weight"):
                tensor.zero_()
            elif not _is_new(name):
                raise ModelError(
                    f"`{name}` has no counterpart in {type(dense).__name__}.",
                    code="upcycle-weights",
                    why="it would start from random numbers, and the model would not compute what the dense one did",
                    fix="report the checkpoint's config; its variant is not known here",
                )
    if model.can_generate() and getattr(dense, "generation_config", None) is not None:
        model.generation_config = dense.generation_config
    return model.eval()


def _dense_matrix(name: str, source: dict[str, Tensor]) -> Tensor:
    """The dense tensor that every expert's part of the stacked parameter ``name`` is a copy of."""
    block, _, part = name.partition(".experts.")
    if not block.endswith(".intermediate"):
        return torch.cat([source[f"{block}.{matrix}.weight"] for matrix in _LLAMA_NAMES[part]])
    return source[f"{block.removesuffix('.intermediate')}.{_BERT_NAMES[part]}"]


def _is_new(name: str) -> bool:
    """Routers, and the gate and input matrices of a shared expert whose output is zero."""
    return ".gate.weight" in name or "shared_expert" in name


def _recipe(config: PretrainedConfig, normalise: bool) -> Recipe:
    recipe = RECIPES.get(config.model_type)
    reason = recipe.refuse(config, normalise) if recipe else _why_unknown(config)
    if recipe is None or reason:
        raise ModelError(
            f"A `{config.model_type}` checkpoint cannot be upcycled: {reason}.",
            code="upcycle-type",
            fix="take a checkpoint of one of these types: " + ", ".join(RECIPES),
        )
    return recipe


def _why_unknown(config: PretrainedConfig) -> str:
    if any(getattr(config, name, None) for name in _EXPERT_COUNTS):
        return "it has experts already"
    return "no MoE type of its shape is known"


def _moe_config(
    dense: PretrainedConfig, recipe: Recipe, experts: int, top_k: int, normalise: bool
) -> PretrainedConfig:
    kept = {
        name: value
        for name, value in dense.to_dict().items()
        if name not in ("model_type", "architectures", "transformers_version", "_name_or_path")
    }
    return recipe.config_class()(**{**kept, **recipe.own(dense, experts, top_k, normalise)})


def _class_of(dense_name: str, recipe: Recipe) -> type[PreTrainedModel]:
    name = recipe.prefix[1] + dense_name.removeprefix(recipe.prefix[0])
    if recipe.prefix[0] == "Bert":
        from coterie.models.zoo import bert_moe

        found: type[PreTrainedModel] | None = getattr(bert_moe, name, None)
    else:
        found = getattr(transformers, name, None)
    if found is None:
        raise ModelError(
            f"{dense_name} has a head that the MoE type lacks.",
            code="upcycle-head",
            fix="upcycle the base model or one with a language-model or classification head",
        )
    return found


def upcycle_checkpoint(
    dense: Path | str,
    out: Path,
    experts: int,
    top_k: int,
    noise: float = 0.0,
    *,
    normalise: bool = True,
    seed: int = 0,
) -> PreTrainedModel:
    """`upcycle` from a checkpoint folder (or hub name) to a folder, tokenizer included.

    Raises:
        ModelError: the checkpoint cannot be read or turned, or ``out`` is not empty or cannot be written.
    """
    _check_empty(out)
    dense_model = _read(str(dense), normalise)
    moe = upcycle(dense_model, experts, top_k, noise, normalise=normalise, seed=seed)
    try:
        moe.save_pretrained(str(out))
        write_trainings(out, trainings_of(dense_model))
        check_saved(moe, out)
    except OSError as error:
        raise _cannot_write(out, error) from None
    with suppress(OSError, ValueError, KeyError):  # a checkpoint without tokenizer stays one
        AutoTokenizer.from_pretrained(str(dense)).save_pretrained(str(out))
    return moe


def _check_empty(out: Path) -> None:
    """Before weights are read: the folder can be made, and holds nothing."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        kind = "is not empty" if out.is_dir() else "is a file"
        raise ModelError(f"{out} {kind}.", code="upcycle-out", fix="name a new folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(out, error) from None


def _cannot_write(out: Path, error: OSError) -> ModelError:
    return ModelError(
        f"{out} cannot be written: {error.strerror or error}.",
        code="upcycle-out",
        fix="name a new folder on a disk with room that you may write to",
    )


def _read(dense: str, normalise: bool) -> PreTrainedModel:
    """The dense model of a folder or hub name, with the head it was saved with."""
    from coterie.models.zoo import bert_moe  # noqa: F401  registers its type, so that an upcycled BERT is recognised

    try:
        config = AutoConfig.from_pretrained(dense)
        # Refuse before weights are read, which takes a while for large checkpoints.
        _recipe(config, normalise)
        quantized = ask_for_plain_weights(config, dense)
        names = config.architectures or []
        model_class = next((c for c in _classes(names) if c is not None), None) or transformers.AutoModel
        check_one_model(Path(dense))
        model: PreTrainedModel
        model, info = model_class.from_pretrained(
            dense, config=config if quantized else None, output_loading_info=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        absent = not Path(dense).exists()
        raise ModelError(
            f"{dense} is no folder here, and no checkpoint of that name came from the hub."
            if absent
            else f"{dense} holds no checkpoint that can be read: {str(error).splitlines()[0]}",
            code="upcycle-read",
            fix="name a folder with config.json and safetensors weights",
        ) from None
    check_keys(dense, set(info["missing_keys"]), set(), set(info["mismatched_keys"]))
    if quantized:
        make_plain(model, dense)
    return model


def _classes(names: list[str]) -> Iterator[type[PreTrainedModel] | None]:
    for name in names:
        yield getattr(transformers, name, None)
