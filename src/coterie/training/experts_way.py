"""A party's part in the `experts` exchange: weights come to its data, only whole-layer sums go back.

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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from coterie.config import FederationConfig, PrivacyRules
from coterie.dp.balance import Balancer
from coterie.dp.losses import default_loss
from coterie.dp.mechanism import LOAD
from coterie.federation.attempt import Attempt
from coterie.federation.fetch_weights import WeightFetcher
from coterie.federation.home import TrunkHome
from coterie.federation.owner import Mirror, SumSender, model_version
from coterie.federation.parts import Part, expert_parts, present_parts
from coterie.federation.pool import Pool
from coterie.federation.round_state import State
from coterie.federation.shard import OptimizerFactory, Shard
from coterie.federation.transport import Lane, Message, Transport
from coterie.federation.values import check_own
from coterie.models import seam
from coterie.models.lora import expert_adapters, expert_wrappers, factors_stay_apart
from coterie.models.placement import Placement
from coterie.models.seam import ExpertLayer
from coterie.models.streaming import HostGradients, LayerStreamer, StreamedExperts
from coterie.models.weight_cache import FileStore, MemoryStore, WeightCache
from coterie.training.agreed_limits import pool_limits
from coterie.training.load_home import LoadHome, releases_loads
from coterie.training.loop import to_device
from coterie.training.packing import Batch
from coterie.training.party_work import superseded
from coterie.training.seeds import derived_seed


@dataclass(frozen=True)
class Sums:
    """What a party adds to a round.

    Attributes:
        experts: layer to stacked sums by parameter name, [E, ...]; None when it does not contribute.
        trunk: sums of the trained trunk parameters by name, and of the expert loads where these are released.
        weight: what everybody's sums together are divided by adds up from these.
        figures: for the owner's own metrics; never sent.
        digest: of the spooled release that they come from; empty without privacy.
    """

    experts: Mapping[int, Mapping[str, Tensor]] | None
    trunk: Mapping[str, Tensor]
    weight: float
    figures: Mapping[str, float]
    digest: str = ""


class Contribution(Protocol):
    """Turns a round's weights and this party's text into sums that may leave it."""

    def open(self, streamer: LayerStreamer) -> None:
        """Called before every attempt's `sums`, with weights at hand: what has to be refused is refused here."""
        ...

    def sums(self, round: int, pins: Mapping[str, str], streamer: LayerStreamer, alive: Callable[[], bool]) -> Sums:
        """Process this party's share of a round.

        Args:
            round: from 1.
            pins: digests of what is computed on: weights, agreement, membership epoch.
            streamer: lends expert weights to the device.
            alive: False once the attempt was given up.
        """
        ...

    def applied(self, round: int, newest: int) -> None:
        """What was kept for sending rounds again may go.

        Args:
            round: every checkpoint that the federation could go back to includes it.
            newest: the same of the newest checkpoint but one; what lies between is kept only while there is room.
        """
        ...

    def check_not_behind(self, received: int) -> None:
        """Compare with the newest round that the hosts received from this party.

        Raises:
            LedgerError: they received more than the ledger knows.
        """
        ...

    def close(self) -> None: ...


class PlainSums:
    """Sums without privacy: summed token gradients of the round's sequences.

    Args:
        model: partial model, trunk on its device.
        layers: its MoE layers.
        batches: the micro-batches of a round, from 1.
        loss: summed loss and tokens of a micro-batch.
        seed: repeats dropout on a second attempt; of the whole run.
        per_record: sum each record's mean loss and count records, as private parties of the same federation do.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[ExpertLayer],
        batches: Callable[[int], Sequence[Batch]],
        loss: Callable[[Batch], tuple[Tensor, int]],
        seed: int,
        *,
        per_record: bool = False,
    ) -> None:
        self._model, self._layers, self._batches, self._seed = model, layers, batches, seed
        self._loss = self._record_loss if per_record else loss

    def _record_loss(self, batch: Batch) -> tuple[Tensor, int]:
        device = next(p for p in self._model.parameters() if not p.is_meta).device
        losses_B = default_loss(self._model, to_device(batch, device))
        return losses_B.sum(), losses_B.shape[0]

    def sums(self, round: int, pins: Mapping[str, str], streamer: LayerStreamer, alive: Callable[[], bool]) -> Sums:
        trained = {name: p for name, p in self._model.named_parameters() if p.requires_grad and not p.is_meta}
        sink = HostGradients()
        totals = {name: torch.zeros(p.shape) for name, p in trained.items()}
        for param in trained.values():
            param.grad = None  # an attempt that failed in its backward leaves some
        loss_sum, tokens = 0.0, 0
        self._model.train()
        with torch.random.fork_rng(), seam.computed_by(self._model, StreamedExperts(streamer, sink)):
            torch.manual_seed(derived_seed(self._seed, round - 1))
            for batch in self._batches(round):
                if not alive():
                    raise superseded()
                loss, counted = self._loss(batch)
                torch.autograd.backward(loss)
                loss_sum, tokens = loss_sum + float(loss.detach()), tokens + counted
                for name, param in trained.items():
                    if param.grad is not None:
                        totals[name] += param.grad.to("cpu", torch.float32)
                        param.grad = None
        experts = {layer.index: _complete(layer, sink.sums.get(layer.index, {})) for layer in self._layers}
        return Sums(experts, totals, float(tokens), {"loss": loss_sum / max(tokens, 1), "tokens": tokens})

    def open(self, streamer: LayerStreamer) -> None:
        """There is nothing to refuse."""

    def applied(self, round: int, newest: int) -> None:
        """Nothing is kept."""

    def check_not_behind(self, received: int) -> None:
        """There is no ledger."""

    def close(self) -> None:
        """Nothing is open."""


def _complete(layer: ExpertLayer, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zeros where no micro-batch had a backward."""
    return {
        name: found[name] if name in found else torch.zeros(param.shape, dtype=torch.float32)
        for name, param in layer.parameters().items()
    }


