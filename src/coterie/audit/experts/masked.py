"""The sums that colluding hosts open where pushes were masked: of everybody but themselves.

A host has what all other parties pushed to it. Their masks cancel with its own, so it adds its own masks to their
pushes and reads the sum of their integers. Hosts that work together add all of theirs, and the masks that they share
with each other cancel, too: what is left is the sum over the parties that are not among them. All others together are
left with one party's sum, which is what a plain push would have shown them.

Attempts to which only some parties contributed, as the others' budgets were spent, are left out: what is in a sum,
and how much noise, is another thing there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from coterie.audit.fitting import unfit
from coterie.audit.transcript import MaskedPart, ReceivedPush, Transcript
from coterie.errors import RoundError
from coterie.federation.experts.masking.grid import MaskGrid
from coterie.federation.experts.masking.streams import unmasked_sum

_Place = tuple[int, int, int]
"""Round, attempt, number of a part."""


def summed_parties(transcripts: Iterable[Transcript], owner: str) -> tuple[str, ...]:
    """Whose pushes are in every sum of ``owner``'s that those who recorded these open together."""
    some = list(transcripts)
    if not some or not some[0].masked:
        return (owner,)
    together = {transcript.party for transcript in some}
    return tuple(party for party in some[0].parties if party not in together)


def open_together(transcripts: Iterable[Transcript], owner: str) -> Iterator[ReceivedPush]:
    """The sums that those who recorded these open together, each under the name of the party that is attacked.

    Args:
        transcripts: of all who work together; everything that they received is read, whoever sent it.
        owner: the party that is attacked; in every sum.

    Raises:
        CheckpointError: ``transcript-damaged``: they add up to nothing that parties push.
    """
    some = [replace(transcript, sender=None) for transcript in transcripts]
    together = {transcript.party for transcript in some}
    others = [party for party in some[0].parties if party not in together]
    pushed: dict[_Place, dict[str, MaskedPart]] = {}
    for transcript in some:
        for each in transcript.masked_parts():
            if each.part.host in together and (each.peer not in together or each.grid is not None):
                # Those who work together need none of each other's pushes: their own masks stand in their place.
                pushed.setdefault((each.round, each.attempt, each.part.number), {})[each.peer] = each
    for place in sorted(pushed):
        known = pushed[place]
        # Else the attempt did not get so far, a recording stopped, or a party contributed no more.
        if known.keys() >= {*together, *others}:
            yield _opened(known, known[owner], _agreed(known))


def _agreed(known: Mapping[str, MaskedPart]) -> MaskGrid:
    """The one grid that all name."""
    grids = {each.grid.digest(): each.grid for each in known.values() if each.grid is not None}
    if len(grids) != 1 or {grid.parties for grid in grids.values()} != {len(known)}:
        raise unfit("What parties kept of their masks", "they name different grids, or one of other parties")
    return next(iter(grids.values()))


def _opened(known: Mapping[str, MaskedPart], push: MaskedPart, grid: MaskGrid) -> ReceivedPush:
    total = unmasked_sum({party: each.masked for party, each in known.items()}, grid.width)
    where = f"round {push.round}, attempt {push.attempt}"
    try:
        sums: dict[str, Tensor] = {
            name: grid.values(name, values, where) for name, values in push.part.split(total).items()
        }
    except RoundError:
        raise unfit(f"The sum of masked pushes in {where}", "it is larger than what parties may push") from None
    return ReceivedPush(push.peer, push.round, push.attempt, push.part, push.weights, sums)
