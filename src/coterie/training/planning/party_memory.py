"""What the ranks of one party hold: its gateway, which stores what the party hosts, and the others, which compute.

Every rank has the trunk, is lent two layers at a time, whole or the rows of its own experts, and adds up sums. Not
all is there at once: layers go when the lot is done, sums of values that another rank owns go before any is noised,
and hosts make a gradient of what was pushed when the sums are gone. Counted is the moment with the most, in bytes of
state; activations, and rows that book-keeping keeps, come on top. `coterie.training.planning.closed_form` adds up
what a federation's party holds at any moment instead.
"""

from __future__ import annotations

from dataclasses import dataclass

from coterie.training.planning.closed_form import FLOAT32, Adapters, Need, Shape
from coterie.training.planning.rank_memory import MOST, Held

INT64 = 8


@dataclass(frozen=True)
class SumBytes:
    """Bytes of one value of a party's sums.

    Attributes:
        computing: while a lot is computed.
        noising: while its owner noises it.
        kept: until it is pushed. What is spooled is written from these bytes.
    """

    computing: int = FLOAT32
    noising: int = FLOAT32
    kept: int = FLOAT32

    @classmethod
    def clipped(cls, *, exact: bool, users: bool, masked: bool) -> SumBytes:
        """Under a budget.

        Args:
            exact: `isolation: exact`: integers, and one record's gradient beside them.
            users: `unit: user`: one user's gradient beside them.
            masked: noised sums stay integers. Otherwise they are float32, and lie over clipped ones that are.
        """
        sums, kept = INT64 if exact else FLOAT32, INT64 if masked else FLOAT32
        return cls(sums + (FLOAT32 if exact or users else 0), sums + kept if exact or masked else kept, kept)


