"""Ranks that a benchmark starts of itself, as torchrun would, and the figures that each leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]


def figures_of(arguments: Sequence[str], world: int, what: str) -> list[dict[str, Any]]:
    """What every rank wrote into ``rank-N.json`` of the folder that it is told by ``--folder``.

    Args:
        arguments: the command: a script and its options.
        world: number of ranks, one thread each.
        what: words for the error.

    Raises:
        SystemExit: a rank failed.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    shared = {
        "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, *arguments, "--folder", place]
        ranks = [subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(r)}) for r in range(world)]
        codes = [rank.wait() for rank in ranks]
        if any(codes):
            raise SystemExit(f"{what} over {world} ranks ended with {codes}")
        return [json.loads(Path(place, f"rank-{rank}.json").read_text("utf-8")) for rank in range(world)]
