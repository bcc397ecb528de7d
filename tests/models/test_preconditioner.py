"""A preconditioned model computes what it did, and its gradients are those of the plain one times the factors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from coterie.dp.clipping import Flat
from coterie.dp.losses import default_loss
from coterie.dp.per_sample.engine import Engine
from coterie.errors import ModelError
from coterie.models import seam
from coterie.models.preconditioner import Factors, Preconditioner, attach, detach, places_of
from coterie.models.second_moments import factor_values, measure
from coterie.models.zoo.catalogue import causal_lm_types
from coterie.models.zoo.tiny import VOCAB, tiny_model


def batches(count: int, length: int = 8) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, VOCAB, (count, length), generator=generator)
    return [
        {"input_ids": own[None], "attention_mask": torch.ones_like(own)[None], "labels": own[None]} for own in ids
    ]


def joined(some: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([batch[name] for batch in some]) for name in some[0]}


def plain_model(family: str) -> PreTrainedModel:
    model = tiny_model(family).eval()
    seam.select(model)
    return model


def dense_factors(model: nn.Module) -> Preconditioner:
    """Factors far from the identity, of every module that can be measured, and every side."""
    measured = measure(model, batches(1), default_loss).factors
    generator = torch.Generator().manual_seed(1)

    def drawn(size: int | None, diagonal: bool) -> Tensor | None:
        if size is None:
            return None
        if diagonal:
            return torch.rand(size, generator=generator) + 0.5
        turned = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
        return turned * (torch.rand(size, generator=generator) + 0.5) @ turned.mT

    found = {}
    for place in places_of(model):
        if place.name not in measured:
            continue
        inner, outer = place.sizes()
        found[place.name] = Factors(drawn(inner, False), drawn(outer, place.is_table))
    return Preconditioner(found)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    trained = dict(model.named_parameters())
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def wide(factor: Tensor) -> Tensor:
    return torch.diag(factor) if factor.dim() == 1 else factor


@pytest.mark.parametrize("family", causal_lm_types())
def test_every_family_computes_what_it_did_and_comes_back(family: str) -> None:
    model, batch = plain_model(family), joined(batches(3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        plain = model(**batch, use_cache=False).logits
    attach(model, dense_factors(model))
    with torch.no_grad():
        torch.testing.assert_close(model(**batch, use_cache=False).logits, plain, rtol=1e-3, atol=1e-4)
    moved = [name for name, value in model.named_parameters() if not torch.equal(value, before[name])]
    assert any("proj" in name for name in moved)
    assert [name for name, _ in model.named_parameters()] == [
        n for n in before if n in dict(model.named_parameters())
    ]
    detach(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, value in after.items():
        torch.testing.assert_close(value, before[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "olmoe"])
def test_gradients_are_the_plain_ones_times_the_factors(family: str) -> None:
    model = plain_model(family)
    factors = dense_factors(model)
    other = copy.deepcopy(model)
    attach(other, factors)
    loss = default_loss(model, batch := joined(batches(3))).sum()
    plain = gradients(model, loss)
    loss = default_loss(other, batch).sum()
    turned = gradients(other, loss)
    names = {id(p): name for name, p in model.named_parameters()}
    touched = set()
    for place in places_of(model):
        own = factors.factors.get(place.name, Factors(None, None))
        for weight, factor, rows in (
            (place.inner, own.inner, place.turned), (place.outer, own.outer, not place.turned)
        ):  # fmt: skip
            if weight is None or factor is None:
                continue
            name = names[id(weight)]
            plain[name] = wide(factor) @ plain[name] if rows else plain[name] @ wide(factor)
            touched.add(name)
        if place.bias is not None:
            assert own.outer is not None
            name = names[id(place.bias)]
            plain[name] = plain[name] @ own.outer
            touched.add(name)
    assert len(touched) > 6
    for name, expected in plain.items():
        torch.testing.assert_close(turned[name], expected, rtol=2e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("method", ["book_keeping", "ghost"])
def test_clipped_sums_are_those_of_one_record_at_a_time(method: Any) -> None:
    model = plain_model("qwen3_moe")
    attach(model, dense_factors(model))
    some, trained = batches(4), dict(model.named_parameters())
    expected = {name: torch.zeros_like(p) for name, p in trained.items()}
    for batch in some:
        own = torch.autograd.grad(default_loss(model, batch).sum(), list(trained.values()), allow_unused=True)
        norm = torch.sqrt(sum(g.double().pow(2).sum() for g in own if g is not None))  # type: ignore[arg-type]
        for total, g in zip(expected.values(), own, strict=True):
            if g is not None:
                total += g * min(1.0, 0.7 / float(norm))
    engine = Engine(model, None, Flat(0.7), method=method)
    engine.accumulate(joined(some))
    for name, got in engine.take().items():
        torch.testing.assert_close(got, expected[name], rtol=1e-3, atol=1e-5, msg=name)


def test_factors_are_powers_of_second_moments() -> None:
    model = nn.Module()
    model.first, model.second = nn.Linear(3, 2, bias=False), nn.Linear(2, 2, bias=False)
    torch.manual_seed(0)
    inputs, targets = torch.randn(40, 3) * torch.tensor([4.0, 1.0, 0.2]), torch.randn(40, 2)

    def loss(model: Any, batch: Any) -> Tensor:
        return F.mse_loss(model.second(model.first(batch["x"]).tanh()), batch["y"], reduction="none").sum(1)

    records = [{"x": x[None], "y": y[None]} for x, y in zip(inputs, targets, strict=True)]
    found = measure(model, records, loss, power=0.25, damping=0.1)
    sides: dict[str, Tensor] = {}
    energy = {"first": 0.0, "second": 0.0}
    for record in records:
        first, second = torch.autograd.grad(loss(model, record).sum(), list(model.parameters()))
        norm = (first.double().pow(2).sum() + second.double().pow(2).sum()).sqrt()
        for name, gradient in (("first", first / norm), ("second", second / norm)):
            sides[f"{name}/in"] = sides.get(f"{name}/in", 0) + gradient.mT @ gradient
            sides[f"{name}/out"] = sides.get(f"{name}/out", 0) + gradient @ gradient.mT
            energy[name] += float(gradient.pow(2).sum())
    middle = (energy["first"] / 6) ** (6 / 10) * (energy["second"] / 4) ** (4 / 10)
    for name, own in found.factors.items():
        got = {"in": own.inner, "out": own.outer}
        for end, scale in (("in", energy[name] * middle), ("out", 1.0)):
            side = sides[f"{name}/{end}"].double()
            damped = side + 0.1 * side.diagonal().mean() * torch.eye(len(side))
            root = torch.linalg.matrix_power(got[end].double(), 4)  # (damped / scale) ** -1
            torch.testing.assert_close(root @ damped / scale, torch.eye(len(side)).double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "phimoe", "deepseek_v3", "qwen3_next"])
def test_room_for_factors_is_known_without_weights(family: str) -> None:
    model = plain_model(family)
    made = measure(model, batches(2), default_loss).tensors().values()
    assert factor_values(model.to("meta")) == sum(factor.numel() for factor in made)


def test_without_power_nothing_changes() -> None:
    model = plain_model("olmoe")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    attach(model, measure(model, batches(3), default_loss, power=0.0))
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, before[name], rtol=1e-5, atol=1e-6)


def test_even_gradients_are_what_it_is_for() -> None:
    """The share of entries that hold nine tenths of the records' squared norm grows."""
    model, some = plain_model("qwen3_moe"), batches(40)

    def share() -> float:
        moments = []
        for batch in some:
            gradients = torch.autograd.grad(default_loss(model, batch).sum(), list(model.parameters()))
            moments.append(torch.cat([g.flatten() for g in gradients]).double().pow(2))
        energies = torch.stack(moments).sum(0).sort(descending=True).values
        return int((energies.cumsum(0) < 0.9 * energies.sum()).sum()) / len(energies)

    before = share()
    attach(model, measure(model, some, default_loss, power=0.25))
    assert share() > 1.5 * before


