"""What ranks do in tests of experts that are spread over them; `rank_processes.run_ranks` starts them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from coterie import dp
from coterie.config import LoraSpec, ModelSpec
from coterie.dp.accounting.lots import Lot
from coterie.dp.checks.between_ranks import check_between_ranks
from coterie.dp.clipping import policy
from coterie.dp.losses import default_loss
from coterie.dp.noise.discrete_gaussian import Slabs
from coterie.dp.ownership import Ownership
from coterie.dp.per_sample import captured_pass, combine_uses, memory_choice
from coterie.dp.per_sample.engine import Engine
from coterie.dp.per_sample.gram import SqNorms
from coterie.dp.per_sample.probe import probe_sizes, synthetic_batch
from coterie.dp.per_sample.shared_batch import SharedBatch
from coterie.dp.session import PrivateSession
from coterie.errors import RankError
from coterie.models import seam
from coterie.models.lora import attach_adapters
from coterie.models.spread.holdings import Holdings
from coterie.models.spread.spread import spread_experts, spread_of
from coterie.models.spread.travel import Trip
from coterie.models.spread.whole_layers import WholeLayers
from coterie.models.zoo.build import build_model
from coterie.models.zoo.tiny import VOCAB, tiny_model
from coterie.ranks.ranks import Ranks
from coterie.training.loop import use_checkpointing
from coterie.training.planning.measured import model_state_bytes
from helpers.rank_tasks import BUDGET, LOT, SLAB, in_bfloat16, use_slabs_of, words

RECORDS = 10
TOKENS = 12
Case = Mapping[str, Any]
"""Options by name; what is not named is as in `WITHOUT`."""
WITHOUT: Case = {
    "family": "olmoe", "clipping": "flat", "method": "book_keeping", "clip_norm": 0.7, "lora": False,
    "checkpointing": False, "records_of": None, "fault": "", "common": False, "broken": None,
    "train": True, "batchings": False, "over": None, "gathered": False,
    "draws_without_numbers": 0, "bad": (), "records": RECORDS, "reference_by": None, "short_of_memory": None,
    "scale": 1.0,
}  # fmt: skip


def texts(records: int = RECORDS, seed: int = 5) -> Tensor:
    """[records, TOKENS] made-up token ids."""
    return torch.randint(3, VOCAB, (records, TOKENS), generator=torch.Generator().manual_seed(seed))


def built(case: Case) -> nn.Module:
    """The same model in every process."""
    model: Any = tiny_model(case["family"])
    if case["checkpointing"]:
        use_checkpointing(model)
    if case["common"]:  # rows with a large common part, of which the gradients all but cancel
        with torch.no_grad():
            model.get_input_embeddings().weight.add_(3.0)
    if case["lora"]:
        model = with_adapters(model, ROUTED if case["lora"] == "router" else ATTENTION)
    seam.select(model)
    return model.train(case["train"])


ATTENTION, ROUTED = ("q_proj",), ("q_proj", "gate")


def with_adapters(model: nn.Module, modules: tuple[str, ...] = ATTENTION) -> nn.Module:
    """Adapters of the experts' matrices and of some of the trunk; their second factors are not zero."""
    names = [name for name in seam.expert_layers(model)[0].parameters() if not name.endswith("_bias")]
    adapted = attach_adapters(model, LoraSpec(rank=2, alpha=4.0, experts=tuple(names), modules=modules), seed=1)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(adapted.named_parameters()):
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(number))
    return adapted


def batch_of(rows: Tensor) -> dict[str, Tensor]:
    return {"input_ids": rows, "labels": rows}


def engine_of(model: nn.Module, case: Case) -> Engine:
    """One that takes its rules as they are, so that a test sees nothing but them."""

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        losses = default_loss(model, batch) * case["scale"]
        for row in case["bad"] if case["broken"] is None else [texts()[case["broken"], :3]]:
            bad = (batch["input_ids"][:, : len(row)] == row).all(1)
            losses = losses * torch.where(bad, torch.nan, 1.0)  # the others' gradients stay numbers
        return losses

    made = Engine(model, loss, clipping=policy(case["clipping"], case["clip_norm"]), method=case["method"])
    made.compared = True
    return made


