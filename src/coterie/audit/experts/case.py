"""What attacks on pushed sums start from, and what they are scored with."""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from coterie.audit.adversaries import Adversary, most_received
from coterie.audit.evidence import Evidence
from coterie.audit.experts.clipped import factors
from coterie.audit.experts.masked import summed_parties
from coterie.audit.experts.membership import Metric
from coterie.audit.experts.opened import Opened
from coterie.audit.experts.pushes import by_round, open_pushes, put, round_as_served, rounding_of, served
from coterie.audit.experts.reader import Reader
from coterie.audit.transcript import ReceivedPush, Transcript
from coterie.config import FederationConfig, ModelSpec, PartyConfig, PrivacyRules, load_yaml
from coterie.dp.noise.pooled import PooledNoise
from coterie.errors import AuditError
from coterie.models import seam
from coterie.models.preconditioner import attach, in_trunk
from coterie.models.zoo.build import build_model
from coterie.training.data.documents import read_documents
from coterie.training.data.packing import Sequences
from coterie.training.data.tokenizer import load_tokenizer_from, tokenize
from coterie.training.folders import TOKENIZER_FOLDER, private_folder
from coterie.training.party.process import FEDERATION_FILE, PARTY_FILE


@dataclass(frozen=True)
class Owned:
    """One of the owner's records: for scoring, and for pushes of other sizes than the recorded ones.

    Attributes:
        row: in the training data.
        document: among all of the owner's documents.
    """

    row: int
    document: int
    ids: tuple[int, ...]


class TimeBudget:
    """Divides the time that is left.

    Args:
        budget_s: seconds from now.
    """

    def __init__(self, budget_s: float) -> None:
        self._until = time.monotonic() + budget_s

    @property
    def left(self) -> float:
        return max(0.0, self._until - time.monotonic())

    def share(self, of: float) -> TimeBudget:
        """A part of what is left."""
        return TimeBudget(self.left * of)


