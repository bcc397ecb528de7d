"""Invariant 4: what couples a batch's records is found by numbers, in the mode, sizes and lengths of training."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from coterie import dp
from coterie.dp.accounting.budget import Budget, PrivacyWarning
from coterie.dp.accounting.lots import Lot
from coterie.dp.checks.made_up import FromCollator
from coterie.dp.checks.self_check import check
from coterie.dp.checks.watched import Watched
from coterie.dp.per_sample.engine import Engine
from coterie.errors import DataError, NoRuleError, PrivacyError

VOCAB, WIDTH = 24, 8
Middle = Callable[[nn.Module, Tensor], Tensor]


class Toy(nn.Module):
    """Embedding, ``middle(module, hidden [B, T, D])``, output layer."""

    def __init__(self, middle: Middle = lambda module, h: h, **limits: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(vocab_size=VOCAB, **limits)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)
        self.middle = middle

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.middle(self, self.embed(input_ids))))


def example(length: int = 5) -> dict[str, Tensor]:
    ids = torch.arange(1, length + 1)[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def checked(middle: Middle, records: int = 4, **limits: int) -> None:
    check(Engine(Toy(middle, **limits)), example(), records=records)


def normalised(module: nn.Module, h: Tensor) -> Tensor:
    return (h - h.mean((0, 1))) / (h.std((0, 1)) + 1e-3) if module.training else h


def shared_scale(module: nn.Module, h: Tensor) -> Tensor:
    """Activations in whole steps of the batch's largest, as in fake quantisation; gradients straight through."""
    if not module.training:
        return h
    step = h.detach().abs().amax() / 127
    return h + ((h / step).round() * step - h).detach()


def mixed_up(order: Callable[[int], Tensor]) -> Middle:
    def middle(module: nn.Module, h: Tensor) -> Tensor:
        share = float(torch.distributions.Beta(2.0, 2.0).sample()) if module.training else 0.0
        return (1 - share) * h + share * h[order(len(h))]

    return middle


def shuffled(count: int) -> Tensor:
    order = list(range(count))
    random.shuffle(order)
    return torch.tensor(order)


def only_the_gradient(module: nn.Module, h: Tensor) -> Tensor:
    """The value is the record's own, the gradient another's too."""
    return h + (h.roll(1, 0) - h.roll(1, 0).detach()) if module.training else h


def capacity(module: nn.Module, h: Tensor) -> Tensor:
    """Two experts; each takes a quarter more than its share of the batch's tokens, first come first served."""
    expert = (h[..., 0] > 0).long().flatten()
    place = F.one_hot(expert, 2).cumsum(0).gather(1, expert[:, None]).flatten()
    kept = place <= 1.25 * len(expert) / 2 if module.training else torch.ones_like(place, dtype=torch.bool)
    return h * torch.where(expert == 1, 2.0, 1.0).view(*h.shape[:2], 1) * kept.view(*h.shape[:2], 1)


def in_large_batches(module: nn.Module, h: Tensor) -> Tensor:
    return h - h.mean(0) if module.training and len(h) >= 8 else h


def only_forwards(module: nn.Module, h: Tensor) -> Tensor:
    """Every record is touched by the one before it, the first by none."""
    return torch.cat([h[:1], h[1:] + 0.1 * h[:-1]])


COUPLED = {
    "batch statistics": normalised,
    "one scale for the batch": shared_scale,
    "mixup": mixed_up(torch.randperm),
    "mixup by sorting": mixed_up(lambda count: torch.rand(count).argsort()),
    "mixup by numpy": mixed_up(lambda count: torch.from_numpy(np.random.permutation(count))),
    "mixup by random": mixed_up(shuffled),
    "gradient alone": only_the_gradient,
    "capacity": capacity,
    "large batches": in_large_batches,
    "one way": only_forwards,
}


@pytest.mark.parametrize("name", COUPLED)
def test_invariant_4_records_coupled_in_training_are_refused_and_the_coupling_is_named(name: str) -> None:
    with pytest.raises(NoRuleError, match="records beside it") as caught:
        checked(COUPLED[name], records=16)
    assert caught.value.code == "dp-batch-coupled"


def test_invariant_4_a_rare_token_shows_a_coupling_that_others_leave_below_the_tolerance() -> None:
    model = Toy(lambda module, h: h + 1e-6 * h.mean((0, 1)))
    model.config.vocab_size = 5000
    model.embed, model.head = nn.Embedding(5000, WIDTH), nn.Linear(WIDTH, 5000)
    check(Engine(model), example())
    with torch.no_grad():
        model.embed.weight[1234] = 1e5
    with pytest.raises(NoRuleError, match="records beside it"):
        check(Engine(model), example())


