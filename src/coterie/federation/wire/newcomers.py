"""Connections that have not shown who they are yet: how many may stand, and for how long.

A connection to the listening port is a newcomer until a stream over it was admitted (certificate, roster, first
message), and again once that stream has ended. Newcomers are cut after a while, and the oldest at once when there are
too many, of the address that has the most; so a member that dials meanwhile finds room. gRPC itself refuses what goes
beyond `most_connections`, which keeps the process's descriptors between two looks.

gRPC tells nothing of connections before their first stream. So the process's own descriptors are looked at: sockets
whose local port is the one it listens on. They are ended by `shutdown`, which leaves the closing to gRPC.
"""

from __future__ import annotations

import ipaddress
import os
import resource
import socket
import stat
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from coterie.errors import TransportError

NEWCOMERS = 64
"""Most connections that may stand without having shown who they are."""
_FILES = 256
"""Descriptors left for everything else: text, weights, checkpoints, logs."""
_SOFT = 65536
_DESCRIPTORS = next((path for path in (Path("/proc/self/fd"), Path("/dev/fd")) if path.is_dir()), None)

Address = tuple[str, int]


def most_connections(streams: int) -> int:
    """Connections gRPC may hold at once: every expected stream twice (it may be dialled anew before the old one has
    ended), and newcomers that come between two looks."""
    return 2 * streams + 2 * NEWCOMERS


def descriptors_needed(accepted: int, dialled: int) -> int:
    """What a process should be allowed to open, with so many streams accepted and dialled."""
    return most_connections(accepted) + 2 * dialled + _FILES


def descriptors_allowed() -> tuple[int, int]:
    """The limit in force, and what `check_descriptors` makes of it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _SOFT if hard == resource.RLIM_INFINITY else min(hard, _SOFT)
    return soft, max(soft, most)


def check_descriptors(me: str, accepted: int, dialled: int) -> int:
    """Raise the soft limit of open descriptors as far as the hard one lets it; the limit now in force.

    Raises:
        TransportError: that is too little for so many streams.
    """
    soft, reachable = descriptors_allowed()
    needed = descriptors_needed(accepted, dialled)
    if reachable < needed:
        raise TransportError(
            f"{me} may have {reachable} files and connections open; it needs {needed}.",
            code="descriptors-few",
            why="strangers could take all of them by connecting, and members would find none left",
            fix="raise the hard limit: `ulimit -Hn`, LimitNOFILE= of systemd, --ulimit nofile= of a container",
        )
    if reachable > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (reachable, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    return reachable


class Newcomers:
    """Watches one listening port.

    Args:
        port: that this process listens on.
        patience_s: how long a connection may take to be admitted.
    """

    def __init__(self, port: int, patience_s: float) -> None:
        self._port, self._patience_s = port, patience_s
        self._admitted: Counter[Address] = Counter()
        self._since: dict[Address, float] = {}
        self._lock = threading.Lock()

    def admit(self, peer: str) -> None:
        """A stream over the connection of ``peer`` (as gRPC names it) was admitted."""
        with self._lock:
            self._admitted[parse_peer(peer)] += 1

    def leave(self, peer: str) -> None:
        """That stream has ended."""
        address = parse_peer(peer)
        with self._lock:
            self._admitted[address] -= 1
            if self._admitted[address] <= 0:
                del self._admitted[address]

    def look(self, now: float) -> int:
        """End what stands too long or too much; how many that were. Takes about a millisecond per hundred sockets."""
        descriptors = {address: number for number, address in self._open_connections()}
        with self._lock:
            strangers = [address for address in descriptors if address not in self._admitted]
        self._since = {address: self._since.get(address, now) for address in strangers}
        ended = {address for address, since in self._since.items() if now - since > self._patience_s}
        waiting = sorted(self._since.keys() - ended, key=lambda address: self._since[address])
        ended |= set(_too_many(waiting, NEWCOMERS))
        for address in ended:
            self._end(descriptors[address], address)
        return len(ended)

    def _open_connections(self) -> Iterator[tuple[int, Address]]:
        """Descriptor and far address of every connection to the port."""
        for name in os.listdir(_DESCRIPTORS) if _DESCRIPTORS is not None else ():
            address = self._far_end(int(name))
            if address is not None:
                yield int(name), address

    def _far_end(self, number: int) -> Address | None:
        try:
            if not stat.S_ISSOCK(os.fstat(number).st_mode):
                return None
            with socket.socket(fileno=os.dup(number)) as own:
                if own.family not in (socket.AF_INET, socket.AF_INET6) or own.getsockname()[1] != self._port:
                    return None
                host, port = own.getpeername()[:2]
                return _plain(host), port
        except OSError:  # closed meanwhile, or it listens and has no far end
            return None

    def _end(self, number: int, address: Address) -> None:
        """Shut a connection down, if the descriptor is still that connection."""
        try:
            with socket.socket(fileno=os.dup(number)) as own:
                if own.getsockname()[1] == self._port and own.getpeername()[1] == address[1]:
                    own.shutdown(socket.SHUT_RDWR)
        except OSError:
            return


def _too_many(oldest_first: list[Address], most: int) -> Iterator[Address]:
    """Whom to end so that ``most`` are left: each time the oldest of the address that has the most."""
    by_host: dict[str, list[Address]] = {}
    for address in reversed(oldest_first):
        by_host.setdefault(address[0], []).append(address)
    for _ in range(len(oldest_first) - most):
        yield max(by_host.values(), key=len).pop()


def parse_peer(peer: str) -> Address:
    """Host and port of what gRPC calls a peer, such as ``ipv4:10.0.0.7:4431`` or ``ipv6:%5B::1%5D:4431``."""
    host, _, port = unquote(peer).partition(":")[2].rpartition(":")
    return _plain(host.strip("[]")), int(port)


def _plain(host: str) -> str:
    """One spelling per address, whether or not it came over a socket for both families."""
    address = ipaddress.ip_address(host.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)
