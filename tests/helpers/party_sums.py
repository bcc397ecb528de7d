"""What the sums of a party take, in one process and at its ranks, beside what is planned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import Tensor

from coterie.dp.accounting.lots import Lot
from coterie.dp.lot_sums import LotSums
from coterie.dp.ownership import Ownership
from coterie.federation.cancel import NEVER
from coterie.models.seam import expert_layers
from coterie.models.streaming.streamer import LayerStreamer
from coterie.ranks.ranks import Alone, Ranks
from coterie.training.experts import contribution
from coterie.training.experts.contribution import Contribution
from coterie.training.experts.gateway import dismiss
from coterie.training.experts.held_sums import HeldSums, to_owners
from coterie.training.party.helping import HelpingRank
from coterie.training.party.inputs import PartyInputs
from coterie.training.planning.allocations import peak_bytes
from coterie.training.planning.party_memory import PartyMemory, SumBytes
from coterie.training.planning.plan import hosted_values, shape_of
from coterie.training.planning.rank_memory import held_of
from helpers.party_tasks import SEVERAL, lending, parts_of, tiny_experts

_compute = LotSums.compute


def allocated(folder: Path, kinds: Sequence[tuple[str, Mapping[str, Any]]]) -> list[tuple[int, int]]:
    """Most bytes that torch allocates for one round's sums in one process, for each kind, and what is planned."""
    found = []
    for number, (kind, changes) in enumerate(kinds):
        inputs = parts_of(Alone(), folder / str(number), kind, changes)[SEVERAL]
        with lending(inputs, tiny_experts(**changes["sizes"])) as (made, streamer):
            made.sums(1, {"weights": "00"}, streamer, NEVER)  # what is built once is there

            def again(made: Contribution = made, streamer: LayerStreamer = streamer) -> None:
                made.sums(2, {"weights": "01"}, streamer, NEVER)

            found.append((peak_bytes(again, inputs.device), memory_of(inputs).lot(1)))
    return found


def summed(ranks: Ranks, folder: Path, kinds: Sequence[tuple[str, Mapping[str, Any]]]) -> list[list[int]]:
    """Bytes of this rank's sums where a lot is computed, and of those that stay with it until they are pushed, for
    each kind; and the most of both that is planned."""
    found = []
    for number, (kind, changes) in enumerate(kinds):
        inputs = parts_of(ranks, folder / str(number), kind, changes)[SEVERAL]
        computed: list[int] = []

        def weighed(owners: Ownership, totals: dict[str, Tensor], into: list[int] = computed) -> None:
            into.append(sum(value.nbytes for value in totals.values()))
            to_owners(owners, totals)

        def compute(lot_sums: LotSums, lot: Lot, name: str, into: list[int] = computed) -> dict[str, Tensor]:
            sums = _compute(lot_sums, lot, name)
            into.append(sum(value.nbytes for value in sums.values()))
            return sums

        with (
            patch.object(contribution, "to_owners", weighed),
            patch.object(LotSums, "compute", compute),
            patch.object(HeldSums, "__init__", autospec=True, side_effect=HeldSums.__init__) as held,
        ):
            if ranks.rank > 0:
                HelpingRank(inputs).run()
            else:
                with lending(inputs, tiny_experts()) as (made, streamer):
                    made.sums(1, {"weights": "00"}, streamer, NEVER)
                dismiss(ranks)
        kept = max(sum(value.nbytes for value in call.args[1].values()) for call in held.call_args_list)
        memory, over = memory_of(inputs), inputs.experts_over
        planned = (
            memory.sums.computing * memory.held.kept(over),
            memory.sums.kept * memory.held.owned(ranks.world, over),
        )
        found.append([*computed, kept, *planned])
    return found


def memory_of(inputs: PartyInputs) -> PartyMemory:
    """What is planned for a party of a test."""
    federation, model, privacy = inputs.federation, inputs.model, inputs.privacy
    layers = expert_layers(model)
    own = sum(hosted_values(layers, inputs.placement, inputs.party))
    sums = SumBytes()
    if privacy is not None:
        exact, masked = privacy.spec.isolation != "fast", federation.aggregation == "masked"
        sums = SumBytes.clipped(exact=exact, users=False, masked=masked)
    shape = shape_of(federation, model, layers, own)
    return PartyMemory(shape, held_of(model, 4), layers[0].num_experts, sums, privacy is not None)
