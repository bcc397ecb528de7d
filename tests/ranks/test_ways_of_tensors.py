"""Which way tensors go between ranks, and that ranks wait for it, and name who is gone; no GPU is needed here.

A GPU's tensor is stood for by one of torch's `meta` device, or by one in host memory that counts as elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import HashStore

from coterie.dp import open_run
from coterie.dp.open_run import _check_devices
from coterie.errors import ConfigError, RankError
from coterie.ranks import ways
from coterie.ranks.processes import SomeRanks
from coterie.ranks.pulse import Pulse
from coterie.ranks.ranks import Alone
from coterie.ranks.ways import Ways, between_gpus, gpu_of_this_rank, own_gpu
from coterie.training.single.setup import pick_device
from helpers import staged_tasks
from helpers.rank_processes import run_ranks, values

NCCL = {"float64", "float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "bool"}
"""Types that NCCL carries (torch's ProcessGroupNCCL)."""


class LateWork:
    """Is done when asked for the last of some times; then it does something, or raises."""

    def __init__(self, asked: float, end: Callable[[], None] = lambda: None) -> None:
        self.left, self._end = asked, end

    def is_completed(self) -> bool:
        self.left -= 1
        return self.left <= 0

    def wait(self) -> None:
        self._end()


class Recorded:
    """In place of torch.distributed: what went to which group; each work ends late, with ones in what arrives."""

    def __init__(self, asked: float = 3, fails: bool = False) -> None:
        self.calls: list[tuple[str, str, list[str], set[str]]] = []
        self._asked, self._fails = asked, fails

    def _begun(self, what: str, group: str, tensors: list[Tensor], arriving: list[Tensor]) -> LateWork:
        types = {str(each.dtype).removeprefix("torch.") for each in tensors}
        self.calls.append((what, group, [each.device.type for each in tensors], types))

        def end() -> None:
            if self._fails:
                raise RuntimeError("connection closed by peer")
            for each in arriving:
                each.fill_(1)

        return LateWork(self._asked, end)

    def reduce(self, tensor: Tensor, group: str, group_dst: int, async_op: bool) -> LateWork:
        assert async_op
        return self._begun("reduce", group, [tensor], [tensor])

    def broadcast(self, tensor: Tensor, group: str, group_src: int, async_op: bool) -> LateWork:
        assert async_op
        return self._begun("broadcast", group, [tensor], [tensor])

    def all_gather(self, found: list[Tensor], own: Tensor, group: str, async_op: bool) -> LateWork:
        assert async_op
        return self._begun("all_gather", group, [own, *found], found)

    def all_to_all_single(
        self, arrived: Tensor, rows: Tensor, receive: list[int], send: list[int], group: str, async_op: bool
    ) -> LateWork:
        assert async_op
        return self._begun("all_to_all_single", group, [rows, arrived], [arrived])


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    found = Recorded()
    monkeypatch.setattr(ways, "distributed", found)
    return found


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "in_host_memory", lambda tensor: False)


def some(made: Ways, patience_s: float = 30.0) -> tuple[SomeRanks, HashStore]:
    """Rank 0 of two; the other one is a pulse, if somebody counts for it."""
    store = HashStore()
    return SomeRanks(0, [0, 1], made, HashStore(), (store, Pulse(store, 0, patience_s)), list), store


def all_of(ranks: SomeRanks, device: str, kind: torch.dtype) -> list[Tensor]:
    """Every kind of exchange once; what arrived."""
    sums, weights = (torch.zeros(5, dtype=kind, device=device) for _ in range(2))
    ranks.add_up([sums], 0)
    ranks.hand_out([weights], 1)
    found = ranks.gather(torch.zeros(2, dtype=kind, device=device))
    return [sums, weights, *found, ranks.exchange(torch.zeros(3, 2, dtype=kind, device=device), [1, 2], [0, 4])]


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.int64, torch.int32])
@pytest.mark.parametrize(("device", "group"), [("cpu", "gloo"), ("meta", "nccl")])
def test_a_tensor_goes_to_the_group_of_its_device(
    kind: torch.dtype, device: str, group: str, recorded: Recorded
) -> None:
    ranks, _ = some(Ways("gloo", "nccl"))
    all_of(ranks, device, kind)
    assert [what for what, *_ in recorded.calls] == ["reduce", "broadcast", "all_gather", "all_to_all_single"]
    for _, used, devices, types in recorded.calls:
        assert used == group
        assert {*devices} == {device}
        assert types <= NCCL


def test_pieces_on_two_devices_are_two_messages(recorded: Recorded) -> None:
    ranks, _ = some(Ways("gloo", "nccl"))
    ranks.add_up([torch.zeros(2), torch.zeros(2, device="meta"), torch.zeros(2)], 0)
    assert [group for _, group, *_ in recorded.calls] == ["gloo", "nccl", "gloo"]


