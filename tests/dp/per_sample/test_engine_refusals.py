"""Invariant 4: what cannot be clipped is refused at set-up, by name, and the self-check finds what nobody named."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from coterie.dp.checks.made_up import FromCollator
from coterie.dp.checks.self_check import check
from coterie.dp.clipping import Flat
from coterie.dp.losses import default_loss, token_loss
from coterie.dp.per_sample import combine_uses
from coterie.dp.per_sample.engine import Engine
from coterie.dp.per_sample.functional import clipped_sum
from coterie.dp.per_sample.sites import CONSTANT, Meaning, Sites
from coterie.dp.per_sample.weight_expressions import Root
from coterie.errors import NoRuleError, PrivacyError
from coterie.models.zoo.tiny import tiny_model
from helpers.engine_reference import token_batch

VOCAB, WIDTH = 24, 8


class Toy(nn.Module):
    """Embedding, something in the middle, output layer."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(vocab_size=VOCAB)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.middle = middle
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.middle(self.embed(input_ids))))


class Weighted(nn.Module):
    """``function(weight, x)`` with a weight of the given shape."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(*shape) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.weight, x)


def checked(middle: nn.Module) -> dict[str, float]:
    return check(Engine(Toy(middle)), token_batch(2, 5, VOCAB)).errors


ODD_BUT_FINE = {
    "einsum": lambda w, x: torch.einsum("btd,de->bte", x, w),
    "cumulative product": lambda w, x: x * torch.cumprod(w, 0)[0],
    "matrix exponential": lambda w, x: x @ torch.linalg.matrix_exp(w),
    "weight by weight": lambda w, x: F.linear(x, w @ w.T),
    "weight norm": lambda w, x: F.linear(x, w / w.norm(dim=1, keepdim=True)),
    "two slices": lambda w, x: torch.cat([F.linear(x, w[:3]), F.linear(x, w[3:])], -1),
    "used twice": lambda w, x: F.linear(F.linear(x, w).tanh(), w.t()),
    "left product": lambda w, x: (w @ x.transpose(1, 2)).transpose(1, 2),
    "in place": lambda w, x: (x * 1.0).mul_(w[0]).add_(w[1]),
    "prepended token": lambda w, x: torch.cat([w[:1].expand(x.shape[0], 1, -1), x], 1)[:, 1:].cumsum(1) + x,
    "scaled shift": lambda w, x: F.linear(x, torch.add(torch.ones(WIDTH, WIDTH), w, alpha=2.0)),
    "scaled difference": lambda w, x: F.linear(x, torch.sub(w, torch.ones(WIDTH, WIDTH), alpha=3.0)),
    "tokens first": lambda w, x: F.linear(x.transpose(0, 1), w).transpose(0, 1),
    "distance": lambda w, x: torch.cdist(x, w.expand(x.shape[0], -1, -1)),
}


@pytest.mark.parametrize("name", ODD_BUT_FINE)
def test_operations_without_a_rule_of_their_own_are_exact(name: str) -> None:
    assert max(checked(Weighted(ODD_BUT_FINE[name], WIDTH, WIDTH)).values()) <= 1e-3


def test_invariant_3_only_what_grows_with_the_records_is_taken_for_them() -> None:
    sizes = ((5, 11), (7, 11), (7, 13))
    sites = Sites(sizes)
    key = ("weight", "linear", False)
    for (records, tokens), odd in zip(sizes, (25, 25, 30), strict=True):
        for shape in ((records, 4), (records * tokens, 4), (30, 4), (2 * tokens + 3, 4), (4, records), (odd, 4)):
            sites.note(key, (records, tokens), ((4, 4), shape))
    assert sites.settle() == key  # 30 and 2 * 11 + 3 are multiples of 5: such a pass went by a wrong supposition
    found = [sites.meanings(key, call, ((4, 4), shape)) for call, shape in enumerate([(9, 4)] * 2 + [(30, 4)])]
    assert found == [(CONSTANT, Meaning(0, True)), (CONSTANT, Meaning(0, False)), (CONSTANT, CONSTANT)]
    assert sites.meanings(key, 3, ((4, 4), (99, 4))) == (CONSTANT, CONSTANT)
    assert sites.meanings(key, 4, ((4, 4), (4, 9))) == (CONSTANT, Meaning(1, True))
    recomputed = ("weight", "linear", True)  # shapes choose between what was learnt, and only if they can
    assert sites.meanings(recomputed, 0, ((4, 4), (4, 9))) == (CONSTANT, Meaning(1, True))
    assert sites.meanings(recomputed, 0, ((4, 4), (9, 4))) is None
    assert sites.meanings(("weight", "matmul", False), 0, ((4, 4), (9, 4))) is None


def test_invariant_1_the_self_check_compares_sums_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms of the right size say nothing about what is added."""
    plain = combine_uses.add_sum

    def turned(root: Root, uses: list[combine_uses.Use], out: Tensor, factors_B: Tensor, fresh: bool = False) -> None:
        plain(root, uses, out, -factors_B if root.name == "head.weight" else factors_B, fresh)

    check(Engine(Toy(nn.Identity())), token_batch(2, 5, VOCAB))
    monkeypatch.setattr(combine_uses, "add_sum", turned)
    with pytest.raises(NoRuleError, match=r"summed gradient of `head\.weight` disagrees"):
        check(Engine(Toy(nn.Identity())), token_batch(2, 5, VOCAB))


