"""The owner's side of a party in the `experts` exchange: weights come to its data, only whole-layer sums go back.

One attempt at a round:

1. freeze the own parts, so that every owner sees the same weights, and learn everybody's versions;
2. start the fetch (whole layers in a fixed order) and compute on what has arrived, one layer on the device at a time;
3. ask `Contribution` for the sums: with privacy they are clipped, noised, spooled and in the ledger by then;
4. declare and push. Nothing about the text shows in which messages cross, how many, or how large they are.
"""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn

from coterie.config import FederationConfig, PrivacyRules
from coterie.dp.noise.pooled import CONTRIBUTORS
from coterie.federation.cancel import CancelToken
from coterie.federation.experts.fetch_weights import WeightFetcher
from coterie.federation.experts.host import ExpertsHost
from coterie.federation.experts.owner import Mirror, SumSender, model_version
from coterie.federation.experts.parts import Part, present_parts
from coterie.federation.rounds.attempt import Attempt
from coterie.federation.rounds.state import State
from coterie.federation.wire.transport import Transport
from coterie.models import seam
from coterie.models.lora import expert_adapters, factors_stay_apart
from coterie.models.streaming.cache import FileStore, LayerWeights, MemoryStore, WeightCache
from coterie.models.streaming.heap import give_back_freed
from coterie.models.streaming.streamer import HostGradients, LayerStreamer, StreamedExperts
from coterie.training.experts.contribution import DRAW, Contribution, Sums
from coterie.training.experts.masked_push import MaskedPush
from coterie.training.experts.shared_trunk import TrunkCopy
from coterie.training.experts.sum_bytes import SumEncoder


