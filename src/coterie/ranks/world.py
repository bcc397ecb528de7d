"""Whether a process was started as one of several, and how many GPUs its machine has."""

from __future__ import annotations

import os
import sys

from coterie.errors import ConfigError, PrivacyError

_COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
"""What torchrun, accelerate, the launchers of MPI and srun tell every process that they start."""


def check_alone() -> None:
    """Refuse to go on as one process where a launcher started several.

    Every start of a private or federated run passes here.

    Raises:
        PrivacyError: a launcher's count is not 1, or torch has joined this process to others.
    """
    for name in _COUNTS:
        count = os.environ.get(name, "").strip()
        if count and count != "1":
            raise _several(count, name)
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        size = distributed.get_world_size()
        if size > 1:
            raise _several(str(size), "torch.distributed")


def gpus_here() -> int:
    """How many GPUs torch finds on this machine."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def auto_devices(over: int) -> int:
    """How many ranks `devices: auto` means: one for each GPU of the machine, in whole groups, or one without.

    Args:
        over: ranks of a group, which hold every expert once together.
    """
    return max(1, gpus_here() // over * over)


def check_enough_gpus(ranks: int) -> None:
    """Refuse more ranks on GPUs than a machine has of these.

    Raises:
        ConfigError: there are fewer GPUs than ranks.
    """
    gpus = gpus_here()
    if ranks > gpus:
        raise ConfigError(
            f"{ranks} ranks of this machine are to train on GPUs, and torch finds {gpus}.",
            code="ranks-gpus",
            why="ranks that share a GPU need more memory and gain nothing",
            fix="start as many ranks as there are GPUs, or say `device: cpu`",
        )


def _several(count: str, told_by: str) -> PrivacyError:
    return PrivacyError(
        f"this process is one of {count}, and each would run on its own.",
        code="ranks-missing",
        where=told_by,
        why="each would draw, clip and noise its own lots: several runs that each say they are the only one",
        fix="start one process, without torchrun, accelerate launch, mpirun or srun",
    )
