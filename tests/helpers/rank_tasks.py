"""What ranks do in tests; `rank_processes.run_ranks` starts them."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coterie import dp
from coterie.dp.accounting import spool
from coterie.dp.accounting.budget import PrivacyWarning
from coterie.dp.accounting.lots import Lot, draw_lot
from coterie.dp.accounting.releases import Pending
from coterie.dp.noise import discrete_gaussian
from coterie.dp.noise.discrete_gaussian import Slabs
from coterie.dp.noise.randomness import SystemRandom
from coterie.dp.ownership import Ownership
from coterie.dp.per_sample.engine import Engine
from coterie.dp.session import PrivateSession
from coterie.dp.shared_releases import SharedReleases
from coterie.errors import CoterieError, RankError, RoundError
from coterie.models import seam
from coterie.models.spread.holdings import Holdings
from coterie.models.zoo.tiny import VOCAB, tiny_model
from coterie.ranks import processes
from coterie.ranks.ranks import Ranks
from helpers.releases_world import PINS, PLAN, UNITS, ReleasesWorld
from helpers.waiting import until

SLAB = 512
"""Small enough for a tiny model to have many slabs, so that ranks share its noise."""
PRODUCT_SLAB = discrete_gaussian._SLAB  # noqa: SLF001 - what it is outside of tests
"""All values of a tiny model lie in one slab, of one rank."""
LOT = 10
BUDGET = 8.0, 1e-3


def quiet() -> None:
    """One thread, and no warnings about budgets of toys."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", PrivacyWarning)
    use_slabs_of(SLAB)


def use_slabs_of(values: int) -> None:
    setattr(discrete_gaussian, "_SLAB", values)  # noqa: B010 - fixed in the product


class Word(nn.Module):
    """An embedding and a head: enough to be trained, small enough to be started often."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(40, 16)
        self.head = nn.Linear(16, 40)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embed(input_ids))


def word_loss(model: nn.Module, batch: Any) -> Tensor:
    logits = model(batch["input_ids"])[:, :-1]
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten(), reduction="none")
    return losses.view(logits.shape[:2]).mean(1) * batch["scale"]


def no_loss(model: nn.Module, batch: Any) -> Tensor:
    """Gradients of zero: what is released is the noise."""
    return word_loss(model, batch) * 0.0


def words(count: int = 24, broken: int | None = None) -> list[dict[str, Tensor]]:
    """Records; one of them may give a loss that is not finite."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 40, (count, 6), generator=generator)
    made = [{"input_ids": own, "scale": torch.tensor(1.0)} for own in ids]
    if broken is not None:
        made[broken]["scale"] = torch.tensor(float("nan"))
    return made


def stacked(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def opened(
    ranks: Ranks, folder: Path, loss: Callable[..., Tensor] = word_loss, records: Any = None, **options: Any
) -> PrivateSession:
    """A session on words; the ranks are told the folder of the ledger."""
    model = Word()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    chosen: dict[str, Any] = {
        "budget": dp.Budget(*BUDGET), "lot_size": LOT, "rounds": 4, "physical_batch": 3, "clip_norm": 0.5,
        "seed": 7, "self_check": False, "run": "words", "ledger": folder / "ledger",
    }  # fmt: skip
    return dp.make_private(
        model, optimizer, words() if records is None else records, stacked, loss, ranks=ranks, **chosen | options
    )


def flat(model: nn.Module) -> list[float]:
    """All weights of a model."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).tolist()


# -- tasks -----------------------------------------------------------------------------------------------------------


def train(
    ranks: Ranks,
    folder: Path,
    loss: Callable[..., Tensor] = word_loss,
    broken: int | None = None,
    fault: str = "",
    **options: Any,
) -> dict[str, Any]:
    """A whole run; weights after every round, and the figures of its lots."""
    FAULTS.get(fault, lambda ranks: None)(ranks)
    weights, figures = [], []
    with opened(ranks, folder, loss, words(broken=broken), **options) as session:
        for lot in session:
            session.step(lot)
            weights.append(flat(session.model))
            assert session.last is not None
            figures.append((session.last.drawn, session.last.loss, session.last.clipped, session.last.masked))
        counted = len(session.ledger.releases(session.run)) if ranks.rank == 0 else None
        kept = sum(v.numel() for own in session.optimizer.state.values() for v in own.values() if v.numel() > 1)
    return {"weights": weights, "figures": figures, "counted": counted, "kept": kept}


def train_with(ranks: Ranks, folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """`train` with options by name."""
    return train(ranks, folder, **options)


def noise_needed(ranks: Ranks, folder: Path) -> tuple[float, float]:
    """Sigma, and the sensitivity of one process's sums."""
    with opened(ranks, folder, no_loss) as session:
        return session.noise_multiplier, session.lot_sums.engine.sensitivity


def noise_alone(ranks: Ranks, folder: Path, seed: int | None = 7) -> list[float]:
    """The gradients that one round leaves where all records' are zero."""
    with opened(ranks, folder, no_loss, seed=seed) as session:
        session.put_gradients()
        return torch.cat([p.grad.reshape(-1) for p in session.model.parameters() if p.grad is not None]).tolist()


def norms_and_sums(ranks: Ranks, family: str, clipping: str) -> dict[str, float]:
    """How far norms and sums of a lot over ranks are from those of one process: the largest relative differences."""
    from coterie.dp.clipping import policy

    lot = Lot(1, torch.arange(10).numpy(), torch.arange(10).numpy())
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, VOCAB, (10, 12), generator=generator)
    model = tiny_model(family)
    seam.select(model)
    model.train()
    engine = Engine(model, clipping=policy(clipping, 0.7), method="book_keeping")
    engine.compared = True

    def computed(rows: Tensor, size: int) -> tuple[dict[str, Tensor], Tensor]:
        norms = [
            engine.accumulate({"input_ids": rows[at : at + size], "labels": rows[at : at + size]}).norms
            for at in range(0, len(rows), size)
        ]
        return engine.take(), torch.cat(norms)

    mine = lot.share(ranks.rank, ranks.world)
    alone, alone_norms = computed(ids, 5)
    sums, norms = computed(ids[torch.from_numpy(mine.records)], 2)
    slabs, owners = Slabs(sums, 1.0, in_place=True), Ownership(ranks, Holdings(model), sums)
    for sharing, owner, names in owners.by_owner(sums):
        sharing.add_up(slabs.sums(names), owner)
    slabs.keep_noised(owners.own(sums))
    owners.hand_out(slabs.noised)
    worst = max(
        float((slabs.noised[name].double() - value.double()).norm() / value.double().norm().clamp_min(1e-30))
        for name, value in alone.items()
    )
    expected = alone_norms[torch.from_numpy(mine.records)]
    return {"norms": float((norms / expected - 1).abs().max()), "sums": worst}