class Case:
    """One owner's run in the exchange `experts`.

    Args:
        evidence: of the run.
        seed: of what is drawn.

    Raises:
        AuditError: nothing was received, or there is no public text to learn on.
        CheckpointError: the owner's key, or a transcript's head and the starting checkpoint, do not fit.
    """

    def __init__(self, evidence: Evidence, seed: int) -> None:
        self.evidence, self.seed = evidence, seed
        self.federation = load_yaml(evidence.run_folder / FEDERATION_FILE, FederationConfig)
        if self.federation.lora is not None:
            raise _nothing(
                "the pushed sums are those of adapters (`lora`), which no attack here reads",
                "take it that a push without noise tells what it is made of, or agree on a `privacy` budget",
            )
        if not evidence.received:
            raise _nothing("no party recorded what it received", "give the run folders of the other parties")
        self.public = [tuple(record) for record in evidence.public if len(record) > 2]
        if len(self.public) < _FEWEST:
            raise _nothing(
                f"there are {len(self.public)} records of public text, and attacks learn on {_FEWEST} or more",
                "name more public text",
            )
        transcript = next(iter(evidence.received.values()))
        self.transcript = transcript
        model = build_model(ModelSpec(path=evidence.start)).float()
        if self.federation.preconditioner is not None:
            party = load_yaml(evidence.run_folder / PARTY_FILE, PartyConfig)
            attach(model, in_trunk(model, party.trunk))
        for each in evidence.received.values():
            each.check_start(model)
        round_as_served(model, transcript.weights_dtype, evidence.trunk == "shared")
        self.reader = Reader(model)
        self.rounding = rounding_of(transcript)
        if not self.rounds():
            raise _nothing("the transcripts hold no whole sum of the owner's", "record at least one whole round")

    @cached_property
    def _parts(self) -> Mapping[Adversary, dict[int, list[ReceivedPush]]]:
        hosts = list(self.evidence.received.values())
        alone = by_round(self._together(Adversary.HOST_PUBLIC))
        return {Adversary.HOST_PUBLIC: alone, Adversary.ALL_HOSTS: by_round(hosts) if len(hosts) > 1 else alone}

    def _together(self, adversary: Adversary) -> list[Transcript]:
        """The transcripts that an adversary has."""
        return list(self.evidence.received.values()) if adversary is Adversary.ALL_HOSTS else [self._one_host]

    @cached_property
    def _one_host(self) -> Transcript:
        received = self.evidence.received
        return received[most_received({name: _values(found) for name, found in received.items()})]

    def parties_in(self, adversary: Adversary) -> int:
        """How many parties' records are in every sum that an adversary opens: one, where pushes are not masked."""
        return len(summed_parties(self._together(adversary), self.evidence.owner))

    def expected_records(self, adversary: Adversary) -> float:
        """Expected records in a private sum that an adversary opens, of all parties that are in it."""
        others = summed_parties(self._together(adversary), self.evidence.owner)
        own = min(self.federation.lot_of(self.evidence.owner), max(len(self.train), 1))
        return own + sum(self.federation.lot_of(party) for party in others if party != self.evidence.owner)

    def claimed_noise(self, adversary: Adversary) -> float | None:
        """The noise multiplier of a sum that an adversary opens, by what the owner's run says; None: it says none.

        With masked pushes every party in the sum adds the owner's sigma, or the same share of it.
        """
        claim, rules = self.evidence.privacy, self.federation.privacy
        if claim is None or claim.noise_multiplier is None or not isinstance(rules, PrivacyRules):
            return None
        share = PooledNoise(len(self.federation.parties), self.federation.colluding).share
        own = claim.noise_multiplier * (share if self.evidence.masked else 1.0)
        return own * math.sqrt(self.parties_in(adversary))

    def rounds(self) -> list[int]:
        """Rounds of which every adversary opens sums."""
        return sorted(set.intersection(*(set(found) for found in self._parts.values())))

    def records_in(self, adversary: Adversary, round_index: int) -> int:
        """Records in the sum that an adversary opens of a round, by the owner's: batches are of one size."""
        return len(self.lot(round_index)) * self.parties_in(adversary)

    def opened(self, adversary: Adversary, round_index: int) -> Opened:
        """What an adversary opens of a round."""
        which = Adversary.ALL_HOSTS if adversary is Adversary.ALL_HOSTS else Adversary.HOST_PUBLIC
        return open_pushes(self._parts[which][round_index], self.reader.layers, self.rounding)

    @cached_property
    def _served(self) -> dict[int, dict[int, dict[str, Tensor]]]:
        return dict(served(list(self.evidence.received.values())))

    def reader_at(self, round_index: int) -> Reader:
        """The model as a round was computed with it; a private trunk as it started."""
        until = [number for number in sorted(self._served) if number <= round_index]
        if round_index == self.rounds()[0] or not until:
            return self.reader
        model = copy.deepcopy(self.reader.model)
        for number in until:
            put(model, self.transcript.parts, self._served[number])
        seam.select(model)
        return Reader(model)

    def lot(self, round_index: int) -> list[Owned]:
        """The records of a round's push."""
        if self.evidence.answers is None:
            raise _nothing("the owner kept no key to its sums", "agree on `transcript:` in federation.yaml")
        if round_index not in self._parts[Adversary.ALL_HOSTS]:
            raise _nothing(f"no sum of {self.evidence.owner} was recorded", "record a round that was made to its end")
        push = self._parts[Adversary.ALL_HOSTS][round_index][0]
        found = self.evidence.answers.records(push)
        return [Owned(record.row, record.document, tuple(record.ids)) for record in found]

    @cached_property
    def train(self) -> list[Owned]:
        """All records that the owner trains on."""
        spec = load_yaml(self.evidence.run_folder / PARTY_FILE, PartyConfig).data
        tokenizer = load_tokenizer_from(private_folder(self.evidence.run_folder) / TOKENIZER_FOLDER)
        found: Sequences = tokenize(read_documents(spec.train, spec), spec, tokenizer)
        return [
            Owned(row, int(found.document_S[row]), tuple(found[row]["input_ids"].tolist()))
            for row in range(len(found))
        ]

    @cached_property
    def metric(self) -> Metric:
        """How single records' gradients scatter, learned on `shown`."""
        return Metric(self.reader, self.shown, 1.0)

    @cached_property
    def clip_norm(self) -> float:
        """C, which the federation agreed on; 1 without a budget."""
        rules = self.federation.privacy
        return rules.clip_norm if isinstance(rules, PrivacyRules) else 1.0

    @cached_property
    def shown_factors(self) -> Tensor:
        """What clipping scales the gradient of each record of `shown` by. [shown]"""
        return factors(self.reader.model, self.shown, self.clip_norm)

    @cached_property
    def clipped_metric(self) -> Metric:
        """How single records' clipped gradients scatter in the first round's model."""
        return Metric(self.reader, self.shown, 1.0, factors=self.shown_factors)

    @cached_property
    def shown(self) -> list[tuple[int, ...]]:
        """Public records that show how gradients scatter; no attack learns on them otherwise."""
        return self.random().sample(self.public, min(_SHOWN, len(self.public) // 2))

    @cached_property
    def learned(self) -> list[tuple[int, ...]]:
        """The other public records."""
        shown = set(self.shown)
        return [record for record in self.public if record not in shown]

    def random(self) -> random.Random:
        """Draws of one attack, the same whatever other attacks drew."""
        return random.Random(self.seed)


_FEWEST = 64
_SHOWN = 128


def _values(transcript: Transcript) -> int:
    """How many values of the owner's sums a host received."""
    if transcript.masked:
        return sum(each.part.num_values for each in transcript.masked_parts() if each.peer == transcript.sender)
    return sum(value.numel() for push in transcript.pushes() for value in push.sums.values())


def documents_of(records: Sequence[Owned]) -> Tensor:
    """[records] int64."""
    return torch.tensor([record.document for record in records])


def _nothing(problem: str, fix: str) -> AuditError:
    return AuditError(
        f"Nothing can be concluded about pushed sums: {problem}.",
        code="audit-no-pushes",
        why="an attack that was not made says nothing about what can be read",
        fix=fix,
    )