@dataclass(frozen=True)
class PartyMemory:
    """A party of the `experts` exchange.

    Attributes:
        shape: sizes of model and federation, with what this party hosts.
        held: the values that are trained: what a rank adds up of them, and what it owns.
        experts_in_layer: experts of a layer; of the one with the fewest.
        sums: see `SumBytes`.
        private: within a budget, where sums are formed a matrix at a time; otherwise a layer at a time.
        adapters: where these alone are trained.
        cached: one process keeps fetched layers in memory. Those of several ranks lie on disk.
        on_gpu: each rank computes on a GPU; sums and what is stepped lie beside it.
    """

    shape: Shape
    held: Held
    experts_in_layer: int
    sums: SumBytes
    private: bool
    adapters: Adapters | None = None
    cached: bool = True
    on_gpu: bool = False

    def alone(self) -> Need:
        """One process: most that it holds where it computes, and most beside that; not at the same moment."""
        sums, values = self.sums, self.held.kept()
        beside = max(sums.computing * values, sums.noising * values, *self._pushing(values))
        return Need(self.device(), self._stored() + beside)

    def device(self, over: int = 1) -> int:
        """Bytes of the gateway where it computes; the other ranks hold no more there.

        Args:
            over: ranks that hold the experts of a layer together; the gateway evaluates with whole layers.
        """
        return self._trunk(over) + max(self._lent(over) + self._made(over), self._lent())

    def gateway(self, world: int = 1, over: int = 1) -> int:
        """Bytes of rank 0, where all lies in one memory.

        Args:
            world: ranks of the party.
            over: of these that hold the experts of a layer together; 1: each borrows whole layers.
        """
        cached = world == 1 and self.cached
        lent = 0 if cached else self._lent(over)
        evaluating = 0 if cached else self._lent()  # rank 0 alone evaluates, with whole layers
        moments = (lent + self.lot(world, over), evaluating, *self._pushing(self.held.owned(world, over)))
        return self._trunk(over) + self._stored(world) + max(moments)

    def other(self, world: int, over: int = 1) -> int:
        """Bytes of any other rank."""
        return self._trunk(over) + self._lent(over) + self.lot(world, over)

    def lot(self, world: int, over: int = 1) -> int:
        """Bytes of sums at a rank while a lot is computed, or noised, and of what is made on the way to them."""
        computing = self.sums.computing * self.held.kept(over) + self._made(over)
        return max(computing, self.sums.noising * self.held.owned(world, over))

    def together(self, world: int, over: int = 1) -> int:
        """Bytes of all ranks; what layers take on disk is not among them."""
        return self.gateway(world, over) + (world - 1) * self.other(world, over)

    def over_devices(self) -> tuple[tuple[int, int], ...]:
        """Rank and group sizes of 1, 2, ... ranks that borrow whole layers."""
        return tuple((world, 1) for world in range(1, MOST + 1))

    def over_experts(self) -> tuple[tuple[int, int], ...]:
        """The same of ranks that hold the experts of a layer together."""
        return tuple((world, world) for world in range(1, min(MOST, self.experts_in_layer) + 1))

    def _rows(self, values: int, over: int) -> int:
        """Of the stacked values of a layer's experts, those of the rank with the most."""
        return values * -(-self.experts_in_layer // over) // self.experts_in_layer

    def _trunk(self, over: int = 1) -> int:
        """The trunk's weights and factors; adapters, and once more those of own experts, where these are spread."""
        own = 0 if over == 1 or self.adapters is None else sum(self.held.experts_at(over).values())
        adapters = 0 if self.adapters is None else self.adapters.trained
        return self.shape.compute_bytes * self.shape.kept_trunk + FLOAT32 * (adapters + own)

    def _lent(self, over: int = 1) -> int:
        """Two layers, in the narrower of the formats that they come and are computed in."""
        narrow = min(self.shape.wire_bytes, self.shape.compute_bytes)
        return 2 * narrow * self._rows(self.shape.experts // self.shape.layers, over)

    def _made(self, over: int = 1) -> int:
        """Gradients on their way to the sums."""
        shape = self.shape
        if self.adapters is not None:
            narrow = shape.wire_bytes < shape.compute_bytes
            widened = shape.compute_bytes * self.adapters.matrix if narrow else 0
            return FLOAT32 * self.held.kept(over) // shape.layers + widened
        if self.private:
            return FLOAT32 * max(self._rows(shape.matrix, over), shape.largest_trunk)
        return shape.compute_bytes * (self._rows(shape.experts // shape.layers, over) + shape.trunk)

    def _stored(self, world: int = 1) -> int:
        """What the gateway hosts and steps, without gradients: weights, moments, masters, bytes that are served."""
        shape, adapters = self.shape, self.adapters
        cache = shape.wire_bytes * shape.experts if world == 1 and self.cached else 0
        if adapters is not None:
            stored, own = 3 * FLOAT32 * adapters.stored, 2 * FLOAT32 * adapters.own
            return stored + own + shape.wire_bytes * adapters.stored + cache
        hosted = (shape.trained_bytes - FLOAT32) * shape.hosted
        if shape.shared_trunk:
            trunk = 3 * FLOAT32 * self._trunk_share  # kept in float32
        else:
            beside = 0 if self.on_gpu else shape.compute_bytes  # on a processor the model's own
            trunk = (shape.trained_bytes - FLOAT32 - beside) * shape.trunk
        return hosted + trunk + shape.wire_bytes * (shape.hosted + self._trunk_share) + cache

    def _pushing(self, kept: int) -> tuple[int, int]:
        """When all pushes are in, and when the stored parts are stepped, with gradients, and sums of what is own."""
        shape, adapters = self.shape, self.adapters
        stored = adapters.stored if adapters is not None else shape.hosted + self._trunk_share
        own = adapters.own if adapters is not None else 0 if shape.shared_trunk else shape.trunk
        staged = shape.push_bytes * shape.parties * stored
        return staged + self.sums.kept * kept, staged + FLOAT32 * stored + (FLOAT32 + self.sums.kept) * own

    @property
    def _trunk_share(self) -> int:
        return self.shape.trunk // self.shape.parties if self.shape.shared_trunk else 0