def test_a_physical_batch_is_as_large_as_training_has_it() -> None:
    checked(in_large_batches, records=7)


def test_invariant_4_noise_that_depends_on_the_padded_length_is_refused() -> None:
    def noisy(module: nn.Module, h: Tensor) -> Tensor:
        most = 5 / (h.shape[1] * h.shape[2]) ** 0.5
        return h + torch.zeros_like(h).uniform_(-most, most) if module.training else h

    with pytest.raises(NoRuleError, match="changes with its padding") as caught:
        checked(noisy)
    assert caught.value.code == "dp-padding"


def shuffled_features(module: nn.Module, h: Tensor) -> Tensor:
    return h[..., torch.randperm(WIDTH)] if module.training else h


RANDOM_BUT_APART = {
    "dropout": lambda module, h: F.dropout(h, 0.3, module.training),
    "home-made dropout": lambda module, h: h * (torch.rand_like(h) > 0.3) if module.training else h,
    "dropped layer": lambda module, h: h if module.training and random.random() < 0.5 else h.tanh(),
    "dropped records": lambda module, h: h * torch.bernoulli(torch.full((len(h), 1, 1), 0.7)),
    "jitter": lambda module, h: h * torch.empty_like(h).uniform_(0.9, 1.1) if module.training else h,
    "normal noise": lambda module, h: h + torch.randn(h.shape) if module.training else h,
    "gumbel": lambda module, h: h * F.gumbel_softmax(h, dim=-1) if module.training else h,
    "shuffled features": shuffled_features,
}


@pytest.mark.parametrize("name", RANDOM_BUT_APART)
def test_randomness_that_keeps_records_apart_passes(name: str) -> None:
    engine = Engine(Toy(RANDOM_BUT_APART[name]))
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    check(engine, example())
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state[1:]


def nearly_tied(difference: float) -> Middle:
    """Token 3 is as near to one expert as to the other, up to a difference that alone and together see otherwise."""

    def middle(module: nn.Module, h: Tensor) -> Tensor:
        tied = (h - module.embed.weight[3]).abs().amax(-1, keepdim=True) < 1e-4  # type: ignore[union-attr]
        rounded = (h.detach() @ torch.ones(WIDTH, 1)) / h.detach().sum(-1, keepdim=True) - 1
        first = rounded + difference * (1 if len(h) > 1 else -1) > 0
        return torch.where(tied & first, -h, h)

    return middle


def test_a_routing_tie_is_settled_by_rounding_alone_and_not_by_luck() -> None:
    checked(nearly_tied(1e-7))
    with pytest.raises(NoRuleError, match="records beside it"):
        checked(nearly_tied(1e-3))


# -- collators and losses --------------------------------------------------------------------------------------------


def stacked(items: list[dict[str, Tensor]]) -> dict[str, Any]:
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def padded(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {
        name: nn.utils.rnn.pad_sequence([item[name] for item in items], True, -100 if name == "labels" else 0)
        for name in items[0]
    }


def counting(items: list[dict[str, Tensor]]) -> dict[str, Any]:
    batch = stacked(items)
    return {**batch, "num_items_in_batch": int((batch["labels"] != -100).sum())}


def weighing(items: list[dict[str, Tensor]]) -> dict[str, Any]:
    """The share of each record's labels in the batch's."""
    batch = stacked(items)
    counts = (batch["labels"] != -100).sum(1)
    return {**batch, "weight": counts / counts.sum()}


def token_losses(model: nn.Module, batch: Any) -> Tensor:
    logits = model(batch["input_ids"]).logits.mT
    return F.cross_entropy(logits, batch["labels"], reduction="none").sum(1)


def contrastive(model: nn.Module, batch: Any) -> Tensor:
    vectors = F.normalize(model(batch["input_ids"]).logits.mean(1), dim=-1)
    return F.cross_entropy(5 * vectors @ vectors.T, torch.arange(len(vectors)), reduction="none")


@pytest.mark.parametrize(
    ("collate", "loss_fn"),
    [
        (counting, lambda model, batch: token_losses(model, batch) / batch["num_items_in_batch"]),
        (weighing, lambda model, batch: token_losses(model, batch) * batch["weight"]),
        (stacked, contrastive),
        (stacked, lambda model, batch: F.softmax(token_losses(model, batch), 0)),
    ],
    ids=["counting collator", "weighing collator", "contrastive", "softmax over losses"],
)
def test_invariant_5_a_collator_or_loss_that_ties_records_together_is_refused(
    collate: Callable[..., Any], loss_fn: Callable[..., Tensor]
) -> None:
    item = {name: value[0] for name, value in example(7).items()}
    model = Toy()
    with pytest.raises(NoRuleError, match="records beside it"):
        check(Engine(model, loss_fn), collate([item]), FromCollator(model, collate, item))


def test_records_of_tuples_pass_through_a_collator_that_names_their_parts() -> None:
    def named(items: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        return {"input_ids": torch.stack([ids for ids, _ in items]), "label": torch.stack([y for _, y in items])}

    item, model = (torch.tensor([1, 2, 3]), torch.tensor(1)), Toy()

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch["input_ids"]).logits.mean(1), batch["label"], reduction="none")

    check(Engine(model, loss_fn), named([item]), FromCollator(model, named, item))


