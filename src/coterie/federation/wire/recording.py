"""Messages kept for an audit that all parties have agreed on, until the agreed round or size is reached.

What other parties send to this one is recorded in the gate (`coterie.federation.wire.gate`), where every message of
theirs
arrives: each as it came, before anybody looks at it. So a transcript holds what this party received and nothing it
could not know: beside it only what the party added to its own masked pushes (`coterie.training.party.own_masks`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coterie.errors import CheckpointError
from coterie.federation.wire.frame import FrameType
from coterie.federation.wire.frame_log import FrameLog
from coterie.federation.wire.transport import Address, Lane, Message

TRANSCRIPT, ANSWERS = "transcript", "transcript-answers"
"""Folders in the private part of a party's run folder: what others sent, and the owner's own key to what it sent."""
OWN_MASKS = "own-masks"
"""Kind of entry in a transcript that the party did not receive: what it added to its own masked push."""
STOPPED = "stopped"
"""Name and kind of the entry that says in which round a recording stopped."""

log = logging.getLogger(__name__)

_FOR_THE_END = 4096
"""Bytes that are always left for that entry."""
_MOST_EARLY = 256


class Recorder:
    """Writes entries to a folder; training goes on where it cannot.

    Args:
        folder: made when the recording begins.
        names: what entries are filed under.
        rounds: the last round that is recorded; None: all.
        limit: most bytes on the disk.

    All methods can be called from any thread.
    """

    def __init__(self, folder: Path, names: Sequence[str], rounds: int | None, limit: int) -> None:
        self._folder, self._names, self._rounds, self._limit = folder, (*names, STOPPED), rounds, limit
        self._lock = threading.Lock()
        self._log: FrameLog | None = None
        self._early: list[tuple[str, FrameType, Lane, Message]] = []
        self._over = False

    def open(self, facts: Mapping[str, Any]) -> None:
        """The run has a name: begin to write. Can be repeated.

        Args:
            facts: what all entries have in common; ``run`` is the run's name.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        with self._lock:
            if self._log is not None or self._over:
                return
            self._log = opened = FrameLog(self._folder, {"rounds": self._rounds, **facts}, self._names, self._limit)
            early, self._early = self._early, []
            for each in early:
                self._write(opened, *each)

    def wants(self, round_no: int) -> bool:
        """Whether messages of a round would be recorded, for what is costly to make."""
        return not self._over and (self._rounds is None or round_no <= self._rounds)

    def keep(self, name: str, frame_type: FrameType, lane: Lane, message: Message) -> None:
        """Record a message."""
        if not self.wants(message.address.round):
            return
        with self._lock:
            if self._over:
                return
            if self._log is not None:
                self._write(self._log, name, frame_type, lane, message)
            else:  # of a peer that heard of the run before us; it waits until we have, too
                self._early.append((name, frame_type, lane, message))
                if len(self._early) > _MOST_EARLY:
                    log.warning("%s does not begin: too much came before the run had a name", self._folder.name)
                    self._early, self._over = [], True

    def close(self) -> None:
        """Make everything durable; nothing is recorded after it."""
        with self._lock:
            self._over = True
            if self._log is not None:
                self._log.close()
                self._log = None

    def _write(self, opened: FrameLog, name: str, frame_type: FrameType, lane: Lane, message: Message) -> None:
        why = f"it would grow beyond {self._limit} bytes"
        try:
            whole = opened.append(name, frame_type, lane, message, spare=_FOR_THE_END)
            if not whole:
                end = Message(STOPPED, Address(round=message.address.round))
                opened.append(STOPPED, FrameType.ONE_WAY, Lane.CONTROL, end)
        except CheckpointError as error:
            whole, why = False, error.message
        if not whole:
            log.warning("%s stops at round %d: %s; training goes on", self._folder.name, message.address.round, why)
            self._over = True
