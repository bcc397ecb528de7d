"""Models of every supported family that are small enough for tests: one forward takes milliseconds.

A family needs no code here, at most a row of sizes: `tiny_config` sets every size field that the family's config
class declares, then the family's own row. What the rows add is what makes a small model still contain all of its
kinds of layers (attention next to linear attention, a hash router next to a learned one).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from coterie.errors import ModelError
from coterie.models.zoo.catalogue import causal_lm_class, causal_lm_types, own_config

VOCAB = 96
EXPERTS = 8
TOP_K = 2

_SIZES: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "max_position_embeddings": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_experts_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 8,
    "num_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "num_experts_per_token": TOP_K,
    "top_k_experts": TOP_K,
    "moe_topk": TOP_K,
    "moe_k": TOP_K,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "n_group": 1,
    "num_expert_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 8,
    "linear_num_heads": 4,
    "linear_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "sliding_window_size": 8,
    "d_rel": 4,
    "rel_extent": 16,
}

_LINEAR = ["linear_attention", "full_attention", "linear_attention"]
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
_ONE_DENSE = ["dense", "sparse", "sparse"]

_FAMILY: Mapping[str, Mapping[str, Any]] = {
    "afmoe": {"layer_types": _SLIDING},
    "bailing_hybrid": {"layer_types": _LINEAR},
    "beam": {"layer_types": _SLIDING, "mlp_layer_types": _ONE_DENSE},
    "cohere2_moe": {"layer_types": _SLIDING},
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "head_dim": 16,
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention", "sliding_attention"],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "index_topk": 2,
        "hc_mult": 2,
        "o_groups": 2,
        "o_lora_rank": 8,
        "partial_rotary_factor": 0.5,
    },
    "dots3_note_text": {
        "head_dim": 16,
        "index_head_dim": 16,
        "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"],
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "exaone_moe": {"layer_types": _SLIDING, "mlp_layer_types": _ONE_DENSE},
    "flint": {"mlp_only_layers": [0], "layer_types": _SLIDING},
    "gemma4_text": {
        "enable_moe_block": True,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 8,
        "global_head_dim": 16,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "gpt_oss": {"max_position_embeddings": 32 * 4096},  # what its default rotary scaling assumes
    "granitemoe_swa": {"layer_types": _SLIDING, "layer_rope_theta": [1e4, 1e4, 1e4]},
    "granitemoehybrid": {"layer_types": _LINEAR, "mamba_n_heads": 4, "mamba_chunk_size": 8},
    "inkling_text": {
        "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
        "mlp_layer_types": _ONE_DENSE,
        "unpadded_vocab_size": VOCAB,
    },
    "inkling2_text": {
        "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
        "unpadded_vocab_size": VOCAB,
        "n_layers_per_attn_res_block": 2,
    },
    "inkling2_loop_text": {  # a message between passes weighs two blocks, so that its query matters
        "num_hidden_layers": 4,
        "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding", "hybrid"],
        "unpadded_vocab_size": VOCAB,
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 3,
        "loop_num_passes": 2,  # three amplify the rounding of a forward to 2e-5 of a gradient's norm
        "loop_gate_rank": 4,
    },
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "kimi_linear": {"layer_types": _LINEAR},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "minimax": {"layer_types": _LINEAR, "block_size": 8},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse", "full_attention"],
        "mlp_layer_types": _ONE_DENSE,
        "dense_intermediate_size": 48,
        "rotary_dim": 8,
        "index_block_size": 4,
        "index_topk_blocks": 2,
        "num_experts_per_tok": TOP_K,
    },
    "mistral4": {"max_position_embeddings": 128 * 8192},  # likewise
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "mlp"],
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "chunk_size": 8,
    },
    "phimoe": {"router_jitter_noise": 0.4},  # its usual 0.01 leaves every gate at exactly 1, without a gradient
    "qwen3_5_moe_text": {"layer_types": _LINEAR},
    "qwen3_next": {"layer_types": _LINEAR},
    "qwen4_exp_text": {
        "layer_types": _LINEAR,
        "hc_count": 2,
        "hc_lowrank": 8,
        "ple_layer_ids": [3],
        "ple_embed_dim": 16,
        "heads_per_ngram": 2,
        "ngram_size": 2,
        "ngram_vocab_size_base": 32,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}


def tiny_config(model_type: str, **overrides: Any) -> PretrainedConfig:
    """The config of a very small model of one family.

    Args:
        model_type: a key of `catalogue.causal_lm_types`.
        overrides: fields of the family's config (of its text part, where a family has parts) that win over ours.

    Raises:
        ModelError: the installed transformers has no such family behind its experts interface.
    """
    if model_type not in causal_lm_types():
        raise ModelError(
            f"`{model_type}` is not a causal language model behind transformers' experts interface.",
            code="model-unknown-family",
            fix="choose one of: " + ", ".join(causal_lm_types()),
        )
    config_class = CONFIG_MAPPING[model_type]
    if "text_config" in config_class.__dataclass_fields__:
        return _composite_config(config_class, overrides)
    return _flat_config(config_class, overrides)


def _flat_config(config_class: type[PretrainedConfig], overrides: Mapping[str, Any]) -> PretrainedConfig:
    fields = config_class.__dataclass_fields__
    values = {name: value for name, value in _SIZES.items() if name in fields}
    if "kv_lora_rank" in fields:  # latent attention has one key and value per head
        values["num_key_value_heads"] = values["num_attention_heads"]
    values.update(_FAMILY.get(config_class.model_type, {}))
    values.update(overrides)
    return config_class(**values)


def _composite_config(config_class: type[PretrainedConfig], overrides: Mapping[str, Any]) -> PretrainedConfig:
    """A config with text, vision and audio parts: tiny text, and no tower that the causal LM does not use."""
    text = _flat_config(config_class.sub_configs["text_config"], overrides)
    parts: dict[str, Any] = {"text_config": text.to_dict()}
    if config_class.model_type == "dots3_note":  # its check wants the towers' outputs as wide as the text
        parts |= {name: {"adapter_out_dim": text.hidden_size} for name in ("vision_config", "audio_config")}
    return config_class(**parts, tie_word_embeddings=text.tie_word_embeddings)


def tiny_model(
    model_type: str,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: torch.device | str = "cpu",
    **overrides: Any,
) -> PreTrainedModel:
    """A very small random model of one family, in eval mode, the same for the same seed.

    Every parameter gets a real random value: the family's own initialisation leaves some at zero (routers, gates,
    biases), which would hide an error in their gradients.
    """
    config = tiny_config(model_type, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model_class = causal_lm_class(model_type)
        model = model_class._from_config(own_config(model_class, config), dtype=dtype)
    fill_random(model, torch.Generator().manual_seed(seed))
    return model.to(device).eval()


@torch.no_grad()
def fill_random(model: nn.Module, generator: torch.Generator) -> None:
    """Random values for all parameters and for the persistent buffers that act like parameters."""
    for name, parameter in model.named_parameters():
        parameter.copy_(_random_like(name, parameter, generator))
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name in module._non_persistent_buffers_set:
                continue
            if name == "balancing_biases":  # ZAYA's last entry is a constant that transformers sets on every load
                buffer[:-1].add_(0.05 * _normal(buffer[:-1], generator))
            elif buffer.is_floating_point():
                buffer.add_(0.05 * _normal(buffer, generator))
            elif name == "tid2eid":  # DeepSeek-V4's table of token id to expert ids
                order = torch.rand(buffer.shape[0], EXPERTS, generator=generator).argsort(dim=1)
                buffer.copy_(order[:, : buffer.shape[1]])


def _random_like(name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    noise = _normal(parameter, generator)
    if parameter.ndim < 2 or name.endswith("A_log"):  # norms, biases, decay rates: near their meaningful start
        return parameter + 0.1 * noise
    scaled: Tensor = noise / parameter.shape[-1] ** 0.5
    return scaled


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like)
