"""What cannot be trained privately, said before anything is computed.

Each refusal names what was found, why it breaks the guarantee and the way out. What cannot be seen by looking at the
model is found by the self-check, which compares numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coterie.dp.losses import Batch, batch_size
from coterie.errors import NoRuleError, PrivacyError

_PACKED_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx", "document_ids")
_CAPACITY_PER_SEQUENCE = "SwitchTransformersTop1Router"
_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_BATCH_STATISTICS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def check_model(model: nn.Module) -> None:
    """Refuse a model whose records influence each other by construction.

    Raises:
        NoRuleError: expert capacity over the batch, expert-choice routing, or batch normalisation.
    """
    for name, module in model.named_modules():
        kind = type(module).__name__
        if hasattr(module, "expert_capacity") and kind != _CAPACITY_PER_SEQUENCE:
            raise NoRuleError(
                f"`{name}` ({kind}) gives every expert a capacity over the whole batch.",
                code="dp-batch-capacity",
                why="one record's tokens push another's out of an expert, so its gradient depends on other records",
                fix="use a family without capacity, or Switch Transformers, whose capacity is per sequence",
            )
        if "ExpertChoice" in kind:
            raise NoRuleError(
                f"`{name}` ({kind}) lets experts choose among the tokens of the whole batch.",
                code="dp-expert-choice",
                why="which tokens of a record are processed depends on the other records",
                fix="use a model in which each token chooses its experts",
            )
        if isinstance(module, _BATCH_STATISTICS) and module.training:
            raise NoRuleError(
                f"`{name}` ({kind}) normalises with statistics of the batch.",
                code="dp-batch-norm",
                why="every record's gradient depends on the other records",
                fix="replace it by LayerNorm or RMSNorm: every round puts the whole model in train mode",
            )


def check_hooks(model: nn.Module) -> None:
    """Refuse hooks on gradients: a release is formed without autograd's accumulation, so they would not run as meant.

    Raises:
        PrivacyError: a trained parameter or a module has one; the message names it.
    """
    hooked = [
        f"parameter `{name}`"
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and (parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None))
    ]
    hooked += [
        f"module `{name}` ({type(module).__name__})"
        for name, module in model.named_modules()
        if module._backward_hooks or module._backward_pre_hooks
    ]
    if hooked:
        raise PrivacyError(
            f"The {hooked[0]} has a hook on its gradient ({len(hooked)} in all).",
            code="dp-gradient-hook",
            why="private gradients do not pass through it: what it holds still would be trained and noised",
            fix="remove the hook; freeze what is to stay (requires_grad_(False)), or change the released gradients "
            "in optimizer.register_step_pre_hook",
        )


def check_types(parameters: Mapping[str, Tensor]) -> None:
    """Refuse trained parameters of a type that norms are not taken in.

    Raises:
        NoRuleError: one is float64, complex, or of eight bits.
    """
    other = next((name for name, p in parameters.items() if p.dtype not in _TYPES), None)
    if other is not None:
        kind = str(parameters[other].dtype).removeprefix("torch.")
        raise NoRuleError(
            f"`{other}` is {kind}; trained parameters have to be float32, bfloat16 or float16.",
            code="dp-dtype",
            why="norms and sums are taken in float32, and their bound is proven for that",
            fix="train it in float32 (model.float()), or freeze it (requires_grad_(False))",
        )


def value_changed(model: nn.Module, name: str) -> NoRuleError:
    """The error for a buffer, a parameter or another tensor of a model that changes when the model sees data."""
    parameter = dict(model.named_parameters()).get(name)
    if parameter is not None:
        kind = "trained parameter" if parameter.requires_grad else "frozen parameter"
    else:
        kind = "buffer" if name in dict(model.named_buffers()) else "attribute"
    return NoRuleError(
        f"The {kind} `{name}` changes when the model sees data.",
        code="dp-buffer",
        why="it would carry un-noised information about records into the next round and the saved model",
        fix="switch that update off (a router bias can be updated from the private load: balance: bias)",
    )


def unused_warning(model: nn.Module, names: Sequence[str]) -> str | None:
    """One sentence about trained parameters that no record uses, with the line that freezes them; None without any.

    Args:
        model: whose parameters these are.
        names: of parameters that got no gradient.
    """
    if not names:
        return None
    trained = sum(parameter.requires_grad for parameter in model.parameters())
    whole = _unused_modules(model, set(names))
    first = whole[0] if whole else names[0]
    get = "get_submodule" if whole else "get_parameter"
    return (
        f"{len(names)} of {max(trained, len(names))} trained tensors were used by no made-up record and would be "
        f"moved by noise alone (first: `{names[0]}`); before the optimizer is made, freeze what no record uses: "
        f'model.{get}("{first}").requires_grad_(False)'
        + (f", and so on for {', '.join(f'`{name}`' for name in whole[1:4])}" if len(whole) > 1 else "")
    )


def _unused_modules(model: nn.Module, unused: set[str]) -> list[str]:
    """Largest modules in which every trained parameter is unused."""
    found: list[str] = []
    for name, module in model.named_modules():
        if not name or any(name.startswith(f"{other}.") for other in found):
            continue
        inside = [f"{name}.{inner}" for inner, p in module.named_parameters() if p.requires_grad]
        if inside and unused.issuperset(inside):
            found.append(name)
    return found


def check_batch(batch: Batch, model: nn.Module | None = None) -> None:
    """Refuse a batch in which a row is not one record.

    Raises:
        PrivacyError: rows pack several records, or padding on the left displaces tokens from an expert's capacity.
    """
    check_mapping(batch)
    packed = next((key for key in _PACKED_KEYS if batch.get(key) is not None), None)
    positions = batch.get("position_ids")
    if packed is None and isinstance(positions, Tensor) and positions.ndim == 2 and _restarts(positions, batch):
        packed = "position_ids that start again within a row"
    if packed is not None:
        raise PrivacyError(
            f"The batch packs several records into one row (it has {packed}).",
            code="dp-packed",
            why="the row would be clipped as one record while it holds many, so nobody's contribution is bounded as "
            "stated",
            fix="prepare one record per row; or drop the packing keys to declare that a whole row is the record",
        )
    if model is not None and _pads_left(batch) and _has_capacity(model):
        raise PrivacyError(
            "The batch is padded on the left and the model gives experts a capacity per sequence.",
            code="dp-left-padding",
            why="padding would use up capacity, so a record's gradient would depend on the longest record beside it",
            fix="set padding_side='right' in the tokenizer or collator",
        )


def check_mapping(batch: Any) -> None:
    """Refuse a batch whose parts have no names.

    Raises:
        PrivacyError: it is a tuple, a tensor or the like.
    """
    if not isinstance(batch, Mapping):
        raise PrivacyError(
            f"The collator made a {type(batch).__name__}, not a mapping of names to tensors.",
            code="dp-batch-mapping",
            why="losses, padding and packing are told by the names of a batch's parts",
            fix="let collate_fn return a dict, for example {'input_ids': ..., 'labels': ...}, and read it in loss_fn",
        )


def check_rows(batch: Batch, items: int) -> None:
    """Refuse a collator that does not give one row for each record.

    Raises:
        PrivacyError: it made another number of rows, or no mapping.
    """
    check_mapping(batch)
    if batch_size(batch) != items:
        raise PrivacyError(
            f"the collator made {batch_size(batch)} rows of {items} records.",
            code="dp-collator-packs",
            why="records packed into one row cannot be clipped apart",
            fix="use a collator that keeps one row for each record (padding, not packing)",
        )


def _restarts(positions: Tensor, batch: Batch) -> bool:
    steps = positions[:, 1:] - positions[:, :-1]
    mask = batch.get("attention_mask")
    real = torch.ones_like(steps, dtype=torch.bool)
    if isinstance(mask, Tensor) and mask.shape == positions.shape:
        real = (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
    return bool(((steps <= 0) & real).any())


def _pads_left(batch: Batch) -> bool:
    mask: Any = batch.get("attention_mask")
    return isinstance(mask, Tensor) and mask.ndim == 2 and bool((mask[:, 0] == 0).any())


def _has_capacity(model: nn.Module) -> bool:
    return any(type(module).__name__ == _CAPACITY_PER_SEQUENCE for module in model.modules())
