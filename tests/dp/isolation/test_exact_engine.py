"""`isolation: exact`: what a record adds is its own, to the last bit, and never more than C."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from coterie import dp
from coterie.dp.accounting.budget import Budget
from coterie.dp.accounting.lots import Lot
from coterie.dp.balance import Balance
from coterie.dp.clipping import Automatic, Clipping, Flat, PerGroup
from coterie.dp.isolation import grid_sums
from coterie.dp.isolation.exact_engine import ExactEngine
from coterie.dp.losses import default_loss
from coterie.dp.noise.discrete_gaussian import GRID_SIGMA, add_noise
from coterie.dp.noise.joint_noise import LOAD, WITHIN
from coterie.dp.noise.randomness import SeededRandom
from coterie.dp.per_sample.engine import Engine
from coterie.dp.session import PrivateSession
from coterie.errors import PrivacyError
from coterie.models import seam
from coterie.models.zoo.tiny import tiny_model
from helpers.engine_reference import distance, gradients, norms, token_batch
from helpers.switch_models import switch

LENGTHS = (9, 5, 61, 5, 17, 2, 64)
STEP = 2.0**-24
Record = dict[str, Tensor]
Sums = dict[str, Tensor]


def made_records(seed: int = 0, lengths: Iterable[int] = LENGTHS) -> list[Record]:
    """Records of many lengths, the last one twice."""
    found = [token_batch(1, tokens, seed=seed + i) for i, tokens in enumerate(lengths)]
    return [*found, found[-1]]


def amplified(model: nn.Module, size: float) -> nn.Module:
    """Weights as an enemy would make them: all logits share a part so large that last bits decide among tokens."""
    head = model.get_output_embeddings().weight
    common = torch.randn(1, head.shape[1], generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        head.add_((size * common).to(head.dtype))
    return model


def with_adapters(family: str) -> nn.Module:
    peft = pytest.importorskip("peft")
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], target_parameters=experts)
    model: nn.Module = peft.get_peft_model(tiny_model(family), settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def lent(model: nn.Module) -> dict[str, Any]:
    """What an engine is told of experts whose weights are elsewhere; takes them out of the model."""
    layers = seam.expert_layers(model)
    held = [{name: p.detach().clone() for name, p in layer.parameters().items()} for layer in layers]
    trained = [{n for n, p in layer.parameters().items() if p.requires_grad} for layer in layers]
    shapes = {
        f"{layer.name}.{name}": layer.parameters()[name].shape
        for layer, names in zip(layers, trained, strict=True)
        for name in names
    }
    for layer in layers:
        for name, parameter in layer.module.named_parameters():
            if name in layer.parameters():
                setattr(layer.module, name, nn.Parameter(parameter.detach().to("meta"), requires_grad=False))

    class Source:
        def layer(self, index: int) -> Any:
            return nullcontext(held[index])

    return {"expert_weights": Source(), "expert_shapes": shapes}


MODELS: dict[str, Callable[[], nn.Module]] = {
    "qwen3_moe": lambda: tiny_model("qwen3_moe"),
    "mixtral": lambda: tiny_model("mixtral"),
    "olmoe crafted": lambda: amplified(tiny_model("olmoe"), 1e6),
    "gpt_oss crafted": lambda: amplified(tiny_model("gpt_oss"), 1e7),
    "jamba": lambda: tiny_model("jamba"),
    "deepseek_v3 crafted": lambda: amplified(tiny_model("deepseek_v3"), 1e6),
    "switch": switch,
    "mixtral bfloat16": lambda: tiny_model("mixtral").to(torch.bfloat16),
    "qwen3_moe bfloat16 crafted": lambda: amplified(tiny_model("qwen3_moe").to(torch.bfloat16), 1e3),
    "adapters": lambda: with_adapters("mixtral"),
    "dense": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=96, bos_token_id=1, eos_token_id=2, n_embd=32, n_layer=2, n_head=4, n_positions=128)
    ).eval(),
}
LENT: dict[str, Callable[[], nn.Module]] = {
    "qwen3_moe": lambda: tiny_model("qwen3_moe"),
    "gpt_oss crafted": lambda: amplified(tiny_model("gpt_oss"), 1e7),
    "adapters": lambda: with_adapters("mixtral"),
}


def total(engine: ExactEngine, records: Iterable[Record]) -> Sums:
    for record in records:
        engine.accumulate(record)
    return engine.take()


def difference(one: Sums, other: Sums) -> Sums:
    return {name: one[name] - other[name] for name in one}


def equal(one: Sums, other: Sums) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def exact_square(sums: Sums) -> int:
    """The squared norm in grid steps, without any rounding."""
    assert all(int(value.abs().max()) < 2**24 for value in sums.values())
    return sum(int((value * value).sum()) for value in sums.values())


def assert_isolated(engine: ExactEngine, records: list[Record], clip_norm: float) -> None:
    engine.use_grid(lambda name: STEP)
    whole = total(engine, records)
    assert all(value.dtype == torch.int64 for value in whole.values())
    for number in range(len(records)):
        own = total(engine, [records[number]])
        others = [record for i, record in enumerate(records) if i != number]
        assert equal(difference(whole, total(engine, reversed(others))), own)
        assert 0.9 * (clip_norm / STEP) ** 2 < exact_square(own) <= (clip_norm / STEP) ** 2


@pytest.mark.parametrize("name", MODELS)
def test_invariant_2_one_record_changes_the_sum_by_its_own_contribution_and_nothing_else(name: str) -> None:
    assert_isolated(ExactEngine(MODELS[name](), clipping=Flat(0.01)), made_records(lengths=(9, 61, 2)), 0.01)


@pytest.mark.parametrize("name", LENT)
def test_invariant_2_exact_for_lent_experts_as_for_the_models_own(name: str) -> None:
    model = LENT[name]()
    records = made_records(lengths=(9, 5, 61))
    own = total(ExactEngine(model, clipping=Flat(0.01)), records)
    engine = ExactEngine(model, None, Flat(0.01), **lent(model))
    assert_isolated(engine, records, 0.01)
    engine.use_grid(lambda name: engine.sensitivity * 2.0**-24)
    assert distance(total(engine, records), own) <= 1e-6


@pytest.mark.parametrize("clipping", [Flat(0.5), PerGroup(0.5), Automatic(0.5)], ids=lambda c: type(c).__name__)
def test_exact_sums_are_the_clipped_sums_of_records_alone(clipping: Clipping) -> None:
    model, records = tiny_model("qwen3_moe"), made_records()
    engine, fast = ExactEngine(model, clipping=clipping), Engine(model, clipping=clipping, method="book_keeping")
    figures = [engine.accumulate(record) for record in records]
    for record in records:
        fast.accumulate(record)
    step = engine.sensitivity * 2.0**-24
    sums = {name: value.double() * step for name, value in engine.take().items()}
    assert distance(sums, fast.take()) <= 2e-5
    alone = torch.cat([norms(gradients(model, record)) for record in records])
    assert torch.allclose(torch.cat([one.norms for one in figures]), alone, rtol=1e-6, atol=0.0)


def padded(records: list[Record]) -> Record:
    """All records in one batch, as a collator pads them."""
    longest = max(record["input_ids"].shape[1] for record in records)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: torch.cat(
            [nn.functional.pad(one[name], (0, longest - one[name].shape[1]), value=value) for one in records]
        )
        for name, value in fill.items()
    }


def moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    return sum(float((after[name] - before[name]).double().square().sum()) for name in before) ** 0.5


def test_invariant_2_crafted_weights_let_a_record_move_others_by_several_c_unless_isolation_is_exact() -> None:
    model = amplified(tiny_model("qwen3_moe"), 1e6)
    others = [token_batch(1, 9, seed=i) for i in range(15)]
    silent = token_batch(1, 61, seed=99)
    silent["labels"][:] = -100  # its own gradient is zero
    fast = Engine(model, clipping=Flat(1.0), method="book_keeping")
    exact = ExactEngine(model, clipping=Flat(1.0))
    fast.compared = exact.compared = True  # with batches of one, from which rounding alone moves these weights
    fast.accumulate(padded(others))
    before = fast.take()
    assert float(fast.accumulate(padded([*others, silent])).norms[-1]) == 0.0
    assert moved(before, fast.take()) > 1.0  # 3.4 when this was written; what the documents say of `fast`
    assert equal(total(exact, others), total(exact, [silent, *others]))


def test_records_that_are_not_finite_add_zero_and_leave_no_trace() -> None:
    model = tiny_model("mixtral")

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        losses = default_loss(model, batch)
        return torch.where((batch["input_ids"] == 7).any(1), losses * math.nan, losses)

    records = [token_batch(1, tokens, vocabulary=6, seed=tokens) for tokens in (9, 5, 33)]
    broken = token_batch(1, 40)
    broken["input_ids"][0, 3] = 7
    engine = ExactEngine(model, loss_fn, Flat(0.5))
    plain = total(engine, records)
    assert bool(engine.accumulate(broken).masked.all())
    assert equal(total(engine, records), plain)
    huge = amplified(tiny_model("mixtral"), 1e38)
    engine = ExactEngine(huge, clipping=Flat(0.5))
    assert bool(engine.accumulate(records[0]).masked.all())
    assert exact_square(engine.take()) == 0


def test_counted_0_computes_and_adds_zero() -> None:
    engine = ExactEngine(tiny_model("mixtral"), clipping=Flat(0.5))
    figures = engine.accumulate(token_batch(1, 9), counted=0)
    assert float(figures.norms[0]) > 0
    assert exact_square(engine.take()) == 0


def test_a_user_is_clipped_once_over_records_that_are_each_alone() -> None:
    model, mine = tiny_model("olmoe"), made_records(lengths=(9, 30, 4))
    others = made_records(seed=50, lengths=(61, 6))
    engine = ExactEngine(model, clipping=Flat(0.5))
    engine.use_grid(lambda name: STEP)
    figures = engine.accumulate_user(mine)
    own = engine.take()
    assert exact_square(own) <= (0.5 / STEP) ** 2
    parts = gradients(model, {n: torch.cat([r[n] for r in mine[:1]]) for n in mine[0]})
    for record in mine[1:]:
        parts += gradients(model, record)
    summed = {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}
    assert float(figures.norms[0]) == pytest.approx(float(norms([summed])[0]), rel=1e-6)
    engine.accumulate_user(others)
    without = engine.take()
    engine.accumulate_user(others)
    engine.accumulate_user(mine)
    assert equal(difference(engine.take(), without), own)


def test_several_records_in_one_batch_are_refused() -> None:
    engine = ExactEngine(tiny_model("mixtral"), clipping=Flat(0.5))
    for call in (engine.accumulate, lambda batch: engine.accumulate_user([batch])):
        with pytest.raises(PrivacyError, match="2 records came in one batch") as error:
            call(token_batch(2, 5))
        assert error.value.code == "dp-isolation-batch"


class Remembers(nn.Module):
    """A model that keeps what it saw in every place a module has."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.table = nn.Embedding(96, 8)
        self.head = nn.Linear(8, 96)
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.how = how
        self.longest = 0
        self.past: list[float] = []
        self.by_name: dict[str, float] = {}
        self.plain = torch.zeros(3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        trace = float(input_ids.sum())
        factor = 1.0
        if self.how == "attribute":
            self.longest = max(self.longest, input_ids.shape[1])
            factor = float(self.longest)
        elif self.how == "list":
            self.past.append(trace)
            factor = sum(self.past)
        elif self.how == "dict":
            self.by_name["sum"] = self.by_name.get("sum", 0.0) + trace
            factor = self.by_name["sum"]
        elif self.how == "tensor":
            self.plain += trace
            factor = float(self.plain[0])
        elif self.how == "buffer":
            self.seen = self.seen + trace
            factor = float(self.seen)
        logits = self.head(self.table(input_ids) * factor)
        return type("Output", (), {"logits": logits})()


@pytest.mark.parametrize("how", ["attribute", "list", "dict", "tensor", "buffer"])
def test_what_a_forward_leaves_in_the_model_is_gone_for_the_next_record(how: str) -> None:
    torch.manual_seed(0)
    assert_isolated(ExactEngine(Remembers(how), clipping=Flat(0.01)), made_records(lengths=(9, 5, 61)), 0.01)


def test_rotary_tables_that_grow_with_the_longest_record_are_put_back() -> None:
    scaling = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = tiny_model("mixtral", rope_parameters=scaling, max_position_embeddings=16)
    assert_isolated(ExactEngine(model, clipping=Flat(0.01)), made_records(lengths=(20, 61, 20)), 0.01)


def test_operations_that_add_up_in_any_order_are_made_to_repeat_or_refused() -> None:
    class Scatter(Remembers):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            assert torch.are_deterministic_algorithms_enabled()
            return super().forward(input_ids, attention_mask)

    assert not torch.are_deterministic_algorithms_enabled()
    ExactEngine(Scatter("nothing"), clipping=Flat(0.5)).accumulate(token_batch(1, 9))
    assert not torch.are_deterministic_algorithms_enabled()

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        if torch.are_deterministic_algorithms_enabled():
            torch._C._get_deterministic_algorithms()
            raise RuntimeError("histogram_cuda does not have a deterministic implementation")
        return default_loss(model, batch)

    engine = ExactEngine(Remembers("nothing"), loss_fn, Flat(0.5))
    with pytest.raises(PrivacyError, match="other bits each time") as error:
        engine.prepare(token_batch(1, 9))  # at set-up, before a record is drawn
    assert error.value.code == "dp-isolation-repeat"


def test_engines_of_several_threads_compute_repeatably_until_each_is_done_and_leave_torch_as_it_was() -> None:
    """As parties of a federation in one process: the second begins while the first computes, and ends after it."""
    computing, second_in, first_out = threading.Event(), threading.Event(), threading.Event()
    modes: list[bool] = []

    class First(Remembers):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            computing.set()
            assert second_in.wait(60)
            return super().forward(input_ids, attention_mask)

    class Second(Remembers):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            second_in.set()
            assert first_out.wait(60)
            modes.append(torch.are_deterministic_algorithms_enabled())
            return super().forward(input_ids, attention_mask)

    def first() -> None:
        ExactEngine(First("nothing"), clipping=Flat(0.5)).accumulate(token_batch(1, 9))
        first_out.set()

    other = threading.Thread(target=first)
    other.start()
    assert computing.wait(60)
    ExactEngine(Second("nothing"), clipping=Flat(0.5)).accumulate(token_batch(1, 9))
    other.join()
    assert all(modes)
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_callers_gradients_and_numbers_of_threads_come_back() -> None:
    model = tiny_model("mixtral")
    kept = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.grad = kept[name]
    engine = ExactEngine(model, clipping=Flat(0.5))
    first = total(engine, [token_batch(1, 33)])
    torch.set_num_threads(2)
    try:
        assert equal(total(engine, [token_batch(1, 33)]), first)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert all(p.grad is kept[name] for name, p in model.named_parameters())


def test_contributions_are_rounded_toward_zero_alike_with_and_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(70_000, generator=generator) * torch.logspace(-20, 6, 70_000)
    values[65_536:] = 0.0  # a chunk of zeros
    scale = 12345.678
    expected = [math.trunc(x * scale) for x in values.tolist()]
    for worth in (1, 1 << 62):
        monkeypatch.setattr(grid_sums, "_WORTH_COMPILING", worth)
        for gradient in (values, values.view(700, 100).T.contiguous().T, values.double()):
            shape = gradient.shape
            sums = grid_sums.GridSums({"w": shape}, {"w": torch.device("cpu")})
            squared = {"w": grid_sums.squares(gradient)}
            assert squared["w"][1] == 0.0
            assert grid_sums.whole(squared["w"]) == pytest.approx(
                math.fsum(x * x for x in values.tolist()), rel=1e-12
            )
            for _ in range(3):
                sums.add({"w": gradient}, squared, {"w": scale})
            assert sums.take()["w"].flatten().tolist() == [3 * x for x in expected]


def test_norms_of_gradients_at_the_ends_of_float32_are_right() -> None:
    for size in (1e-45, 1e-30, 1e30, 3e38):
        gradient = torch.full((1000,), size)
        reference = math.fsum(float(x) ** 2 for x in gradient.tolist())
        assert grid_sums.whole(grid_sums.squares(gradient)) == pytest.approx(reference, rel=1e-12)
        assert reference > 0


def test_a_policy_cannot_raise_a_contribution() -> None:
    class Generous(Flat):
        def factors(self, norms_GB: Tensor, thresholds_G: Tensor) -> Tensor:
            return torch.ones_like(norms_GB)

    engine = ExactEngine(tiny_model("mixtral"), clipping=Generous(0.01))
    engine.use_grid(lambda name: STEP)
    assert exact_square(total(engine, [token_batch(1, 9)])) <= (0.01 / STEP) ** 2


def test_half_of_the_numbers_that_numpy_has_not_are_added_exactly() -> None:
    gradient = torch.randn(5000, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    sums = grid_sums.GridSums({"w": gradient.shape}, {"w": torch.device("cpu")})
    sums.add({"w": gradient}, {"w": grid_sums.squares(gradient)}, {"w": 1e4})
    assert np.array_equal(sums.take()["w"].numpy(), np.trunc(gradient.double().numpy() * 1e4).astype(np.int64))


def test_noise_on_integers_is_the_noise_on_the_grid_they_count() -> None:
    std = 0.7
    counts = {
        "large": torch.randint(-(2**20), 2**20, (70_000,), generator=torch.Generator().manual_seed(1)),
        "small": torch.arange(-3, 4),
        "also small": torch.arange(5),
    }
    sums = {name: (value.double() * std / GRID_SIGMA).float() for name, value in counts.items()}
    ours = add_noise(counts, std, SeededRandom(1), "r", divisor=3.0)
    theirs = add_noise(sums, std, SeededRandom(1), "r", divisor=3.0)
    for name, value in ours.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, theirs[name])
    with pytest.raises(PrivacyError, match="far above its clip norm"):
        add_noise({"w": torch.tensor([2**51])}, std, SeededRandom(1), "r")


class Text(list[dict[str, Any]]):
    """Records of several lengths, each with a user."""

    def __init__(self, count: int = 24) -> None:
        for i in range(count):
            ids = token_batch(1, 3 + 7 * i % 19, seed=i)["input_ids"][0]
            self.append({"input_ids": ids, "labels": ids, "user": f"u{i % 7}"})


def collate(items: list[dict[str, Any]]) -> Record:
    one = [{n: item[n][None] for n in ("input_ids", "labels")} for item in items]
    return padded([{**record, "attention_mask": torch.ones_like(record["input_ids"])} for record in one])


def session(folder: Path, model: nn.Module, data: Any = None, **options: Any) -> PrivateSession:
    defaults: dict[str, Any] = {
        "dataset": data if data is not None else Text(), "collate_fn": collate, "budget": Budget(6.0, 1e-3),
        "lot_size": 8, "rounds": 4, "physical_batch": 4, "ledger": folder / "ledger",
    }  # fmt: skip
    return dp.make_private(model, torch.optim.SGD(model.parameters(), 0.1), **defaults | options)


@pytest.mark.filterwarnings("ignore::coterie.dp.accounting.budget.PrivacyWarning")
@pytest.mark.parametrize("unit", ["record", "user"])
def test_invariant_2_all_that_a_round_releases_is_a_sum_of_what_each_unit_adds_alone(
    tmp_path: Path, unit: str
) -> None:
    model = tiny_model("mixtral", attention_dropout=0.3)
    users = {"user_column": "user"} if unit == "user" else {}
    made = session(
        tmp_path,
        model,
        seed=3,
        lot_size=4,
        isolation="exact",
        adaptive_quantile=0.5,
        balance=Balance("private_load"),
        **users,
    )
    numbers = [(1, 8, 15), (2, 9), (4, 11, 18)] if unit == "user" else [(1,), (4,), (5,), (20,), (23,)]

    def released(units: list[tuple[int, ...]]) -> Sums:
        records = np.array([number for own in units for number in own], np.int64)
        owners = np.repeat(np.arange(len(units)), [len(own) for own in units]).astype(np.int64)
        return made.lot_sums.compute(Lot(1, records, owners), "1|0")

    whole = released(numbers)
    assert {LOAD, WITHIN} <= whole.keys()
    assert all(value.dtype == torch.int64 for value in whole.values())
    noise = made.lot_sums.noise(whole)
    bounds = {"gradients": made.lot_sums.engine.sensitivity, LOAD: made.lot_sums.balancer.load_bound * (1 + 1e-6)}  # type: ignore[union-attr]
    for unit_records in numbers:
        own = released([unit_records])
        assert equal(
            difference(whole, released([other for other in reversed(numbers) if other != unit_records])), own
        )
        gradient = {name: value for name, value in own.items() if name not in (LOAD, WITHIN)}
        assert exact_square(gradient) <= (bounds["gradients"] / noise.step(min(gradient))) ** 2
        assert exact_square({LOAD: own[LOAD]}) <= (bounds[LOAD] / noise.step(LOAD)) ** 2
        assert exact_square({WITHIN: own[WITHIN]}) <= (0.5 / noise.step(WITHIN)) ** 2
        assert exact_square({WITHIN: own[WITHIN]}) > 0
    assert not equal(whole, made.lot_sums.compute(Lot(2, np.array([1]), np.array([0])), "2|0"))
    made.close()


@pytest.mark.filterwarnings("ignore::coterie.dp.accounting.budget.PrivacyWarning")
def test_dropout_masks_are_each_records_own_and_differ(tmp_path: Path) -> None:
    record = Text()[3]
    made = session(tmp_path, tiny_model("mixtral", attention_dropout=0.5), [record] * 9, seed=3, isolation="exact")
    sums = [made.lot_sums.compute(Lot(1, np.array([i]), np.array([0])), "1|0") for i in (0, 1, 0)]
    assert equal(sums[0], sums[2])
    assert not equal(sums[0], sums[1])
    assert not equal(sums[0], made.lot_sums.compute(Lot(1, np.array([0]), np.array([0])), "1|1"))
    made.close()


@pytest.mark.filterwarnings("ignore::coterie.dp.accounting.budget.PrivacyWarning")
def test_isolation_is_in_ledger_and_statement_and_a_resumed_run_keeps_it(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    made = session(tmp_path, model, isolation="exact", run="one")
    made.step(made.next_lot())
    made.save(tmp_path / "saved")
    assert made.ledger.run("one")["isolation"] == "exact"
    assert made.ledger.run("one")["eta"] == 0.0
    text = str(made.statement())
    assert "isolation exact" in text
    assert "rounding in shared batches" not in text
    made.close()
    again = PrivateSession.resume(
        tmp_path / "saved",
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        Text(),
        collate,
        ledger=tmp_path / "ledger",
    )
    assert isinstance(again.lot_sums.engine, ExactEngine)
    again.step(again.next_lot())
    again.close()
    fast = session(tmp_path, model, run="two")
    assert fast.statement().isolation == "fast"
    assert "2.7 to 3.9 C" in str(fast.statement())
    fast.close()


@pytest.mark.filterwarnings("ignore::coterie.dp.accounting.budget.PrivacyWarning")
def test_half_precision_is_exact_unless_it_is_said_otherwise(tmp_path: Path) -> None:
    half = session(tmp_path, tiny_model("mixtral").to(torch.bfloat16), run="a")
    assert isinstance(half.lot_sums.engine, ExactEngine)
    half.close()
    asked = session(tmp_path, tiny_model("mixtral").to(torch.bfloat16), isolation="fast", run="b")
    assert "0.05 to 0.25 C" in str(asked.statement())
    asked.close()
    with torch.autocast("cpu", torch.bfloat16):
        cast = session(tmp_path, tiny_model("mixtral"), run="c", self_check=False)
    assert cast.statement().isolation == "exact"
    cast.close()


def test_an_engine_that_does_not_do_what_is_asked_is_refused(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    with pytest.raises(PrivacyError, match="isolation exact was asked for") as error:
        session(tmp_path, model, engine=Engine(model), isolation="exact")
    assert error.value.code == "dp-isolation-engine"


def test_a_run_is_not_taken_up_again_with_an_engine_of_the_other_isolation(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    made = session(tmp_path, model, isolation="exact", run="one")
    made.step(made.next_lot())
    made.save(tmp_path / "saved")
    made.close()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(PrivacyError, match="isolation: exact") as error:
        PrivateSession.resume(
            tmp_path / "saved", model, optimizer, Text(), collate, ledger=tmp_path / "ledger", engine=Engine(model)
        )
    assert error.value.code == "dp-isolation-engine"
