"""What a party adds to its own masked pushes, kept beside what it received: with it, an audit opens what it could.

The sum of the others' pushes is readable to whoever takes its own out of it. Their masks and this party's cancel, so
what it takes is its own masks alone: no value of its own sums is written here. They open this party's pushes to
whoever also has what the hosts recorded, so they exist only where all parties agreed to record.
"""

from __future__ import annotations

from torch import Tensor

from coterie.federation.experts.masking.grid import MaskGrid
from coterie.federation.rounds.attempt import Attempt
from coterie.federation.wire.frame import FrameType
from coterie.federation.wire.recording import OWN_MASKS, Recorder
from coterie.federation.wire.transport import Lane, Message


class OwnMasks:
    """Records one party's masks.

    Args:
        recorder: of what it receives.
        party: its name, under which they are filed.
    """

    def __init__(self, recorder: Recorder, party: str) -> None:
        self._recorder, self._party = recorder, party

    def wants(self, attempt: Attempt) -> bool:
        """Whether the round is recorded at all."""
        return self._recorder.wants(attempt.round)

    def keep(self, attempt: Attempt, part: int, grid: MaskGrid, masks: Tensor) -> None:
        """One part of a push.

        Args:
            attempt: of the push.
            part: its number.
            grid: that all parties' integers lie on.
            masks: uint8 [V * width], as `coterie.federation.experts.masking.streams.masks_of` gives them.
        """
        message = Message(OWN_MASKS, attempt.address(part=part), {"grid": grid.to_json()}, (masks,))
        self._recorder.keep(self._party, FrameType.ONE_WAY, Lane.CONTROL, message)