def test_file_and_model_are_held_to_each_other(tmp_path: Path) -> None:
    model, place = plain_model("qwen3_moe"), tmp_path / "preconditioner.safetensors"
    made = measure(model, batches(3), default_loss)
    made.save(place)
    read = Preconditioner.load(place)
    assert read.factors.keys() == made.factors.keys()
    for name, own in read.factors.items():
        for got, expected in zip(
            (own.inner, own.outer), (made.factors[name].inner, made.factors[name].outer), strict=True
        ):
            assert (got is None and expected is None) or torch.equal(got, expected)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="no matrix of this model"):
        attach(plain_model("olmoe"), Preconditioner({"model.nowhere": Factors(torch.eye(3), None)}))
    name = next(name for name in made.factors if "q_proj" in name)
    with pytest.raises(ModelError, match=f"`{name}` has 3 rows"):
        attach(model, Preconditioner({name: Factors(torch.eye(3), None)}))
    attach(model, read)
    with pytest.raises(ModelError, match="already"):
        attach(model, read)
    with pytest.raises(ModelError, match="other weights than it has"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    detach(model)
    model.save_pretrained(tmp_path / "saved")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    for file, said in (("other.safetensors", "no preconditioner"), ("absent", "There is no file")):
        with pytest.raises(ModelError, match=said):
            Preconditioner.load(tmp_path / file)
    for factor in (torch.zeros(3, 3), torch.full((3,), float("nan")), torch.zeros(3), torch.ones(2, 3)):
        Preconditioner({"x": Factors(factor, None)}).save(place)
        with pytest.raises(ModelError, match="nothing can be computed with"):
            Preconditioner.load(place)
    place.write_bytes(place.read_bytes()[:100])
    with pytest.raises(ModelError, match="no whole safetensors file"):
        Preconditioner.load(place)


def test_a_module_without_a_gradient_is_left_as_it_is() -> None:
    model = plain_model("olmoe")
    model.unused = nn.Embedding(4, 3)
    found = measure(model, batches(2), default_loss)
    assert "unused" not in found.factors
    assert "model.embed_tokens" in found.factors
    attach(model, found)
    assert torch.equal(model.unused(torch.tensor([1])), model.unused.weight[1:2])
    with pytest.raises(ModelError, match="nothing can be computed with"):
        attach(plain_model("olmoe"), Preconditioner({"lm_head": Factors(torch.full((3, 3), float("nan")), None)}))


def test_what_cannot_be_measured_is_one_sentence() -> None:
    model = plain_model("olmoe")
    with pytest.raises(ModelError, match="no public record"):
        measure(model, [], default_loss)
    with pytest.raises(ModelError, match="no trainable matrix"):
        measure(model.requires_grad_(False), batches(1), default_loss)
    model.requires_grad_(True)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="record 1 is not finite"):
        measure(model, batches(1), default_loss)
