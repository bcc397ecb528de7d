"""A model that runs in pieces has the gradients of `loss.backward()`, and asks for its experts outside autograd."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from coterie.errors import ModelError
from coterie.models.cut.cut_model import Cut, decoder_layers
from coterie.models.expert_math import backward_rows, forward_rows, weight_gradients
from coterie.models.seam import ExpertLayer, ExpertsCall, RoutedRows, expert_layers, select
from coterie.models.zoo.catalogue import causal_lm_types
from coterie.models.zoo.tiny import VOCAB, tiny_model

FAMILIES = list(causal_lm_types())
Loss = Callable[[nn.Module], Tensor]


class LocalExchange:
    """Answers from the model's own expert weights, by closed form. Counts, and insists on being outside autograd."""

    def __init__(self, rows: bool = False) -> None:
        self.rows = rows
        self.forwards: Counter[int] = Counter()
        self.backwards: Counter[int] = Counter()
        self.kept: list[bool] = []
        self.gradients: dict[str, Tensor] = {}

    def answers_rows(self, layer: ExpertLayer) -> bool:
        return self.rows or layer.layout.has_post_expert_norm

    def forward(self, call: ExpertsCall, keep: bool) -> tuple[Tensor, Any]:
        assert torch._C._current_graph_task_id() == -1, "asked inside autograd"
        assert not call.hidden_ND.requires_grad
        assert not call.routing_weights_NK.requires_grad
        self.forwards[call.layer.index] += 1
        self.kept.append(keep)
        with torch.autocast("cpu", enabled=False):
            rows = RoutedRows.of(call.expert_ids_NK, call.layer.num_experts)
            x_RD = call.hidden_ND[rows.token_R]
            out_RD, pre_RG = forward_rows(call.layer, self._weights(call.layer), x_RD, rows.ends_E)
            ticket = (call, rows, x_RD, pre_RG, out_RD)
            if self.answers_rows(call.layer):
                return out_RD.clone(), ticket
            return rows.combine(out_RD, call.routing_weights_NK, call.hidden_ND.dtype), ticket

    def backward(self, ticket: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        assert torch._C._current_graph_task_id() == -1, "asked inside autograd"
        call, rows, x_RD, pre_RG, out_RD = ticket
        layer: ExpertLayer = call.layer
        self.backwards[layer.index] += 1
        grad_weights = None
        if self.answers_rows(layer):
            grad_RD = grad
        else:
            grad_RD = grad[rows.token_R] * call.routing_weights_NK.reshape(-1)[rows.pair_R, None]
            grad_weights = torch.zeros_like(call.routing_weights_NK)
            dots_R = (grad[rows.token_R].float() * out_RD.float()).sum(-1)
            grad_weights.view(-1)[rows.pair_R] = dots_R.to(grad_weights.dtype)
        found = backward_rows(layer, self._weights(layer), pre_RG, grad_RD, rows.ends_E)
        for name, value in weight_gradients(layer, x_RD, found, grad_RD, rows.ends_E).items():
            key = f"{layer.name}.{name}"
            self.gradients[key] = self.gradients[key] + value if key in self.gradients else value
        grad_hidden = torch.zeros_like(call.hidden_ND).index_add_(0, rows.token_R, found.grad_x_RD)
        return grad_hidden, grad_weights

    def _weights(self, layer: ExpertLayer) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in layer.parameters().items()}


def token_loss(model: nn.Module) -> Tensor:
    ids = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
    logits = model(input_ids=ids, use_cache=False).logits.float()
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def plain_gradients(model: nn.Module, loss: Loss = token_loss, seed: int = 3) -> dict[str, Tensor | None]:
    select(model)
    model.zero_grad()
    torch.manual_seed(seed)
    loss(model).backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return grads


def cut_gradients(
    model: nn.Module, exchange: LocalExchange, loss: Loss = token_loss, seed: int = 3
) -> dict[str, Tensor | None]:
    cut = Cut(model)
    model.zero_grad()
    with cut.record(exchange, seed=seed) as tape:
        tape.backward(loss(model))
    cut.close()
    grads = {name: exchange.gradients.get(name, parameter.grad) for name, parameter in model.named_parameters()}
    model.zero_grad()
    return grads


