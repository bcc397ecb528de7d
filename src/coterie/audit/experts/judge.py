"""How much the spectra of a push speak for a supposed token: a likelihood ratio that is learned on simulated pushes.

A row of a token of the push lies inside the span of its expert's sum, and how far inside depends on how many tokens
the expert had, on the noise, on rounding. None of it is assumed: pushes of public text of the same size, opened by
the same adversary, show how rows of their own tokens and rows of wrong guesses at the same places look.

Shape letters as in `coterie.audit.experts.reader`; C features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.audit.experts.membership import Metric
from coterie.audit.experts.opened import ExpertSum, Opened
from coterie.audit.experts.reader import LayerRows, LayerView

RULED_OUT = -30.0
"""Log likelihood ratio of a token of which an expert says that nobody chose it."""
FEATURES, MATCHES = 6, 10
_NONE = torch.zeros(0, dtype=torch.long)
_FEW = 8
_STEPS = 300


class Opener:
    """Features of rows under the sums of one push.

    Args:
        opened: the sums.
        reference: views of text that is not in the push: what rows of others look like under each sum.
        metric: how such pushes scatter.
    """

    def __init__(self, opened: Opened, reference: Sequence[LayerView], metric: Metric) -> None:
        self._opened = opened
        self._metric, self._divided = metric, metric.divided(opened)
        self._usual: dict[tuple[int, int], Tensor] = {}
        for (layer, expert), each in opened.experts.items():
            view = reference[layer]
            own = view.expert_R == expert
            own = own if int(own.sum()) >= _FEW else torch.ones_like(own)
            outside = each.first.outside(view.hidden_RD[own]), each.second.outside(view.inner_RF[own])
            self._usual[layer, expert] = torch.stack(
                [number for side in outside for number in (side.mean(), side.std())]
            )

    def features(self, layer: int, rows: LayerView | LayerRows) -> tuple[Tensor, Tensor, Tensor]:
        """What the opened sums of a layer say about each row that chose one of them.

        Returns:
            Token of each such row [R], features [R, C], and the tokens that are ruled out.
        """
        tokens, found = [_NONE], [torch.zeros(0, FEATURES)]
        out = [_NONE]
        for expert, each in self._of_layer(layer):
            of = (rows.expert_R == expert).nonzero()[:, 0]
            if each.first.empty:
                out.append(rows.token_R[of])
            elif len(of):
                own = each.first.outside(rows.hidden_RD[of]), each.second.outside(rows.inner_RF[of])
                tokens.append(rows.token_R[of])
                found.append(torch.cat([torch.stack(own, 1), self._usual[layer, expert].expand(len(of), -1)], 1))
        return torch.cat(tokens), torch.cat(found), torch.cat(out)

    def matches(self, layer: int, rows: LayerRows) -> tuple[Tensor, Tensor]:
        """How much of each row's own outer products the sums of its expert hold: exactly, and beside the scatter.

        Returns:
            As `features`, without the tokens that are ruled out.
        """
        tokens, found = [_NONE], [torch.zeros(0, MATCHES)]
        for expert, each in self._of_layer(layer):
            of = (rows.expert_R == expert).nonzero()[:, 0]
            if not len(of) or each.first.empty:
                continue
            usual = self._usual[layer, expert].expand(len(of), -1)
            columns = [usual]
            pairs = (rows.hidden_RD[of], rows.before_RG[of]), (rows.inner_RF[of], rows.after_RD[of])
            for number, (spectrum, pair) in enumerate(zip((each.first, each.second), pairs, strict=True)):
                side = layer, expert, number
                product_R, size_R = torch.zeros(len(of)), torch.zeros(len(of))
                if side in self._metric:
                    product_R, size_R = self._metric.held(side, self._divided[side], *pair)
                deviation_R = size_R.clamp_min(1e-30).sqrt()
                held = spectrum.matched(*pair).clamp(-3.0, 5.0), product_R / deviation_R, deviation_R.log1p()
                columns.append(torch.stack(held, 1))
            tokens.append(rows.token_R[of])
            found.append(torch.cat(columns, 1))
        return torch.cat(tokens), torch.cat(found)

    def _of_layer(self, layer: int) -> list[tuple[int, ExpertSum]]:
        return [(expert, each) for (at, expert), each in self._opened.experts.items() if at == layer]


class Ratio:
    """The log likelihood ratio of two classes of feature rows, by a small network.

    Args:
        inside_RC, others_RC: features of rows of either class.
        seed: of the network's start.
    """

    def __init__(self, inside_RC: Tensor, others_RC: Tensor, seed: int) -> None:
        both = torch.cat([inside_RC, others_RC])
        self._mean, self._std = both.mean(0), both.std(0).clamp_min(1e-6)
        self._limit = 0.0
        if not len(inside_RC) or not len(others_RC):
            return
        # No more certain than so many rows can show.
        self._limit = float(torch.tensor(len(both) + 1.0).log())
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            self._net = nn.Sequential(
                nn.Linear(both.shape[1], 16), nn.SiLU(), nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 1)
            )
            label = torch.cat([torch.ones(len(inside_RC)), torch.zeros(len(others_RC))])
            weight = torch.where(label > 0, 0.5 / len(inside_RC), 0.5 / len(others_RC))
            optimizer = torch.optim.Adam(self._net.parameters(), 0.02, weight_decay=1e-4)
            inputs = self._scaled(both)
            for _ in range(_STEPS):
                loss = F.binary_cross_entropy_with_logits(self._net(inputs)[:, 0], label, weight, reduction="sum")
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
        self._net.requires_grad_(False)

    def __call__(self, features_RC: Tensor) -> Tensor:
        """[R] log of how much likelier a row is inside than outside."""
        if not self._limit or not len(features_RC):
            return torch.zeros(len(features_RC))
        ratio_R1: Tensor = self._net(self._scaled(features_RC))
        return ratio_R1[:, 0].clamp(-self._limit, self._limit)

    def _scaled(self, features_RC: Tensor) -> Tensor:
        return (features_RC - self._mean) / self._std
