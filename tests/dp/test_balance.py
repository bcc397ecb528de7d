"""Balance without mixing records: what each mode adds, what is released, and how much one record can move it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from coterie import dp
from coterie.dp.balance import Balance, Balancer
from coterie.dp.losses import default_loss
from coterie.dp.noise.joint_noise import LOAD
from coterie.dp.router_watch import RouterWatch
from coterie.errors import PrivacyError
from coterie.models.zoo.tiny import tiny_model

Make = Callable[..., PreTrainedModel]


def batch(records: int = 4, tokens: int = 9, vocab: int = 90) -> dict[str, Tensor]:
    ids = torch.randint(3, vocab, (records, tokens), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def single(many: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    length = int(many["attention_mask"][i].sum())
    return {name: value[i : i + 1, :length] for name, value in many.items()}


def balancer(model: PreTrainedModel, mode: str, **options: Any) -> Balancer:
    return Balancer(Balance(mode, **options), model, default_loss)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "family", ["olmoe", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe"]
)
def test_router_is_seen_in_every_kind_of_family(make_tiny: Make, family: str) -> None:
    model = make_tiny(family)
    watch = RouterWatch(model)
    many = batch()
    with watch.watching() as seen:
        model(many["input_ids"], attention_mask=many["attention_mask"])
    assert set(seen.ids) == set(seen.logits) == {layer.index for layer in watch.layers}
    for layer in watch.layers:
        logits, ids = seen.logits[layer.index].reshape(-1, layer.num_experts), seen.ids[layer.index]
        chosen = watch.probabilities(logits).gather(1, ids)
        best = watch.probabilities(logits).max(1).values
        assert (chosen.max(1).values >= best - 1e-6).float().mean() > 0.9  # the logits are those that chose


@pytest.mark.parametrize("mode", ["per_sequence", "private_load"])
def test_invariant_11_balance_term_of_a_record_does_not_depend_on_the_others(make_tiny: Make, mode: str) -> None:
    model = make_tiny("qwen3_moe").eval()
    balanced, plain, many = balancer(model, mode, coefficient=1.0), default_loss, batch()
    balanced.load = torch.linspace(0.05, 0.2, sum(balanced.sizes), dtype=torch.float64)
    together = balanced(model, many) - plain(model, many)
    alone = torch.cat([balanced(model, single(many, i)) - plain(model, single(many, i)) for i in range(4)])
    assert torch.allclose(together, alone, atol=1e-5)
    assert (together > 0.1).all()


def test_per_sequence_term_is_the_switch_loss_of_a_batch_of_one(make_tiny: Make) -> None:
    model = make_tiny("mixtral", num_hidden_layers=1).eval()
    one = single(batch(), 2)
    router = next(module for name, module in model.named_modules() if name.endswith("gate"))
    shown: list[Tensor] = []
    router.register_forward_hook(lambda module, args, out: shown.append(out[0]))
    balanced = balancer(model, "per_sequence", coefficient=1.0)
    term = (balanced(model, one) - default_loss(model, one)).item()
    probabilities = shown[0].softmax(-1)
    experts, top_k = probabilities.shape[1], 2
    share = torch.zeros(experts).index_add(0, probabilities.topk(top_k).indices.flatten(), torch.ones(18)) / 18
    assert term == pytest.approx(experts * float((share * probabilities.mean(0)).sum().detach()), rel=1e-4)


def test_engine_stays_exact_with_a_balance_loss(make_tiny: Make) -> None:
    from coterie.dp.checks.self_check import check
    from coterie.dp.per_sample.engine import Engine

    for mode in ("per_sequence", "private_load"):
        model = make_tiny("olmoe", num_hidden_layers=1)
        errors = check(Engine(model, balancer(model, mode, coefficient=1.0))).errors
        assert max(errors.values()) < 1e-4


def test_one_record_moves_the_load_sum_by_at_most_the_bound(make_tiny: Make) -> None:
    balanced = balancer(make_tiny("olmoe", num_hidden_layers=2), "private_load")
    sizes = balanced.sizes
    assert balanced.load_bound == pytest.approx(math.sqrt(sum(1 - 1 / size for size in sizes)))
    one_expert = torch.zeros(1, sum(sizes), dtype=torch.float64)
    one_expert[0, 0] = one_expert[0, sizes[0]] = 1.0
    assert torch.linalg.vector_norm(balanced.unit_loads(one_expert, torch.tensor([0])).sum(0)) == pytest.approx(
        balanced.load_bound
    )
    for bad in (math.nan, math.inf, 1e9):
        row = torch.full((1, sum(sizes)), bad, dtype=torch.float64)
        assert torch.linalg.vector_norm(balanced.unit_loads(row, torch.tensor([0])).sum(0)) <= balanced.load_bound * (
            1 + 1e-9
        )
    same_user = balanced.unit_loads(one_expert.repeat(5, 1), torch.zeros(5, dtype=torch.int64)).sum(0)
    assert torch.linalg.vector_norm(same_user) == pytest.approx(balanced.load_bound)
    assert balanced.unit_loads(torch.zeros(0, sum(sizes)), torch.zeros(0, dtype=torch.int64)).sum(0).tolist() == [
        0.0
    ] * sum(sizes)


def test_padding_is_not_load(make_tiny: Make) -> None:
    model = make_tiny("olmoe", num_hidden_layers=1).eval()
    balanced, many = balancer(model, "private_load"), batch()
    balanced(model, many)
    together = balanced.latest
    assert together is not None
    for i in range(4):
        balanced(model, single(many, i))
        assert balanced.latest is not None
        assert torch.allclose(balanced.latest[0], together[i], atol=1e-6)
    assert torch.allclose(together.sum(1), torch.ones(4, dtype=torch.float64), atol=1e-6)


@pytest.fixture
def session(tmp_path: Path) -> Callable[..., dp.PrivateSession]:
    def make(model: PreTrainedModel, **options: Any) -> dp.PrivateSession:
        generator = torch.Generator().manual_seed(2)
        data = [{"input_ids": row, "labels": row} for row in torch.randint(3, 90, (48, 8), generator=generator)]
        defaults = {
            "budget": dp.Budget(8.0, 1e-3), "lot_size": 16, "rounds": 6, "physical_batch": 16, "seed": 1,
            "ledger": tmp_path, "self_check": False,
        }  # fmt: skip
        return dp.make_private(model, torch.optim.SGD(model.parameters(), 0.1), data, **defaults | options)

    return make


def test_invariant_9_load_shares_the_round_s_one_gaussian(session: Callable[..., dp.PrivateSession]) -> None:
    model = tiny_model("olmoe", num_hidden_layers=1)
    run = session(model, balance=Balance("private_load", load_share=0.2))
    sums = run.lot_sums.compute(run.next_lot(), "x")
    assert sums[LOAD].shape == (8,)
    std = run.lot_sums.noise(sums).std
    sigma, engine, bound = run.noise_multiplier, run.lot_sums.engine, run.lot_sums.balancer.load_bound
    spent = (engine.sensitivity / std["gradients"]) ** 2 + (bound / std[LOAD]) ** 2
    assert spent <= 1 / sigma**2
    assert spent == pytest.approx(1 / sigma**2, rel=1e-2)
    assert (bound / std[LOAD] * sigma) ** 2 == pytest.approx(0.2**2, rel=1e-2)


def test_released_loads_follow_the_router_over_rounds(session: Callable[..., dp.PrivateSession]) -> None:
    model = tiny_model("olmoe", num_hidden_layers=1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lm_head" in name)  # the router stands still
    run = session(
        model,
        balance=Balance("private_load", load_share=0.7, smoothing=0.95),
        rounds=25,
        budget=dp.Budget(60.0, 1e-3),
    )
    truth = []
    for lot in run:
        run.step(lot)
        truth.append(run.lot_sums.balancer.latest.mean(0))
    released = run.lot_sums.balancer.load
    assert released is not None
    assert (released - torch.stack(truth).mean(0)).abs().max() < 0.06
    assert released.sum() == pytest.approx(1.0, abs=0.2)
    shown = run.lot_sums.balancer.figures()
    assert shown["load_most"] == pytest.approx(float(released.max()) * len(released))
    assert shown["load_least"] == pytest.approx(float(released.min()) * len(released))


def test_bias_follows_the_released_load_and_is_refused_where_there_is_none(make_tiny: Make) -> None:
    model = make_tiny("deepseek_v3")
    balanced = balancer(model, "bias", coefficient=0.05)
    before = [bias.clone() for bias, _ in balanced._biases]
    load = torch.zeros(sum(balanced.sizes), dtype=torch.float64)
    load[0] = 10.0
    balanced.take_released(load / 10.0)
    bias = balanced._biases[0][0] - before[0]
    assert bias[0] == pytest.approx(-0.05)
    assert (bias[1:] <= 0.05 + 1e-6).all()
    with pytest.raises(PrivacyError, match="has no routing bias to move"):
        balancer(make_tiny("mixtral"), "bias")
    with pytest.raises(PrivacyError, match="has no experts to balance"):
        balancer(torch.nn.Linear(2, 2), "per_sequence")  # type: ignore[arg-type]


def test_bias_mode_trains_privately_and_moves_only_by_what_was_released(
    session: Callable[..., dp.PrivateSession],
) -> None:
    model = tiny_model("deepseek_v3", num_hidden_layers=2)
    run = session(model, balance=Balance("bias", coefficient=0.01), rounds=2)
    start = [bias.clone() for bias, _ in run.lot_sums.balancer._biases]
    for lot in run:
        run.step(lot)
    for before, (after, _) in zip(start, run.lot_sums.balancer._biases, strict=True):
        assert (after - before).abs().max() <= 0.02 + 1e-6
        assert not torch.equal(after, before)


def test_smoothing_starts_as_a_plain_mean() -> None:
    balanced = balancer(tiny_model("olmoe", num_hidden_layers=1), "private_load", smoothing=0.9)
    for value in (1.0, 3.0):
        balanced.take_released(torch.full((8,), value))
    assert balanced.load is not None
    assert torch.allclose(balanced.load, torch.full((8,), 2.0 + 1 / 8, dtype=torch.float64))
    again = balancer(tiny_model("olmoe", num_hidden_layers=1), "private_load", smoothing=0.9)
    again.restore(balanced.state())
    balanced.take_released(torch.zeros(8))
    again.take_released(torch.zeros(8))
    assert torch.equal(balanced.load, again.load)
