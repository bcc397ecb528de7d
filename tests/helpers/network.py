"""A network of our own: one namespace per member around one that forwards, made and removed by the test.

Between two members packets can be dropped (both ways or one), or led through a small program that delays, loses and
slows them. That needs root and Linux, and touches nothing outside these namespaces.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

NET = "10.213"
WHY_NOT = (
    "needs root, Linux, iproute2 and /dev/net/tun"
    if not (sys.platform == "linux" and os.geteuid() == 0 and shutil.which("ip") and os.path.exists("/dev/net/tun"))
    else ""
)


def run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


def possible() -> str:
    """Why there can be no such network here; empty if there can."""
    if WHY_NOT:
        return WHY_NOT
    name = f"coterie-probe-{os.getpid()}"
    try:
        run("ip", "netns", "add", name)
        run("ip", "netns", "del", name)
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {error.stderr.decode().strip()}"
    return ""


class Network:
    """Namespaces for ``members``, each with one address; all can reach each other until told otherwise."""

    def __init__(self, members: Sequence[str]) -> None:
        self.members = tuple(members)
        self._mark = f"cot{os.getpid()}"
        self._hub = f"{self._mark}-hub"
        self._pump: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Network:
        try:
            self._add(self._hub)
            self._in_hub("sysctl", "-qw", "net.ipv4.ip_forward=1")
            for index, member in enumerate(self.members):
                space, inner, outer = self.space(member), f"{self._mark}i{index}", f"{self._mark}o{index}"
                self._add(space)
                run("ip", "-n", self._hub, "link", "add", outer, "type", "veth", "peer", "name", inner)
                run("ip", "-n", self._hub, "link", "set", inner, "netns", space)
                for where, device, last in ((self._hub, outer, 1), (space, inner, 2)):
                    run("ip", "-n", where, "addr", "add", f"{NET}.{index}.{last}/24", "dev", device)
                    run("ip", "-n", where, "link", "set", device, "up")
                run("ip", "-n", space, "route", "add", "default", "via", f"{NET}.{index}.1")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.smooth()
        for space in (*map(self.space, self.members), self._hub):
            subprocess.run(["ip", "netns", "del", space], capture_output=True)

    def space(self, member: str) -> str:
        return f"{self._mark}-{member}"

    def address(self, member: str) -> str:
        return f"{NET}.{self.members.index(member)}.2"

    def cut(self, one: str, other: str, *, both: bool = True) -> None:
        """Drop what ``one`` sends to ``other``, and the other way round."""
        for source, target in ((one, other), (other, one))[: 2 if both else 1]:
            run("ip", "-n", self._hub, "rule", "add", *self._between(source, target), "blackhole", "pref", "10")

    def mend(self, one: str, other: str) -> None:
        for source, target in ((one, other), (other, one)):
            subprocess.run(
                ["ip", "-n", self._hub, "rule", "del", *self._between(source, target), "blackhole", "pref", "10"],
                capture_output=True,
            )

    def roughen(self, *, delay_s: float = 0.0, loss: float = 0.0, bytes_per_s: float = 0.0) -> None:
        """Everything between all members is late, lost or slow from now on, per direction of one line for all."""
        self.smooth()
        command = [
            sys.executable,
            str(Path(__file__).with_name("pump.py")),
            str(delay_s),
            str(loss),
            str(bytes_per_s),
        ]
        self._pump = subprocess.Popen(["ip", "netns", "exec", self._hub, *command])
        deadline = time.monotonic() + 20
        while subprocess.run(["ip", "-n", self._hub, "link", "set", "rough", "up"], capture_output=True).returncode:
            assert time.monotonic() < deadline, "the pump did not start"
            time.sleep(0.05)
        run("ip", "-n", self._hub, "route", "replace", "default", "dev", "rough", "table", "100")
        for name in ("all", "rough"):
            self._in_hub("sysctl", "-qw", f"net.ipv4.conf.{name}.rp_filter=0")
        for index in range(len(self.members)):
            device = f"{self._mark}o{index}"
            run("ip", "-n", self._hub, "rule", "add", "iif", device, "lookup", "100", "pref", "20")

    def smooth(self) -> None:
        """End what `roughen` began."""
        if self._pump is None:
            return
        for index in range(len(self.members)):
            device = f"{self._mark}o{index}"
            subprocess.run(["ip", "-n", self._hub, "rule", "del", "iif", device, "pref", "20"], capture_output=True)
        self._pump.kill()
        self._pump.wait()
        self._pump = None

    def _between(self, source: str, target: str) -> tuple[str, ...]:
        return "from", self.address(source), "to", self.address(target)

    def _add(self, space: str) -> None:
        run("ip", "netns", "add", space)
        run("ip", "-n", space, "link", "set", "lo", "up")

    def _in_hub(self, *words: str) -> None:
        run("ip", "netns", "exec", self._hub, *words)