def test_invariant_4_clipped_sum_refuses_batch_normalisation() -> None:
    with pytest.raises(NoRuleError, match="statistics of the batch"):
        clipped_sum(Toy(nn.BatchNorm1d(5)).train(), token_batch(2, 5, VOCAB), 1.0)


class Escapes(torch.autograd.Function):
    """A custom function, which torch's function dispatch does not see."""

    @staticmethod
    def forward(ctx: object, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)  # type: ignore[attr-defined]
        return x @ w

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad @ w.T, torch.einsum("btd,bte->de", x, grad)


@pytest.mark.parametrize(
    "function",
    [
        lambda w, x: Escapes.apply(x, w),
        lambda w, x: x + (x.mean(0, keepdim=True) @ w),  # mixes the records before the parameter
        lambda w, x: Escapes.apply(x, w.float() * 1.0),  # past the rules, and as a derived value
    ],
    ids=["custom function", "mixes records", "derived and custom"],
)
def test_invariant_4_uses_that_cannot_be_split_are_refused_by_name(function: Callable[..., Tensor]) -> None:
    with pytest.raises(NoRuleError) as caught:
        checked(Weighted(function, WIDTH, WIDTH))
    assert "middle.weight" in str(caught.value) or caught.value.code == "dp-batch-coupled"
    assert caught.value.fix


