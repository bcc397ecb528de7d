"""A party that invites, in a thread of the test, and what others need to join it."""

from __future__ import annotations

import datetime as dt
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from coterie.config import FederationConfig, load_yaml
from coterie.federation.enrolment.codes import JoinCode
from coterie.federation.enrolment.inviting import Inviting, Listening, Places
from coterie.federation.enrolment.joining import Joined, Watch, join_federation
from coterie.federation.identity.provision import free_endpoints
from coterie.federation.identity.roster import Roster
from coterie.models.split.placement import Placement
from coterie.models.split.splitter import split
from coterie.models.zoo.build import build_model

MODEL = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_experts": 4,
    "num_experts_per_tok": 2,
}  # fmt: skip


def agreed(folder: Path, parties: tuple[str, ...] = ("alder", "birch"), **settings: Any) -> Path:
    """federation.yaml and the split model of an inviter; gives the file."""
    folder.mkdir(parents=True, exist_ok=True)
    endpoints = free_endpoints(len(parties) + 1)
    federation = {
        "name": "grove",
        "model": {"family": "olmoe", "config": MODEL},
        "parties": {name: {"endpoint": endpoint} for name, endpoint in zip(parties, endpoints, strict=False)},
        "coordinator": {"endpoint": endpoints[-1]},
        "exchange": "experts",
        "privacy": "none",
        "train": {"rounds": 2, "batch_size": 2},
        **settings,
    }
    path = folder / "federation.yaml"
    path.write_text(yaml.safe_dump(federation, sort_keys=False))
    config = load_yaml(path, FederationConfig)
    model = build_model(config.model, meta=True)
    split(config.model, Placement.of_spec(config.placement, list(config.parties), model), folder / "parts", seed=0)
    return path


class Inviter:
    """An `Inviting` that runs, with what it said."""

    def __init__(self, settings: Path, **how: Any) -> None:
        folder = settings.parent
        self.codes: dict[str, JoinCode] = {}
        self.told: list[str] = []
        self.roster: Roster | None = None
        self.problem: BaseException | None = None
        self._shown = threading.Event()
        kit = None if how.get("elsewhere") else folder / "coordinator-kit"
        places = Places(folder / "ca", folder / "kit", kit)
        valid = how.get("valid", dt.timedelta(hours=1))
        self.inviting = Inviting("alder", settings, places, how.get("at", Listening()), valid, self.told.append)
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        def show(_: object, codes: dict[str, tuple[JoinCode, dt.datetime]]) -> None:
            self.codes = {name: code for name, (code, _) in codes.items()}
            self._shown.set()

        try:
            self.roster = self.inviting.run(show)
        except BaseException as error:
            self.problem = error
        finally:
            self._shown.set()

    def start(self) -> Inviter:
        self.thread.start()
        assert self._shown.wait(60)
        return self

    def heard(self, words: str) -> None:
        """Wait until it said so."""
        until = time.monotonic() + 60
        while not any(words in line for line in self.told):
            assert time.monotonic() < until, self.told
            time.sleep(0.02)


@contextmanager
def invites(settings: Path, **how: Any) -> Iterator[Inviter]:
    """An inviter that listens until the block ends."""
    made = Inviter(settings, **how).start()
    try:
        yield made
    finally:
        made.inviting.stop()
        made.thread.join(60)
        assert not made.thread.is_alive()


def watch(**instead: Any) -> Watch:
    """A person who agrees to everything and looks away."""
    usual = {"agrees": lambda _: True, "step": lambda _: None, "fetched": lambda *_: None, "waits": lambda _: None}
    return Watch(**{**usual, "same": lambda _: True, **instead})


class Joiner:
    """Joins in a thread."""

    def __init__(self, code: JoinCode, folder: Path) -> None:
        self.joined: Joined | None = None
        self.problem: BaseException | None = None
        folder.mkdir(exist_ok=True)
        self._code, self._folder = code, folder
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            kit = self._folder / "kit"
            self.joined = join_federation(self._code, self._folder, kit, watch(), patience_s=30.0)
        except BaseException as error:
            self.problem = error

    def end(self) -> Joined:
        """What came of it."""
        self.thread.join(60)
        assert self.joined is not None, self.problem
        return self.joined