# -- records that the data holds padded ------------------------------------------------------------------------------


class Masked(Toy):
    """A ``middle`` that is given the attention mask too, and a layer for it."""

    def __init__(self, middle: Any) -> None:
        super().__init__(middle)
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        assert attention_mask is not None
        return SimpleNamespace(logits=self.head(self.middle(self, self.embed(input_ids), attention_mask)))  # type: ignore[call-arg]


def unpadded(module: Any, h: Tensor, mask: Tensor) -> Tensor:
    """The layer computes tokens alone, as models do that cut padding out."""
    kept = mask.bool()
    return h.index_put(tuple(kept.nonzero().T), module.layer(h[kept]))


def centred(module: Any, h: Tensor, mask: Tensor) -> Tensor:
    """The batch's mean is taken off, but only where there is padding."""
    weight = mask[..., None] / mask.sum()
    return h if bool(mask.all()) else h - (h * weight).sum((0, 1))


def sorted_by(descending: bool) -> Any:
    def ordered(module: Any, h: Tensor, mask: Tensor) -> Tensor:
        order = mask.sum(1).argsort(descending=descending, stable=True)
        return module.layer(h[order])[order.argsort()]

    return ordered


UNEVEN = {
    "unpadded": unpadded,
    "centred": centred,
    "longest first": sorted_by(True),
    "shortest first": sorted_by(False),
}


def padded_item(real: int, left: bool, width: int = 8) -> dict[str, Tensor]:
    gap = (width - real, 0) if left else (0, width - real)
    ids = torch.arange(1, real + 1)
    return {
        "input_ids": F.pad(ids, gap),
        "attention_mask": F.pad(torch.ones_like(ids), gap),
        "labels": F.pad(ids, gap, value=-100),
    }


def labelled_losses(model: nn.Module, batch: Any) -> Tensor:
    logits = model(batch["input_ids"], batch["attention_mask"]).logits.mT
    return F.cross_entropy(logits, batch["labels"], reduction="none").sum(1)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("name", UNEVEN)
@pytest.mark.filterwarnings("ignore:2 of 5 trained tensors were used by no made-up record")  # the toy's own layer
def test_invariant_4_models_that_go_by_padding_are_refused_where_the_data_is_padded(
    tmp_path: Path, name: str, left: bool
) -> None:
    """The first record is a whole one: what the others look like counts too."""
    data = [padded_item(8 - i % 5, left) for i in range(12)]
    with pytest.raises(NoRuleError):
        set_up(Masked(UNEVEN[name]), data, tmp_path, stacked, loss_fn=labelled_losses)
    whole = [padded_item(8, left) for _ in range(12)]
    if name == "centred":  # nothing is ever taken off
        set_up(Masked(UNEVEN[name]), whole, tmp_path / "whole", stacked, loss_fn=labelled_losses).close()