class ExpertsOwner:
    """Mirrors everybody's parts, computes on them, and brings this party's sums to their hosts.

    Args:
        federation: shared settings.
        model: partial model; a shared trunk is overwritten by what the hosts serve.
        parts: every part of it.
        host: this party's host side; its parts are read, and take their sums, without a wire.
        transport: to the others.
        contribution: see `Contribution`.
        copy: this party's copy of a shared trunk.
        cache_dir: where fetched layers lie on disk; None keeps them in host memory.
        device: where experts compute.
        roster: hash of the signed roster; a release made under another one is burned.
        masked: brings masked sums; None where hosts read each party's.
        shares: ranks of the party that share the experts of a layer.

    Attributes:
        streamer: lends layers to the device.
        seconds: what the last attempt took: ``agree`` (freeze, digests, a shared trunk), ``fetch`` (all layers,
            beside the computing), ``waited_first`` and ``waited_later`` (computing stood still for the first layer,
            for the others on their first use), ``lot`` (computing with its waits, noise, spool), ``push``. Never
            sent.
    """

    def __init__(  # noqa: PLR0913 - what was agreed and what is needed, each by its name
        self,
        federation: FederationConfig,
        model: nn.Module,
        parts: Sequence[Part],
        host: ExpertsHost,
        transport: Transport,
        contribution: Contribution,
        copy: TrunkCopy,
        *,
        cache_dir: Path | None,
        device: torch.device,
        roster: str = "",
        masked: MaskedPush | None = None,
        shares: int = 1,
    ) -> None:
        self._federation, self._model, self._parts, self._host = federation, model, tuple(parts), host
        self._contribution, self._roster, self._masked = contribution, roster, masked
        # Where everybody sends spooled bytes, a second attempt at a round brings the same ones and hosts keep what
        # they have.
        self._repeatable = (
            isinstance(federation.privacy, PrivacyRules) and not federation.mixed_privacy and masked is None
        )
        weights_dtype, push_dtype = getattr(torch, federation.weights_dtype), getattr(torch, federation.push_dtype)
        self._encoder = SumEncoder(parts, push_dtype)
        layers = seam.expert_layers(model)
        store = FileStore(cache_dir) if cache_dir is not None else MemoryStore(pinned=device.type == "cuda")
        self._mirror = Mirror(
            parts,
            [layer.num_experts for layer in layers],
            WeightCache(store, len(layers), shares),
            host,
            WeightFetcher(transport, deadline_s=federation.deadline_s, value_limit=federation.value_limit),
            weights_dtype,
            set_trunk=copy.take,
            wait_s=federation.deadline_s,
        )
        compute_dtype = next(iter(layers[0].parameters().values())).dtype
        self.streamer = LayerStreamer(self._mirror, device, compute_dtype)
        self.sender = SumSender(transport, host, parts, deadline_s=federation.deadline_s)
        self._cancelled = False
        self.seconds: dict[str, float] = {}

    def compute(self, state: State, cancel: CancelToken, own: Collection[str] = ()) -> Sums:
        """One attempt: fetch, compute, push. Changes no parameter but a shared trunk, which is fetched.

        Args:
            state: names the attempt.
            cancel: ends it.
            own: trunk parameters that this party steps by itself.

        Returns:
            This party's sums of these.
        """
        self._cancelled = False
        began = time.monotonic()
        attempt = Attempt(state.round, state.attempt)
        versions = self._refresh(attempt, state, cancel)
        self._contribution.open(self.streamer)
        give_back_freed()  # of the comparison before the first lot
        self._contribution.check_not_behind(self._mirror.received)
        pins = {
            "weights": model_version(versions),
            "agreement": self._federation.content_hash(),
            "roster": self._roster,
            "epoch": str(state.epoch),
        }

        both = CancelToken(lambda: cancel.cancelled or self._cancelled)
        masks = None if self._masked is None else self._masked.agreed(self._contribution, state, pins, both)
        with masks or nullcontext() as session:
            if session is not None:
                pins |= {DRAW: session.draw, CONTRIBUTORS: ",".join(session.contributors)}
            agreed = time.monotonic()
            self.streamer.watch()
            if self._masked is not None and (session is None or self._host.me not in session.contributors):
                sums = self._contribution.nothing()
            else:
                sums = self._contribution.sums(state.round, pins, self.streamer, both)
            self.streamer.drop_all()
            self._mirror.join()
            computed = time.monotonic()
            both.check()
            if self._masked is not None and session is not None:
                self._masked.push(sums, session, self.sender, attempt, versions, both)
            else:
                self._push_plain(sums, attempt, versions)
        self.seconds = self._split_time(agreed - began, computed - agreed, time.monotonic() - computed)
        return sums.only(own)

    def _push_plain(self, sums: Sums, attempt: Attempt, versions: Mapping[int, str]) -> None:
        values, release = sums.values, sums.digest or _name_of(attempt)
        self.sender.declare(attempt, contributes=values is not None, weight=sums.weight)
        if values is not None:
            limit, me = self._host.push_limit, self._host.me
            self._encoder.check(values, release, lambda name: limit(me, name), str(attempt))
            self.sender.push(attempt, lambda part: self._encoder.encode(part, values, release), versions)

    def _split_time(self, agree_s: float, lot_s: float, push_s: float) -> dict[str, float]:
        waited = self.streamer.waited
        later = sum(seconds for layer, seconds in waited.items() if layer > 0)
        return {
            "agree_seconds": agree_s,
            "fetch_seconds": self._mirror.fetch_s,
            "waited_first_seconds": waited.get(0, 0.0),
            "waited_later_seconds": later,
            "lot_seconds": lot_s,
            "push_seconds": push_s,
        }

    def drop(self) -> None:
        """Forget an attempt."""
        self.streamer.drop_all()

    @contextmanager
    def evaluating(self, state: State, cancel: CancelToken) -> Iterator[None]:
        """Inside, the model computes with the newest weights of all hosts."""
        self._refresh_between(state, cancel)
        with (
            factors_stay_apart(self._model),
            seam.computed_by(
                self._model, StreamedExperts(self.streamer, HostGradients(), expert_adapters(self._model))
            ),
        ):
            yield
        self.streamer.drop_all()
        self._mirror.join()

    def catch_up(self, state: State, cancel: CancelToken) -> None:
        """Bring in the newest weights of all hosts, a shared trunk's into the model."""
        self._refresh_between(state, cancel)
        self._mirror.join()

    def layer(self, index: int) -> LayerWeights:
        """A layer's stacked weights off the device, as they were fetched last."""
        return self._mirror.get(index)

    def forget_trunk(self) -> None:
        """The model's trunk is about to be overwritten from elsewhere."""
        self.drop()
        self._mirror.forget_trunk()

    def cancel(self) -> None:
        """Called from another thread: give the attempt up soon."""
        self._cancelled = True
        self._mirror.cancel()

    def close(self) -> None:
        """End the side threads."""
        self._mirror.cancel()
        self._mirror.join(check=False)
        self.streamer.close()

    def _release(self, attempt: Attempt, state: State) -> tuple[object, ...]:
        """Another one whenever the parties' sums may be other bytes.

        Spooled bytes are the same at every attempt, but not under another membership epoch: then they are burned.
        """
        return (attempt.round, state.epoch) if self._repeatable and attempt.number else (attempt,)

    def _refresh_between(self, state: State, cancel: CancelToken) -> None:
        """Fetch what the round that was committed last made; computing the next one finds it here."""
        self._cancelled = False
        self._refresh(Attempt(state.round), state, cancel)

    def _refresh(self, attempt: Attempt, state: State, cancel: CancelToken) -> dict[int, str]:
        active = [name for name in self._federation.parties if name not in state.absent]
        parts = present_parts(self._parts, active)
        lent = [part for part in parts if part.host == self._host.me and self._parts[part.number].host != part.host]
        if lent:  # they are read from the model, which an earlier fetch may still be writing
            self._mirror.join(check=False)
        self._mask(state.absent)
        self._mirror.use(parts)
        self.sender.use(parts)
        self._host.begin(attempt, active, lent, self._release(attempt, state))
        versions = self._mirror.versions(attempt, cancel)
        self._mirror.start(attempt, versions)
        return versions

    def _mask(self, absent: Collection[str]) -> None:
        """Leave out the experts of absent hosts."""
        masked: dict[int, list[int]] = defaultdict(list)
        for part in self._parts:
            if part.layer >= 0 and part.host in absent:
                masked[part.layer] += part.experts
        seam.mask(self._model, masked)


def _name_of(attempt: Attempt) -> str:
    """A hexadecimal name for sums that were not spooled."""
    return hashlib.sha256(f"{attempt.round}.{attempt.number}".encode()).hexdigest()
