"""Points at which a process of coterie kills itself (-9).

The product knows nothing of this: functions are wrapped from outside, so that the process ends before or after the
``nth`` call.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

PARTY = {
    "before a checkpoint is loaded": ("coterie.training.party.actor", "PartyActor", "load", "before", ""),
    "before a round is computed": ("coterie.training.party.actor", "PartyActor", "compute", "before", ""),
    "after a round is computed, before it is reported": (
        "coterie.training.party.actor",
        "PartyActor",
        "compute",
        "after",
        "",
    ),
    "after the commit, before the step": ("coterie.training.party.actor", "PartyActor", "step", "before", ""),
    "after the step": ("coterie.training.party.actor", "PartyActor", "step", "after", ""),
    "before a checkpoint is written": ("coterie.checkpoints", "CheckpointStore", "write", "before", ""),
    "between two files of a checkpoint": (
        "coterie.checkpoints",
        "",
        "save_tensors",
        "after",
        "trunk.safetensors",
    ),
    "after all files of a checkpoint, before its manifest": (
        "coterie.checkpoints",
        "",
        "save_tensors",
        "after",
        "hosted.safetensors",
    ),
    "after a checkpoint's manifest, before its name": ("coterie.storage", "", "_sync_tree", "after", ".part"),
    "after a checkpoint has its name": ("coterie.checkpoints", "CheckpointStore", "write", "after", ""),
    "while an old checkpoint goes": ("shutil", "", "rmtree", "before", ".old.part"),
}
MASKED = {
    "before it says what it holds of the round": (
        "coterie.federation.experts.masking.board", "MaskAgreement", "agree", "before", "",
    ),
    "after keys were agreed on, before the lot": (
        "coterie.federation.experts.masking.board", "MaskAgreement", "agree", "after", "",
    ),
    "after the noised integers were spooled, before they are counted": (
        "coterie.dp.accounting.ledger", "Ledger", "record_release", "before", "",
    ),
    "after they were counted, before they are masked": (
        "coterie.dp.accounting.ledger", "Ledger", "record_release", "after", "",
    ),
    "after the digests of masked pushes, before their values": (
        "coterie.federation.experts.masking.board", "MaskAgreement", "commit", "after", "",
    ),
    "after masked values left, before the sum is looked at": (
        "coterie.federation.experts.host", "ExpertsHost", "check_masked", "before", "",
    ),
    "after the sum was looked at": ("coterie.federation.experts.host", "ExpertsHost", "check_masked", "after", ""),
}  # fmt: skip
COORDINATOR = {
    "before a decision is written": ("coterie.federation.rounds.journal", "Journal", "_write", "before", ""),
    "after a decision is written, before anybody is told": (
        "coterie.federation.rounds.journal", "Journal", "_write", "after", "",
    ),
    "before everybody is told": ("coterie.federation.rounds.coordinator", "Coordinator", "_broadcast", "before", ""),
}  # fmt: skip
POINTS = {**PARTY, **MASKED, **COORDINATOR}


def arm(point: str, nth: int) -> None:
    """Wrap the function of a point."""
    module_name, owner, name, when, ending = POINTS[point]
    module = __import__(module_name, fromlist=["_"])
    holder = getattr(module, owner) if owner else module
    function: Callable[..., Any] = getattr(holder, name)
    calls = 0

    def dying(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        mine = not ending or str(arguments[0]).endswith(ending)
        calls += mine
        if mine and calls == nth and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments, **options)
        if mine and calls == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(holder, name, dying)


def note_streams() -> None:
    """Append to a file of the working folder, for every part that is masked, the hash of each key that its streams
    are made from, and that of what came out."""
    from coterie.federation.experts.masking import streams

    derive, mask = streams.derive, streams.Masks.mask
    here = threading.local()  # parts are masked in several threads

    def noted(secret: bytes, session: bytes, *, info: str) -> bytes:
        key = derive(secret, session, info=info)
        here.keys = [*getattr(here, "keys", []), hashlib.sha256(key).hexdigest()]
        return key

    def masked(masks: Any, part: int, integers: Any, width: int) -> Any:
        here.keys = []
        out = mask(masks, part, integers, width)
        value = hashlib.sha256(out.numpy().tobytes()).hexdigest()
        file = os.open("streams.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(file, "".join(f"{key} {value}\n" for key in here.keys).encode())
        os.close(file)
        return out

    streams.derive, streams.Masks.mask = noted, masked


def be_busy(nth: int, seconds: int = 10) -> None:
    """In the ``nth`` computation, let no other Python of this process run for a while."""
    from coterie.training.party.actor import PartyActor

    compute, calls = PartyActor.compute, 0

    def busy(*arguments: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == nth:
            print("busy from now on", flush=True)
            ctypes.PyDLL(None).sleep(seconds)
            print("no longer busy", flush=True)
        compute(*arguments, **options)

    PartyActor.compute = busy  # type: ignore[method-assign]


def jump(nth: int, days: int) -> None:
    """After the ``nth`` computation the clock on the wall shows another day."""
    from coterie.training.party.actor import PartyActor

    compute, wall, calls = PartyActor.compute, time.time, 0

    def counted(*arguments: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        compute(*arguments, **options)

    PartyActor.compute = counted  # type: ignore[method-assign]
    time.time = lambda: wall() + (86400.0 * days if calls >= nth else 0.0)


def prepare(point: str, nth: int) -> None:
    """`arm`, `be_busy` or `jump`."""
    if point == "busy":
        be_busy(nth)
    elif point.startswith("clock "):
        jump(nth, int(point.removeprefix("clock ")))
    else:
        if point in MASKED:
            note_streams()
        arm(point, nth)
