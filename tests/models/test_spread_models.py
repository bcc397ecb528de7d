"""A spread model by itself, in one process: what it holds, what it refuses, and the names of its parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coterie import dp
from coterie.config import ModelSpec
from coterie.dp.noise.discrete_gaussian import Slabs
from coterie.dp.ownership import Ownership
from coterie.errors import CheckpointError, ModelError, PrivacyError, RankError
from coterie.models.spread.cuts import cuts_of
from coterie.models.spread.holdings import Holdings
from coterie.models.spread.loaded import build_spread
from coterie.models.spread.spread import spread_experts
from coterie.ranks.ranks import Alone
from helpers.rank_tasks import words
from helpers.spread_tasks import collated, scaled_loss, small, with_adapters


class Rank(Alone):
    """One of several ranks, which exchanges nothing."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_parts_of_all_ranks_are_the_whole_model_each_value_once(world: int, lora: bool) -> None:
    def made() -> Any:
        return with_adapters(small()) if lora else small()

    whole, pieces, seen = made(), list[tuple[str, Tensor]](), dict[str, list[Tensor]]()
    for rank in range(world):
        part = made()
        spread_experts(part, Rank(rank, world))
        pieces += Holdings(part).own(dict(part.named_parameters())).items()
        for name, held in Holdings(part).parts().items():
            seen.setdefault(name, []).append(torch.as_tensor(held.places))
    for name, places in seen.items():
        assert torch.equal(
            torch.cat(places).sort().values, torch.arange(dict(whole.named_parameters())[name].numel())
        )
    joined = Holdings(whole).joined(pieces)
    assert joined.keys() == cuts_of(whole).keys()
    for name, parameter in whole.named_parameters():
        assert name not in joined or torch.equal(joined[name], parameter)


def test_what_some_number_of_ranks_wrote_is_read_by_any_other() -> None:
    pieces = list[tuple[str, Tensor]]()
    for rank in range(4):
        part: Any = with_adapters(small())
        spread_experts(part, Rank(rank, 4))
        moments = {f"{name}/exp_avg": 2 * p.detach() for name, p in part.named_parameters()}
        steps = {f"{name}/step": torch.tensor(3.0) for name, _ in part.named_parameters()}
        pieces += Holdings(part).own(moments).items()
        if rank == 0:
            pieces += steps.items()
    for rank in range(3):
        part = with_adapters(small())
        spread_experts(part, Rank(rank, 3))
        joined = Holdings(part).joined(pieces)
        for name in cuts_of(part):
            assert torch.equal(joined[f"{name}/exp_avg"], 2 * dict(part.named_parameters())[name])
            assert float(joined[f"{name}/step"]) == 3.0


@pytest.mark.parametrize("trained", ["everything", "experts", "adapters"])
def test_a_release_whose_shared_values_one_rank_owns_says_of_every_part_whose_it_is(trained: str) -> None:
    def made() -> Any:
        model = with_adapters(small()) if trained == "adapters" else small()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and (trained != "experts" or "experts" in name))
        return model

    whole = {name: p.detach() for name, p in made().named_parameters() if p.requires_grad}
    pieces, ranks = list[tuple[str, Tensor]](), list[Holdings]()
    for rank in range(2):
        part = made()
        spread_experts(part, Rank(rank, 2))
        ranks.append(Holdings(part))
        own = {name: p.detach().clone() for name, p in part.named_parameters() if name in whole}
        slabs = Slabs(own, 1.0, ranks[-1].parts(), in_place=True)
        mine = Ownership(Rank(rank, 2), ranks[-1], own).own(own)
        slabs.keep_noised(mine)
        pieces += slabs.parts(mine).items()
    for holdings in (*ranks, Holdings(made())):
        for order in (pieces, pieces[::-1]):
            assert_own(holdings.joined(order), holdings, whole)


def assert_own(joined: dict[str, Tensor], holdings: Holdings, whole: dict[str, Tensor]) -> None:
    assert joined.keys() == whole.keys()
    parts = holdings.parts()
    for name, value in whole.items():
        values = value.reshape(-1)
        expected = values[torch.as_tensor(parts[name].places)] if holdings.is_part(name) else values
        assert torch.equal(joined[name].reshape(-1), expected), name


@pytest.mark.parametrize("world", [1, 2, 3])
def test_values_of_some_experts_that_do_not_say_of_which_are_refused(world: int) -> None:
    """As the first version of spread experts spooled them where one rank owned all shared values."""
    part = small()
    spread_experts(part, Rank(1, 2))
    own = {name: p.detach() for name, p in part.named_parameters()}
    reader = small()
    if world > 1:
        spread_experts(reader, Rank(0, world))
    some = [*own.items(), *Holdings(part).own(own).items()]
    for pieces in (some, some[::-1], [*own.items()])[: 2 if world == 1 else 3]:
        with pytest.raises(CheckpointError, match="does not say of which experts") as caught:
            Holdings(reader).joined(pieces)
        assert caught.value.code == "checkpoint-experts"


