"""How tensors get from rank to rank: by Gloo where they are in host memory, by NCCL or through host memory elsewhere.

This is all that knows of a tensor's device where ranks exchange something. NCCL wants a GPU for each rank. Where
ranks share one, or NCCL is missing, a GPU's tensor is copied to host memory, goes by Gloo, and what comes is copied
back: the same bytes, slower. Which of the two it is follows from where the ranks are, and is the same at all of them.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor, distributed

from coterie.ranks.world import check_enough_gpus

LONGEST = timedelta(hours=2)
"""A rank that is alive may be waited for so long: the longest evaluation, or the longest step of one rank alone."""


class Work(Protocol):
    """A collective that has begun."""

    def is_completed(self) -> bool:
        """Whether nothing has to be waited for; that it came to nothing counts as well."""

    def wait(self) -> Any:
        """Let what comes after see the result; raises what went wrong. By itself NCCL's does not wait for the GPU."""


class _Staged:
    """A collective of copies in host memory, which are copied back once it is done."""

    def __init__(self, work: Any, arriving: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._work, self._arriving = work, arriving

    def is_completed(self) -> bool:
        return bool(self._work.is_completed())

    def wait(self) -> None:
        self._work.wait()
        for target, copy in self._arriving:
            target.copy_(copy)


class Ways:
    """The groups of some ranks.

    Args:
        host: Gloo's, for tensors in host memory.
        gpus: NCCL's, for those on GPUs; None: they go through host memory.
    """

    def __init__(self, host: Any, gpus: Any | None = None) -> None:
        self._host, self._gpus = host, gpus

    def add_up(self, values: Tensor, owner: int) -> Work:
        """Begin to add all ranks' values up into those of ``owner``; the others' may be anything afterwards."""
        group, (own,) = self._at(values)
        work = distributed.reduce(own, group=group, group_dst=owner, async_op=True)
        return _back(work, [(values, own)])

    def hand_out(self, values: Tensor, owner: int) -> Work:
        """Begin to write ``owner``'s bytes over those of every rank."""
        group, (own,) = self._at(values.view(torch.uint8))
        work = distributed.broadcast(own, group=group, group_src=owner, async_op=True)
        return _back(work, [(values.view(torch.uint8), own)])

    def gather(self, found: Sequence[Tensor], own: Tensor) -> Work:
        """Begin to put every rank's tensor into ``found``, in rank order."""
        group, (sent, *there) = self._at(own, *found)
        work = distributed.all_gather(there, sent, group=group, async_op=True)
        return _back(work, list(zip(found, there, strict=True)))

    def exchange(self, arrived: Tensor, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Work:
        """Begin to send rows to all ranks and take theirs; see `coterie.ranks.ranks.Ranks.exchange`."""
        group, (sent, there) = self._at(rows, arrived)
        work = distributed.all_to_all_single(there, sent, list(receive), list(send), group=group, async_op=True)
        return _back(work, [(arrived, there)])

    def leave(self, failed: bool) -> None:
        """Give up what has begun between GPUs and will not end, since a rank is gone; else nothing."""
        if failed and self._gpus is not None:
            self._gpus.abort()

    def _at(self, *tensors: Tensor) -> tuple[Any, list[Tensor]]:
        """The group for tensors of one device, and the tensors as it takes them."""
        if in_host_memory(tensors[0]):
            return self._host, [*tensors]
        if self._gpus is not None:
            return self._gpus, [*tensors]
        return self._host, [each.to("cpu", copy=True) for each in tensors]


def in_host_memory(tensor: Tensor) -> bool:
    """Whether Gloo takes a tensor as it is."""
    return tensor.device.type == "cpu"


def _back(work: Work, pairs: Sequence[tuple[Tensor, Tensor]]) -> Work:
    """The work itself, or one that copies what arrives in place of tensors to these."""
    arriving = [(target, there) for target, there in pairs if target.data_ptr() != there.data_ptr()]
    return _Staged(work, arriving) if arriving else work


# -- which rank has which GPU ----------------------------------------------------------------------------------------


def own_gpu() -> str | None:
    """A name of this rank's GPU that no other GPU has; None where it has none to itself, or there is no NCCL."""
    if not (torch.cuda.is_available() and distributed.is_nccl_available()):
        return None
    index = _local("LOCAL_RANK", 0)
    if index >= torch.cuda.device_count():
        return None
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return f"{socket.gethostname()}/{visible[index] if index < len(visible) else index}"


def between_gpus(gpus: Sequence[str | None]) -> str:
    """How tensors of GPUs travel: `nccl` where every rank has a GPU to itself, else through `host` memory.

    Args:
        gpus: what `own_gpu` says at each rank.
    """
    return "nccl" if None not in gpus and len({*gpus}) == len(gpus) else "host"


def gpu_of_this_rank() -> torch.device:
    """The GPU of this process: of the ranks on this machine, each has its own.

    It becomes torch's current device, too.

    Raises:
        ConfigError: there are fewer GPUs than ranks.
    """
    ranks = _local("LOCAL_WORLD_SIZE", 1)
    if ranks == 1:
        return torch.device("cuda")
    check_enough_gpus(ranks)
    device = torch.device("cuda", _local("LOCAL_RANK", 0))
    torch.cuda.set_device(device)
    return device


def _local(name: str, otherwise: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else otherwise
