"""A federation's sites around a hub that is not FLARE's: it loses, repeats, delays, withholds and forges pieces.

Each site is its own tunnel and its own members, started by what the site itself says it runs.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from coterie.demonstration.processes import Command, Processes, Running
from coterie.federation.identity.provision import free_endpoints
from coterie.flare.local import LocalMember
from coterie.flare.tunnel import DATA, OPEN, Tunnel

SITES = {"alder": ("alder", "coordinator"), "birch": ("birch",), "cedar": ("cedar",)}
FAULTS = ("lost", "brought again", "delayed", "withheld", "forged", "put in", "opened again")
AGAIN_S = 0.2


class Hub:
    """Hands messages over, and does what it likes with one in so many.

    Args:
        every: that many messages from one fault to the next; 0: it is honest.

    Attributes:
        done: how often each of `FAULTS` was done.
        forged: connections into which other bytes were put.
        ended: connections that a site did not know any more, or has closed.
        down: whether it carries nothing now.
    """

    def __init__(self, every: int = 0) -> None:
        self.every, self.done, self.down = every, Counter[str](), False
        self.messages = 0
        self.forged: set[str] = set()
        self.ended: set[str] = set()
        self._seen: list[tuple[str, str, Mapping[str, Any]]] = []
        self._guard = threading.Lock()
        self.tunnels: dict[str, Tunnel] = {}

    def deliver(self, source: str, target: str, body: Mapping[str, Any]) -> None:
        """What a site's `Tunnel` calls to send."""
        if self.down:
            raise OSError("the hub is gone")
        fault = self._fault(source, target, body)
        if fault == "lost":
            raise OSError("no answer in all tries")
        if fault == "withheld":
            return
        if fault == "delayed":
            time.sleep(AGAIN_S)
        if fault == "opened again":
            self._repeat(OPEN)
        if fault in ("forged", "put in"):
            self.forged.add(str(body["stream"]))
            data = bytes(body["data"])
            middle = len(data) // 2
            other = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
            self._hand(source, target, {**body, "data": other if fault == "forged" else b"from the hub" * 20})
            if fault == "forged":
                return
        self._hand(source, target, body)
        if fault == "brought again":
            self._hand(source, target, body)
            self._repeat(DATA)

    def stop(self) -> None:
        """Carry nothing from now on: every connection of which somebody sends a piece ends."""
        self.down = True

    def _fault(self, source: str, target: str, body: Mapping[str, Any]) -> str | None:
        with self._guard:
            self._seen = [*self._seen[-200:], (source, target, body)]
            self.messages += 1
            if not self.every or self.messages % self.every or body["op"] != DATA:
                return None
            fault = FAULTS[sum(self.done.values()) % len(FAULTS)]
            self.done[fault] += 1
            return fault

    def _repeat(self, op: str) -> None:
        """Something of some time ago, whether its connection is still there or not."""
        with self._guard:
            old = next(message for message in self._seen if message[2]["op"] == op or op == OPEN)
        try:
            self.tunnels[old[1]].handle(old[0], old[2])
        except OSError:
            self.done[f"{op} of old refused"] += 1

    def _hand(self, source: str, target: str, body: Mapping[str, Any]) -> None:
        if body["op"] == "close":
            self.ended.add(str(body["stream"]))
        try:
            self.tunnels[target].handle(source, body)
        except OSError:
            self.ended.add(str(body["stream"]))
            raise


class Sites:
    """All sites of an agreed federation around one hub, in a copy of its folder.

    Args:
        agreed: a folder of `helpers.federation_processes.make_folder`.
        folder: made here.
        hub: carries.
        processes: starts members.
    """

    def __init__(self, agreed: Path, folder: Path, hub: Hub, processes: Processes) -> None:
        shutil.copytree(agreed, folder)
        self.folder, self.hub, self._processes = folder, hub, processes
        self.running: dict[str, Running] = {}

    def _member(self, name: str) -> LocalMember:
        if name != "coordinator":
            return LocalMember(name, self.folder / name / "party.yaml")
        kit, run_dir = self.folder / "kits" / "coordinator", self.folder / "coordinator"
        return LocalMember(name, self.folder / "federation.yaml", kit, run_dir)

    def start(self) -> None:
        """Tunnels and members of all sites; again after `close`, members go on from their newest checkpoints."""
        site_of = {member: site for site, members in SITES.items() for member in members}
        dial = {}
        for site, members in SITES.items():
            here = dict(zip(members, free_endpoints(len(members)), strict=True))
            elsewhere = {member: other for member, other in site_of.items() if other != site}
            self.hub.tunnels[site] = Tunnel(here, elsewhere, self._send(site))
            dial[site] = {**here, **self.hub.tunnels[site].start()}
        for site, members in SITES.items():
            for name in members:
                others = {other: address for other, address in dial[site].items() if other != name}
                words = self._member(name).command(dial[site][name], others)
                arguments = tuple(words[words.index("coterie") + 1 :])
                self.running[name] = self._processes.start(Command(name, arguments, self.log_of(name)))

    def _send(self, site: str) -> Callable[[str, Mapping[str, Any]], None]:
        return lambda other, body: self.hub.deliver(site, other, body)

    def log_of(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def until(self, holds: Callable[[], bool], timeout_s: float) -> None:
        """Wait for something while members run.

        Raises:
            AssertionError: it did not come about in time, or a member ended in between.
        """
        deadline = time.monotonic() + timeout_s
        while not holds():
            codes = {name: each.code for name, each in self.running.items() if each.poll()}
            logs = {name: self.log_of(name).read_text()[-2500:] for name in self.running}
            told = "\n".join(f"--- {name}\n{log}" for name, log in logs.items())
            assert not any(codes.values()), f"{codes} {self.hub.done}\n{told}"
            assert time.monotonic() < deadline, f"waited in vain: {codes} {self.hub.done}\n{told}"
            time.sleep(0.1)

    def ended(self, timeout_s: float) -> None:
        """Wait until all have ended well."""
        self.until(self._over, timeout_s)

    def codes(self, timeout_s: float) -> dict[str, int | None]:
        """Wait until all have ended, however, and say how."""
        deadline = time.monotonic() + timeout_s
        while not self._over() and time.monotonic() < deadline:
            time.sleep(0.1)
        return {name: each.code for name, each in self.running.items()}

    def _over(self) -> bool:
        return False not in [each.poll() for each in self.running.values()]

    def close(self) -> None:
        """End all connections, as a hub's job that ends does."""
        for tunnel in self.hub.tunnels.values():
            tunnel.close()
