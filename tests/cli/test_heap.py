"""Freed memory goes back to the system, in a process of its own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

_FREED = """
import re
from pathlib import Path
from coterie.cli.heap import give_back_freed

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024

give_back_freed()
bytearray(30 << 20)[0]  # freed at once: glibc now takes blocks of that size from the heap
before = resident()
large, small = [], []
for _ in range(20):
    large.append(bytearray(b"x") * (8 << 20))
    small.append(bytearray(64 << 10))  # lies between them, and stays
del large
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such settings")
@pytest.mark.parametrize("as_set", [{}, {"MALLOC_MMAP_THRESHOLD_": "33554432"}], ids=["ours", "a person's"])
def test_large_blocks_between_small_ones_are_given_back_unless_a_person_said_otherwise(
    as_set: dict[str, str],
) -> None:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    ran = subprocess.run(
        [sys.executable, "-c", _FREED], env=inherited | as_set, capture_output=True, text=True, check=True
    )
    kept_mib = int(ran.stdout)
    assert kept_mib >= 100 if as_set else kept_mib <= 20