def assert_gradients(
    got: dict[str, Tensor | None], expected: dict[str, Tensor | None], tolerance: float = 1e-5
) -> None:
    assert got.keys() == expected.keys()
    for name, reference in expected.items():
        found = got[name]
        if reference is None or not reference.any():
            assert found is None or not found.any(), name
        else:
            assert found is not None, name
            assert (found - reference).norm() <= tolerance * reference.norm(), name


def use_checkpointing(model: nn.Module) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def training(family: str, **settings: Any) -> nn.Module:
    return tiny_model(family, **settings).train()


# ---- every family -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_plain_backward_and_a_layer_is_asked_as_often_as_it_is_passed(family: str) -> None:
    model = training(family)
    passed: Counter[int] = Counter()
    for layer in expert_layers(model):  # once, but for families that loop over their layers
        layer.module.register_forward_hook(lambda *_, index=layer.index: passed.update([index]))
    plain_gradients(model)
    once = Counter(passed)
    assert once.keys() == {layer.index for layer in expert_layers(model)}
    for checkpointing in (False, True):
        if checkpointing:
            use_checkpointing(model)
        expected = plain_gradients(model)
        exchange = LocalExchange()
        if checkpointing and max(once.values()) > 1:  # which pass is computed again cannot be told
            with pytest.raises(ModelError, match="recomputed in a way that coterie cannot follow"):
                cut_gradients(model, exchange)
            return
        assert_gradients(cut_gradients(model, exchange), expected)
        assert exchange.forwards == once
        assert exchange.backwards == once
        assert all(exchange.kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_moe_layer_lies_in_a_decoder_layer_that_transformers_checkpoints(family: str) -> None:
    model = tiny_model(family)
    layers = expert_layers(model)
    found = decoder_layers(model, layers)
    assert all(isinstance(module, GradientCheckpointingLayer) for module in found)
    assert len(found) == len(layers)


def with_post_expert_norm() -> nn.Module:
    """No causal LM of transformers has a norm behind its experts yet (Muse Spark has one, with images)."""
    model = training("olmoe")
    for layer in expert_layers(model):
        layer.module.has_post_expert_norm = True
        layer.module.post_expert_norm = nn.RMSNorm(32)
    return model


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "qwen2_moe", "nemotron_h", "a norm behind each expert"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_the_same_when_the_owner_combines(family: str, checkpointing: bool) -> None:
    model = training(family) if family in FAMILIES else with_post_expert_norm()
    if checkpointing:
        use_checkpointing(model)
    expected = plain_gradients(model)
    assert_gradients(cut_gradients(model, LocalExchange(rows=True)), expected)


# ---- where the random state and the dtype matter ------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_masks_are_those_of_the_seed(checkpointing: bool) -> None:
    model = training("olmoe", attention_dropout=0.3)
    if checkpointing:
        use_checkpointing(model)
    expected = plain_gradients(model, seed=11)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert_gradients(cut_gradients(model, LocalExchange(), seed=11), expected)
    assert torch.equal(torch.get_rng_state(), before), "a seeded recording leaves the process's random state alone"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_under_autocast_are_those_of_plain_backward(checkpointing: bool) -> None:
    model = training("olmoe")
    if checkpointing:
        use_checkpointing(model)

    def loss(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return token_loss(model)

    expected = plain_gradients(model, loss)
    assert_gradients(cut_gradients(model, LocalExchange(), loss), expected, tolerance=3e-2)


def test_a_frozen_trunk_still_sends_gradients_to_the_experts() -> None:
    model = training("olmoe")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("experts" in name or "lm_head" in name)
    expected = plain_gradients(model)
    got = cut_gradients(model, LocalExchange())
    assert_gradients(got, expected)
    assert any("experts" in name and grad is not None and grad.any() for name, grad in got.items())


# ---- unusual models -----------------------------------------------------------------------------------------------


class Strange(nn.Module):
    """A model with olmoe's experts and layers that do what no family does (yet)."""

    def __init__(self, layer: Callable[[nn.Module, int], nn.Module]) -> None:
        super().__init__()
        olmoe = tiny_model("olmoe")
        self.embed = nn.Embedding(VOCAB, 32)
        self.blocks = nn.ModuleList([layer(olmoe.model.layers[n].mlp, n) for n in range(3)])
        self.head = nn.Linear(32, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        shared: dict[str, Tensor] = {}
        for block in self.blocks:
            x = block(x, shared=shared)
        return self.head(x)


class Twice(GradientCheckpointingLayer):
    """Calls its experts twice, the second time on what depends on the first."""

    def __init__(self, mlp: nn.Module, number: int) -> None:
        super().__init__()
        self.mlp, self.before = mlp, nn.Linear(32, 32)

    def forward(self, x: Tensor, shared: dict[str, Tensor]) -> Tensor:
        x = x + self.mlp(torch.tanh(self.before(x)))
        return x + self.mlp(torch.sin(x))


class Around(GradientCheckpointingLayer):
    """The first layer hands a tensor with a history to the later ones in a dictionary."""

    def __init__(self, mlp: nn.Module, number: int) -> None:
        super().__init__()
        self.mlp, self.key, self.first = mlp, nn.Linear(32, 32), number == 0

    def forward(self, x: Tensor, shared: dict[str, Tensor]) -> Tensor:
        if self.first:
            out = x + self.mlp(x)
            shared["key"] = torch.tanh(self.key(out))  # leads back to this layer's experts, and past them
            return out
        return x + self.mlp(x * shared["key"]) * shared["key"]


class WritesAnswer(Around):
    """Writes into what its experts returned, and needs the result again in the backward."""

    def forward(self, x: Tensor, shared: dict[str, Tensor]) -> Tensor:
        out = self.mlp(x)
        out += x
        return torch.sin(out) * x


class Writes(Around):
    """Writes into its argument."""

    def forward(self, x: Tensor, shared: dict[str, Tensor]) -> Tensor:
        x += 1.0
        return x + self.mlp(x)


class Remembers(Around):
    """Keeps a tensor with its history for the next micro-batch."""

    memory: Tensor | None = None

    def forward(self, x: Tensor, shared: dict[str, Tensor]) -> Tensor:
        out = x + self.mlp(x)
        if self.memory is not None:
            out = out + self.memory.mean()
        self.memory = out
        return out


def strange_loss(model: nn.Module) -> Tensor:
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    return nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten(), reduction="sum")


def checkpointed(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = lambda function, *args: torch.utils.checkpoint.checkpoint(
                function, *args, use_reentrant=False
            )
    return model.train()


@pytest.mark.parametrize("layer", [Twice, Around, WritesAnswer])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rows", [False, True])
def test_gradients_are_right_in_layers_that(layer: Any, checkpointing: bool, rows: bool) -> None:
    model = Strange(layer)
    if checkpointing:
        checkpointed(model)
    expected = plain_gradients(model, strange_loss)
    exchange = LocalExchange(rows)
    assert_gradients(cut_gradients(model, exchange, strange_loss), expected)
    calls = 2 if layer is Twice else 1
    assert exchange.forwards == exchange.backwards == Counter(dict.fromkeys(range(3), calls))


def test_a_layer_that_writes_into_its_argument_is_refused() -> None:
    with pytest.raises(ModelError) as caught:
        cut_gradients(Strange(Writes), LocalExchange(), strange_loss)
    assert caught.value.code == "model-writes-input"


def test_a_tensor_from_another_micro_batch_is_an_error_and_no_wrong_gradient() -> None:
    model = Strange(Remembers)
    cut = Cut(model)
    with cut.record(LocalExchange()) as tape:
        tape.backward(strange_loss(model))
    with pytest.raises(ModelError) as caught, cut.record(LocalExchange()) as tape:
        tape.backward(strange_loss(model))
    assert caught.value.code == "model-graph-leak"


def test_experts_that_the_loss_does_not_need_are_asked_once_with_zeros() -> None:
    model = training("olmoe")

    def loss(model: nn.Module) -> Tensor:
        return model.lm_head.weight.square().sum() + 0 * token_loss(model).detach()

    exchange = LocalExchange()
    cut_gradients(model, exchange, loss)
    assert exchange.backwards == Counter({0: 1, 1: 1, 2: 1})
    assert not any(grad.any() for grad in exchange.gradients.values())


# ---- what it costs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted({"olmoe", "inkling2_text", "gemma4_text", "qwen3_next"} & set(FAMILIES)))
def test_each_layer_is_run_backward_once(family: str) -> None:
    model = training(family)
    runs: Counter[str] = Counter()

    def count(name: str) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            first.register_hook(lambda grad: runs.update([name]))

        return after

    attention = [n for n, _ in model.named_modules() if n.endswith((".self_attn", ".linear_attn"))]
    for name in attention:
        model.get_submodule(name).register_forward_hook(count(name))
    cut_gradients(model, LocalExchange())
    assert runs == Counter(attention)


def test_checkpointed_layers_are_recomputed_once() -> None:
    model = training("olmoe")
    use_checkpointing(model)
    runs: Counter[int] = Counter()
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(lambda *_, number=number: runs.update([number]))
    cut_gradients(model, LocalExchange())
    assert runs == Counter({0: 2, 1: 2, 2: 2})


def test_without_checkpointing_no_expert_output_is_kept() -> None:
    model = training("olmoe")
    cut = Cut(model)
    with cut.record(LocalExchange()) as tape:
        token_loss(model)
        assert all(one.value is None for received in tape._received.values() for one in received)


# ---- inference and wrong use --------------------------------------------------------------------------------------


def test_inference_asks_for_forwards_only_and_gives_the_plain_output() -> None:
    model = tiny_model("olmoe")
    ids = torch.arange(3, 15).view(1, -1)
    select(model)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    cut, exchange = Cut(model), LocalExchange()
    with cut.inference(exchange):
        logits = model(input_ids=ids).logits
    assert not logits.requires_grad
    torch.testing.assert_close(logits, expected)
    assert exchange.kept == [False] * 3
    assert not exchange.backwards
    assert torch.is_grad_enabled()


def test_a_cut_model_outside_of_a_recording_is_refused() -> None:
    model = tiny_model("olmoe")
    Cut(model)
    with pytest.raises(ModelError) as caught:
        model(input_ids=torch.arange(3, 9).view(1, -1))
    assert caught.value.code == "model-not-recording"


def test_reentrant_checkpointing_is_refused() -> None:
    model = training("olmoe")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ModelError) as caught:
        cut_gradients(model, LocalExchange())
    assert caught.value.code == "model-reentrant-checkpoint"


def test_a_loss_without_a_history_is_refused() -> None:
    model = training("olmoe")
    with pytest.raises(ModelError) as caught:
        cut_gradients(model, LocalExchange(), lambda model: token_loss(model).detach())
    assert caught.value.code == "model-loss-without-gradient"


def test_an_expert_module_shared_by_checkpointed_layers_is_refused() -> None:
    model = checkpointed(Strange(Around))
    model.blocks[1].mlp = model.blocks[0].mlp
    with pytest.raises(ModelError) as caught:
        cut_gradients(model, LocalExchange(), strange_loss)
    assert caught.value.code == "model-recompute"


def test_an_expert_module_shared_by_layers_is_fine_without_checkpointing() -> None:
    model = Strange(Around)
    model.blocks[1].mlp = model.blocks[0].mlp
    expected = plain_gradients(model, strange_loss)
    assert_gradients(cut_gradients(model, LocalExchange(), strange_loss), expected)


def test_an_error_of_the_exchange_reaches_the_caller_and_frees_the_turn() -> None:
    model = training("olmoe")
    cut = Cut(model)

    class Broken(LocalExchange):
        def backward(self, ticket: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
            raise ConnectionError("gone")

    with pytest.raises(ConnectionError), cut.record(Broken()) as tape:
        tape.backward(token_loss(model))
    assert cut.active is None
    cut.device_lock.acquire()
    cut.device_lock.release()