def test_without_a_group_of_gpus_copies_go_by_gloo_and_come_back_once_they_are_there(
    recorded: Recorded, elsewhere: None
) -> None:
    made = Ways("gloo")
    own = torch.zeros(4)
    work = made.add_up(own, 0)
    while not work.is_completed():
        assert not bool(own.any())
    assert not bool(own.any())  # completed is the work of the copies
    work.wait()
    assert torch.equal(own, torch.ones(4))
    ranks, _ = some(made)
    assert all(bool((each != 0).all()) for each in all_of(ranks, "cpu", torch.float32))
    assert {group for _, group, *_ in recorded.calls} == {"gloo"}


@pytest.mark.parametrize("group", ["nccl", None])
def test_a_rank_that_takes_no_part_is_named_however_the_tensors_go(
    group: str | None, monkeypatch: pytest.MonkeyPatch, elsewhere: None
) -> None:
    monkeypatch.setattr(ways, "distributed", Recorded(asked=float("inf")))
    ranks, _ = some(Ways("gloo", group), patience_s=0.3)
    began = time.monotonic()
    with pytest.raises(RankError, match="rank 1 has been silent") as caught:
        ranks.gather(torch.zeros(2))
    assert caught.value.code == "ranks-silent"
    assert time.monotonic() - began < 20


def test_what_went_wrong_between_gpus_is_said(monkeypatch: pytest.MonkeyPatch, elsewhere: None) -> None:
    monkeypatch.setattr(ways, "distributed", Recorded(fails=True))
    ranks, _ = some(Ways("gloo", "nccl"))
    with pytest.raises(RankError, match="connection closed by peer") as caught:
        ranks.add_up([torch.zeros(2)], 0)
    assert caught.value.code == "ranks-exchange"


def test_who_leaves_after_an_error_gives_up_what_will_not_end() -> None:
    class Group:
        aborted = 0

        def abort(self) -> None:
            self.aborted += 1

    group = Group()
    Ways("gloo", group).leave(failed=False)
    assert group.aborted == 0
    Ways("gloo", group).leave(failed=True)
    assert group.aborted == 1
    Ways("gloo").leave(failed=True)


def test_gpus_have_a_group_where_every_rank_has_its_own() -> None:
    assert between_gpus(["one/0", "one/1", "two/0"]) == "nccl"
    assert between_gpus(["one/0", "one/0"]) == "host"
    assert between_gpus(["one/0", None]) == "host"
    assert between_gpus([None, None]) == "host"


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """torch finds two GPUs; the list says which became the current one."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return current


def test_each_rank_of_a_machine_takes_its_own_gpu(
    two_gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pick_device("auto") == torch.device("cuda")
    names = set()
    for rank in range(2):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert pick_device("auto") == pick_device("cuda") == torch.device("cuda", rank)
        assert two_gpus[-1] == torch.device("cuda", rank)
        assert pick_device("cpu") == torch.device("cpu")
        names.add(own_gpu())
    assert len(names) == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    assert str(own_gpu()).endswith("/GPU-b")


def test_fewer_gpus_than_ranks_are_one_sentence(
    two_gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(
        ConfigError, match="3 ranks of this machine are to train on GPUs, and torch finds 2"
    ) as caught:
        gpu_of_this_rank()
    assert caught.value.code == "ranks-gpus"
    assert own_gpu() is None


def test_rows_go_between_gpus_only_where_they_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        device = torch.device("cuda", 0)

    model, ranks = nn.Linear(1, 1), Alone()
    monkeypatch.setattr(model, "named_parameters", lambda: iter([("weight", OnGpu())]))
    _check_devices(ranks, model, compared=False)
    monkeypatch.setattr(ranks, "world", 2)
    _check_devices(ranks, model, compared=False)  # whole models
    monkeypatch.setattr(open_run, "spread_of", lambda model: object())
    _check_devices(ranks, model, compared=True)
    with pytest.raises(RankError, match="`weight` is on a GPU") as caught:
        _check_devices(ranks, model, compared=False)
    assert caught.value.code == "ranks-device"
    _check_devices(ranks, nn.Linear(1, 1), compared=False)


def test_runs_through_host_memory_come_to_the_same_bits(tmp_path: Path) -> None:
    by_rank: list[Any] = values(run_ranks(2, staged_tasks.both_ways, tmp_path))
    for same, types in by_rank:
        assert same == [True] * len(staged_tasks.RUNS)
        assert {*types} <= NCCL
        assert {"float32", "uint8", "int32", "int64"} <= {*types}