@pytest.mark.parametrize("largest_first", [False, True])
@pytest.mark.parametrize("numbers", [2, 3, 40])
def test_invariant_4_records_that_the_model_sorts_by_a_number_of_theirs_are_refused(
    tmp_path: Path, numbers: int, largest_first: bool
) -> None:
    """As where tasks or languages have experts of their own; the first records have the same number."""

    class Sorted(Toy):
        def forward(self, input_ids: Tensor, task: Tensor) -> SimpleNamespace:  # type: ignore[override]
            order = task.argsort(descending=largest_first, stable=True)
            return SimpleNamespace(logits=self.head(self.embed(input_ids)[order])[order.argsort()])

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        logits = model(batch["input_ids"], batch["task"]).logits.mT
        return F.cross_entropy(logits, batch["input_ids"], reduction="none").sum(1)

    data = [{"input_ids": torch.arange(1, 6), "task": torch.tensor(max(0, i - 3) % numbers)} for i in range(50)]
    with pytest.raises(NoRuleError, match="disagree"):
        set_up(Sorted(), data, tmp_path, stacked, loss_fn=loss_fn)


def test_numbers_that_the_model_cannot_compute_made_up_are_left_out(tmp_path: Path) -> None:
    def last(model: nn.Module, batch: Any) -> Tensor:
        place = (batch["length"] - 1).clamp_min(0)[:, None, None].expand(-1, 1, VOCAB)
        at = model(batch["input_ids"]).logits.gather(1, place)
        return F.cross_entropy(at[:, 0], batch["input_ids"][:, 0], reduction="none")

    data = [{"input_ids": torch.arange(1, 21), "length": torch.tensor(15 + i % 6)} for i in range(12)]
    set_up(Toy(), data, tmp_path, stacked, loss_fn=last).close()


@pytest.mark.parametrize("masked", [True, False], ids=["mask", "padding token"])
def test_invariant_5_a_loss_over_the_batch_s_real_tokens_is_refused_where_the_data_is_padded(
    tmp_path: Path, masked: bool
) -> None:
    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        real = (batch["input_ids"] != 0).float()
        losses = F.cross_entropy(model(batch["input_ids"]).logits.mT, batch["input_ids"], reduction="none")
        return (losses * real).sum(1) / real.sum(1).mean()

    model = Toy(pad_token_id=0)
    names = ("input_ids", "attention_mask") if masked else ("input_ids",)
    data = [
        {name: value for name, value in padded_item(8 - i % 5, False).items() if name in names} for i in range(12)
    ]
    with pytest.raises(NoRuleError, match="records beside it"):
        set_up(model, data, tmp_path, stacked, loss_fn=loss_fn)


@pytest.mark.parametrize("name", [*UNEVEN, "head on labels"])
def test_invariant_4_the_public_functions_compare_padding_when_they_see_it(name: str) -> None:
    def on_labels(model: Any, batch: Any) -> Tensor:
        """The output layer computes labelled tokens alone."""
        kept = batch["labels"] != -100
        losses = F.cross_entropy(
            model.head(model.embed(batch["input_ids"])[kept]), batch["labels"][kept], reduction="none"
        )
        return torch.zeros(kept.shape).index_put(tuple(kept.nonzero().T), losses).sum(1)

    model, loss_fn = Masked(UNEVEN.get(name, centred)), on_labels if name not in UNEVEN else labelled_losses
    engine = Engine(model, loss_fn)
    whole, uneven = (stacked([padded_item(n, False) for n in lengths]) for lengths in ((8, 8, 8), (4, 8, 6)))
    with pytest.raises(NoRuleError):
        dp.per_sample_norms(model, uneven, loss_fn)
    if name in ("centred", "head on labels"):
        engine.accumulate(whole)  # right, and no reason to compare anything else
    with pytest.raises(NoRuleError):
        engine.accumulate(uneven)


# -- lengths ---------------------------------------------------------------------------------------------------------


def item_of(length: int, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def set_up(model: nn.Module, data: list[Any], ledger: Path, collate: Any = padded, **options: Any) -> Any:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    settings: dict[str, Any] = {
        "budget": Budget(8.0, 1e-4), "lot_size": 8, "rounds": 2, "physical_batch": 4, "ledger": ledger,
    }  # fmt: skip
    return dp.make_private(model, optimizer, data, collate, **(settings | options))


def roped(kind: str) -> nn.Module:
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 16}
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64 if kind == "longrope" else 16, rope_parameters=rope,
    )  # fmt: skip
    model = LlamaForCausalLM._from_config(config, attn_implementation="eager")
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.4)
    return model


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_invariant_4_positions_scaled_by_the_batch_s_longest_are_refused_where_records_reach_the_limit(
    kind: str, tmp_path: Path
) -> None:
    short = [item_of(12, i) for i in range(20)]
    with pytest.raises(NoRuleError, match="padding") as caught:
        set_up(roped(kind), [*short, item_of(24)], tmp_path)
    assert "= 16" in str(caught.value.where)
    set_up(roped(kind), [*short, item_of(16)], tmp_path).close()