def clipped(engine: Engine, rows: Tensor, size: int, batches: int) -> tuple[dict[str, Tensor], Tensor]:
    """Sums and norms of some records in so many physical batches; those without a record are filled up."""
    norms = []
    for number in range(batches):
        own = rows[number * size : (number + 1) * size]
        filled = own if len(own) else torch.full((1, TOKENS), 3)
        norms.append(engine.accumulate(batch_of(filled), counted=len(own)).norms[: len(own)])
    return engine.take(), torch.cat(norms)


def difference(found: Tensor, expected: Tensor) -> float:
    """Relative; infinite where one of them is no number, since `max` leaves out what cannot be compared."""
    off = (found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
    return float(off.nan_to_num(torch.inf))


# -- norms, sums and outputs -----------------------------------------------------------------------------------------


def norms_and_sums(ranks: Ranks, cases: Sequence[Case]) -> list[dict[str, float]]:
    """How far norms and sums are from one process's with the whole model: the largest relative differences."""
    found = []
    for case in cases:
        try:
            found.append(_norms_and_sums(ranks, {**WITHOUT, **case}))
        except Exception as error:
            error.add_note(f"In {case}.")
            raise
    return found


def _norms_and_sums(ranks: Ranks, case: Case) -> dict[str, float]:
    rows, records = texts(case["records"]), case["records"]
    shares = case["records_of"] or [list(range(rank, records, ranks.world)) for rank in range(ranks.world)]
    mine = torch.tensor(shares[ranks.rank], dtype=torch.int64)
    whole, part = built(case), built(case)
    spread_experts(part, ranks, case["over"], gathered=case["gathered"])
    spread = spread_of(part)
    assert spread is not None
    expected, expected_norms = _reference(ranks, whole, case, rows)
    engine = engine_of(part, case)
    short = patch.object(memory_choice, "_free_bytes", lambda devices: 0)
    with FAULTS[case["fault"]](ranks), short if case["short_of_memory"] == ranks.rank else nullcontext():
        sums, norms = clipped(engine, rows[mine], 2, max(-(-len(share) // 2) for share in shares))
    worst = 0.0
    for name, value in expected.items():
        cut = spread.cuts.get(name)
        if cut is None:
            ranks.add_up([sums[name]], 0)
            ranks.hand_out([sums[name]], 0)
        else:
            value = cut.part(value, spread.held(cut))
            spread.replicas.add_up([sums[name]], 0)
            spread.replicas.hand_out([sums[name]], 0)
        worst = max(worst, difference(sums[name], value))
    wanted = expected_norms[mine]
    usual = torch.isfinite(wanted)
    off = (norms / wanted - 1).abs()[usual]
    found = {"norms": float(off.max()) if len(off) else 0.0, "sums": worst}
    if case["batchings"] and not all(value <= 1e-5 for value in found.values()):
        found |= {"norms by batch": 0.0, "sums by batch": 0.0}
        for batch in (2, 1):
            other, other_norms = clipped(engine_of(whole, case), rows, batch, records // batch)
            by_batch = (other_norms / expected_norms - 1).abs()[torch.isfinite(expected_norms)]
            found["norms by batch"] = max(found["norms by batch"], float(by_batch.max()))
            sums_by_batch = [difference(other[name], value) for name, value in expected.items()]
            found["sums by batch"] = max(found["sums by batch"], *sums_by_batch)
    return found


def _reference(ranks: Ranks, whole: nn.Module, case: Case, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Sums and norms of one process with the whole model: every rank computes them, or one does for all."""
    by, records = case["reference_by"], len(rows)
    if by in (None, ranks.rank):
        sums, norms = clipped(engine_of(whole, case), rows, records // 2, 2)
    else:
        sums = {name: torch.empty_like(p) for name, p in whole.named_parameters() if p.requires_grad}
        norms = torch.empty(records, dtype=torch.float64)
    if by is not None:
        sums = dict(sorted(sums.items()))  # one order at all ranks
        ranks.hand_out([*sums.values(), norms], by)
    return sums, norms


def joint_norms(ranks: Ranks, cases: Sequence[Case]) -> list[list[float]]:
    """The norm of what all ranks together add for each of some records, in clip norms, and the bound of it."""
    return [_joint_norms(ranks, {**WITHOUT, "clip_norm": 1e-3, **case}) for case in cases]


def _joint_norms(ranks: Ranks, case: Case) -> list[float]:
    model = built(case)
    spread_experts(model, ranks, gathered=case["gathered"])
    spread = spread_of(model)
    assert spread is not None
    engine = engine_of(model, case)
    found = [engine.eta]
    for row in texts(3):
        with FAULTS[case["fault"]](ranks):
            sums, _ = clipped(engine, row[None] if ranks.rank == 0 else row[:0].view(0, TOKENS), 1, 1)
        square = torch.zeros(1, dtype=torch.float64)
        for name, value in sums.items():
            if name in spread.cuts or ranks.rank == 0:  # the others' trunks have added nothing
                square += value.double().square().sum()
        found.append(float(torch.stack(ranks.gather(square)).sum().sqrt()) / case["clip_norm"])
    return found


def taken_again(ranks: Ranks, cases: Sequence[tuple[Sequence[float], Sequence[float]]]) -> list[float]:
    """Slack of a record's whole squared norm, over it, once two ranks have refined their parts.

    Args:
        ranks: two.
        cases: value and slack of each rank's part: at first, and what its careful value is.
    """
    found = []
    for first, careful in cases:
        model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False)})
        engine = engine_of(model, {**WITHOUT, "clip_norm": 1.0})
        shared = SharedBatch(ranks, (1, 0), (1, 0), frozenset({"a.weight"}), None)
        value, slack = (torch.tensor([first[2 * ranks.rank + place]], dtype=torch.float64) for place in (0, 1))
        again = SqNorms(torch.tensor([careful[ranks.rank]], dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
        squares = {"a.weight": SqNorms(value, slack)}
        with patch.object(combine_uses, "sq_norms", lambda *_, again=again, **__: again):
            engine._book_keeping.refine(squares, {"a.weight": ("a", [])}, shared)  # type: ignore[dict-item] # noqa: SLF001
        parts = shared.exchanged(shared.own_squares(engine.gradient_groups, squares))
        found.append(float(sum(part.slack for part in parts) / sum(part.value for part in parts)))
    return found


def disagreeing(ranks: Ranks) -> list[str]:
    """What ranks hear in a batch that one of them would clip in another way, and in one of another lot."""
    model = small()
    spread_experts(model, ranks)
    row, heard = texts(1)[:, :6] % 40, []
    for methods, lots in ((("ghost", "book_keeping"), ("3|0", "3|0")), (("ghost", "ghost"), ("3|0", "4|0"))):
        engine = engine_of(model, {**WITHOUT, "method": methods[ranks.rank]})
        engine.begin(lots[ranks.rank])
        try:
            engine.accumulate(batch_of(row))
        except RankError as error:
            heard.append(f"{error.code}: {error.message} {error.where}")
    return heard


def only_remote(ranks: Ranks) -> tuple[float, float, float]:
    """The joint norm that experts of rank 1 alone add for a record of rank 0, in clip norms, and two of its norms:
    as rank 0 says, and as one process does."""
    norms = []
    for spread in (False, True):
        model: Any = small(experts_per_token=1)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("experts" in name)
        gate = next(m for n, m in model.named_modules() if n.endswith("mlp.gate"))
        with torch.no_grad():
            gate.weight.zero_()
            gate.weight[-1].fill_(5.0)  # whatever the token is, one of the last two wins: both are at the last rank
            gate.weight[-2].fill_(-5.0)
        if spread:
            spread_experts(model, ranks)
        engine = engine_of(model, {**WITHOUT, "clip_norm": 1e-4})
        row = texts(1)[:, :6] % 40
        sums, norm = clipped(engine, row if ranks.rank == 0 or not spread else row[:0], 1, 1)
        norms.append(norm)
    square = torch.stack([value.double().square().sum() for value in sums.values()]).sum()
    assert ranks.rank == ranks.world - 1 or float(square) == 0.0
    joint = float(torch.stack(ranks.gather(square.view(1))).sum().sqrt()) / 1e-4
    return joint, float(norms[1][0]) if len(norms[1]) else 0.0, float(norms[0][0])


def outputs_and_gradients(ranks: Ranks, family: str) -> dict[str, Any]:
    """Plain use of a spread model beside the whole one: logits, gradients of all ranks' records, generated tokens."""
    case = {**WITHOUT, "family": family}
    whole: Any = built(case)
    part: Any = built(case)
    spread_experts(part, ranks)
    spread = spread_of(part)
    assert spread is not None
    rows = texts(2 * ranks.world)
    default_loss(whole, batch_of(rows)).sum().backward()
    mine = rows[2 * ranks.rank : 2 * ranks.rank + 2]
    default_loss(part, batch_of(mine)).sum().backward()
    worst, expected = 0.0, dict(whole.named_parameters())
    for name, parameter in part.named_parameters():
        value, cut = expected[name].grad, spread.cuts.get(name)
        own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if value is None:
            continue
        if cut is None:
            ranks.add_up([own], 0)
            ranks.hand_out([own], 0)
        else:
            value = cut.part(value, spread.held(cut))
        if bool(value.any()):
            worst = max(worst, difference(own, value))
    whole.eval(), part.eval()
    with torch.no_grad():
        logits = difference(part(mine).logits, whole(mine).logits)
        how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        same = torch.equal(part.generate(mine[:1], **how), whole.generate(mine[:1], **how))
    return {"gradients": worst, "logits": logits, "same tokens": same}


# -- private sessions ------------------------------------------------------------------------------------------------


def small(experts_per_token: int = 2, hidden: int = 16, experts: int = 6) -> nn.Module:
    """A model of one layer, small enough to be trained for some rounds."""
    model: Any = build_model(
        ModelSpec(
            family="olmoe",
            config={
                "hidden_size": hidden, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
                "num_key_value_heads": 2, "num_experts": experts, "num_experts_per_tok": experts_per_token,
                "vocab_size": 40, "max_position_embeddings": 32, "pad_token_id": None, "eos_token_id": 1,
            },
        ),
        seed=3,
    )  # fmt: skip
    seam.select(model)
    return model


def collated(items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    rows = torch.stack([item["input_ids"] for item in items])
    return batch_of(rows) | {"scale": torch.stack([item["scale"] for item in items])}


def scaled_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return default_loss(model, {name: batch[name] for name in ("input_ids", "labels")}) * batch["scale"]


def no_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return scaled_loss(model, batch) * 0.0


def prepared(
    ranks: Ranks,
    spread: bool,
    lora: bool = False,
    frozen_trunk: bool = False,
    over: int | None = None,
    gathered: bool = False,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = with_adapters(small()) if lora else small()
    if frozen_trunk:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("experts" in name)
    if spread:
        spread_experts(model, ranks, over, gathered=gathered)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)


def opened(
    ranks: Ranks, folder: Path, *, spread: bool = True, lora: bool = False, frozen_trunk: bool = False, **options: Any
) -> PrivateSession:
    """A session on `words`; the experts of its model are spread over the ranks, or over groups of them."""
    how = options.pop("over", None), options.pop("gathered", False)
    model, optimizer = prepared(ranks, spread, lora, frozen_trunk, *how)
    records = words(broken=options.pop("broken", None))
    loss = options.pop("loss", scaled_loss)
    chosen: dict[str, Any] = {
        "budget": dp.Budget(*BUDGET), "lot_size": LOT, "rounds": 3, "physical_batch": 3, "clip_norm": 0.5,
        "seed": 7, "self_check": False, "run": "words", "ledger": folder / "ledger", "method": "book_keeping",
    }  # fmt: skip
    return dp.make_private(model, optimizer, records, collated, loss, ranks=ranks, **chosen | options)


def whole_values(ranks: Ranks, model: nn.Module, tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """By name, with the parts of all ranks put together, at every rank."""
    spread = spread_of(model)
    found = {}
    for name, own in tensors.items():
        assert own is not None
        cut = None if spread is None else spread.cuts.get(name)
        if cut is None:
            found[name] = own.detach().clone()
            continue
        whole = torch.full(cut.shape(), torch.nan)
        assert spread is not None
        group = spread.ranks
        for rank in range(group.world):
            held = cut.held(rank, group.world)
            part = own.detach().clone().contiguous() if rank == group.rank else torch.empty(cut.shape(held))
            group.hand_out([part], rank)
            cut.put(part, held, whole, range(cut.experts))
        found[name] = whole
    return found


def flat(ranks: Ranks, model: nn.Module) -> list[float]:
    """All weights of a model, wherever they lie."""
    whole = whole_values(ranks, model, dict(model.named_parameters()))
    return torch.cat([value.reshape(-1) for value in whole.values()]).tolist()


def train(ranks: Ranks, folder: Path, options: Case) -> dict[str, Any]:
    """A whole run; weights after its last two rounds, figures of its lots, and how many values this rank holds."""
    chosen = dict(options)
    weights, figures = [], []
    with FAULTS[chosen.pop("fault", "")](ranks), opened(ranks, folder, **chosen) as session:
        for lot in session:
            session.step(lot)
            weights.append(flat(ranks, session.model))
            assert session.last is not None
            figures.append((session.last.drawn, session.last.loss, session.last.clipped, session.last.masked))
        counted = len(session.ledger.releases(session.run)) if ranks.rank == 0 else None
        held = sum(p.numel() for p in session.model.parameters())
    # The last two: more would not fit into the pipe that ranks answer by, and they end together.
    return {"weights": weights[-2:], "figures": figures, "counted": counted, "held": held}


def held_bytes(ranks: Ranks, folder: Path, options: Case) -> int:
    """What this rank has of parameters: weights, gradients and the optimizer's state; counters of steps aside."""
    with opened(ranks, folder, **options) as session:
        session.step(next(iter(session)))
        state = [tensor for own in session.optimizer.state.values() for tensor in own.values()]
        kept = sum(tensor.nbytes for tensor in state if tensor.dim() > 0)
        return kept + model_state_bytes(session.model) - sum(buffer.nbytes for buffer in session.model.buffers())


def noise_alone(ranks: Ranks, folder: Path, options: Case) -> list[float]:
    """The gradients that one round leaves where all records' are zero."""
    with opened(ranks, folder, loss=no_loss, **options) as session:
        session.put_gradients()
        gradients = {name: p.grad for name, p in session.model.named_parameters() if p.requires_grad}
        whole = whole_values(ranks, session.model, gradients)
    return torch.cat([whole[name].reshape(-1) for name in sorted(whole)]).tolist()


def noise_needed(ranks: Ranks, folder: Path) -> tuple[float, float]:
    """Sigma, and the sensitivity of the sums."""
    with opened(ranks, folder) as session:
        return session.noise_multiplier, session.lot_sums.engine.sensitivity


def resumable(
    ranks: Ranks,
    folder: Path,
    spread: bool = True,
    slab: int = SLAB,
    frozen_trunk: bool = False,
    over: int | None = None,
    gathered: bool = False,
) -> dict[str, Any]:
    """A run that is begun or gone on with, with a checkpoint after one round; what the ledger counts at the end."""
    use_slabs_of(slab)
    saved = folder / "saved"
    if (saved / "manifest.json").exists():
        model, optimizer = prepared(ranks, spread, frozen_trunk=frozen_trunk, over=over, gathered=gathered)
        session = PrivateSession.resume(
            saved, model, optimizer, words(), collated, scaled_loss, ledger=folder / "ledger", ranks=ranks
        )
    else:
        session = opened(ranks, folder, spread=spread, frozen_trunk=frozen_trunk, over=over, gathered=gathered)
    with session:
        for lot in session:
            session.step(lot)
            if session.round == 1:
                session.save(saved)
        counted = [(r.round, r.draw) for r in session.ledger.releases(session.run)] if ranks.rank == 0 else None
        return {"weights": flat(ranks, session.model), "counted": counted}


def deadly(
    ranks: Ranks,
    folder: Path,
    step: str,
    slab: int = SLAB,
    frozen_trunk: bool = False,
    over: int | None = None,
    gathered: bool = False,
) -> dict[str, Any]:
    """`resumable`, of which the last rank is killed when it has been told what a step came to."""
    together = ranks.together

    def deadly_together(name: str, make: Callable[[], Any], *, patient: bool = False) -> list[Any]:
        told = together(name, make, patient=patient)
        if name == step and ranks.rank == ranks.world - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return told

    ranks.together = deadly_together  # type: ignore[method-assign]
    return resumable(ranks, folder, slab=slab, frozen_trunk=frozen_trunk, over=over, gathered=gathered)


SMALL: dict[str, Callable[[], nn.Module]] = {
    "small": small,
    "uneven": lambda: small(hidden=20, experts=13),  # two ranks hold 6 and 7 of them, one a prime that probes avoid
}


def compared_with_alone(ranks: Ranks, cases: Sequence[Case]) -> list[str]:
    """What a comparison before training says of what these ranks compute together: a code, or nothing."""
    found = []
    for given in cases:
        case = {**WITHOUT, "spread": True, **given}
        model = SMALL[case["family"]]().train() if case["family"] in SMALL else built(case)
        if case["spread"]:
            spread_experts(model, ranks, case["over"], gathered=case["gathered"])
        like, tokens = batch_of(texts(1) % 40), probe_sizes(model)[0][1]
        case["bad"] = [
            row
            for draw in range(case["draws_without_numbers"])
            for row in synthetic_batch(model, like, ranks.world, tokens, 101 + draw)["input_ids"][:, :3]
        ]
        engine, trained = engine_of(model, case), {n: p for n, p in model.named_parameters() if p.requires_grad}
        owners = Ownership(ranks, Holdings(model), trained)
        try:
            with FAULTS[case["fault"]](ranks):
                check_between_ranks(engine, ranks, owners, like)
            found.append("")
        except RankError as error:
            found.append(error.code)
        assert not any(bool(total.any()) for total in engine.take().values())
    return found


def refused(ranks: Ranks, folder: Path, fault: str) -> None:
    """A run that is checked as by default, while something between the ranks is broken."""
    with FAULTS[fault](ranks), opened(ranks, folder, self_check=True):
        pass


def failing(ranks: Ranks, folder: Path, gathered: bool = False, again: bool = False) -> None:
    """A run in which rank 1 fails in the middle of a batch, while rank 0 waits for its rows; perhaps its script goes
    on as if nothing had been."""

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        losses = scaled_loss(model, batch)
        if armed and ranks.rank == 1:
            raise OSError("the memory of rank 1")
        return losses

    armed = False
    with opened(ranks, folder, loss=loss, gathered=gathered) as session:
        lot = session.next_lot()
        session.lot_sums.engine.prepare(collated(words()[:1]))  # type: ignore[attr-defined]
        armed = True
        try:
            session.step(lot)
        except Exception:
            if not again:
                raise
            armed = False
            session.step(session.next_lot())


def uneven(ranks: Ranks) -> None:
    """Rank 1 runs a spread model once less than rank 0, and goes on to another step."""
    model: Any = small().eval()
    spread_experts(model, ranks)
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        model(ids)
        if ranks.rank == 0:
            model(ids)
    ranks.tell("a step", lambda: 1)


def held(ranks: Ranks, folder: Path, options: Case) -> dict[str, int]:
    """Values that this rank has of weights, sums and the optimizer's state in a run."""
    with opened(ranks, folder, **options) as session:
        for lot in session:
            session.step(lot)
        sums = session.lot_sums.engine.take()
        state = session.optimizer.state.values()
        return {
            "weights": sum(p.numel() for p in session.model.parameters()),
            "sums": sum(own.numel() for own in sums.values()),
            "state": sum(v.numel() for own in state for v in own.values() if v.numel() > 1),
        }


def whole_at_once(ranks: Ranks, case: Case) -> tuple[int, int, int]:
    """Most values of whole layers, and of their sums, that a rank has at once; values of a layer, and of a matrix."""
    case = {**WITHOUT, **case}
    alive: list[ReferenceType[Tensor]] = []
    most = [0]
    summed, whole = WholeLayers.summed, WholeLayers._whole  # noqa: SLF001

    def counted(tensor: Tensor) -> Tensor:
        alive.append(ref(tensor))
        most.append(sum(each.numel() for own in alive if (each := own()) is not None))
        return tensor

    def sums_counted(self: WholeLayers, name: str, value: Tensor) -> Tensor:
        return summed(self, name, counted(value))

    def gathering_counted(self: WholeLayers, name: str, own: Tensor) -> Tensor:
        return counted(whole(self, name, own))

    with (
        patch.object(WholeLayers, "summed", sums_counted),
        patch.object(WholeLayers, "_whole", gathering_counted),
    ):
        model = built(case)
        sizes = [p.numel() for p in seam.expert_layers(model)[0].parameters().values()]
        spread_experts(model, ranks, gathered=True)
        clipped(engine_of(model, case), texts(4), 2, 2)
        return max(most), sum(sizes), max(sizes)


def another_layer_than_the_others(ranks: Ranks) -> None:
    """Rank 1 gathers a layer that nobody else comes for."""
    model = tiny_model("olmoe")
    layers = WholeLayers(model, spread_experts(model, ranks, gathered=True))
    with layers.layer(ranks.rank):
        pass


# -- faults ----------------------------------------------------------------------------------------------------------


def _rank_by_rank(ranks: Ranks) -> AbstractContextManager[Any]:
    return patch.object(SharedBatch, "exchanged", lambda self, own: [own])


def _half_of_the_ranks(ranks: Ranks) -> AbstractContextManager[Any]:
    exchanged = SharedBatch.exchanged

    def by_half(self: SharedBatch, own: SqNorms) -> list[SqNorms]:
        parts, half = exchanged(self, own), ranks.world // 2
        near = ranks.rank // half
        return [p if rank // half == near else SqNorms.zeros_like(p) for rank, p in enumerate(parts)]

    return patch.object(SharedBatch, "exchanged", by_half)


def _dropped_tail(ranks: Ranks) -> AbstractContextManager[Any]:
    there = Trip.there

    def shorter(self: Trip, rows_T: Tensor) -> Tensor:
        arrived = there(self, rows_T).clone()
        arrived[len(arrived) // 2 :] = 0.0  # the last row alone may be of a last token, which predicts nothing
        return arrived

    return patch.object(Trip, "there", shorter)


def _lost_router_gradient(ranks: Ranks) -> AbstractContextManager[Any]:
    back = Trip.back

    def forgetful(self: Trip, rows_A: Tensor) -> Tensor:
        weights = rows_A.shape == self.expert_AK.shape
        return back(self, torch.zeros_like(rows_A) if weights else rows_A)

    return patch.object(Trip, "back", forgetful)


def _lost_adapters(ranks: Ranks) -> AbstractContextManager[Any]:
    return patch.object(captured_pass, "expert_adapters", lambda model: {})


def _other_records(ranks: Ranks) -> AbstractContextManager[Any]:
    """Rows that do not say from which rank their record is."""
    begin = Trip.begin.__func__  # type: ignore[attr-defined]

    def strange(cls: type[Trip], ranks: Ranks, bounds: Any, ids_NK: Tensor, record_N: Tensor) -> Trip:
        return begin(cls, ranks, bounds, ids_NK, record_N - record_N.min())

    return patch.object(Trip, "begin", classmethod(strange))


def _noise_everywhere(ranks: Ranks) -> AbstractContextManager[Any]:
    plain = Slabs.add_noise

    def by_all(self: Slabs, names: Iterable[str], *arguments: Any) -> None:
        for _ in range(ranks.world):
            plain(self, names, *arguments[:2], 1.0)
        for target in self.noised.values():
            target.div_(arguments[2])

    return patch.object(Slabs, "add_noise", by_all)


def _wrong_group(ranks: Ranks) -> AbstractContextManager[Any]:
    """Norms are exchanged with the rank that has the same experts in place of that which has the others."""
    partners = [rank for rank in range(ranks.world) if rank % 2 == ranks.rank % 2]

    def beside(self: SharedBatch, own: SqNorms) -> list[SqNorms]:
        found = ranks.gather(torch.stack([own.value, own.slack]))
        return [SqNorms(*found[rank]) for rank in partners]

    return patch.object(SharedBatch, "exchanged", beside)


def _replica_twice(ranks: Ranks) -> AbstractContextManager[Any]:
    kind = type(ranks)
    add_up = kind.add_up

    def again(self: Ranks, pieces: Sequence[Tensor], owner: int) -> None:
        add_up(self, pieces, owner)
        if self is not ranks:
            add_up(self, pieces, owner)

    return patch.object(kind, "add_up", again)


def _averaged(ranks: Ranks) -> AbstractContextManager[Any]:
    add_up = ranks.add_up

    def divided(pieces: Sequence[Tensor], owner: int) -> None:
        add_up(pieces, owner)
        for piece in pieces:
            piece.div_(ranks.world)

    return patch.object(ranks, "add_up", divided)


def _reduced_in_bfloat16(ranks: Ranks) -> AbstractContextManager[Any]:
    return patch.object(ranks, "add_up", in_bfloat16(ranks))


def _lot_twice(ranks: Ranks) -> AbstractContextManager[Any]:
    """Every group of two has the whole lot."""
    share = Lot.share
    return patch.object(Lot, "share", lambda self, rank, world: share(self, rank % 2, 2))


def _other_layer(ranks: Ranks) -> AbstractContextManager[Any]:
    """All ranks gather another layer than the one that computes."""
    layer = WholeLayers.layer
    return patch.object(WholeLayers, "layer", lambda self, index: layer(self, (index + 1) % len(self._layers)))


def _stale_weights(ranks: Ranks) -> AbstractContextManager[Any]:
    """A layer that was gathered once is never gathered again."""
    whole, kept = WholeLayers._whole, dict[str, Tensor]()  # noqa: SLF001

    def once(self: WholeLayers, name: str, own: Tensor) -> Tensor:
        if name not in kept:
            kept[name] = whole(self, name, own)
        return kept[name]

    return patch.object(WholeLayers, "_whole", once)


def _tail_of_a_layer(ranks: Ranks) -> AbstractContextManager[Any]:
    """The last expert of a layer does not arrive."""
    whole = WholeLayers._whole  # noqa: SLF001

    def shorter(self: WholeLayers, name: str, own: Tensor) -> Tensor:
        found = whole(self, name, own)
        found[-1:] = 0.0
        return found

    return patch.object(WholeLayers, "_whole", shorter)


def _sums_at_home(ranks: Ranks) -> AbstractContextManager[Any]:
    """Each rank keeps what it computed for its own experts, and nobody hears of the rest."""

    def kept(self: WholeLayers, name: str, whole: Tensor) -> Tensor:
        cut, own = self._spread.cuts[name], self._ranks
        return cut.part(whole, cut.held(own.rank, own.world))

    return patch.object(WholeLayers, "summed", kept)


FAULTS: dict[str, Callable[[Ranks], AbstractContextManager[Any]]] = {
    "": lambda ranks: nullcontext(),
    "clipped rank by rank": _rank_by_rank,
    "exchange over half of the ranks": _half_of_the_ranks,
    "dropped tail": _dropped_tail,
    "lost router gradient": _lost_router_gradient,
    "lost adapters": _lost_adapters,
    "exchange over the wrong group": _wrong_group,
    "a replica's sums twice": _replica_twice,
    "the lot once for each group": _lot_twice,
    "sums averaged": _averaged,
    "bfloat16 reduction": _reduced_in_bfloat16,
    "records of one rank taken for another's": _other_records,
    "noise at every rank": _noise_everywhere,
    "another layer": _other_layer,
    "weights of an earlier round": _stale_weights,
    "the tail of a layer": _tail_of_a_layer,
    "sums that stay at home": _sums_at_home,
}
