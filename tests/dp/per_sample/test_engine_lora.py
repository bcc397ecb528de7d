"""LoRA: on linear layers, shared experts and stacked expert parameters, against merged weights by plain autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from coterie.config import LoraSpec
from coterie.dp.checks.batches_of_one import coarsest
from coterie.dp.clipping import Flat
from coterie.dp.per_sample.engine import Engine
from coterie.errors import ModelError, NoRuleError
from coterie.models.lora import attach_adapters
from coterie.models.zoo.tiny import tiny_model
from helpers.engine_reference import clipped, distance, gradients, norms, token_batch

peft = pytest.importorskip("peft")

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def adapted(family: str, **targets: Any) -> nn.Module:
    model = peft.get_peft_model(tiny_model(family), peft.LoraConfig(r=3, lora_alpha=6, **targets))
    randomised(model)
    return model.eval()


def randomised(model: nn.Module) -> None:
    """Every adapter gets values of its own: a fresh one adds nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def assert_exact(
    model: nn.Module, batch: dict[str, Tensor], expected: list[dict[str, Tensor]], method: str = "book_keeping"
) -> None:
    """Norms and the clipped sum are those of the records' own gradients."""
    engine = Engine(model, clipping=Flat(0.5), method=method)  # type: ignore[arg-type]
    figures = engine.accumulate(batch)
    assert float((figures.norms / norms(expected) - 1).abs().max()) <= 1e-5
    assert distance(engine.take(), clipped(expected, 0.5)) <= 5e-5


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("qwen2_moe", {"target_modules": ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]}),
        ("mixtral", {"target_parameters": EXPERTS, "target_modules": ["q_proj"]}),
        ("gpt_oss", {"target_parameters": EXPERTS}),
    ],
)
def test_invariant_1_exact_for_lora(family: str, targets: dict[str, Any]) -> None:
    model, batch = adapted(family, **targets), token_batch(3, 7)
    expected = gradients(model, batch)
    for method in ("book_keeping", "ghost"):
        assert_exact(model, batch, expected, method)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_invariant_1_a_router_s_adapter_works_beside_those_of_experts(family: str) -> None:
    model, batch = adapted(family, target_parameters=[*EXPERTS, "mlp.gate.weight"]), token_batch(3, 7)
    expected = gradients(model, batch)
    assert any("gate.lora" in name and g.any() for name, g in expected[0].items())
    assert_exact(model, batch, expected)


def test_invariant_1_a_router_that_is_a_linear_layer_and_answers_more_than_its_product_is_adapted_too() -> None:
    spec = LoraSpec(rank=3, experts=("gate_up_proj", "down_proj"), modules=("router",))
    model, batch = attach_adapters(tiny_model("phimoe"), spec, seed=0).eval(), token_batch(3, 7)
    randomised(model)
    expected = gradients(model, batch)
    assert any("router.lora" in name and g.any() for name, g in expected[0].items())
    assert_exact(model, batch, expected)


def test_invariant_4_experts_whose_bias_is_computed_are_refused() -> None:
    model = adapted("gpt_oss", target_parameters=["mlp.experts.down_proj_bias"])
    with pytest.raises(NoRuleError, match=r"lora_[AB]"):
        Engine(model).norms(token_batch(3, 7))


def test_invariant_1_a_tied_table_used_through_an_expression_is_exact() -> None:
    """peft's trained tokens: a few rows replace those of a table that input and output share."""
    model, batch = tiny_model("olmoe", tie_word_embeddings=True), token_batch(3, 7)
    tokens = sorted({int(batch["input_ids"][0, 0]), int(batch["input_ids"][1, 3])})
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], trainable_token_indices=tokens)
    model = peft.get_peft_model(model, config).eval()
    expected = gradients(model, batch)
    assert_exact(model, batch, expected)


class _Shapes(TorchDispatchMode):
    """Shapes of everything that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        views = ("detach", "transpose", "view", "alias", "t.", "slice", "select", "as_strided", "unsqueeze")
        if isinstance(out, torch.Tensor) and not any(name in str(func) for name in views):
            self.made.add(tuple(out.shape))
        return out


def test_merged_expert_weights_are_never_formed() -> None:
    model = adapted("mixtral", target_parameters=EXPERTS)
    stacked = [p for name, p in model.named_parameters() if "experts" in name and "lora" not in name]
    shapes = {tuple(p.shape) for p in stacked} | {tuple(p.mT.shape) for p in stacked}
    assert all(len(shape) == 3 for shape in shapes)
    engine = Engine(model, method="book_keeping")
    engine.prepare(token_batch(2, 5))
    with _Shapes() as seen:
        engine.accumulate(token_batch(2, 5))
    assert not shapes & seen.made
    with _Shapes() as seen:  # the slow way does form them, so the test can see it
        model(**{k: v for k, v in token_batch(2, 5).items() if k != "labels"})
    assert shapes & seen.made


def test_merged_adapters_are_refused() -> None:
    model = adapted("mixtral", target_parameters=EXPERTS)
    model.merge_adapter()
    with pytest.raises(ModelError, match="merged"):
        Engine(model).norms(token_batch(2, 5))


@pytest.mark.parametrize("family", ["qwen3_moe", "mellum"])
def test_adapters_in_float32_on_weights_in_half_precision_are_no_more_exact_than_these(family: str) -> None:
    """What is compared with batches of one rounds as the frozen weights do, whatever is trained."""
    model = adapted(family, target_parameters=EXPERTS)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    assert coarsest(model) is torch.bfloat16
    batch = token_batch(3, 7)
    for method in ("book_keeping", "ghost"):
        engine = Engine(model, clipping=Flat(0.5), method=method)  # type: ignore[arg-type]
        engine.prepare(batch)
        for record in range(3):
            engine.accumulate({name: value[record : record + 1] for name, value in batch.items()})
            contribution = (
                torch.stack([value.double().square().sum() for value in engine.take().values()]).sum().sqrt()
            )
            assert 0.4 <= float(contribution) <= 0.5 * (1 + engine.eta)
    assert coarsest(adapted(family, target_parameters=EXPERTS)) is torch.float32