def test_invariant_4_tokens_sorted_across_records_are_found_by_the_self_check() -> None:
    def shuffled(w: Tensor, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        return F.linear(flat.flip(0), w).flip(0).view(x.shape)  # rows of the last record first

    with pytest.raises(NoRuleError, match=r"middle\.weight") as caught:
        checked(Weighted(shuffled, WIDTH, WIDTH))
    assert caught.value.code == "dp-self-check"


def test_invariant_4_a_parameter_whose_data_is_replaced_in_the_forward_is_refused() -> None:
    def replaced(w: Tensor, x: Tensor) -> Tensor:
        w.data = w.data * 2
        return F.linear(x, w)

    def moved(w: Tensor, x: Tensor) -> Tensor:
        w.data = w.data.float()  # to the type it has
        return F.linear(x, w)

    with pytest.raises(NoRuleError, match=r"`middle\.weight` is changed during the forward"):
        Engine(Toy(Weighted(replaced, WIDTH, WIDTH))).norms(token_batch(2, 5, VOCAB))
    Engine(Toy(Weighted(moved, WIDTH, WIDTH))).norms(token_batch(2, 5, VOCAB))


def test_invariant_4_batch_normalisation_is_refused() -> None:
    class Norm(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.transpose(1, 2)).transpose(1, 2)

    with pytest.raises(NoRuleError, match="statistics of the batch"):
        checked(Norm(WIDTH))


def test_invariant_4_a_buffer_that_changes_is_refused_and_put_back() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("load", torch.zeros(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                with torch.no_grad():
                    self.load += x.mean((0, 1))
            return x

    toy = Toy(Counts())
    with pytest.raises(NoRuleError, match=r"middle\.load"):
        check(Engine(toy), token_batch(2, 5, VOCAB))
    assert not toy.middle.load.any()


class Average(nn.Module):
    """Adds a moving average of what it sees, in train mode, kept as a buffer or as a frozen parameter."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind == "buffer":
            self.register_buffer("mean", torch.zeros(WIDTH))
        else:
            self.mean = nn.Parameter(torch.zeros(WIDTH), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(0.1 * x.detach().mean((0, 1)))
        return x + self.mean.detach()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["buffer", "frozen parameter"])
def test_invariant_6_state_changed_by_data_in_train_mode_is_refused_whatever_the_mode(
    kind: str, training: bool
) -> None:
    toy = Toy(Average(kind)).train(training)
    with pytest.raises(NoRuleError, match=rf"The {kind} `middle\.mean` changes"):
        check(Engine(toy), token_batch(2, 5, VOCAB))
    assert not toy.middle.mean.any()
    assert toy.training == training


def test_invariant_4_batch_normalisation_is_refused_in_eval_mode_too() -> None:
    toy = Toy(nn.BatchNorm1d(5)).eval()
    with pytest.raises(NoRuleError, match="statistics of the batch"):
        check(Engine(toy), token_batch(2, 5, VOCAB))
    assert not toy.middle.training


class Pooled(nn.Module):
    """A classifier that averages over tokens, with or without regard to the mask."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(vocab_size=VOCAB, num_labels=2)
        self.embed, self.head, self.masked = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, 2), masked

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        weight = attention_mask[..., None].float() if self.masked else torch.ones_like(attention_mask)[..., None]
        return SimpleNamespace(logits=self.head((self.embed(input_ids) * weight).sum(1) / weight.sum(1)))


def labelled(length: int) -> dict[str, Tensor]:
    ids = torch.arange(1, length + 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor(1)}


def pad_right(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    padded = {n: nn.utils.rnn.pad_sequence([i[n] for i in items], True) for n in ("input_ids", "attention_mask")}
    return padded | {"labels": torch.stack([item["labels"] for item in items])}


def test_invariant_4_pooling_over_padding_is_refused() -> None:
    batch = pad_right([labelled(5)])
    for model, given in ((Pooled(False), None), (Pooled(False), pad_right)):
        source = given and FromCollator(model, given, labelled(5))
        with pytest.raises(NoRuleError, match="changes with its padding") as caught:
            check(Engine(model), batch, source)
        assert caught.value.code == "dp-padding"
    model = Pooled(True)
    check(Engine(model), batch)
    check(Engine(model), batch, FromCollator(model, pad_right, labelled(5)))


def test_records_that_are_never_padded_may_be_pooled_without_a_mask() -> None:
    def stack(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}

    model = Pooled(False)
    check(Engine(model), stack([labelled(5)]), FromCollator(model, stack, labelled(5)))


def test_invariant_4_absolute_positions_behind_left_padding_are_refused() -> None:
    config = GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    model = GPT2LMHeadModel(config).eval()
    batch = token_batch(2, 8, VOCAB)
    check(Engine(model), batch)
    batch["attention_mask"][0, :3] = 0
    with pytest.raises(NoRuleError, match="changes with its padding"):
        check(Engine(model), batch)


def test_invariant_5_left_padding_changes_nothing_where_positions_are_relative() -> None:
    batch = token_batch(2, 8, VOCAB)
    batch["attention_mask"][0, :3] = 0
    check(Engine(tiny_model("phimoe")), batch)
    padded = {name: value[:1] for name, value in token_batch(1, 8, VOCAB).items()}
    padded["attention_mask"][0, :3], padded["labels"][0, :3] = 0, -100
    alone = {name: value[:, 3:] for name, value in padded.items()}
    model = tiny_model("phimoe").eval()
    assert torch.allclose(default_loss(model, padded), default_loss(model, alone), rtol=1e-5)


def test_invariant_5_a_loss_over_the_padded_length_is_refused() -> None:
    def over_padding(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        return F.cross_entropy(logits.mT, batch["labels"][:, 1:], reduction="none", ignore_index=-100).mean(1)

    with pytest.raises(NoRuleError, match="loss changes with its padding"):
        check(Engine(Toy(nn.Identity()), over_padding), token_batch(2, 8, VOCAB))


def test_invariant_4_capacity_over_the_batch_is_refused() -> None:
    from transformers import NllbMoeConfig, NllbMoeForConditionalGeneration

    config = NllbMoeConfig(
        vocab_size=96, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16,
        encoder_attention_heads=2, decoder_attention_heads=2, num_experts=2, encoder_sparse_step=1,
        decoder_sparse_step=1,
    )  # fmt: skip
    with pytest.raises(NoRuleError, match="capacity over the whole batch"):
        check(Engine(NllbMoeForConditionalGeneration(config)))


def test_invariant_4_expert_choice_is_refused() -> None:
    class ExpertChoiceRouter(nn.Linear):
        """Each expert would take its best tokens of the batch."""

    with pytest.raises(NoRuleError, match="choose among the tokens"):
        checked(ExpertChoiceRouter(WIDTH, WIDTH))


def test_invariant_4_a_balance_loss_over_the_batch_is_refused() -> None:
    def with_balance(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        out = model(batch["input_ids"], output_router_logits=True)
        labels = batch["labels"]
        return token_loss(out.logits[:, :-1], labels[:, 1:]) + 0.1 * out.aux_loss

    with pytest.raises(NoRuleError, match="records beside it") as caught:
        check(Engine(tiny_model("mixtral"), with_balance))
    assert "balance" in str(caught.value.fix)


def test_invariant_5_a_mean_over_the_batch_is_refused() -> None:
    def labels_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(**batch).loss

    with pytest.raises(PrivacyError, match=r"returned \[\] for a batch"):
        check(Engine(tiny_model("mixtral"), labels_loss))


def test_invariant_5_a_loss_divided_by_the_tokens_of_the_batch_is_refused() -> None:
    def over_all_tokens(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model(batch["input_ids"]).logits[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none")
        return losses.view(len(logits), -1).sum(1) / losses.numel()

    with pytest.raises(NoRuleError, match="records beside it"):
        check(Engine(tiny_model("mixtral"), over_all_tokens))


@pytest.mark.parametrize(
    "extra",
    [
        {"cu_seq_lens_q": torch.tensor([0, 4, 8])},
        {"seq_idx": torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 1, 1]])},
        {"position_ids": torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]])},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_invariant_1_packed_records_are_refused(extra: dict[str, Tensor]) -> None:
    with pytest.raises(PrivacyError, match="packs several records"):
        Engine(tiny_model("mixtral")).accumulate({**token_batch(2, 5), **extra})


def test_left_padding_with_a_capacity_per_sequence_is_refused() -> None:
    from helpers.switch_models import switch

    batch = token_batch(2, 6)
    batch["attention_mask"][0, :2] = 0
    with pytest.raises(PrivacyError, match="padded on the left"):
        Engine(switch()).accumulate(batch)


def test_bad_input_is_one_clear_sentence() -> None:
    model = tiny_model("mixtral")
    for clip_norm in (0.0, -1.0, float("nan")):
        with pytest.raises(PrivacyError, match="clip_norm"):
            clipped_sum(model, token_batch(2, 5), clip_norm)
    with pytest.raises(PrivacyError, match="how many records"):
        Engine(model).accumulate({**token_batch(2, 5), "labels": torch.zeros(3, 5, dtype=torch.int64)})
    with pytest.raises(PrivacyError, match="no `labels`"):
        Engine(model).accumulate({"input_ids": torch.ones(2, 5, dtype=torch.int64)})
    model.requires_grad_(False)
    with pytest.raises(PrivacyError, match="nothing to train"):
        Engine(model)


def test_a_parameter_class_that_hides_its_operations_is_refused() -> None:
    class Quantised(nn.Parameter):
        pass

    toy = Toy(nn.Linear(WIDTH, WIDTH))
    toy.middle.weight = Quantised(toy.middle.weight.detach())
    with pytest.raises(NoRuleError, match="Quantised"):
        Engine(toy).norms(token_batch(2, 5, VOCAB))
    assert type(toy.head.weight) is nn.Parameter


def test_self_check_passes_and_leaves_the_model_as_it_was() -> None:
    model = tiny_model("qwen3_moe").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    errors = check(Engine(model, default_loss, Flat(1.0))).errors
    assert set(errors) == {name for name, _ in model.named_parameters()}
    assert max(errors.values()) <= 1e-4
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
