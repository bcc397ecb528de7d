"""Run a `coterie` command on a device whose memory is counted, on a machine without a GPU.

    python benchmarks/counted_device.py BUILD_DIR FIGURES_DIR COMMAND [ARGUMENTS]

The device is `counted_device.cpp`, compiled into BUILD_DIR on first use (a minute; needs a C++ compiler and ninja).
What the command holds there at most is written to FIGURES_DIR when it ends, with the resident size of the process.
Where there is a GPU it is used instead, and torch's own figure is written. BUILD_DIR `-`: the processor, uncounted.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import load

SOURCE = Path(__file__).with_suffix(".cpp")
NAME = "counted"


def build(folder: Path) -> Any:
    """The compiled device; processes that build at the same time wait for one another."""
    folder.mkdir(parents=True, exist_ok=True)
    return load("counted_device", [str(SOURCE)], build_directory=str(folder), extra_cflags=["-O1"])


def install(folder: Path) -> Any:
    """Make the device known to torch under the name ``counted``, and what `coterie` picks."""
    extension = build(folder)
    module: Any = types.ModuleType(f"torch.{NAME}")
    module._lazy_init = lambda: None
    module._is_in_bad_fork = lambda: False
    module.is_available = module.is_initialized = lambda: True
    module.device_count, module.current_device = lambda: 1, lambda: 0
    module.manual_seed_all = lambda seed: None
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, module)

    from coterie.models.split import shards
    from coterie.training.party import process
    from coterie.training.single import setup

    read = shards.load_file  # safetensors knows no device of this name

    def load_file(path: Path, device: str = "cpu") -> dict[str, torch.Tensor]:
        return {name: tensor.to(device) for name, tensor in read(path).items()}

    shards.load_file = load_file
    setup.pick_device = process.pick_device = lambda name: torch.device(f"{NAME}:0")
    return extension


def main() -> None:
    build_dir, figures_dir, *arguments = sys.argv[1:]
    peak: Callable[[], int] = int  # nothing
    if build_dir == "-":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated
    else:
        peak = install(Path(build_dir)).peak
    from coterie.cli.app import main as coterie
    from coterie.training.planning.measured import peak_rss_bytes

    def write() -> None:
        figures = {
            "arguments": arguments,
            "peak_device_bytes": peak(),
            "peak_rss_bytes": peak_rss_bytes(),
        }
        path = Path(figures_dir) / f"{os.getpid()}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures), encoding="utf-8")

    atexit.register(write)
    coterie(arguments)


if __name__ == "__main__":
    main()