@pytest.mark.parametrize("held", [(0,), (1,), (0, 2)])
def test_experts_that_no_rank_wrote_are_missed_by_those_that_have_them_alone(held: tuple[int, ...]) -> None:
    pieces = list[tuple[str, Tensor]]()
    for rank in held:
        part: Any = small()
        spread_experts(part, Rank(rank, 3))
        moments = {f"{name}/exp_avg": p.detach() for name, p in part.named_parameters()}
        pieces += Holdings(part).own(moments).items()
    for rank in range(3):
        reader: Any = small()
        spread_experts(reader, Rank(rank, 3))
        if rank in held:
            assert Holdings(reader).joined(pieces)
            continue
        with pytest.raises(CheckpointError, match=f"of expert {2 * rank} in") as caught:
            Holdings(reader).joined(pieces)
        assert caught.value.code == "checkpoint-experts"
    with pytest.raises(CheckpointError):
        Holdings(small()).joined(pieces)


def test_more_ranks_than_experts_are_refused() -> None:
    with pytest.raises(ModelError, match="has 6 experts, and there are 7 ranks") as caught:
        spread_experts(small(), Rank(0, 7))
    assert caught.value.code == "spread-few-experts"


def test_a_part_is_not_saved_as_if_it_were_the_whole(tmp_path: Path) -> None:
    model: Any = small()
    spread_experts(model, Rank(0, 2))
    with pytest.raises(ModelError, match="a part of the model's experts") as caught:
        model.save_pretrained(tmp_path)
    assert caught.value.code == "spread-save"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"isolation": "exact"}, "dp-spread-exact"),
        ({"noise_bands": 2}, "dp-spread-bands"),
        ({"users": [i % 7 for i in range(24)], "records_per_user": 2}, "dp-spread-users"),
    ],
)
def test_what_spread_experts_cannot_promise_is_refused_before_the_ledger_knows_a_run(
    options: dict[str, Any], code: str, tmp_path: Path
) -> None:
    model = small()
    spread_experts(model, Alone())
    with pytest.raises(PrivacyError) as caught:
        dp.make_private(
            model, torch.optim.SGD(model.parameters(), 0.1), words(), collated, scaled_loss, lot_size=4, seed=1,
            budget=dp.Budget(8.0, 1e-3), self_check=False, ledger=tmp_path / "ledger", **options,
        )  # fmt: skip
    assert caught.value.code == code
    assert not (tmp_path / "ledger").exists()


def test_experts_over_other_ranks_than_those_that_share_the_run_are_refused(tmp_path: Path) -> None:
    model = small()
    spread_experts(model, Rank(0, 2))
    with pytest.raises(RankError, match="spread over 2 ranks, and 1 share") as caught:
        dp.make_private(
            model, torch.optim.AdamW(model.parameters()), words(), collated, scaled_loss, lot_size=4, seed=1,
            budget=dp.Budget(8.0, 1e-3), self_check=False, ledger=tmp_path / "ledger",
        )  # fmt: skip
    assert caught.value.code == "ranks-spread"
    assert not (tmp_path / "ledger").exists()


def test_a_checkpoint_is_read_layer_by_layer_and_only_what_a_rank_holds_is_kept(tmp_path: Path) -> None:
    whole: Any = small()
    whole.generation_config.update(do_sample=True, temperature=0.3, eos_token_id=[1, 7])
    whole.save_pretrained(tmp_path)
    pieces, spec = list[tuple[str, Tensor]](), ModelSpec(path=tmp_path)
    for rank in range(3):
        part = build_spread(spec, Rank(rank, 3))
        own = dict(part.named_parameters())
        assert not any(tensor.is_meta for tensor in (*own.values(), *part.buffers()))
        assert sum(p.numel() for p in own.values()) < sum(p.numel() for p in whole.parameters())
        pieces += Holdings(part).own(own).items()
        for name, parameter in whole.named_parameters():
            assert name in cuts_of(whole) or torch.equal(own[name], parameter)
            assert own[name].requires_grad
    joined = Holdings(whole).joined(pieces)
    assert all(torch.equal(value, dict(whole.named_parameters())[name]) for name, value in joined.items())
    assert joined.keys() == cuts_of(whole).keys()
    ids = torch.arange(3, 9)[None]
    whole.eval()
    alone = build_spread(spec, Alone()).eval()
    assert alone.generation_config.to_diff_dict() == whole.generation_config.to_diff_dict()
    assert torch.equal(alone(ids).logits, whole(ids).logits)
