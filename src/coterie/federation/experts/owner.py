"""The owner's side of the `experts` exchange: mirror all hosts' weights, bring sums back.

Weights are fetched by one thread a host while the model already computes, in the order in which it needs them, with
enough of the following parts asked for that a slow line never idles between two. Which parts are asked for, in which
order and how large they are never depends on the owner's text.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from coterie.errors import CoterieError, DeadlineError, RoundError
from coterie.federation.cancel import NEVER, CancelToken, cancelled_round
from coterie.federation.experts.fetch_weights import Transfer, WeightFetcher
from coterie.federation.experts.host import DECLARE, ExpertsHost
from coterie.federation.experts.parts import AHEAD, Part, combined_digest
from coterie.federation.experts.push_sums import Push, Pusher
from coterie.federation.rounds.attempt import Attempt
from coterie.federation.wire.transport import Lane, Message, Transport
from coterie.models.streaming.cache import Digests, LayerWeights, WeightCache
from coterie.models.streaming.heap import give_back_freed


class Mirror:
    """A copy of all parts in a `WeightCache`, brought up to date once a round.

    Args:
        parts: every part of the model.
        num_experts: E of every MoE layer.
        cache: where layers lie, in ``dtype``.
        own_host: this party's own parts, read without a wire.
        fetcher: asks the other hosts.
        dtype: of the weights on the wire and in the cache.
        set_trunk: takes the parameters of a shared trunk as they arrive.
        wait_s: how long computing waits for a layer.

    Attributes:
        received: the newest round of which another host has a complete sum of ours.
        fetch_s: seconds from the start of this round's fetch until everything was in; 0 before that.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        num_experts: Sequence[int],
        cache: WeightCache,
        own_host: ExpertsHost,
        fetcher: WeightFetcher,
        dtype: torch.dtype,
        *,
        set_trunk: Callable[[Mapping[str, Tensor]], None],
        wait_s: float,
    ) -> None:
        self._all, self._num_experts, self._cache, self._own_host = tuple(parts), tuple(num_experts), cache, own_host
        self._parts = self._all
        self._fetcher, self._dtype, self._set_trunk, self._wait_s = fetcher, dtype, set_trunk, wait_s
        self.received = 0
        self.fetch_s = 0.0
        self._held: dict[int, str] = {}
        self._arrived = threading.Condition()
        self._coming: dict[int, set[int]] = {}
        self._ready: set[int] = set()
        self._fresh: dict[int, list[tuple[Part, Tensor, str]]] = defaultdict(list)
        self._error: BaseException | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._cancelled: Future[None] = Future()
        self._began = 0.0
        self.num_layers = cache.num_layers

    def use(self, parts: Sequence[Part]) -> None:
        """From the next round on, mirror these parts; see `coterie.federation.experts.parts.present_parts`."""
        self._parts = tuple(parts)

    def versions(self, attempt: Attempt, cancel: CancelToken = NEVER) -> dict[int, str]:
        """Digest of every part that is to be computed on, by part number, before anything large moves.

        From here on `cancel` ends this attempt, and no earlier one.

        Raises:
            TransportError, RoundError: a host is gone, or serves another attempt; or this one was given up.
        """
        self.join(check=False)
        with self._arrived:
            self._error, self._cancelled = None, Future()
        cancel.check()
        own = [part for part in self._parts if part.host == self._own_host.me]
        others = [part for part in self._parts if part.host != self._own_host.me]
        offers = self._fetcher.offers(others, attempt, self._dtype, self._cancelled)
        self.received = max((offer.received for offer in offers.values()), default=0)
        digests = {number: offer.digest for number, offer in offers.items()}
        return digests | {part.number: self._own_host.own_digest(part.number, attempt) for part in own}

    def start(self, attempt: Attempt, versions: Mapping[int, str]) -> None:
        """Bring in whatever is not held yet; returns once the trunk's parts are in, the layers follow.

        Every part is asked for in every round; one whose bytes are held already answers with its digest alone.
        """
        self._cache.begin_round()
        self._fresh.clear()
        self._began, self.fetch_s = time.monotonic(), 0.0
        self._coming = {layer: set() for layer in range(-1, self.num_layers)}
        by_host: dict[str, list[Part]] = defaultdict(list)
        for part in self._parts:
            self._coming[part.layer].add(part.number)
            by_host[part.host].append(part)
        self._fill_up_missing()
        self._ready = {layer for layer, parts in self._coming.items() if not parts}
        self._threads = ThreadPoolExecutor(len(by_host), thread_name_prefix="coterie-fetch")
        for host_parts in by_host.values():
            self._threads.submit(self._fetch, host_parts, attempt, dict(versions))
        self._wait(-1)

    def get(self, layer: int) -> LayerWeights:
        """A layer's stacked weights off the device; waits for it on first use in an attempt.

        Raises:
            DeadlineError: it did not come in time.
            CoterieError: what the fetch failed with.
        """
        self._wait(layer)
        return self._cache.get(layer)

    def digests(self) -> dict[int, Digests]:
        """Digests of every layer's shares, as this round has it; waits for all.

        Raises:
            DeadlineError, CoterieError: see `get`.
        """
        for layer in range(self.num_layers):
            self._wait(layer)
        return self._cache.digests()

    def join(self, *, check: bool = True) -> None:
        """Wait until everything is in, as when the lot was empty and nothing was computed.

        Raises:
            CoterieError: what the fetch failed with.
        """
        if self._threads is not None:
            self._threads.shutdown(wait=True)
            self._threads = None
        if check and self._error is not None:
            raise self._error

    def forget_trunk(self) -> None:
        """The model's trunk is about to be overwritten from elsewhere: fetch it anew, whatever was held."""
        self.cancel()
        self.join(check=False)
        for part in self._all:
            if part.layer < 0:
                self._held.pop(part.number, None)

    def cancel(self) -> None:
        """Give up the fetch that is under way; returns at once."""
        with self._arrived:
            self._error = self._error or cancelled_round()
            if not self._cancelled.done():
                self._cancelled.set_result(None)
            self._arrived.notify_all()

    def _fetch(self, parts: Sequence[Part], attempt: Attempt, versions: Mapping[int, str]) -> None:
        """Bring one host's parts in, in their order."""
        begun: deque[tuple[Part, Transfer | Tensor | None]] = deque()
        ahead = 0
        try:
            for part in parts:
                begun.append((part, self._begin(part, attempt, versions[part.number])))
                ahead += part.num_bytes(self._dtype)
                while begun and (ahead >= AHEAD or part is parts[-1]):
                    if self._cancelled.done():
                        return
                    first, coming = begun.popleft()
                    digest = versions[first.number]
                    blob = self._fetcher.finish(coming, digest) if isinstance(coming, Transfer) else coming
                    self._accept(first, blob, digest)
                    ahead -= first.num_bytes(self._dtype)
        except BaseException as error:
            with self._arrived:
                self._error = self._error or error
                self._arrived.notify_all()

    def _begin(self, part: Part, attempt: Attempt, digest: str) -> Transfer | Tensor | None:
        """A part that is on its way, or here; None for one that is held already."""
        if self._held.get(part.number) == digest:
            return None
        if part.host != self._own_host.me:
            return self._fetcher.begin(part, attempt, self._dtype)
        if self._own_host.own_digest(part.number, attempt) != digest:
            raise RoundError("this party's own weights changed within an attempt.", code="weights-changed")
        return self._own_host.own_bytes(part.number, attempt)

    def _accept(self, part: Part, blob: Tensor | None, digest: str) -> None:
        """Take a part in; the thread that brings a layer's last part puts the layer together."""
        with self._arrived:
            if blob is not None:
                self._held.pop(part.number, None)
                self._fresh[part.layer].append((part, blob, digest))
            self._coming[part.layer].discard(part.number)
            if self._coming[part.layer]:
                return
            fresh = self._fresh.pop(part.layer, [])
        self._assemble(part.layer, fresh)
        with self._arrived:
            # Not before: an attempt that ends between two parts of a layer leaves the cache as it was.
            self._held.update({new.number: version for new, _, version in fresh})
            self._ready.add(part.layer)
            if len(self._ready) == len(self._coming):
                self.fetch_s = time.monotonic() - self._began
            self._arrived.notify_all()

    def _assemble(self, layer: int, fresh: Sequence[tuple[Part, Tensor, str]]) -> None:
        if layer < 0:
            for part, blob, _ in fresh:
                self._set_trunk(part.decode(blob, self._dtype))
        elif fresh:
            before = self._cache.get(layer) if layer in self._cache.digests() else {}
            stacked = {name: tensor.clone() for name, tensor in before.items()}
            for part, blob, _ in fresh:
                for name, rows in part.decode(blob, self._dtype).items():
                    shape = (self._num_experts[layer], *rows.shape[1:])
                    stacked.setdefault(name, torch.zeros(shape, dtype=self._dtype))[list(part.experts)] = rows
            self._cache.put(layer, stacked)
            give_back_freed()

    def _fill_up_missing(self) -> None:
        """Zeros for layers that no present host stores and that are not held; their experts are masked."""
        for layer in range(self.num_layers):
            if not self._coming[layer] and layer not in self._cache.digests():
                shapes = {name: shape for part in self._all if part.layer == layer for name, shape in part.shapes}
                size = self._num_experts[layer]
                self._cache.put(
                    layer,
                    {name: torch.zeros((size, *shape[1:]), dtype=self._dtype) for name, shape in shapes.items()},
                )

    def _wait(self, layer: int) -> None:
        with self._arrived:
            ready = self._arrived.wait_for(
                lambda: self._error is not None or layer in self._ready, timeout=self._wait_s
            )
            if self._error is not None:
                raise self._error
        if not ready:
            raise DeadlineError(
                f"layer {layer} did not arrive within {self._wait_s:g} s.",
                code="weights-late",
                fix="look whether its hosts are up (`coterie status`), or raise deadline_s",
            )


