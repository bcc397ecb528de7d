"""On which addresses a process listens. Run as a script it is a rank that says so once it has joined the others."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import sys
from pathlib import Path

from coterie.cli.ranks import joined_party

LISTENS = "0A"
ADDRESS_OF = 0x8915
"""SIOCGIFADDR of Linux."""


def addresses() -> list[str]:
    """Of this process's own sockets."""
    links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    own = {link[8:-1] for link in links if link.startswith("socket:[")}
    found = []
    for file, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path("/proc/self/net", file).read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == LISTENS and inode in own:
                words = bytes.fromhex(local.partition(":")[0])
                turned = b"".join(words[at : at + 4][::-1] for at in range(0, len(words), 4))
                found.append(socket.inet_ntop(family, turned))
    return found


def seen_by_others() -> str:
    """An interface that other machines reach; a name that no interface has where there is none."""
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            try:
                answer = fcntl.ioctl(asking.fileno(), ADDRESS_OF, struct.pack("256s", name.encode()))
            except OSError:
                continue
        if answer[20] != 127:
            return name
    return "nowhere0"


if __name__ == "__main__":
    with joined_party() as joined:
        assert joined is not None
        said = {"listens": addresses(), "nccl": os.environ["NCCL_SOCKET_IFNAME"]}
        Path(sys.argv[1], str(joined.rank)).write_text(json.dumps(said))
