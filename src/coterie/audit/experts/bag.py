"""Which tokens a push holds, from the sums of embedding and head: a reader that is learned on simulated pushes.

The input embedding's sum has a row only for ids that occur. Where the same matrix is the head, every row moves: by
``p - 1`` at places that the id follows, by ``p`` everywhere else. How much a row tells is learned, not assumed.

Shape letters: V vocabulary, D width, P pushes, C features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.audit.experts.reader import Reader
from coterie.audit.experts.simulate import by_length

_STEPS = 400


def table_names(model: nn.Module) -> list[str]:
    """The parameters with a row for each id: embedding and head, once where they are tied."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
    tables = [module.weight for module in modules if module is not None]
    return [name for name, param in model.named_parameters() if any(param is table for table in tables)]


def table_sums(reader: Reader, records: Sequence[Sequence[int]], factors: Tensor | None = None) -> dict[str, Tensor]:
    """What some records add to the sums of embedding and head. {name: [V, D]}

    Args:
        reader: the model.
        records: token ids.
        factors: [records], of each record's summed gradient; default 1.
    """
    names = table_names(reader.model)
    own = dict(reader.model.named_parameters())
    tables = [own[name] for name in names]
    totals = {name: torch.zeros_like(own[name]) for name in names}
    for table in tables:
        table.requires_grad_(True)
    try:
        for numbers, ids_BT in by_length(records):
            if ids_BT.shape[1] > 1:
                losses_B = reader.losses(ids_BT)
                scale_B = torch.ones(len(numbers)) if factors is None else factors[numbers]
                for name, gradient in zip(
                    names, torch.autograd.grad((losses_B * scale_B).sum(), tables), strict=True
                ):
                    totals[name] += gradient
    finally:
        for table in tables:
            table.requires_grad_(False)
    return totals


@dataclass(frozen=True)
class Bag:
    """What was read of one push.

    Attributes:
        log_odds_V: that each id occurs.
        counts_V: how often, at best; whole numbers.
    """

    log_odds_V: Tensor
    counts_V: Tensor


class BagReader:
    """Learns what rows of ids that occur look like.

    Args:
        reader: the model.
        public: records of public text.
        lot: records in a push.
        names: of the tables whose sums the adversary opens; see `table_names`.
        pushes: to learn on.
        noise: standard deviation of what was added to each value.
        factors: [len(public)], as of `table_sums`.
        seed: of what is drawn.
    """

    def __init__(
        self,
        reader: Reader,
        public: Sequence[Sequence[int]],
        lot: int,
        names: Sequence[str],
        *,
        pushes: int = 16,
        noise: float = 0.0,
        factors: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        own = dict(reader.model.named_parameters())
        self._names = tuple(names)
        self._tables = {name: own[name].detach() for name in names}
        vocabulary = reader.vocabulary
        tokens = torch.tensor([token for record in public for token in record])
        self._often_V = (torch.bincount(tokens, minlength=vocabulary).float() + 0.5) / len(tokens)
        sums, counts = [], []
        for _ in range(pushes):
            chosen = torch.randperm(len(public), generator=generator)[:lot].tolist()
            records = [public[number] for number in chosen]
            made = table_sums(reader, records, None if factors is None else factors[chosen])
            sums.append(
                {name: made[name] + noise * torch.randn(made[name].shape, generator=generator) for name in names}
            )
            ids = torch.tensor([token for record in records for token in record])
            counts.append(torch.bincount(ids, minlength=vocabulary).float())
        self._usual = {name: torch.stack([each[name] for each in sums]).mean(0) for name in names}
        features = torch.stack([self._features(each) for each in sums])
        self._mean, self._std = features.mean((0, 1)), features.std((0, 1)).clamp_min(1e-6)
        self._learn((features - self._mean) / self._std, torch.stack(counts), seed)

    def read(self, sums: Mapping[str, Tensor]) -> Bag:
        """The tokens of one push.

        Args:
            sums: {name: [V, D]} of every table that the reader was made for.
        """
        with torch.no_grad():
            odds_V, log_count_V = self._net((self._features(sums) - self._mean) / self._std).unbind(-1)
        counts_V = torch.where(odds_V > self._least, log_count_V.clamp(0.0, 12.0).exp().round().clamp_min(1.0), 0.0)
        return Bag(odds_V, counts_V.long())

    def usual(self) -> Bag:
        """What a push of so many records holds on average, without looking at one."""
        return Bag(self._base_V.clamp(1e-6, 1 - 1e-6).logit(), self._usual_count_V.round().long())

    def _features(self, sums: Mapping[str, Tensor]) -> Tensor:
        """[V, C]"""
        found = [self._often_V.log()]
        for name in self._names:
            row_VD, usual_VD, table_VD = sums[name], self._usual[name], self._tables[name]
            unit_VD = F.normalize(table_VD, dim=1)
            beyond_VD = row_VD - usual_VD
            middle_D = F.normalize(row_VD.sum(0), dim=0)
            found += [
                (row_VD.norm(dim=1) + 1e-9).log(),
                (beyond_VD.norm(dim=1) + 1e-9).log(),
                (usual_VD.norm(dim=1) + 1e-9).log(),
                _squeezed((row_VD * unit_VD).sum(1)),
                _squeezed((beyond_VD * unit_VD).sum(1)),
                _squeezed(row_VD @ middle_D),
                F.cosine_similarity(row_VD, usual_VD, dim=1),
                F.cosine_similarity(row_VD, unit_VD, dim=1),
            ]
        return torch.stack(found, 1)

    def _learn(self, features_PVC: Tensor, counts_PV: Tensor, seed: int) -> None:
        occurs_PV = (counts_PV > 0).float()
        self._base_V = occurs_PV.mean(0)
        self._usual_count_V = counts_PV.mean(0)
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            self._net = nn.Sequential(
                nn.Linear(features_PVC.shape[-1], 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 2)
            )
            optimizer = torch.optim.Adam(self._net.parameters(), 0.01, weight_decay=1e-5)
            for _ in range(_STEPS):
                odds_PV, log_count_PV = self._net(features_PVC).unbind(-1)
                error_PV = (log_count_PV - counts_PV.clamp_min(1.0).log()).square() * occurs_PV
                loss = F.binary_cross_entropy_with_logits(
                    odds_PV, occurs_PV
                ) + error_PV.sum() / occurs_PV.sum().clamp_min(1.0)
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
        self._net.requires_grad_(False)
        self._least = self._best_border(features_PVC, counts_PV)

    @torch.no_grad()
    def _best_border(self, features_PVC: Tensor, counts_PV: Tensor) -> float:
        """The log odds above which naming an id pays in the F measure of the bag."""
        odds_PV, log_count_PV = self._net(features_PVC).unbind(-1)
        guessed_PV = log_count_PV.clamp(0.0, 12.0).exp().round().clamp_min(1.0)

        def measure(border: float) -> float:
            named_PV = torch.where(odds_PV > border, guessed_PV, 0.0)
            return float(
                (2 * torch.minimum(named_PV, counts_PV).sum(1) / (named_PV.sum(1) + counts_PV.sum(1))).mean()
            )

        return max((border / 4 for border in range(-12, 13)), key=measure)


def _squeezed(values: Tensor) -> Tensor:
    """Signed logarithm: sums grow with the lot."""
    return values.sign() * (values.abs() * 1e3).log1p()
