"""What a party brings to a federation, read from its files and checked before anything goes over the wire."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from coterie.config import FederationConfig, LoraSpec, PrivacySpec
from coterie.dp.accounting.provenance import Artefact
from coterie.dp.accounting.texts import Originals
from coterie.dp.noise.pooled import PooledNoise
from coterie.dp.plan import PrivacyPlan
from coterie.federation.experts.masking.session import Signer
from coterie.models.split.placement import Placement
from coterie.models.split.trainings import Training
from coterie.models.spread.spread import spread_of
from coterie.ranks.ranks import Alone, Ranks
from coterie.training.data.packing import Sequences
from coterie.training.folders import private_folder
from coterie.training.party.questions import Questions
from coterie.training.trackers import Trackers


@dataclass(frozen=True)
class Weights:
    """Starting weights: the trunk by parameter and buffer name, the hosted experts by global key."""

    trunk: Mapping[str, Tensor]
    experts: Mapping[str, Tensor]


@dataclass(frozen=True)
class PrivacyInputs:
    """What a party trains under.

    Attributes:
        spec: shared rules with the party's own choices.
        rounds: of the federation; the party plans one release for each.
        seed: for tests; None in private runs.
        artefacts: what weights and tokenizer were made from.
        digest: names the party's dataset in its ledger; None: the prepared records' content.
        push_after_s: constant-work mode: the sum leaves this long after the round began, not earlier.
        sequence_length: rows are padded to it in constant-work mode.
        noise_multiplier: in place of the calibrated one; for seeded tests.
        agreed_noise: sigma of all parties, where pushes are masked; a budget that needs more is refused.
        pooled: whose noise lies in all that others see of this party, where pushes are masked.
        largest_lot: expected units in the largest lot of all parties; None: this party's.
        largest_noise: noise multiplier beyond which hosts take this party's sums for nonsense.
        record: what one record is, in public words and numbers; see `coterie.training.provenance.record_facts`.
        originals: the documents behind the records; None: the records themselves.
        momentum: with which optimisers add up rounds, for noise in bands.
        recorded: parties keep what others send them and a key to their own sums, for an audit.
        trained: what of the model is, in words; None: all of it.
    """

    spec: PrivacySpec
    rounds: int
    seed: int | None = None
    artefacts: tuple[Artefact, ...] = ()
    digest: str | None = None
    push_after_s: float | None = None
    sequence_length: int | None = None
    noise_multiplier: float | None = None
    agreed_noise: float | None = None
    pooled: PooledNoise | None = None
    largest_lot: int | None = None
    largest_noise: float = math.inf
    record: Mapping[str, Any] = field(default_factory=dict)
    originals: Originals | None = None
    momentum: float = 0.0
    recorded: bool = False
    trained: str | None = None


@dataclass(frozen=True)
class PartyInputs:
    """Everything one party works with.

    Attributes:
        party: its name.
        federation: the shared settings.
        model: on ``device``, its experts on the meta device; its trunk is overwritten by `weights`.
        weights: reads the starting weights; called when the party begins from the split model.
        placement: who hosts which expert.
        train, test: this party's text; without ``test`` nothing is evaluated.
        run_dir: exists.
        device: where the trunk and the hosted experts compute.
        cache: where fetched layers lie in the `experts` exchange.
        privacy: what this party trains under; None without privacy.
        roster: hash of the signed roster, its membership epoch and certificates included; empty without one.
        trainings: what is behind the weights of this run's checkpoints, this run included.
        questions: that this party asks of the finished model; None: it only answers.
        trackers: hear the figures that may leave.
        bases: where adapters alone are trained, content digests of the files with the frozen weights: those of
            ``trunk`` and of ``experts``.
        signer: this party's identity; needed where pushes are masked.
        ranks: that share this party's lots; rank 0 alone speaks to the federation.
        spread: the model once more with this rank's experts alone, where they are over the ranks; see
            `coterie.models.spread.beside`.
    """

    party: str
    federation: FederationConfig
    model: nn.Module
    weights: Callable[[], Weights]
    placement: Placement
    train: Sequences
    test: Sequences | None
    run_dir: Path
    device: torch.device
    cache: Literal["memory", "disk"] = "memory"
    privacy: PrivacyInputs | None = None
    roster: str = ""
    trainings: tuple[Training, ...] = ()
    signer: Signer | None = None
    ranks: Ranks = field(default_factory=Alone)
    spread: nn.Module | None = None
    bases: Mapping[str, str] = field(default_factory=dict)
    questions: Questions | None = None
    trackers: Trackers | None = None

    @property
    def lots_model(self) -> nn.Module:
        """What lots are computed with."""
        return self.model if self.spread is None else self.spread

    @property
    def experts_over(self) -> int:
        """Ranks that hold every expert once, together; 1: each borrows whole layers."""
        spread = spread_of(self.lots_model)
        return 1 if spread is None else spread.ranks.world

    @property
    def cache_folder(self) -> Path | None:
        """Where fetched layers lie on disk, of which all ranks read; None: in host memory."""
        on_disk = self.cache == "disk" or self.ranks.world > 1
        return private_folder(self.run_dir) / "cache" if on_disk else None

    def active(self, absent: Collection[str]) -> tuple[str, ...]:
        """The parties that take part, in roster order."""
        return tuple(name for name in self.federation.parties if name not in absent)


def party_plan(privacy: PrivacyInputs, model: nn.Module) -> PrivacyPlan:
    """What bounds a party's releases: its settings, against hosts that choose the weights."""
    return PrivacyPlan.of_settings(
        privacy.spec, model, privacy.rounds, seed=privacy.seed, against_hosts=True,
        noise_multiplier=privacy.noise_multiplier, agreed_noise=privacy.agreed_noise, pooled=privacy.pooled,
        momentum=privacy.momentum,
    )  # fmt: skip


def trunk_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers of a partial model that are here, by name; tied ones once."""
    saved = model.state_dict(keep_vars=True)
    tensors: dict[str, Tensor] = {name: param for name, param in model.named_parameters() if not param.is_meta}
    tensors.update({n: buffer for n, buffer in model.named_buffers() if n in saved and not buffer.is_meta})
    return tensors


def changing_tensors(model: nn.Module, lora: LoraSpec | None) -> dict[str, Tensor]:
    """Those of `trunk_tensors` that training can change: where adapters are trained, they and the buffers."""
    tensors = trunk_tensors(model)
    if lora is None:
        return tensors
    frozen = {name for name, param in model.named_parameters() if not param.requires_grad}
    return {name: tensor for name, tensor in tensors.items() if name not in frozen}


def trunk_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters that are here."""
    return {name: param for name, param in model.named_parameters() if param.requires_grad and not param.is_meta}