@pytest.mark.parametrize("limits", [{"attention_chunk_size": 14}, {}], ids=["in the config", "in the code alone"])
def test_invariant_4_a_limit_at_which_the_model_computes_otherwise_is_refused(
    limits: dict[str, int], tmp_path: Path
) -> None:
    def chunked(module: nn.Module, h: Tensor) -> Tensor:
        return 1.1 * h if h.shape[1] > 14 else h

    data = [item_of(4, i) for i in range(12)]
    set_up(Toy(chunked, **limits), [*data, item_of(14)], tmp_path, collate=padded).close()
    with pytest.raises(NoRuleError, match="padding"):
        set_up(Toy(chunked, **limits), [*data, item_of(15)], tmp_path)


def test_a_record_longer_than_the_model_takes_is_refused_before_the_first_lot(tmp_path: Path) -> None:
    def table(module: nn.Module, h: Tensor) -> Tensor:
        return h + torch.zeros(20, WIDTH)[torch.arange(h.shape[1])]

    data = [item_of(4, i) for i in range(12)]
    with pytest.raises(PrivacyError, match="as long as the longest of the data, 30 tokens") as caught:
        set_up(Toy(table), [*data, item_of(30)], tmp_path)
    assert caught.value.code == "dp-length"


# -- values that a forward changes -----------------------------------------------------------------------------------


class Remembers(Toy):
    """Writes what it sees into one of its own values, in the way named."""

    def __init__(self, way: str, large: bool = False) -> None:
        super().__init__()
        self.way, self.writing = way, True
        size = 3 * (1 << 20) if large else 8
        if way.startswith("parameter"):
            self.memory = nn.Parameter(torch.zeros(size), requires_grad=not way.endswith("frozen"))
        elif way.startswith("buffer"):
            self.register_buffer("memory", torch.zeros(size), persistent=not way.endswith("hidden"))
        else:
            self.memory = torch.zeros(size)
            self.kept: Any = {"attribute in a list": [self.memory], "attribute in a dict": {"a": (self.memory,)}}.get(
                way, SimpleNamespace(load=self.memory)
            )
            if way != "attribute":
                del self.memory

    def remembered(self) -> Tensor:
        kept = getattr(self, "kept", self)
        if isinstance(kept, list):
            return kept[0]
        if isinstance(kept, dict):
            return kept["a"][0]
        return self.memory if hasattr(self, "memory") else kept.load

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        hidden = self.embed(input_ids)
        if self.writing:
            seen = hidden.detach().mean()
            if self.way == "attribute":
                self.memory = self.memory + seen
            elif self.way == "attribute in an object":
                self.kept.load = self.kept.load + seen
            elif self.way == "attribute in a list":
                self.kept[0].data.add_(seen)
            elif self.way == "attribute in a dict":
                self.kept["a"][0].add_(seen)
            elif "view" in self.way:
                self.memory.data.view(-1)[::2].add_(seen)
            else:
                self.memory.data.add_(seen)
        hidden = hidden + 0.0 * self.memory[0] if self.way.startswith("parameter") else hidden
        return SimpleNamespace(logits=self.head(hidden))


WAYS = [
    "parameter", "parameter, frozen", "parameter by a view", "buffer", "buffer by a view", "buffer, hidden",
    "attribute", "attribute in a list", "attribute in a dict", "attribute in an object",
]  # fmt: skip


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_invariant_6_values_written_past_the_version_counter_are_seen_whatever_they_are(
    way: str, large: bool
) -> None:
    model = Remembers(way, large)
    with pytest.raises(NoRuleError, match="changes when the model sees data") as caught:
        check(Engine(model), example())
    assert caught.value.code == "dp-buffer"
    if not large:
        assert not model.remembered().any(), "put back"


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("way", ["parameter", "buffer", "attribute", "attribute in a dict"])
def test_invariant_6_values_that_a_lot_writes_are_seen_and_nothing_is_released(
    way: str, large: bool, tmp_path: Path
) -> None:
    model = Remembers(way, large)
    model.writing = False
    session = set_up(model, [item_of(5, i) for i in range(12)], tmp_path, lot_size=11)
    model.writing = True
    with pytest.raises(NoRuleError, match="changes when the model sees data"):
        session.step(session.next_lot())
    assert session.spent().epsilon == 0
    session.close()


