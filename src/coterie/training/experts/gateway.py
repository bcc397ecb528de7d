"""Several ranks that are one party: rank 0, its gateway, speaks to the federation, and tells the others what to do.

They know nothing of the other parties. Before each thing that all do together they hear what it is, and get what they
need for it: the trunk's bytes, loads, which experts are left out, and the digest of every layer, which they read from
the gateway's cache. The same calls then meet in `Ranks`, as in a run of one party alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from coterie.dp.accounting.ledger import LedgerHead
from coterie.dp.balance import Balancer
from coterie.dp.party_session import Contributor
from coterie.errors import CoterieError, RankError
from coterie.federation.cancel import CancelToken
from coterie.federation.experts.masking.grid import MaskGrid
from coterie.federation.experts.masking.session import Held
from coterie.models import seam
from coterie.models.spread.beside import follow
from coterie.models.streaming.cache import PinnedFiles
from coterie.models.streaming.streamer import LayerStreamer
from coterie.ranks.ranks import Ranks
from coterie.training.experts.contribution import Contribution, Sums
from coterie.training.experts.held_sums import Asked, HeldSums, SumsAtOwners
from coterie.training.party.inputs import PartyInputs, trunk_tensors

NEXT = "what comes next"
OPEN, LEDGER, SUMS, FORGET, CLOSE, END = "open", "the ledger", "sums", "forget", "close", "the end"
HELD, PART = "who has which sums", "a part of the sums"
_AT_ONCE = 64 * 2**20
"""Bytes that are handed out at once."""


class GatewayContribution:
    """What a party of several ranks adds to a round, at its gateway; see `Contribution`.

    Args:
        own: the gateway's part, which shares each lot with the other ranks.
        inputs: what the party brings; with its trunk the other ranks compute.
        run: name of the party's run in its ledger, once it has joined.
    """

    def __init__(self, own: Contribution, inputs: PartyInputs, run: Callable[[], str]) -> None:
        self._own, self._ranks, self._inputs, self._run = own, inputs.ranks, inputs, run
        # Where experts are spread the gateway borrows its own rows alone, as the other ranks do.
        self._rows = SharedLayers(inputs) if inputs.experts_over > 1 else None
        self._known = False  # the other ranks have the frozen trunk
        self._listening = True

    @property
    def balancer(self) -> Balancer | None:
        return self._own.balancer

    def open(self, streamer: LayerStreamer) -> None:
        digests = streamer.digests()
        layers = [digests[index] for index in sorted(digests)]
        if self._rows is not None:
            self._rows.pin(layers)
        with self._joint(OPEN, **self._setting(), layers=layers):
            self._hand_out()
            self._own.open(self._lending(streamer))

    def sums(self, round_no: int, pins: Mapping[str, str], streamer: LayerStreamer, cancel: CancelToken) -> Sums:
        lending = self._lending(streamer)
        try:
            with self._joint(SUMS, round=round_no, pins=dict(pins)):
                sums = self._own.sums(round_no, pins, lending, cancel)
        finally:
            lending.drop_all()
        own = sums.values
        if not isinstance(own, HeldSums):
            return sums
        with self._joint(HELD):
            listed = self._ranks.together(HELD, own.listed)
        return replace(sums, values=SumsAtOwners(own, self._ranks, listed, self._asking))

    def share(
        self, round_no: int, pins: Mapping[str, str], streamer: LayerStreamer, cancel: CancelToken
    ) -> HeldSums | None:
        return self._own.share(round_no, pins, self._lending(streamer), cancel)

    def nothing(self) -> Sums:
        return self._own.nothing()

    def grid(self, parties: int) -> MaskGrid:
        return self._own.grid(parties)

    def outlook(self, round_no: int, pins: Mapping[str, str]) -> Held:
        return self._own.outlook(round_no, pins)

    def applied(self, round_no: int, newest: int) -> None:
        with self._joint(FORGET, round=round_no, newest=newest):
            self._own.applied(round_no, newest)

    def check_not_behind(self, received: int) -> None:
        self._own.check_not_behind(received)

    def open_ledger(self, streamer: LayerStreamer) -> Contributor | None:
        with self._joint(LEDGER, **self._setting()):
            self._hand_out()
            return self._own.open_ledger(self._lending(streamer))

    def ledger_head(self) -> LedgerHead | None:
        return self._own.ledger_head()

    def expect(self, head: LedgerHead | None) -> None:
        self._known = False  # a checkpoint was loaded
        self._own.expect(head)

    def privacy(self) -> dict[str, object] | None:
        return self._own.privacy()

    def statement(self) -> str:
        return self._own.statement()

    def close(self) -> None:
        try:
            if self._listening:
                self._tell(CLOSE)
        except RankError:
            pass  # what the others held went with them
        finally:
            self._own.close()
            if self._rows is not None:
                self._rows.close()

    def _lending(self, streamer: LayerStreamer) -> LayerStreamer:
        return streamer if self._rows is None else self._rows.streamer

    @contextmanager
    def _joint(self, what: str, **content: Any) -> Iterator[None]:
        """Inside, the other ranks do the same.

        Where this ends with an error that they may not have heard, they are not there for anything else.
        """
        self._listening = False
        self._tell(what, **content)
        try:
            yield
        except CoterieError as error:
            self._listening = not isinstance(error, RankError)
            raise
        self._listening = True

    def _asking(self, asked: Sequence[Asked], dtype: torch.dtype) -> AbstractContextManager[None]:
        """Inside, the other ranks bring what they are asked for."""
        return self._joint(PART, asked=[list(each) for each in asked], dtype=str(dtype))

    def _tell(self, what: str, **content: Any) -> None:
        self._ranks.tell(NEXT, lambda: {"what": what, **content}, patient=True)

    def _setting(self) -> dict[str, Any]:
        balancer = self._own.balancer
        released = balancer is not None and balancer.balance.releases_loads
        return {
            "run": self._run(),
            "all": not self._known,
            "masked": [list(experts) for _, experts in sorted(seam.masked(self._inputs.model).items())],
            "loads": balancer.public().tolist() if balancer is not None and released else None,
        }

    def _hand_out(self) -> None:
        hand_out(self._ranks, moved_tensors(self._inputs.model, everything=not self._known))
        follow(self._inputs.lots_model, self._inputs.model)
        self._known = True


class SharedLayers:
    """The gateway's cache files as a rank of the party borrows from them: whole layers, or its own experts' rows.

    Args:
        inputs: what the party brings.

    Attributes:
        streamer: lends them.
    """

    def __init__(self, inputs: PartyInputs) -> None:
        folder, layers = inputs.cache_folder, seam.expert_layers(inputs.model)
        if folder is None:
            raise RuntimeError("a rank reads layers from the gateway's files")
        over = inputs.experts_over
        self._files = PinnedFiles(folder, len(layers), inputs.ranks.rank % over, over)
        self.streamer = LayerStreamer(self._files, inputs.device, next(iter(layers[0].parameters().values())).dtype)

    def pin(self, layers: Sequence[Sequence[str]]) -> None:
        """From now on layers have these digests."""
        self.streamer.drop_all()
        self._files.pin(dict(enumerate(layers)))

    def close(self) -> None:
        self.streamer.close()


def dismiss(ranks: Ranks) -> None:
    """Let the other ranks of a party end."""
    ranks.tell(NEXT, lambda: {"what": END}, patient=True)


def moved_tensors(model: nn.Module, *, everything: bool) -> list[Tensor]:
    """What the gateway has of a trunk and the other ranks lack: all of it, or what may have changed since."""
    trunk = trunk_tensors(model)
    return [
        tensor
        for _, tensor in sorted(trunk.items())
        if everything or tensor.requires_grad or not isinstance(tensor, nn.Parameter)
    ]


@torch.no_grad()
def hand_out(ranks: Ranks, tensors: Sequence[Tensor]) -> None:
    """Write rank 0's bytes of some tensors over those of every rank."""
    some: list[Tensor] = []
    for number, tensor in enumerate(tensors, 1):
        some.append(tensor)
        if number == len(tensors) or sum(each.nbytes for each in some) >= _AT_ONCE:
            found = [each.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8) for each in some]
            ranks.hand_out(found, 0)
            for each, raw in zip(some, found, strict=True):
                if ranks.rank > 0:
                    each.copy_(raw.view(each.dtype).view(each.shape))
            some = []
