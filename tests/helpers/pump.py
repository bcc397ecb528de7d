"""Packets in at a tun device, out at the same one: later, fewer, slower. ``pump.py DELAY_S LOSS BYTES_PER_S``.

The kernel's own emulation (netem) is not in every kernel; this is enough for a few megabits.
"""

from __future__ import annotations

import fcntl
import os
import random
import select
import struct
import sys
import time
from collections import deque

_TUNSETIFF, _TUN, _NO_PI = 0x400454CA, 0x0001, 0x1000
_QUEUED_S = 0.5


def main(delay_s: float, loss: float, bytes_per_s: float) -> None:
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH", b"rough", _TUN | _NO_PI))
    os.set_blocking(device, False)
    draw, waiting, free_at = random.Random(1), deque[tuple[float, bytes]](), 0.0
    while True:
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            os.write(device, waiting.popleft()[1])
        wait = max(0.0, waiting[0][0] - now) if waiting else 1.0
        if not select.select([device], [], [], wait)[0]:
            continue
        packet, now = os.read(device, 65536), time.monotonic()
        if draw.random() < loss or free_at - now > _QUEUED_S:
            continue
        if bytes_per_s:
            free_at = max(free_at, now) + len(packet) / bytes_per_s
        waiting.append((max(free_at, now) + delay_s, packet))


if __name__ == "__main__":
    main(*map(float, sys.argv[1:4]))