class ExpertsWay:
    """Serves this party's parts, mirrors everybody's, and brings this party's sums to their hosts.

    Args:
        party: this party.
        federation: shared settings.
        model: partial model; a shared trunk is overwritten by what the hosts serve.
        placement: who hosts which expert.
        trunk: starting weights of the trunk, for the share this party is home to.
        experts: starting weights of the hosted experts, by global key.
        transport: to the others.
        make_optimizer: of hosted parts.
        contribution: see `Contribution`.
        balancer: is told the public loads of every round, where parties release theirs.
        cache_dir: where fetched layers lie on disk; None keeps them in host memory.
        device: where experts compute.
        roster: hash of the signed roster; a release made under another one is burned.

    Attributes:
        pool: what this party stores for everybody.
        streamer: lends layers to the device.
        seconds: what the last attempt took: ``agree`` (freeze, digests, a shared trunk), ``fetch`` (all layers,
            beside the computing), ``waited_first`` and ``waited_later`` (computing stood still for the first layer,
            for the others on their first use), ``lot`` (computing with its waits, noise, spool), ``push``. Never
            sent.
    """

    def __init__(
        self,
        party: str,
        federation: FederationConfig,
        model: nn.Module,
        placement: Placement,
        trunk: Mapping[str, Tensor],
        experts: Mapping[str, Tensor],
        transport: Transport,
        make_optimizer: OptimizerFactory,
        contribution: Contribution,
        *,
        balancer: Balancer | None = None,
        cache_dir: Path | None,
        device: torch.device,
        roster: str = "",
    ) -> None:
        self._roster = roster
        self._federation, self._model, self._transport = federation, model, transport
        self._contribution, self._balancer = contribution, balancer
        # Where everybody sends spooled bytes, a second attempt at a round brings the same ones and hosts keep what
        # they have.
        self._repeatable = isinstance(federation.privacy, PrivacyRules) and not federation.mixed_privacy
        self._layers = seam.expert_layers(model)
        self.parts = model_parts(federation, model, placement)
        names = {name for part in self.parts if part.layer < 0 and part.host == party for name, _ in part.shapes}
        loads = {LOAD: LoadHome(balancer)} if balancer is not None and LOAD in names else {}
        weights_dtype, push_dtype = getattr(torch, federation.weights_dtype), getattr(torch, federation.push_dtype)
        self._push_dtype = push_dtype
        self.pool = Pool(
            party,
            tuple(federation.parties),
            self.parts,
            Shard(self._layers, experts, make_optimizer),
            TrunkHome({name: trunk[name] for name in sorted(names - {LOAD})}, make_optimizer, loads),
            weights_dtype=weights_dtype,
            push_dtype=push_dtype,
            lend=self._lend,
            ahead=2,
            limits=pool_limits(federation, model),
        )
        pinned = device.type == "cuda"
        store = FileStore(cache_dir) if cache_dir is not None else MemoryStore(pinned=pinned)
        self._mirror = Mirror(
            self.parts,
            [layer.num_experts for layer in self._layers],
            WeightCache(store, len(self._layers)),
            self.pool,
            WeightFetcher(transport, deadline_s=federation.deadline_s, value_limit=federation.value_limit),
            weights_dtype,
            set_trunk=self._set_trunk,
            wait_s=federation.deadline_s,
        )
        compute_dtype = next(iter(self._layers[0].parameters().values())).dtype
        self.streamer = LayerStreamer(self._mirror, device, compute_dtype)
        self._sender = SumSender(transport, self.pool, self.parts, deadline_s=federation.deadline_s)
        self._interrupted = False
        self.sums: Sums | None = None
        self.seconds: dict[str, float] = {}
        self._attempt = Attempt(0)

    def handle(self, peer: str, lane: Lane, message: Message) -> Message:
        """Serve another party."""
        return self.pool.handle(peer, lane, message, wait_s=self._federation.deadline_s)

    def compute(self, told: State, alive: Callable[[], bool]) -> None:
        """One attempt: fetch, compute, push. Changes no parameter but a shared trunk, which is fetched."""
        self._interrupted = False
        began = time.monotonic()
        attempt = self._attempt = Attempt(told.round, told.attempt)
        versions = self._refresh(attempt, told)
        self._contribution.open(self.streamer)
        self._contribution.check_not_behind(self._mirror.received)
        pins = {
            "weights": model_version(versions),
            "agreement": self._federation.content_hash(),
            "roster": self._roster,
            "epoch": str(told.epoch),
        }

        def going() -> bool:
            return alive() and not self._interrupted

        agreed = time.monotonic()
        self.streamer.watch()
        sums = self._contribution.sums(told.round, pins, self.streamer, going)
        self.streamer.drop_all()
        self._mirror.join()
        computed = time.monotonic()
        if not going():
            raise superseded()
        blobs = self._encode(sums, attempt) if sums.experts is not None else None
        self._sender.declare(attempt, contributes=blobs is not None, weight=sums.weight)
        if blobs is not None:
            self._check_own(blobs, attempt)
            self._sender.push(attempt, blobs, versions)
        self.sums = sums
        self.seconds = self._split_time(agreed - began, computed - agreed, time.monotonic() - computed)

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

    def step(self, rate: float) -> Sums:
        """Apply the committed round to the own parts; returns this party's sums, for a private trunk."""
        assert self.sums is not None
        self.pool.commit(self._attempt, rate)
        sums, self.sums = self.sums, None
        return sums

    def drop(self) -> None:
        """Forget an attempt."""
        self.sums = None
        self.streamer.drop_all()

    @contextmanager
    def evaluating(self, told: State) -> Iterator[None]:
        """Inside, the model computes with the newest weights of all hosts."""
        self._refresh_between(told)
        with (
            factors_stay_apart(self._model),
            seam.computed_by(
                self._model, StreamedExperts(self.streamer, HostGradients(), expert_adapters(self._model))
            ),
        ):
            yield
        self.streamer.drop_all()
        self._mirror.join()

    def catch_up(self, told: State) -> None:
        """Bring in the newest weights of all hosts, a shared trunk's into the model."""
        self._refresh_between(told)
        self._mirror.join()

    def forget(self) -> None:
        """Weights are about to be replaced by a checkpoint's."""
        self.drop()
        self._mirror.forget_trunk()
        self.pool.forget()

    def go_on_after(self, round: int) -> None:
        """A checkpoint was loaded, behind which lie this many rounds of the run."""
        self.pool.go_on_after(round)

    def interrupt(self) -> None:
        """Called from another thread: give the attempt up soon."""
        self._interrupted = True
        self._mirror.stop()

    def close(self) -> None:
        """End the side threads; what waits here for a round fails."""
        self.pool.close()
        self._mirror.stop()
        self._mirror.join(check=False)
        self.streamer.close()
        self._contribution.close()

    def _release(self, attempt: Attempt, told: State) -> tuple[object, ...]:
        """Another one whenever the parties' sums may be other bytes.

        Spooled bytes are the same at every attempt, but not under another membership epoch: then they are burned.
        """
        return (attempt.round, told.epoch) if self._repeatable and attempt.number else (attempt,)

    def _refresh_between(self, told: State) -> None:
        """Fetch what the round that was committed last made; computing the next one finds it here."""
        self._interrupted = False
        self._refresh(Attempt(told.round), told)

    def _refresh(self, attempt: Attempt, told: State) -> dict[int, str]:
        active = [name for name in self._federation.parties if name not in told.absent]
        parts = present_parts(self.parts, active)
        lent = [part for part in parts if part.host == self.pool.me and self.parts[part.number].host != part.host]
        if lent:  # they are read from the model, which an earlier fetch may still be writing
            self._mirror.join(check=False)
        self._mask(told.absent)
        self._mirror.use(parts)
        self._sender.use(parts)
        self.pool.begin(attempt, active, lent, self._release(attempt, told))
        versions = self._mirror.versions(attempt)
        self._mirror.start(attempt, versions)
        return versions

    def _mask(self, absent: Collection[str]) -> None:
        """Leave out the experts of absent hosts."""
        masked: dict[int, list[int]] = defaultdict(list)
        for part in self.parts:
            if part.layer >= 0 and part.host in absent:
                masked[part.layer] += part.experts
        seam.mask(self._model, masked)

    def _lend(self, part: Part) -> dict[str, Tensor]:
        """This party's copy of a trunk share."""
        own: dict[str, Tensor] = dict(self._model.named_parameters())
        if self._balancer is not None:
            own[LOAD] = self._balancer.public()
        return {name: own[name] for name, _ in part.shapes}

    @torch.no_grad()
    def _set_trunk(self, tensors: Mapping[str, Tensor]) -> None:
        own = dict(self._model.named_parameters())
        for name, value in tensors.items():
            if name == LOAD:
                assert self._balancer is not None
                self._balancer.follow(value)
            else:
                own[name].copy_(value)

    def _encode(self, sums: Sums, attempt: Attempt) -> dict[int, Tensor]:
        assert sums.experts is not None
        blobs = {}
        for part in self.parts:
            if not part.trained:
                continue
            if part.layer < 0:
                tensors: Mapping[str, Tensor] = sums.trunk
            else:
                stacked = sums.experts[part.layer]
                tensors = {name: stacked[name][list(part.experts)] for name, _ in part.shapes}
            blobs[part.number] = self._rounded(part, tensors, sums.digest or _name_of(attempt))
        return blobs

    def _check_own(self, blobs: Mapping[int, Tensor], attempt: Attempt) -> None:
        """What a host would refuse does not leave: this party says itself that it diverged."""
        for part in self.parts:
            if part.trained:
                for name, values in part.decode(blobs[part.number], self._push_dtype).items():
                    limit = self.pool.push_limit(self.pool.me, name)
                    check_own(f"this party's sums of {name}", [values], limit, where=str(attempt))

    def _rounded(self, part: Part, tensors: Mapping[str, Tensor], release: str) -> Tensor:
        """The part's bytes; in bfloat16 by coins that follow from the release, so that resending repeats them.

        Args:
            part: gives the order of its tensors.
            tensors: float32, by name.
            release: hexadecimal name, another one in every round: the same coins each time would add up to a bias.
        """
        if self._push_dtype == torch.float32:
            return part.encode(tensors, torch.float32)
        coins = torch.Generator().manual_seed(int(release[:12], 16) * len(self.parts) + part.number)
        return part.encode(
            {name: stochastic_bfloat16(tensors[name], coins) for name, _ in part.shapes}, torch.bfloat16
        )


