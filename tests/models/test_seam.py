"""The seam computes what each family's own code computes: forward and the gradient of every parameter."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from coterie.errors import ModelError
from coterie.models import seam
from coterie.models.seam import ExpertLayer, ExpertsCall, ExpertsLayout, LocalExperts, expert_layers
from coterie.models.zoo.catalogue import causal_lm_types
from coterie.models.zoo.tiny import VOCAB, fill_random, tiny_model

FAMILIES = list(causal_lm_types())
REFERENCES = ["eager", "grouped_mm"]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm; exact zero wherever the expected tensor is zero."""
    got, expected = got.double(), expected.double()
    scale = expected.norm()
    difference = (got - expected).norm()
    return float(difference / scale) if scale > 0 else float(difference)


def prompt(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(7))


def choose(model: nn.Module, implementation: str) -> None:
    if implementation == "coterie":
        seam.select(model)
    else:
        model.set_experts_implementation(implementation)


def forward_and_gradients(model: nn.Module, ids: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
    model.zero_grad()
    torch.manual_seed(0)
    logits = model(input_ids=ids, use_cache=False).logits
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits)
    (logits * direction).sum().backward()
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return logits.detach(), grads


def assert_same_gradients(got: dict, expected: dict, tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, reference in expected.items():
        if reference is None:
            assert got[name] is None, name
        else:
            assert relative_error(got[name], reference) < tolerance, name


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("family", FAMILIES)
def test_whole_model_equals_the_familys_own_path_in_float32(family, reference):
    model, ids = tiny_model(family), prompt()
    choose(model, reference)
    expected, expected_grads = forward_and_gradients(model, ids)
    choose(model, "coterie")
    got, grads = forward_and_gradients(model, ids)
    assert relative_error(got, expected) < TOLERANCE[torch.float32]
    assert_same_gradients(grads, expected_grads, TOLERANCE[torch.float32])


def routing(kind: str, tokens: int, top_k: int, num_experts: int) -> tuple[Tensor, Tensor]:
    """Expert ids and weights [N, K] of one situation; ids that mean "no expert" are marked by their value."""
    generator = torch.Generator().manual_seed(11)
    ids = torch.rand(tokens, num_experts, generator=generator).argsort(dim=1)[:, :top_k]
    weights = torch.rand(tokens, top_k, generator=generator)
    if kind == "one expert takes all":
        ids = torch.full_like(ids, 3)
    elif kind == "an expert without tokens":
        ids = torch.where(ids == 2, 5, ids)
    elif kind == "ids outside the range":
        ids[0], ids[1, 0], ids[2, -1], ids[3, 0] = num_experts, -1, num_experts + 4, num_experts
    return ids, weights


SITUATIONS = ["usual", "one expert takes all", "an expert without tokens", "ids outside the range", "one token"]


def run_experts(
    layer: ExpertLayer,
    call: Callable[[Tensor, Tensor, Tensor], Tensor],
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
) -> dict[str, Tensor]:
    """Output of one experts module and the gradients of its inputs and parameters."""
    hidden = hidden.detach().requires_grad_()
    weights = weights.detach().requires_grad_()
    parameters = dict(layer.module.named_parameters())
    out = call(hidden, ids, weights)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    grads = torch.autograd.grad((out * direction).sum(), [hidden, weights, *parameters.values()])
    names = ["hidden", "weights", *parameters]
    return {"out": out.detach(), **dict(zip(names, grads, strict=True))}


def reference_experts(layer: ExpertLayer, implementation: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The family's own code. It has no "no expert", so such a pair becomes expert 0 with weight 0."""

    def call(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        layer.module.config._experts_implementation = implementation
        valid = (ids >= 0) & (ids < layer.num_experts)
        return layer.module(hidden, ids.where(valid, 0).contiguous(), weights * valid)

    return call


def seam_experts(layer: ExpertLayer) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def call(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return LocalExperts()(ExpertsCall(layer, hidden, ids, weights))

    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_alone_equal_the_familys_own_in_every_routing_situation(family, dtype):
    # With fixed routing: in bf16 a whole model may route a token elsewhere after a rounding, and prove nothing.
    layer = expert_layers(tiny_model(family, dtype=dtype))[0]
    width = layer.module.down_proj.shape[1 if not layer.layout.is_transposed else 2]
    for kind in SITUATIONS:
        tokens = 1 if kind == "one token" else 20
        ids, weights = routing(kind, tokens, 2, layer.num_experts)
        hidden = torch.randn(tokens, width, generator=torch.Generator().manual_seed(3)).to(dtype)
        got = run_experts(layer, seam_experts(layer), hidden, ids, weights.to(dtype))
        for reference in REFERENCES:
            expected = run_experts(layer, reference_experts(layer, reference), hidden, ids, weights.to(dtype))
            for name in expected:
                error = relative_error(got[name], expected[name])
                assert error < TOLERANCE[dtype], f"{kind}, {reference}, {name}: {error}"


def test_an_expert_without_tokens_gets_a_gradient_of_exactly_zero():
    layer = expert_layers(tiny_model("qwen3_moe"))[0]
    ids, weights = routing("an expert without tokens", 20, 2, layer.num_experts)
    got = run_experts(layer, seam_experts(layer), torch.randn(20, 32), ids, weights)
    assert not got["down_proj"][2].any()
    assert got["down_proj"][5].any()


def test_a_pair_without_expert_adds_nothing_and_its_weight_gets_no_gradient():
    layer = expert_layers(tiny_model("gpt_oss"))[0]
    ids, weights = routing("ids outside the range", 20, 2, layer.num_experts)
    got = run_experts(layer, seam_experts(layer), torch.randn(20, 32), ids, weights)
    assert not got["out"][0].any()
    outside = (ids < 0) | (ids >= layer.num_experts)
    assert not got["weights"][outside].any()
    assert got["weights"][~outside].all()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_non_contiguous_inputs_and_gradients_change_nothing(family):
    layer = expert_layers(tiny_model(family))[0]
    ids, weights = routing("usual", 20, 2, layer.num_experts)
    hidden = torch.randn(20, 32)
    straight = run_experts(layer, seam_experts(layer), hidden, ids, weights)
    strided = run_experts(
        layer,
        seam_experts(layer),
        hidden.t().contiguous().t(),
        ids.t().contiguous().t(),
        weights.t().contiguous().t(),
    )
    for name, expected in straight.items():
        assert relative_error(strided[name], expected) < 1e-6, name
    # A sum hands a stride-0 gradient back; torch's own CPU kernel refuses that.
    hidden.requires_grad_()
    seam_experts(layer)(hidden, ids, weights).sum().backward()
    assert hidden.grad is not None


@pytest.mark.parametrize("family", FAMILIES)
def test_under_autocast_the_experts_compute_in_the_autocast_dtype_as_the_family_does(family):
    layer = expert_layers(tiny_model(family))[0]
    ids, weights = routing("usual", 20, 2, layer.num_experts)
    hidden = torch.randn(20, layer.module.down_proj.shape[1 if not layer.layout.is_transposed else 2])
    with torch.autocast("cpu", torch.bfloat16):
        got = run_experts(layer, seam_experts(layer), hidden, ids, weights)
        expected = run_experts(layer, reference_experts(layer, "eager"), hidden, ids, weights)
    exact = run_experts(layer, seam_experts(layer), hidden, ids, weights)
    for name in expected:
        assert got[name].dtype == expected[name].dtype, name
        assert relative_error(got[name], expected[name]) < TOLERANCE[torch.bfloat16], name
    assert relative_error(got["out"], exact["out"]) > 1e-4  # it did round


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_gives_the_same_gradients(family):
    model, ids = tiny_model(family), prompt()
    calls: list[int] = []
    local = LocalExperts()

    def counted(call: ExpertsCall) -> Tensor:
        calls.append(call.layer.index)
        return local(call)

    layers = seam.select(model, counted)
    model.train()
    plain = forward_and_gradients(model, ids)
    once = len(calls)  # as many as layers, but for families that loop over them
    assert set(calls) == {layer.index for layer in layers}
    if not model.supports_gradient_checkpointing:
        pytest.skip(f"{family} has no gradient checkpointing in this release")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = forward_and_gradients(model, ids)
    assert len(calls) == 3 * once, "every MoE layer is computed again in backward"
    assert relative_error(checkpointed[0], plain[0]) < 1e-6
    assert_same_gradients(checkpointed[1], plain[1], TOLERANCE[torch.float32])


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_gives_the_familys_own_tokens(family):
    model = tiny_model(family)
    ids = prompt(batch=2, length=6)
    outputs = []
    for implementation in ("eager", "coterie"):
        choose(model, implementation)
        outputs.append(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False))
    assert torch.equal(*outputs)


def test_an_implementation_sees_every_moe_layer_with_its_ordinal():
    model = tiny_model("nemotron_h")
    calls: list[ExpertsCall] = []
    local = LocalExperts()

    def record(call: ExpertsCall) -> Tensor:
        calls.append(call)
        return local(call)

    layers = seam.select(model, record)
    model(input_ids=prompt())
    assert [call.layer.index for call in calls] == list(range(len(layers)))
    assert [call.layer.name for call in calls] == [layer.name for layer in layers]
    assert calls[0].hidden_ND.shape == (24, 32)
    assert calls[0].expert_ids_NK.shape == calls[0].routing_weights_NK.shape == (24, 2)
    assert [(layer, implementation) for layer, implementation in seam.bindings(model)] == [
        (x, record) for x in layers
    ]


def test_a_dense_model_is_refused():
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    with pytest.raises(ModelError, match="no Mixture-of-Experts layer") as error:
        seam.select(LlamaForCausalLM(config))
    assert error.value.code == "model-no-experts"


def test_a_reload_loses_the_seam_and_the_check_catches_it(tmp_path):
    model = tiny_model("qwen3_moe")
    seam.select(model)
    seam.check_selected(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ModelError, match="not through coterie") as error:
        seam.check_selected(loaded)
    assert error.value.code == "model-seam-lost"
    seam.select(loaded)
    seam.check_selected(loaded)


def test_a_changed_implementation_is_caught():
    model = tiny_model("mixtral")
    seam.select(model)
    model.set_experts_implementation("eager")
    with pytest.raises(ModelError, match="with `eager`"):
        seam.check_selected(model)


def special_layer(module_name: str, class_name: str, config_name: str, **sizes: object) -> ExpertLayer:
    """The experts of a family without a causal LM: two storage layouts occur nowhere else."""
    folder = f"transformers.models.{module_name}"
    if importlib.util.find_spec(folder) is None:
        pytest.skip(f"this transformers has no {module_name}")
    config = getattr(importlib.import_module(f"{folder}.configuration_{module_name}"), config_name)(**sizes)
    experts = getattr(importlib.import_module(f"{folder}.modeling_{module_name}"), class_name)(config)
    fill_random(experts, torch.Generator().manual_seed(0))
    assert experts.down_proj.shape[0] == 8
    return ExpertLayer(0, "experts", 8, ExpertsLayout.of(experts), experts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("which", ["bias without interleaving", "norm after the expert"])
def test_layouts_that_only_other_models_use_are_honoured_too(which, dtype):
    if which == "bias without interleaving":
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_local_experts": 8}
        names = ("openai_privacy_filter", "OpenAIPrivacyFilterExperts", "OpenAIPrivacyFilterConfig")
        layer = special_layer(*names, **sizes)
        assert layer.layout == ExpertsLayout(has_bias=True, is_transposed=True)
    else:
        sizes = {"hidden_size": 32, "moe_intermediate_size": 16, "num_local_experts": 8, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "moe_hidden_size": 24}
        layer = special_layer("muse_spark", "MuseSparkExperts", "MuseSparkTextConfig", **sizes)
        assert layer.layout == ExpertsLayout(has_post_expert_norm=True)
    layer.module.to(dtype)
    width = layer.module.down_proj.shape[2 if layer.layout.is_transposed else 1]
    ids, weights = routing("usual", 20, 2, layer.num_experts)
    hidden = torch.randn(20, width, generator=torch.Generator().manual_seed(3)).to(dtype)
    got = run_experts(layer, seam_experts(layer), hidden, ids, weights.to(dtype))
    for reference in REFERENCES:
        expected = run_experts(layer, reference_experts(layer, reference), hidden, ids, weights.to(dtype))
        for name in expected:
            assert relative_error(got[name], expected[name]) < TOLERANCE[dtype], f"{reference}, {name}"


def halved(model: nn.Module) -> nn.Module:
    """A model whose first MoE layer holds the first half of its experts only."""
    layer = expert_layers(model)[0]
    for name, stacked in layer.parameters().items():
        setattr(layer.module, name, nn.Parameter(stacked.detach()[: layer.num_experts // 2]))
    return model


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "mixtral"])
def test_a_layer_that_holds_some_of_its_experts_is_not_computed_with_these_alone(family: str) -> None:
    model = halved(tiny_model(family))
    layer = seam.select(model)[0]
    assert layer.num_experts == 2 * layer.parameters()["down_proj"].shape[0]
    with pytest.raises(ModelError, match="holds 4 of its 8 experts") as caught:
        model(input_ids=prompt(), use_cache=False)
    assert caught.value.code == "model-experts-elsewhere"


def test_a_layer_that_was_never_selected_is_not_computed_in_part_either() -> None:
    model = halved(tiny_model("olmoe"))
    model.set_experts_implementation(seam.NAME)
    with pytest.raises(ModelError, match="holds 4 of its 8 experts"):
        model(input_ids=prompt(), use_cache=False)


def test_experts_that_transformers_shares_out_are_refused_by_name() -> None:
    model = tiny_model("olmoe")
    setattr(expert_layers(model)[1].module, "_is_expert_parallel", True)  # noqa: B010 - transformers' own mark
    with pytest.raises(ModelError, match=r"transformers has shared out the experts of model\.layers\.1") as caught:
        seam.select(model)
    assert caught.value.code == "model-expert-parallel"
    model.set_experts_implementation(seam.NAME)
    with pytest.raises(ModelError, match="transformers has shared out"):
        model(input_ids=prompt(), use_cache=False)