class SumSender:
    """Declares a party's part in a round and brings spooled sums to the hosts.

    Args:
        transport: to the other hosts.
        own_host: this party's own parts take their sum without a wire.
        parts: every part of the model.
    """

    def __init__(
        self, transport: Transport, own_host: ExpertsHost, parts: Sequence[Part], *, deadline_s: float
    ) -> None:
        self._transport, self._own_host, self._parts = transport, own_host, tuple(parts)
        self._pusher = Pusher(transport, deadline_s=deadline_s)
        self._deadline_s = deadline_s

    def use(self, parts: Sequence[Part]) -> None:
        """From now on, bring sums of these parts to their hosts."""
        self._parts = tuple(parts)

    def declare(self, attempt: Attempt, *, contributes: bool, weight: float) -> None:
        """Tell every host whether sums will come, and what they are to be divided by."""
        message = Message(DECLARE, attempt.address(), {"contributes": contributes, "weight": weight})
        hosts = sorted({part.host for part in self._parts})
        futures = [
            self._transport.request_async(host, Lane.CONTROL, message, self._deadline_s)
            for host in hosts
            if host != self._own_host.me
        ]
        self._own_host.handle(self._own_host.me, Lane.CONTROL, message)
        for future in futures:
            future.result()

    def push(self, attempt: Attempt, blob_of: Callable[[Part], Tensor], versions: Mapping[int, str]) -> None:
        """Bring every part's sum to its host, all hosts at the same time, each part in the fixed order.

        Args:
            attempt: the round's open attempt.
            blob_of: makes the uint8 bytes of a part, exactly as spooled; asked when it is a part's turn, in any
                thread, and again for a part whose connection broke.
            versions: digest of the weights each sum was computed on.

        Raises:
            CoterieError: the first host in roster order that could not be reached or refused.
        """
        by_host: dict[str, list[Part]] = defaultdict(list)
        for part in self._parts:
            if part.trained:
                by_host[part.host].append(part)

        def push_to_host(parts: Sequence[Part]) -> None:
            if parts[0].host == self._own_host.me:
                for part in parts:
                    self._own_host.stage_own(part, attempt, blob_of(part), versions[part.number])
                return
            items = [Push(part, partial(blob_of, part), versions[part.number]) for part in parts]
            self._pusher.push_all(items, attempt)

        with ThreadPoolExecutor(len(by_host), thread_name_prefix="coterie-push") as pool:
            futures = [pool.submit(push_to_host, parts) for parts in by_host.values()]
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, CoterieError)):
            raise error


def model_version(versions: Mapping[int, str]) -> str:
    """One digest for all parts: what a round of a party is pinned to."""
    return combined_digest(versions[number] for number in sorted(versions))
