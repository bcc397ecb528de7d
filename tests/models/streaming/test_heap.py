"""Freed memory goes back to the system: in a process of its own, that other tests left no holes in."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such functions")

_RESIDENT = """
import re
from pathlib import Path

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
"""

_BLOCKS = (
    _RESIDENT
    + """
from coterie.models.streaming.heap import give_back_freed

bytearray(30 << 20)[0]  # freed at once: glibc now takes blocks of that size from the heap
before = resident()
large, small = [], []
for _ in range(20):
    large.append(bytearray(b"x") * (8 << 20))
    small.append(bytearray(64 << 10))  # lies between them, and stays
del large
kept = resident() - before
give_back_freed()
print(kept, resident() - before)
"""
)

_LAYERS = (
    _RESIDENT
    + """
import torch
from coterie.federation.experts.owner import Mirror
from coterie.federation.experts.parts import Part
from coterie.models.streaming.cache import MemoryStore, WeightCache

hosts, layers, shape = ("alder", "birch", "cedar"), 10, (4, 1024, 512)
parts = [
    Part(3 * layer + place, host, layer, tuple(range(4 * place, 4 * place + 4)), (("down_proj", shape),), False)
    for layer in range(layers) for place, host in enumerate(hosts)
]
cache = WeightCache(MemoryStore(), layers)
mirror = Mirror(parts, [12] * layers, cache, None, None, torch.bfloat16, set_trunk=None, wait_s=1.0)
torch.empty(30 << 20, dtype=torch.uint8).zero_()
before = resident()
for layer in range(layers):
    of_layer = [part for part in parts if part.layer == layer]
    fresh = [(part, torch.ones(part.num_bytes(torch.bfloat16), dtype=torch.uint8), "") for part in of_layer]
    small = [torch.ones(50_000) for _ in range(4)]  # what else is allocated meanwhile
    mirror._assemble(layer, fresh)
    del fresh
mirror._assemble(0, [(parts[0], torch.ones(parts[0].num_bytes(torch.bfloat16), dtype=torch.uint8), "")])
held = sum(t.nbytes for layer in range(layers) for t in cache.get(layer).values()) >> 20
print(held, resident() - before)
"""
)

_PEAKS = (
    _RESIDENT
    + """
import sys
from contextlib import nullcontext
import torch
from coterie.models.streaming.cache import MemoryStore, WeightCache
from coterie.models.streaming.heap import give_back_freed
from coterie.models.streaming.streamer import LayerStreamer

cache = WeightCache(MemoryStore(), 1)
cache.put(0, {"down_proj": torch.ones(1)})
streamer = LayerStreamer(cache, torch.device("cpu"), torch.float32)
bytearray(30 << 20)[0]
with streamer.layer(0):
    pass
give_back_freed()
before, blocks, small = resident(), [], []
for size in 8, 9:  # what has 9 fits into no hole of 8
    for _ in range(320 // size):
        blocks.append(bytearray(b"x") * (size << 20))
        small.append(bytearray(64 << 10))
        with streamer.layer(0):
            pass
    used, most = sum(map(len, blocks)) >> 20, resident() - before
    del blocks[:]
    with streamer.layer(0):
        pass
    print(used, most, resident() - before)
streamer.close()
"""
)


def printed(script: str, **environment: str) -> list[int]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    ran = subprocess.run(
        [sys.executable, "-c", script], env=inherited | environment, capture_output=True, text=True, check=True
    )
    return [int(word) for word in ran.stdout.split()]


def test_what_was_freed_between_blocks_in_use_is_given_back() -> None:
    kept, left = printed(_BLOCKS)
    assert kept >= 100
    assert left <= 20


def test_a_party_holds_the_layers_that_it_fetched_and_not_the_messages_too() -> None:
    held, resident = printed(_LAYERS, OMP_NUM_THREADS="1")
    assert held == 120
    assert resident <= 1.25 * held


def test_free_pages_are_given_back_where_a_process_would_grow_because_of_them_and_not_before() -> None:
    """Every time a layer is lent: what one forward frees is there for the next, and does not add to its peak."""
    used, most, left, used_again, most_again, _ = printed(_PEAKS, OMP_NUM_THREADS="1")
    assert used <= most <= used + 20
    assert left >= used - 20, "nothing is gained, and new pages cost more"
    assert used_again > 300
    assert most_again <= max(used, used_again) + 64 + 30
