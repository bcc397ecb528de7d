"""A private federation whose ledgers are compared with what hosts receive, at every push."""

from __future__ import annotations

import copy
import json
import shutil
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from coterie.config import FederationConfig
from coterie.dp.checks import self_check
from coterie.dp.checks.comparison import ComparisonReport
from coterie.federation.experts.host import ExpertsHost
from coterie.federation.experts.take_sums import BEGIN
from coterie.training.party.in_process import InProcessFederation
from coterie.training.party.inputs import PartyInputs
from coterie.training.party.run import PartyResult
from helpers.federations import PARTIES, full_models, make_parts
from helpers.private_settings import private_settings, with_privacy
from helpers.waiting import until

VICTIM = "birch"


ROUNDS, FATAL = 4, 3


class Died(BaseException):
    """A process that is gone: no `except CoterieError` and no report sees it."""


class PrivateWorld:
    """A private federation whose victim's ledger is compared with what the hosts receive, at every push."""

    def __init__(self, folder: Path, *, rounds: int = ROUNDS, seeded: bool = False, **changes: object) -> None:
        self.folder, self.seeded = folder, seeded
        self.config: FederationConfig = private_settings(**{"train__rounds": rounds, "deadline_s": 4.0, **changes})
        self.model = full_models()[PARTIES[0]]
        self.federation = InProcessFederation(self.config, folder / "coordinator")
        self.uncounted: list[str] = []
        self.announced: dict[tuple[str, int, int], list[str]] = defaultdict(list)

    def parts(self, **changes: object) -> dict[str, PartyInputs]:
        parts = make_parts(self.config, {name: copy.deepcopy(self.model) for name in PARTIES}, self.folder)
        private = with_privacy(parts, self.folder, sigma=None, seeded=self.seeded)
        return {name: replace(each, **changes) for name, each in private.items()}  # type: ignore[arg-type]

    def start(self, **changes: object) -> None:
        self.federation.coordinate()
        for each in self.parts(**changes).values():
            self.federation.up(each)

    def back(self) -> None:
        self.federation.up(self.parts()[VICTIM])

    def die(self) -> None:
        """Cut the victim off from everybody, then unwind it."""
        self.federation.cut_off(VICTIM)
        raise Died

    def entries(self, name: str = VICTIM) -> list[dict]:
        return [
            json.loads(line)
            for path in (self.folder / f"ledger-{name}").glob("*/ledger.jsonl")
            for line in path.read_text().splitlines()
        ]

    def releases(self, name: str = VICTIM) -> list[tuple[int, int]]:
        return [(e["data"]["round"], e["data"]["draw"]) for e in self.entries(name) if e["kind"] == "release"]

    def at(self, *, round_no: int) -> bool:
        """Whether that round is being made, or a later one."""
        return any(s.state.phase == "compute" and s.state.round >= round_no for s in self.federation.statuses)

    def at_last(self, round_no: int) -> bool:
        """Whether that round, or a later one, is what is being made now."""
        now = self.federation.statuses[-1].state
        return now.phase == "compute" and now.round >= round_no

    def told(self, code: str) -> bool:
        """Whether the victim gave this reason for a failed attempt; the last attempt may have failed of another."""
        return any(f"{VICTIM} failed" in s.state.note and code in s.state.note for s in self.federation.statuses)

    def heard(self, host: str, peer: str, message) -> None:  # type: ignore[no-untyped-def]
        """Called for every push that begins, before its bytes are taken."""
        if peer != VICTIM:
            return
        round_no = message.address.round
        told = self.announced[host, round_no, message.address.part]
        told.append(message.body["digest"])
        counted = sum(r == round_no for r, _ in self.releases())
        if len(set(told)) > counted:
            self.uncounted.append(
                f"{host} hears of {len(set(told))} results for round {round_no}; {counted} are counted"
            )

    def spooled(self, name: str = VICTIM) -> list[Path]:
        return sorted((self.folder / f"ledger-{name}").glob("*/spool/*/release-*.safetensors"))

    def go_back(self, *, checkpoints: int, name: str = "cedar") -> None:
        """A host comes back without its newest checkpoints, as from a disk image of some time ago."""
        self.federation.kill(name)
        for newest in sorted((self.folder / name / "private" / "checkpoints").iterdir())[-checkpoints:]:
            shutil.rmtree(newest)

    def run_past(self, dead: threading.Event) -> None:
        """From the start to the end, with the victim's death, which ``dead`` tells of, and return in between."""
        self.start()
        assert dead.wait(120.0), "the point was never reached"
        until(lambda: isinstance(self.federation.ends.get(VICTIM), BaseException))
        self.back()
        self.finished()

    def finished(self) -> None:
        self.federation.join()
        for name, end in self.federation.ends.items():
            assert not isinstance(end, BaseException), (name, end)
            assert not isinstance(end, PartyResult) or (end.finished and end.rounds == self.config.train.rounds)


def skip_comparison(patch: pytest.MonkeyPatch) -> None:
    """No comparison of the engine with batches of one when a ledger is opened: on a tiny model it takes longer than
    all the rounds. What it finds is tested in tests/dp/checks; tests/training/experts/test_private_exchange.py goes
    through it in a federation."""
    patch.setattr(self_check, "check", lambda *_: ComparisonReport({}, []))


@pytest.fixture
def already_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """See `skip_comparison`."""
    skip_comparison(monkeypatch)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Callable[[PrivateWorld], PrivateWorld]:
    def watch(world: PrivateWorld) -> PrivateWorld:
        handle = ExpertsHost.handle

        def seen(self, peer, lane, message, **options):  # type: ignore[no-untyped-def]
            if message.kind == BEGIN:
                world.heard(self.me, peer, message)
            return handle(self, peer, lane, message, **options)

        monkeypatch.setattr(ExpertsHost, "handle", seen)
        return world

    return watch
