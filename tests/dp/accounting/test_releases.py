"""Invariant 8, crash by crash: the process dies at every single write, sync, rename and removal."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coterie.dp.accounting.lots import Lot, draw_lot
from coterie.dp.accounting.releases import Pending, Releases
from coterie.dp.accounting.spool import Durable, Release, Spool
from coterie.dp.noise.randomness import SystemRandom
from coterie.errors import BudgetError, LedgerError
from helpers.releases_world import PINS, PLAN, RUN, UNITS, ReleasesWorld
from helpers.waiting import until

NOTHING = np.empty(0, np.int64)


class Crash(BaseException):
    """Power fails here."""


def dying_at(monkeypatch: pytest.MonkeyPatch, step: int) -> Callable[[], int]:
    """Make the ``step``-th durable operation from now on the last one; every second time only half of it happens."""
    done = 0

    def wrap(name: str) -> None:
        real = getattr(os, name)

        def dying(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            done += 1
            if done == step:
                if name in ("write", "pwrite") and step % 2:
                    real(args[0], bytes(args[1])[: len(args[1]) // 2], *args[2:])
                raise Crash(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, dying)

    for name in ("write", "pwrite", "fsync", "replace", "unlink", "ftruncate"):
        wrap(name)
    return lambda: done


@pytest.mark.parametrize("durable", ["first", "behind"])
def test_invariant_8_a_crash_at_any_point_never_under_reports_and_never_noises_a_lot_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: Durable
) -> None:
    crashes = 0
    for step in range(1, 200):
        world = ReleasesWorld(tmp_path / str(step), durable)
        world.folder.mkdir()
        with monkeypatch.context() as patch:
            count = dying_at(patch, step)
            try:
                for number in (1, 2):
                    world.work(number)
                    with world.open() as releases:
                        releases.spool.drop_releases(number - 1)
                finished = True
            except Crash:
                finished = False
            crashes += not finished
        world.check()
        for number in (1, 2):
            world.work(number)
        world.check()
        assert len({digest for number, digest in world.sent if number == 2}) == 1
        if finished:
            assert count() < step
            break
    assert crashes > 25


def test_invariant_8_crash_after_spooling_sends_those_bytes_and_counts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = ReleasesWorld(tmp_path)
    with world.open() as releases:
        pending = releases.begin(1, PINS, lambda _: draw_lot(1, PLAN, UNITS, SystemRandom()))
        assert isinstance(pending, Pending)
        spooled = releases.spool.write_release(1, 0, {"w": torch.ones(8)}, PINS)
        releases.spool.keep(spooled, "first")
        assert releases.ledger.releases(RUN) == []
    with world.open() as releases:
        assert [r.digest for r in releases.ledger.releases(RUN)] == [spooled.digest]
        again = releases.begin(1, PINS, lambda _: pytest.fail("drew a lot"))
        assert isinstance(again, Release)
        assert (again.digest, again.tensors()["w"].tolist()) == (spooled.digest, [1.0] * 8)


STORED = [
    ("sync", "release-00000001-0.unsynced"),
    ("rename", "release-00000001-0.safetensors"),
    ("sync", "spool"),
]
COUNTED = [("sync", "ledger.jsonl"), ("sync", "spool")]  # and the lot is gone


@pytest.mark.parametrize(
    ("durable", "wanted"),
    [("first", STORED + COUNTED), ("behind", COUNTED + STORED), ("never", COUNTED + STORED[1:2])],
)
def test_invariant_8_what_others_see_is_synced_before_it_is_counted_and_all_is_counted_before_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: Durable, wanted: list[tuple[str, str]]
) -> None:
    world, trace = ReleasesWorld(tmp_path), []
    real_sync, real_replace = os.fsync, os.replace

    def name_of(handle: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{handle}")).name

    with world.open() as releases:
        pending = releases.begin(1, PINS, lambda _: draw_lot(1, PLAN, UNITS, SystemRandom()))
        monkeypatch.setattr(os, "fsync", lambda h: (trace.append(("sync", name_of(h))), real_sync(h))[1])
        monkeypatch.setattr(
            os, "replace", lambda a, b: (trace.append(("rename", Path(b).name)), real_replace(a, b))[1]
        )
        assert isinstance(pending, Pending)
        releases.publish(pending, {"w": torch.ones(8)}, durable=durable)
        releases.spool.settle()
    assert trace == wanted


def slow_disk() -> tuple[Callable[[int], None], threading.Event, threading.Event]:
    """An ``os.fsync`` that lets results wait; when it has begun, and what it waits for."""
    real, syncing, disk = os.fsync, threading.Event(), threading.Event()

    def slow(handle: int) -> None:
        if "release" in os.readlink(f"/proc/self/fd/{handle}"):
            syncing.set()
            assert disk.wait(60)
        real(handle)

    return slow, syncing, disk


def test_a_round_goes_on_while_its_result_is_synced_and_the_next_result_waits_for_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, (slow, syncing, disk) = ReleasesWorld(tmp_path), slow_disk()

    with world.open() as releases:
        monkeypatch.setattr(os, "fsync", slow)
        for number in (1, 2):
            pending = releases.begin(number, PINS, lambda _: draw_lot(1, PLAN, UNITS, SystemRandom()))
            assert isinstance(pending, Pending)
            if number == 2:
                assert releases.published(3) is None, "a look at another round does not wait"
                late = threading.Timer(0.2, disk.set)
                late.start()
            releases.publish(pending, {"w": torch.full((8,), float(number))}, durable="behind")
            assert syncing.wait(60)
            assert disk.is_set() is (number == 2)
            assert releases.used == number
        late.join()
        assert [each.tensors()["w"][0].item() for each in releases.spool.releases()] == [1.0, 2.0]


@pytest.mark.parametrize("left", ["nothing", "its length alone", "its first half", "another one"])
def test_invariant_8_what_a_power_cut_took_is_counted_and_its_round_is_drawn_anew(tmp_path: Path, left: str) -> None:
    world, pending = ReleasesWorld(tmp_path), None
    with world.open() as releases:
        pending = releases.begin(1, PINS, lambda _: draw_lot(1, PLAN, UNITS, SystemRandom()))
        assert isinstance(pending, Pending)
        first = releases.publish(pending, {"w": torch.ones(8)}, durable="behind")
    path = first.path.rename(first.path.with_suffix(".unsynced"))  # as before it was synced
    content = path.read_bytes()
    if left == "nothing":
        path.unlink()
    else:
        cuts = {"its length alone": bytes(len(content)), "its first half": content[: len(content) // 2]}
        path.write_bytes(cuts.get(left, content[:-1] + b"~"))
    with world.open() as releases:
        again = releases.begin(1, PINS, lambda _: draw_lot(1, PLAN, UNITS, SystemRandom()))
        assert isinstance(again, Pending)
        assert again.draw == 1
        assert again.lot.records.tolist() != pending.lot.records.tolist()
        releases.publish(again, {"w": torch.zeros(8)}, durable="behind")
        assert releases.used == 2
        assert [each.digest for each in releases.spool.releases()] != [first.digest]


def test_what_was_not_synced_and_is_whole_is_used_by_the_next_process(tmp_path: Path) -> None:
    world = ReleasesWorld(tmp_path)
    with world.open() as releases:
        pending = releases.begin(1, PINS, lambda _: draw_lot(1, PLAN, UNITS, SystemRandom()))
        assert isinstance(pending, Pending)
        first = releases.publish(pending, {"w": torch.ones(8)}, durable="behind")
    first.path.rename(first.path.with_suffix(".unsynced"))
    with world.open() as releases:
        assert releases.begin(1, PINS, lambda _: pytest.fail("drew a lot")) == first
        assert releases.used == 1


@pytest.mark.parametrize("ends", ["the next result", "a look at it", "the end"])
def test_a_disk_that_fails_behind_a_round_is_said_and_the_round_stays_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    world, real = ReleasesWorld(tmp_path), os.fsync
    draw: Callable[[int], Lot] = lambda _: draw_lot(1, PLAN, UNITS, SystemRandom())  # noqa: E731

    def full(handle: int) -> None:
        if "release" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    def one_result_then(releases: Releases) -> None:
        pending = releases.begin(1, PINS, draw)
        assert isinstance(pending, Pending)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            releases.publish(pending, {"w": torch.ones(8)}, durable="behind")
            if ends == "the next result":
                other = releases.begin(2, PINS, draw)
                assert isinstance(other, Pending)
                releases.publish(other, {"w": torch.ones(8)}, durable="behind")
            elif ends == "a look at it":
                releases.published(1)
            else:
                releases.spool.close()

    with world.open() as releases, pytest.raises(OSError, match="No space left") as caught:
        one_result_then(releases)
    assert caught.value.filename == str(tmp_path / "spool" / "release-00000001-0.safetensors"), "which disk is full?"
    with world.open() as releases:
        assert releases.used == 1


@pytest.mark.parametrize("up_to_round", [1, 2])
def test_a_result_that_is_removed_need_not_have_been_synced(
    up_to_round: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = Spool(tmp_path / "spool")

    def full(path: Path) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr("coterie.dp.accounting.spool.sync_file", full)
    spool.keep(spool.write_release(2, 0, {"w": torch.ones(8)}, PINS), "behind")
    if up_to_round == 1:
        with pytest.raises(OSError, match="release-00000002-0"):
            spool.drop_releases(up_to_round)
        assert list(spool.folder.glob("release-*"))
    else:
        spool.drop_releases(up_to_round)
        assert not list(spool.folder.glob("release-*"))
    spool.close()


def test_invariant_8_retry_before_spooling_recomputes_the_same_lot(tmp_path: Path) -> None:
    world = ReleasesWorld(tmp_path)
    lots = []
    for _ in range(3):
        with world.open() as releases:
            pending = releases.begin(1, PINS, lambda _: draw_lot(1, PLAN, UNITS, SystemRandom()))
            assert isinstance(pending, Pending)
            lots.append(pending.lot.records.tolist())
    assert lots[0] == lots[1] == lots[2]


def test_invariant_8_a_failed_ledger_write_leaves_nothing_that_can_be_sent_uncounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = ReleasesWorld(tmp_path)
    draw: Callable[[int], Lot] = lambda _: draw_lot(1, PLAN, UNITS, SystemRandom())  # noqa: E731
    noised = {"w": torch.ones(8)}
    with world.open() as releases:
        pending = releases.begin(1, PINS, draw)
        assert isinstance(pending, Pending)

        def full(*_: Any) -> None:
            raise LedgerError("the disk is full", code="dp-ledger-write")

        with monkeypatch.context() as patch:
            patch.setattr(releases.ledger, "record_release", full)
            for again in (
                lambda: releases.publish(pending, noised),
                lambda: releases.begin(1, PINS, draw),
                lambda: releases.published(1),
                lambda: releases.publish(pending, {"w": torch.zeros(8)}),
            ):
                with pytest.raises(LedgerError, match="the disk is full"):
                    again()
        assert releases.used == 0
        first = releases.begin(1, PINS, draw)
        assert isinstance(first, Release)
        assert [r.digest for r in releases.ledger.releases(RUN)] == [first.digest]
        assert torch.equal(first.tensors()["w"], noised["w"]), "the lot was noised a second time"
        assert releases.publish(pending, {"w": torch.zeros(8)}) == first
        assert releases.used == 1


@pytest.mark.parametrize(
    "changed", [{"weights": "w2"}, {"weights": "w1", "roster": "r2"}, {"weights": "w1", "epoch": "2"}]
)
def test_invariant_8_changed_weights_roster_or_epoch_burn_the_round(tmp_path: Path, changed: dict[str, str]) -> None:
    world = ReleasesWorld(tmp_path)
    world.work(1)
    world.work(1, changed)
    with world.open() as releases:
        ledger = releases.ledger
        assert [(r.round, r.draw, r.pins) for r in ledger.releases(RUN)] == [(1, 0, PINS), (1, 1, changed)]
        assert [e.data["reason"] for e in ledger.entries() if e.kind == "burned"] != []
        assert releases.used == 2
    first, second = world.computed
    assert first[2] != second[2]
    assert world.sent[0][1] != world.sent[1][1]


def test_a_pending_lot_is_drawn_anew_when_what_it_is_computed_from_changes(tmp_path: Path) -> None:
    world = ReleasesWorld(tmp_path)
    lots = []
    for pins in (PINS, {"weights": "w2"}):
        with world.open() as releases:
            pending = releases.begin(1, pins, lambda _: draw_lot(1, PLAN, UNITS, SystemRandom()))
            assert isinstance(pending, Pending)
            lots.append(pending.lot.records.tolist())
            assert releases.used == 0
    assert lots[0] != lots[1]


def test_lost_spool_means_a_new_lot_that_counts_again(tmp_path: Path) -> None:
    world = ReleasesWorld(tmp_path)
    world.work(1)
    for path in (tmp_path / "spool").glob("release-*"):
        path.unlink()
    world.work(1)
    world.check()
    assert world.computed[0][2] != world.computed[1][2]
    with world.open() as releases:
        assert releases.used == 2


def test_spooled_bytes_that_changed_are_neither_used_nor_counted_anew(tmp_path: Path) -> None:
    world = ReleasesWorld(tmp_path)
    world.work(1)
    (path,) = (tmp_path / "spool").glob("release-*")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(LedgerError, match="is not what the ledger counted"), world.open():
        pass


def test_spent_budget_stops_before_a_lot_is_drawn(tmp_path: Path) -> None:
    world = ReleasesWorld(tmp_path)
    with world.open(rounds=1) as releases:
        pending = releases.begin(1, PINS, lambda _: Lot(1, NOTHING, NOTHING))
        assert isinstance(pending, Pending)
        releases.publish(pending, {"w": torch.ones(8)})
        assert (releases.remaining, releases.last_round()) == (0, 1)
        with pytest.raises(BudgetError, match="the budget of this run is spent: 1 of 1 rounds are released"):
            releases.begin(2, PINS, lambda _: pytest.fail("drew a lot"))


def test_two_sessions_on_one_spool_are_refused(tmp_path: Path) -> None:
    world = ReleasesWorld(tmp_path)
    with (
        world.open() as releases,
        pytest.raises(LedgerError, match="is in use"),
        world.open(),
    ):
        pass
    with world.open() as releases:
        assert releases.used == 0


def test_a_spool_that_nobody_closed_is_in_use_until_its_last_result_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a session is dropped, and resumed in the same process."""
    world, (slow, syncing, disk) = ReleasesWorld(tmp_path), slow_disk()

    spool = Spool(tmp_path / "spool")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", slow)
        spool.keep(spool.write_release(1, 0, {"w": torch.ones(8)}, PINS), "behind")
        assert syncing.wait(60)
        del spool
        try:
            with pytest.raises(LedgerError, match="is in use"):
                Spool(tmp_path / "spool")
        finally:
            disk.set()

    def is_free() -> bool:
        try:
            Spool(tmp_path / "spool").close()
        except LedgerError:
            return False
        return True

    until(is_free)
    with world.open() as releases:
        assert releases.used == 1


VICTIM = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from helpers.releases_world import ReleasesWorld
step, done = int(sys.argv[3]), 0
real = os.fsync
def fsync(handle):
    global done
    done += 1
    if done == step:
        os.kill(os.getpid(), signal.SIGKILL)
    real(handle)
os.fsync = fsync
world = ReleasesWorld(Path(sys.argv[2]), sys.argv[4])
for number in (1, 2, 3):
    world.work(number)
    print(number, *world.sent[-1][1:], flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("step", "durable"), [(8, "first"), (13, "first"), (17, "first"), (13, "behind")])
def test_invariant_8_a_killed_process_resumes_without_losing_count(
    tmp_path: Path, step: int, durable: Durable
) -> None:
    victim = subprocess.run(
        [sys.executable, "-c", VICTIM, str(Path(__file__).parents[2]), str(tmp_path), str(step), durable],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert victim.returncode == -signal.SIGKILL, victim.stderr
    world = ReleasesWorld(tmp_path, durable)
    world.sent = [(int(line.split()[0]), line.split()[1]) for line in victim.stdout.splitlines()]
    for number in (1, 2, 3):
        world.work(number)
    world.check()
    for number in (1, 2, 3):
        assert len({digest for n, digest in world.sent if n == number}) == 1