def _name_of(attempt: Attempt) -> str:
    """A hexadecimal name for sums that were not spooled."""
    return hashlib.sha256(str(attempt).encode()).hexdigest()


def stochastic_bfloat16(values: Tensor, coins: torch.Generator) -> Tensor:
    """Round float32 to bfloat16 up or down with the odds that keep the mean; post-processing of what was noised.

    Guarantee: a finite value stays finite (magnitudes above bfloat16's largest become that).
    """
    largest = torch.finfo(torch.bfloat16).max
    bits = values.clamp(-largest, largest).contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, values.shape, generator=coins, dtype=torch.int32)
    return ((bits + noise) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


def model_parts(federation: FederationConfig, model: nn.Module, placement: Placement) -> tuple[Part, ...]:
    """Every part of a federation's model, in the order in which parts cross."""
    layers = seam.expert_layers(model)
    own = dict(model.named_parameters())
    shared = {name: tuple(own[name].shape) for name in shared_names(federation, model)}
    if releases_loads(federation):
        shared[LOAD] = (sum(layer.num_experts for layer in layers),)
    return expert_parts(
        [{name: tuple(param.shape) for name, param in layer.parameters().items()} for layer in layers],
        [[placement.host_name(layer.index, e) for e in range(layer.num_experts)] for layer in layers],
        tuple(federation.parties),
        shared,
        train_experts=federation.lora is None,
    )


def shared_names(federation: FederationConfig, model: nn.Module) -> tuple[str, ...]:
    """Trained parameters outside the stacked experts that all parties train together: a shared trunk, and adapters
    of experts in any case."""
    trained = [name for name, p in model.named_parameters() if p.requires_grad and not p.is_meta]
    if federation.trunk == "shared":
        return tuple(trained)
    factors = {id(p) for wrapper in expert_wrappers(model) for p in wrapper.parameters()}
    own = dict(model.named_parameters())
    return tuple(name for name in trained if id(own[name]) in factors)
