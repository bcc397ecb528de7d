"""Well-known Mixture-of-Experts models by their published dimensions: to plan with before anything is downloaded.

Each is a family and the settings of its config, as published. Building one on the meta device reads
and draws no weight.
"""

from __future__ import annotations

import difflib
from typing import Any

from coterie.config import ModelSpec
from coterie.errors import ModelError

_PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "Mixtral-8x7B": (
        "mixtral",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "tie_word_embeddings": False,
        },
    ),
    "OLMoE-1B-7B": (
        "olmoe",
        {
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "tie_word_embeddings": False,
        },
    ),
    "Qwen3-30B-A3B": (
        "qwen3_moe",
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "tie_word_embeddings": False,
        },
    ),
    "DeepSeek-V2-Lite": (
        "deepseek_v2",
        {
            "vocab_size": 102400,
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "kv_lora_rank": 512,
            "q_lora_rank": None,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "first_k_dense_replace": 1,
            "tie_word_embeddings": False,
        },
    ),
    "gpt-oss-20b": (
        "gpt_oss",
        {
            "vocab_size": 201088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 24,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "tie_word_embeddings": False,
        },
    ),
}
PRESETS = tuple(_PUBLISHED)
"""Names, as their makers write them."""


def preset(name: str) -> ModelSpec:
    """A model by its published name, in bfloat16, with weights that nobody has drawn yet.

    Raises:
        ModelError: no such name is known (code ``model-preset``).
    """
    found = {known.lower(): known for known in PRESETS}.get(name.lower())
    if found is None and name.lower().startswith("switch"):
        raise ModelError(
            f"`{name}` cannot be trained here: it is an encoder-decoder outside transformers' experts interface.",
            code="model-preset",
            why="its experts have a capacity and drop tokens beyond it",
            fix="`--preset Switch-base-8` says what that one would need; plan a decoder with experts of that size: "
            "`family: mixtral` and its `config` in a settings file",
        )
    if found is None:
        near = difflib.get_close_matches(name.lower(), [known.lower() for known in PRESETS], n=1)
        meant = next((known for known in PRESETS if known.lower() in near or name.lower() in known.lower()), None)
        raise ModelError(
            f"`{name}` is no model whose published dimensions are known here.",
            code="model-preset",
            why="a plan needs every dimension, and a guessed one would make all figures wrong",
            fix=(f"did you mean {meant}? " if meant else "")
            + f"choose one of {', '.join(PRESETS)}, or name family and config in a settings file",
        )
    family, config = _PUBLISHED[found]
    return ModelSpec(family=family, config=config, dtype="bfloat16")
