"""Were these documents trained on? Scores of every record under the model, its start and its references, and AUCs.

Shape letters: S sequences (records), D documents.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coterie.audit.metrics import Estimate, Scores, auc
from coterie.audit.model.scoring import TokenScores, score_tokens
from coterie.audit.model.signals import Population, lowest_mean, mean_loss, rmia, zlib_ratio
from coterie.audit.model.target import Design, Load, Target, check_causal
from coterie.training.data.documents import Documents
from coterie.training.data.packing import Sequences
from coterie.training.data.tokenizer import tokenize

RATIO, LOSS, ZLIB, MIN_K, MIN_K_PLUS, RMIA = (
    "loss against the start", "loss", "zlib", "Min-K%", "Min-K%++", "RMIA",
)  # fmt: skip
AGAINST = "loss against a reference"
RECORDS_EACH = 64
"""Most records of a document that are scored."""
_TAILS = torch.tensor([0.025, 0.975], dtype=torch.float64)


@dataclass(frozen=True)
class Candidates:
    """Records whose membership is asked about, each known by its document's id and its place in it.

    Attributes:
        ids: of records; document_ids: of the document each is of.
        members: whether the document of each record is one, by the record's id.
    """

    ids: tuple[str, ...]
    document_ids: tuple[str, ...]
    sequences: tuple[list[int], ...]
    members: Mapping[str, bool]

    @classmethod
    def of(cls, target: Target, most: int, seed: int) -> Candidates:
        """At most ``most`` documents of each side, and of each at most `RECORDS_EACH` records, drawn by ``seed``."""
        draw = random.Random(seed)
        ids: list[str] = []
        owners: list[str] = []
        sequences: list[list[int]] = []
        truth: dict[str, bool] = {}
        for documents, names, member in (
            (target.members, target.member_ids, True),
            (target.others, target.other_ids, False),
        ):
            chosen = sorted(draw.sample(range(len(documents)), min(most, len(documents))))
            cut = records_of(target, Documents(tuple(documents.texts[index] for index in chosen)))
            for place, own in cut.items():
                for number in sorted(draw.sample(range(len(own)), min(RECORDS_EACH, len(own)))):
                    name = names[chosen[place]]
                    ids.append(f"{name}:{number}")
                    owners.append(name)
                    sequences.append(own[number])
                    truth[ids[-1]] = member
        return cls(tuple(ids), tuple(owners), tuple(sequences), truth)

    @property
    def documents(self) -> Mapping[str, int]:
        """Number of the document of each record, by the record's id."""
        numbers: dict[str, int] = {}
        return {
            record: numbers.setdefault(owner, len(numbers))
            for record, owner in zip(self.ids, self.document_ids, strict=True)
        }

    def scores(self, values_S: Tensor) -> Scores:
        """Scores in the order of the records, joined with the truth by id."""
        return Scores.joined(dict(zip(self.ids, values_S.tolist(), strict=True)), self.members, self.documents)

    def by_document(self, values_S: Tensor) -> Scores:
        """The same with one score a document: the mean of its records'."""
        gathered: dict[str, list[float]] = {}
        for owner, value in zip(self.document_ids, values_S.tolist(), strict=True):
            gathered.setdefault(owner, []).append(value)
        truth = {owner: self.members[record] for record, owner in zip(self.ids, self.document_ids, strict=True)}
        return Scores.joined({owner: sum(some) / len(some) for owner, some in gathered.items()}, truth)

    def count(self, member: bool) -> int:
        """Documents on one side."""
        return len(
            {o for record, o in zip(self.ids, self.document_ids, strict=True) if self.members[record] == member}
        )


def records_of(target: Target, documents: Documents) -> dict[int, list[list[int]]]:
    """Each document's own sequences, as training cuts them; where training packs documents together, in chunks."""
    if not len(documents):
        return {}
    packing = "chunks" if target.data.packing == "documents" else target.data.packing
    cut: Sequences = tokenize(documents, target.data.model_copy(update={"packing": packing}), target.tokenizer)
    found: dict[int, list[list[int]]] = {}
    for row, document in enumerate(cut.document_S.tolist()):
        found.setdefault(document, []).append(cut[row]["input_ids"].tolist())
    return found


@dataclass(frozen=True)
class ModelScores:
    """What one model, its start and its references say of the candidates.

    Attributes:
        own: the attacked model, token by token.
        start_S: mean loss of the start; reference_RS: of the references.
        population: see `Population`, with the start as the first reference; None without such text.
    """

    own: TokenScores
    start_S: Tensor
    reference_RS: Tensor
    population: Population | None