def test_a_table_made_at_first_use_is_no_record_s() -> None:
    def lazily(module: nn.Module, h: Tensor) -> Tensor:
        if not hasattr(module, "table"):
            module.table = torch.arange(64.0)
        return h + module.table[: h.shape[1], None] / 64

    checked(lazily)


def test_watched_sees_one_element_of_any_type_and_puts_small_ones_back() -> None:
    model = nn.Module()
    for name, dtype in {"a": torch.float32, "b": torch.bfloat16, "c": torch.int64, "d": torch.bool}.items():
        model.register_buffer(name, torch.zeros(100_001, dtype=dtype))
        model.register_buffer(f"{name}_small", torch.zeros(7, dtype=dtype))
    before = Watched(model)
    assert before.changed() == []
    for name, buffer in model.named_buffers():
        buffer.data[5] = 1
        assert before.changed() == [name]
        lost = before.restore()
        assert lost == ([] if "small" in name else [name])
        buffer.data[5] = 0
    model.a.data[[1, 99_999]] = torch.tensor([3.0, 4.0])
    swapped = Watched(model)
    model.a.data[[1, 99_999]] = torch.tensor([4.0, 3.0])
    assert swapped.changed() == ["a"], "an exchange of two values is a change"


# -- what no record uses, and lots that teach nothing ----------------------------------------------------------------


def test_parameters_that_no_record_uses_are_warned_of_and_in_the_statement(tmp_path: Path) -> None:
    class Seeing(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.vision = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
            self.scale = nn.Parameter(torch.ones(3))

    model = Seeing()
    data = [item_of(5, i) for i in range(12)]
    with pytest.warns(PrivacyWarning, match="5 of 8 trained tensors were used by no made-up record") as caught:
        session = set_up(model, data, tmp_path)
    line = 'model.get_submodule("vision").requires_grad_(False)'
    assert line in str(caught[0].message)
    assert line in str(session.statement())
    session.close()
    model.get_submodule("vision").requires_grad_(False)
    model.get_parameter("scale").requires_grad_(False)
    session = set_up(model, data, tmp_path)
    assert "noise alone" not in str(session.statement())
    session.close()


def test_the_owner_is_told_of_a_lot_that_taught_nothing(tmp_path: Path) -> None:
    class Poisoned(Toy):
        bad = False

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
            out = super().forward(input_ids)
            return SimpleNamespace(logits=out.logits * float("nan")) if self.bad else out

    model = Poisoned()
    session = set_up(model, [item_of(5, i) for i in range(12)], tmp_path)
    model.bad = True
    session.lot_sums.compute(Lot(1, np.arange(3), np.arange(3)), "1|0")
    assert "none of the lot's 3 records gave a finite loss" in str(session.last.nothing_learnt)
    session.lot_sums.compute(Lot(1, np.arange(0), np.arange(0)), "1|1")
    assert session.last.nothing_learnt == "the lot was empty"
    model.bad = False
    session.lot_sums.compute(Lot(1, np.arange(3), np.arange(3)), "1|2")
    assert session.last.nothing_learnt is None
    session.close()


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_models_of_types_that_norms_are_not_taken_in_get_one_sentence(dtype: torch.dtype) -> None:
    model = Toy()
    model.head = model.head.to(dtype)
    with pytest.raises(NoRuleError, match=r"`head\.weight` is (float64|complex64)") as caught:
        dp.per_sample_norms(model, example())
    assert caught.value.code == "dp-dtype"
    model.head.requires_grad_(False)
    Engine(model)


def test_batches_and_datasets_of_another_kind_get_one_sentence(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict
    from torch.utils.data import IterableDataset

    class Stream(IterableDataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 12

        def __iter__(self) -> Any:
            return iter([])

    data = [item_of(5, i) for i in range(12)]
    with pytest.raises(PrivacyError, match="made a tuple, not a mapping"):
        set_up(Toy(), data, tmp_path, collate=lambda items: tuple(padded(items).values()))
    with pytest.raises(DataError, match="tuple"):
        set_up(Toy(), [tuple(item.values()) for item in data], tmp_path, collate=None)
    both = DatasetDict(train=Dataset.from_list([{"input_ids": [1, 2]}]), test=Dataset.from_list([{"input_ids": [1]}]))
    with pytest.raises(DataError, match="train"):
        set_up(Toy(), both, tmp_path)
    with pytest.raises(DataError, match="Stream"):
        set_up(Toy(), Stream(), tmp_path)
