"""Ranks of a party whose weights are not in host memory, on a device of torch's own kind: no GPU is needed.

What crosses between ranks goes through host memory, as between ranks that share a GPU.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from helpers import counted_party_tasks
from helpers.federation_commands import folder as folder
from helpers.federation_commands import made as made
from helpers.federation_commands import with_a_budget
from helpers.rank_processes import run_ranks, values


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The device, compiled."""
    if not (shutil.which("c++") and shutil.which("ninja")):
        pytest.skip("needs a C++ compiler and ninja")
    place = tmp_path_factory.mktemp("device")
    counted_party_tasks.device().build(place)
    return place


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [{"experts_over": 2}, {"devices": 2}], ids=str)
def test_what_ranks_on_devices_push_is_what_one_process_on_one_pushes(
    folder: Path, compiled: Path, ranks: dict[str, int]
) -> None:
    """Each rank's self-check passes there, and so does the comparison of what they compute together."""
    with_a_budget(folder, device="auto", **ranks)
    gateway, helper = values(run_ranks(2, counted_party_tasks.checked, folder, compiled))
    assert gateway[0] == helper[0] == 1
    assert gateway[1] <= 1e-6
    assert min(gateway[2], helper[2]) > 0, "nothing was on the device"