def deadly(ranks: Ranks, folder: Path, rank: int, step: str, when: str) -> dict[str, Any]:
    """A run with a checkpoint after two rounds, of which one rank is killed at a step."""
    if ranks.rank == rank:
        kill_at(ranks, step, when)
    return resumable(ranks, folder)


def resumable(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """The same run, begun or gone on with; what the ledger counts at the end."""
    saved = folder / "saved"
    if (saved / "manifest.json").exists():
        model = Word()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        session = PrivateSession.resume(
            saved, model, optimizer, words(), stacked, word_loss, ledger=folder / "ledger", ranks=ranks
        )
    else:
        session = opened(ranks, folder, run=f"words-{len(list((folder / 'ledger').glob('*/spool/*')))}")
    with session:
        if session.round == 0:
            session.save(saved)
        for lot in session:
            session.step(lot)
            if session.round == 2:
                session.save(saved)
        counted = [(r.round, r.draw) for r in session.ledger.releases(session.run)] if ranks.rank == 0 else None
        return {"weights": flat(session.model), "counted": counted}


def differing(ranks: Ranks, folder: Path, what: Mapping[str, Any]) -> None:
    """A run whose second rank has another setting, or other records."""
    records, changed = words(), dict[str, Any]()
    if ranks.rank == 1:
        changed = dict(what)
        records = [records[index] for index in changed.pop("order", range(24))]
    with opened(ranks, folder, records=records, **changed) as session:
        for lot in session:
            session.step(lot)


def failing(ranks: Ranks, folder: Path) -> None:
    """A run in which one record cannot be read by rank 1."""

    class Torn(list):  # type: ignore[type-arg]
        def __getitem__(self, index: Any) -> Any:
            if armed and ranks.rank == 1:
                raise OSError("the disk of rank 1")
            return super().__getitem__(index)

    armed = False
    with opened(ranks, folder, records=Torn(words())) as session:
        armed = True
        for lot in session:
            session.step(lot)


def in_turns(ranks: Ranks, folder: Path) -> None:
    """A session that steps by itself once, and leaves it to its caller then."""
    with opened(ranks, folder) as session:
        session.step(session.next_lot())
        session.put_gradients()


def stopped(ranks: Ranks) -> None:
    """Rank 1 is frozen, as a debugger or a full swap does it."""
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    ranks.tell("a step", lambda: 1)


def given_up(ranks: Ranks) -> None:
    """Rank 0 gives up what rank 1 would go on with for ever."""

    def heard() -> bool:
        ranks.check_others()
        return False

    def make() -> None:
        if ranks.rank == 0:
            raise OSError("given up")
        until(heard, 60.0)

    ranks.together("a lot", make)


def late(ranks: Ranks, patient: bool) -> str:
    """Rank 0 lives, and comes later than a rank may that has nobody to wait for."""
    setattr(processes, "LONGEST", timedelta(seconds=1))  # noqa: B010 - hours in the product
    if ranks.rank == 0:
        time.sleep(2.5)
    return ranks.tell("a step", lambda: "a word", patient=patient)


def out_of_step(ranks: Ranks) -> None:
    ranks.tell(f"step {ranks.rank}", lambda: 1)


def without_ranks(ranks: Ranks, folder: Path) -> None:
    """Ranks that are joined, and a session that is not told."""
    opened(None, folder)  # type: ignore[arg-type]


# -- faults ----------------------------------------------------------------------------------------------------------


def kill_at(ranks: Ranks, step: str, when: str) -> None:
    together = ranks.together

    def deadly_together(name: str, make: Callable[[], Any], **options: Any) -> list[Any]:
        def made() -> Any:
            value = make()
            if name == step and when == "done":
                os.kill(os.getpid(), signal.SIGKILL)
            return value

        if name == step and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        told = together(name, made, **options)
        if name == step and when == "told":
            os.kill(os.getpid(), signal.SIGKILL)
        return told

    ranks.together = deadly_together  # type: ignore[method-assign]


def _average(ranks: Ranks) -> None:
    add_up = ranks.add_up

    def averaged(pieces: Any, owner: int) -> None:
        add_up(pieces, owner)
        for piece in pieces:
            piece.copy_(piece / ranks.world)

    ranks.add_up = averaged  # type: ignore[method-assign]


def in_bfloat16(ranks: Ranks) -> Callable[[Any, int], None]:
    """Ranks' `add_up` in half precision."""
    add_up = ranks.add_up

    def lowered(pieces: Any, owner: int) -> None:
        low = [piece.to(torch.bfloat16) for piece in pieces]
        add_up(low, owner)
        if ranks.rank == owner:
            for piece, total in zip(pieces, low, strict=True):
                piece.copy_(total)

    return lowered


def _reduced_in_bfloat16(ranks: Ranks) -> None:
    ranks.add_up = in_bfloat16(ranks)  # type: ignore[method-assign]


def _noise_everywhere(ranks: Ranks) -> None:
    plain = Slabs.add_noise

    def before_adding_up(self: Slabs, names: Iterable[str], *arguments: Any) -> None:
        for _ in range(ranks.world):
            plain(self, names, *arguments[:2], 1.0)
        for target in self.targets(names):
            target.div_(arguments[2])

    Slabs.add_noise = before_adding_up  # type: ignore[method-assign]


def _own_lots(ranks: Ranks) -> None:
    share = Lot.share

    def drawn_alone(self: Lot, rank: int, world: int) -> Lot:
        own = share(self, 0, 1)
        keep = torch.rand(len(own), generator=torch.Generator().manual_seed(rank)).numpy() < 1 / world
        return Lot(own.round, own.records[keep], torch.arange(int(keep.sum())).numpy())

    Lot.share = drawn_alone  # type: ignore[method-assign]


def _dropped_tail(ranks: Ranks) -> None:
    sums = Slabs.sums
    Slabs.sums = lambda self, names: sums(self, names)[:-1]  # type: ignore[method-assign]


FAULTS: dict[str, Callable[[Ranks], None]] = {
    "average": _average,
    "bfloat16 reduction": _reduced_in_bfloat16,
    "noise at every rank": _noise_everywhere,
    "lots of one's own": _own_lots,
    "dropped tail": _dropped_tail,
}


def looked_for_at_once(ranks: Ranks, folder: Path) -> list[bool]:
    """Whether a release whose parts are synced slowly, beside the round, is found as soon as it is counted."""
    world = ReleasesWorld(folder)
    sync = spool.sync_file

    def slowly(path: Path) -> None:
        time.sleep(0.5 * (1 + ranks.rank))
        sync(path)

    spool.sync_file = slowly
    with ExitStack() as open_ones:
        own = open_ones.enter_context(world.open()) if ranks.rank == 0 else None
        parts = None if own else spool.Spool(spool.shard_folder(folder / "spool", ranks.rank))
        shared = SharedReleases(ranks, own, parts)
        open_ones.callback(shared.close)
        pending = shared.begin(1, PINS, lambda _: draw_lot(1, PLAN, UNITS, SystemRandom()))
        assert isinstance(pending, Pending)
        release = shared.publish(pending, {f"w{ranks.rank}": torch.ones(8)}, durable="behind")
        return [len(dict(shared.pieces(release))) == 2, shared.published(1) == release]


def given_up_by_another_group(ranks: Ranks) -> list[tuple[str, list[int]]]:
    """Rank 0 gives a lot up between two batches, while ranks 2 and 3 are in the exchanges of the first.

    Returns:
        Of this attempt and of another one, what was raised, and what came of the last exchange.
    """
    group, _ = ranks.split(2)
    found: list[tuple[str, list[int]]] = []

    def give_up() -> None:
        raise RoundError("the attempt was given up.", code="round-abandoned")

    for attempt in (1, 2):
        came: list[int] = []

        def compute(attempt: int = attempt, came: list[int] = came) -> None:
            if ranks.rank < 2 and attempt == 1:
                time.sleep(0.8)
                ranks.tell("the next batch", give_up)
            for number in range(1, 7):
                time.sleep(0.3 * (ranks.rank == 3 and attempt == 1))  # it has more to compute
                with ranks.exchanging():
                    sent = torch.full((2,), 100 * attempt + 10 * number + ranks.rank)
                    came[:] = group.exchange(sent, [1, 1], [1, 1]).tolist()

        try:
            ranks.together("a lot", compute)
            found.append(("", came))
        except RankError as error:
            return [*found, (type(error).__name__, came)]
        except CoterieError as error:
            found.append((type(error).__name__, came))
    return found
