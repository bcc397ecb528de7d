"""Whether the sizes in a model's config fit each other, asked wherever a model is read and not in its first round.

transformers builds a model whose tokens ask for more experts than a layer has, or whose heads do not share the width,
and the first forward fails in the middle of torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from coterie.errors import ConfigError, ModelError

_TOP_K = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k", "num_experts_per_token")
_AT_LEAST_ONE = ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads")


def experts_per_token(text_config: Any) -> int:
    """K, under whatever name the family has for it; the largest one where layers differ.

    Raises:
        ConfigError: the config does not say.
    """
    found = _top_k(text_config)
    if found is not None:
        return found[1]
    raise ConfigError(
        f"{type(text_config).__name__} does not say how many experts a token takes.",
        code="plan-top-k",
        fix="set num_experts_per_tok in the model's config",
    )


def _top_k(text_config: Any) -> tuple[str, int] | None:
    for name in _TOP_K:
        value = getattr(text_config, name, None)
        if value is not None:
            return name, int(value if isinstance(value, int) else max(value))
    return None


def check_before_building(text_config: Any) -> None:
    """What would end in a traceback while the model is built.

    Raises:
        ModelError: a size is less than one, or heads do not share what they should.
    """
    for name in _AT_LEAST_ONE:
        value = getattr(text_config, name, None)
        if isinstance(value, int) and value < 1:
            raise _unfit(f"`{name}` is {value}", "a size of at least 1 is needed", "correct it")
    heads, groups = (getattr(text_config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        raise _unfit(
            f"`num_attention_heads` is {heads} and `num_key_value_heads` {groups}",
            "every key and value head serves as many query heads as the others",
            "take a number of key and value heads that divides that of query heads",
        )


def check_routing(text_config: Any, layers: Sequence[int], stacked: Sequence[Tensor]) -> None:
    """Whether each token finds the experts that it asks for.

    Args:
        text_config: of the model.
        layers: experts of each MoE layer.
        stacked: expert parameters, of some experts or all; shapes alone are looked at.

    Raises:
        ModelError: it does not, or experts hold no weights.
    """
    if not layers:
        return
    experts = min(layers)
    if experts < 1 or any(0 in tensor.shape[1:] for tensor in stacked):
        raise _unfit(
            "A layer's experts hold no weights at all", "there is nothing to train or to share",
            "give the number of experts and their width in the model's config",
        )  # fmt: skip
    found = _top_k(text_config)
    if found is None:
        return
    name, chosen = found
    if not 1 <= chosen <= experts:
        raise ModelError(
            f"`{name}` is {chosen}, and a layer has {experts} experts: a token takes between 1 and {experts}.",
            code="model-top-k",
            why="the first forward pass would fail" if chosen else "no expert would compute or learn anything",
            fix=f"set {name} to {experts} or less" if chosen else f"set {name} to 1 or more",
        )
    _check_groups(text_config, experts, chosen)


def _check_groups(text_config: Any, experts: int, chosen: int) -> None:
    """Of families whose tokens choose some groups of experts first, and experts within these."""
    groups, open_groups = (getattr(text_config, name, None) for name in ("n_group", "topk_group"))
    method = getattr(text_config, "topk_method", None)
    if method == "greedy" or (method is None and (groups is None or open_groups is None)):
        return
    least = 2 if method is None and groups != 1 else 1  # DeepSeek-V3 and its kin rate a group by its best two experts
    if groups is None or open_groups is None:
        problem = f"experts from groups that are not named (`topk_method: {method}`, `topk_group`, `n_group`)"
    elif not 1 <= open_groups <= groups or experts % groups or experts // groups < least:
        problem = f"{open_groups} of {groups} groups of a layer's {experts} experts (`topk_group`, `n_group`)"
    elif open_groups * (experts // groups) < chosen:
        problem = f"{chosen} experts out of {open_groups} groups of {experts // groups} (`topk_group`, `n_group`)"
    else:
        return
    raise ModelError(
        f"A token would take {problem}, which cannot be.",
        code="model-expert-groups",
        why="the router would fail, or take experts that its own rule leaves out",
        fix="let n_group divide the number of experts into groups of two or more, and topk_group groups hold as many "
        "as a token takes; 1 and 1 is no groups",
    )


def _unfit(problem: str, why: str, fix: str) -> ModelError:
    return ModelError(f"{problem}.", code="model-sizes", where="the model's config", why=why, fix=fix)
