"""What the tensors of this process take, whoever holds them."""

from __future__ import annotations

import gc
import sys
import threading
import time

import torch

LISTING = threading.Lock()


def live_bytes() -> int:
    """Of every tensor that Python can reach; what several share counts once.

    Python ends a thread that is just making a tuple with an error where somebody else refers to it. So no thread may
    run while all objects are listed, and who lists next must find the usual switching of threads.
    """
    with LISTING:
        usual = sys.getswitchinterval()
        sys.setswitchinterval(60.0)
        try:
            time.sleep(0.05)  # threads that wait for their turn begin to wait that long
            tensors = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
        finally:
            sys.setswitchinterval(usual)
    # A sparse tensor, which another test of the process may have left, has no storage of its own; its parts do.
    dense = [each for each in tensors if each.device.type == "cpu" and each.layout == torch.strided]
    storages = [each.untyped_storage() for each in dense]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