def measure(target: Target, candidates: Candidates, *, most_population: int, seed: int) -> tuple[ModelScores, ...]:
    """Score candidates and population under all models, each loaded once and let go.

    Returns:
        The attacked model; where members were not chosen by coins, also each reference as if it were attacked, and
        then none of them has a reference but the start.
    """
    chosen: list[list[int]] = []
    if target.population is not None:
        own = records_of(target, target.population)
        everything = [sequence for sequences in own.values() for sequence in sequences]
        chosen = random.Random(seed).sample(everything, min(most_population, len(everything)))
    sequences = [*candidates.sequences, *chosen]
    models = [score_tokens(loaded(load), sequences) for load in (target.model, target.start, *target.references)]
    attacked, start, *references = models
    if target.design is Design.COIN:
        return (_measured(attacked, start, references, len(candidates.sequences)),)
    return tuple(_measured(model, start, [], len(candidates.sequences)) for model in (attacked, *references))


def _measured(attacked: TokenScores, start: TokenScores, references: Sequence[TokenScores], size: int) -> ModelScores:
    loss_S, others_RS = mean_loss(attacked), torch.stack([mean_loss(scores) for scores in (start, *references)])
    population = Population(loss_S[size:], others_RS[:, size:]) if len(loss_S) > size else None
    return ModelScores(attacked.front(size), others_RS[0, :size], others_RS[1:, :size], population)


def loaded(load: Load) -> PreTrainedModel:
    """A model that predicts next tokens.

    Raises:
        AuditError: it has another head.
    """
    model = load()
    check_causal(model)
    return model


def signals(measured: ModelScores, texts: Sequence[bytes]) -> dict[str, Tensor]:
    """Scores of every record by every attack, [S] each; larger means member."""
    own = measured.own
    loss_S = mean_loss(own)
    found = {
        RATIO: measured.start_S - loss_S,
        LOSS: -loss_S,
        ZLIB: zlib_ratio(loss_S, texts),
        MIN_K: lowest_mean(own.log_p_P, own),
        MIN_K_PLUS: lowest_mean(own.surprise_P, own),
    }
    if len(measured.reference_RS):
        found[AGAINST] = measured.reference_RS.mean(0) - loss_S
    if measured.population is not None:
        references_RS = torch.cat([measured.start_S[None], measured.reference_RS])
        found[RMIA] = rmia(loss_S, references_RS, measured.population)
    return found


def corrected(attacked: Scores, controls: Sequence[Scores], *, seed: int, resamples: int = 1000) -> Estimate:
    """An AUC less what models that saw no member reach above one half, on the mean of them.

    Documents are resampled alike in all. All hold the same records in the same order, as `Candidates.scores` makes
    them.
    """
    members_D, others_D = (
        torch.bincount(documents).double() for documents in (attacked.member_documents_M, attacked.other_documents_N)
    )
    generator = torch.Generator().manual_seed(seed)
    member_RD, other_RD = (_times(len(sizes), resamples, generator) for sizes in (members_D, others_D))
    pairs_R = (member_RD @ members_D) * (other_RD @ others_D)
    own, *rest = (((member_RD @ _kernel(scores)) * other_RD).sum(1) / pairs_R for scores in (attacked, *controls))
    low, high = torch.quantile(own - torch.stack(rest).mean(0), _TAILS).tolist()
    value = auc(attacked).value - sum(auc(control).value for control in controls) / len(controls)
    count = len(attacked.member_M) + len(attacked.other_N)
    return Estimate(_inside(value), _inside(min(low, value)), _inside(max(high, value)), count)


def _inside(difference: float) -> float:
    """An AUC so far from one half, within what an AUC can be."""
    return min(1.0, max(0.0, 0.5 + difference))


def _kernel(scores: Scores) -> Tensor:
    """[D, D] of member and other documents: pairs of records in which the member scores higher; ties count half."""
    member_M, other_N = scores.member_M, scores.other_N
    sides = (scores.member_documents_M, scores.other_documents_N)
    table = torch.zeros(int(sides[0].max()) + 1, int(sides[1].max()) + 1, dtype=torch.float64)
    for score, document in zip(member_M.tolist(), sides[0].tolist(), strict=True):
        won_N = (other_N < score).double() + (other_N == score).double() / 2
        table[document].index_add_(0, sides[1], won_N)
    return table


def _times(documents: int, resamples: int, generator: torch.Generator) -> Tensor:
    chosen = torch.randint(documents, (resamples, documents), generator=generator)
    ones = torch.ones_like(chosen, dtype=torch.float64)
    return torch.zeros(resamples, documents, dtype=torch.float64).scatter_add_(1, chosen, ones)
