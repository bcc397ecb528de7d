"""Invariant 1 over what is trained: frozen embeddings, norms alone, adapters that scale.

The data then needs no gradient where a trained parameter first meets it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from coterie.dp.clipping import Flat
from coterie.dp.per_sample.engine import Engine
from coterie.models.zoo.catalogue import causal_lm_types
from coterie.models.zoo.tiny import tiny_model
from helpers.engine_reference import clipped, distance, gradients, norms, token_batch

SELECTIONS: dict[str, Callable[[str], bool]] = {
    "all but embeddings": lambda name: "embed" not in name,
    "norms": lambda name: "norm" in name.lower(),
}


def assert_exact(model: nn.Module, compared: bool = False) -> None:
    batch = token_batch(2, 7)
    expected = gradients(model, batch)
    engine = Engine(model, clipping=Flat(0.5), method="book_keeping")
    engine.compared = compared
    figures = engine.accumulate(batch)
    assert float((figures.norms / norms(expected) - 1).abs().max()) <= 5e-5
    assert distance(engine.take(), clipped(expected, 0.5)) <= 1e-4


@pytest.mark.parametrize("family", causal_lm_types())
def test_invariant_1_exact_for_a_part_of_every_family(family: str) -> None:
    """Families take turns; each selection is tried on half of them."""
    model = tiny_model(family)
    turn = sorted(causal_lm_types()).index(family) % len(SELECTIONS)
    trained = list(SELECTIONS.values())[turn]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained(name))
    assert_exact(model, compared=True)


def adapted(kind: str, family: str) -> nn.Module:
    peft = pytest.importorskip("peft")
    configs: dict[str, Callable[[], Any]] = {
        "IA3": lambda: peft.IA3Config(target_modules=["k_proj", "v_proj", "o_proj"], feedforward_modules=["o_proj"]),
        "VeRA": lambda: peft.VeraConfig(target_modules=["q_proj"], r=4),
        "LN tuning": lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    }
    model: nn.Module = peft.get_peft_model(tiny_model(family), configs[kind]())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.filterwarnings("ignore:Unsupported layer type .*RMSNorm:UserWarning")  # peft, of norms
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "granitemoe"])
@pytest.mark.parametrize("kind", ["IA3", "VeRA", "LN tuning"])
def test_invariant_1_exact_for_adapters_that_scale(kind: str, family: str) -> None:
    assert_exact(adapted(kind, family))


@pytest.mark.parametrize("reentrant", [False, True])
def test_invariant_1_exact_for_norms_alone_under_checkpointing(reentrant: bool) -> None:
    model = tiny_model("qwen3_moe")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    expected = gradients(model, batch := token_batch(3, 7))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    engine = Engine(model.train(), clipping=Flat(0.5), method="book_keeping")
    engine.accumulate(batch)
    assert distance(engine.take(), clipped(expected, 0.5)) <= 5e-5


def test_invariant_1_a_parameter_used_in_two_ways_is_told_apart_in_a_recompute() -> None:
    from torch.utils.checkpoint import checkpoint

    class Two(nn.Module):
        """One matrix for tokens and for a table that all records share, inside a checkpoint."""

        def __init__(self) -> None:
            super().__init__()
            self.linear, self.table = nn.Linear(4, 4), nn.Parameter(torch.randn(6, 4))

        def _inside(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) + self.linear(self.table)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inside: torch.Tensor = checkpoint(self._inside, x, use_reentrant=False)
            return self.linear(inside)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return model(batch["x"]).square().sum((1, 2))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, batch = Two(), {"x": torch.randn(6, 6, 4)}  # as many records as the table has rows
    expected = gradients(model, batch, loss)
    engine = Engine(model, loss, Flat(0.5), method="book_keeping")
    figures = engine.accumulate(batch)
    assert float((figures.norms / norms(expected) - 1).abs().max()) <= 1e-5
    assert distance(engine.take(), clipped(expected, 0.5)) <= 5e-5


def test_invariant_3_randomness_on_a_weight_is_found_in_train_mode_after_an_eval_pass() -> None:
    from coterie.errors import NoRuleError

    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, nn.functional.dropout(self.weight, 0.5, self.training))

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return model(batch["x"]).square().sum(1)  # type: ignore[no-any-return]

    engine = Engine(Dropped().eval(), loss, Flat(1.0), method="book_keeping")
    engine.accumulate({"x": torch.randn(3, 4)})
    engine.model.train()
    with pytest.raises(NoRuleError, match="draws random numbers"):
        engine.accumulate({"x": torch.randn(3, 4)})
