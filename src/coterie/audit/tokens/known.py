"""What an attacker can prepare once, before it looks at a transcript: everything that public text teaches."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coterie.audit.metrics import content_ids
from coterie.audit.prior import Unigram
from coterie.audit.tokens.decoders import Gaussian, Nearest, Softmax, directions
from coterie.audit.tokens.link import Linker
from coterie.audit.tokens.views import TextRows, cover, views
from coterie.errors import AuditError

_WORK_PER_S = 3e9
"""Parameters times tokens that a second of one core sees forward and backward, with the decoders' fits."""
_LEAST = 4
"""Times that a decoder sees every token at least."""
_FEWEST = 2000
_TRAINED = 16_000


@dataclass
class Known:
    """Public text through the public model, and decoders fitted on it.

    Attributes:
        model: the public starting model.
        views: of each MoE layer.
        unigram: of the public text.
        content_V: which ids carry meaning.
        seed: of everything that is drawn.
        hits: where the model guesses the text of its owner, by text; filled while attacks are scored.
    """

    model: PreTrainedModel
    views: list[TextRows]
    unigram: Unigram
    content_V: Tensor
    seed: int
    hits: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: PreTrainedModel, public: Sequence[Sequence[int]], *, seed: int, budget_s: float) -> Known:
        """Run as much public text through the model as the budget has time for; the same for the same arguments.

        Raises:
            AuditError: ``audit-public``: too little public text.
        """
        vocabulary = int(model.get_input_embeddings().weight.shape[0])
        everything = torch.cat([torch.tensor(text) for text in public]) if public else torch.empty(0).long()
        if len(everything) < _FEWEST:
            raise AuditError(
                f"Public text has {len(everything)} tokens; an attack needs {_FEWEST} to learn from.",
                code="audit-public",
                why="another party would have any amount of it, so that little would be found here for want of text",
                fix="name files of public text",
            )
        generator = torch.Generator().manual_seed(seed)
        allowed = budget_s * _WORK_PER_S / sum(param.numel() for param in model.parameters())
        chosen: list[Sequence[int]] = []
        tokens = 0
        for number in torch.randperm(len(public), generator=generator).tolist():
            if chosen and tokens + len(public[number]) > allowed:
                break
            chosen.append(public[number])
            tokens += len(public[number])
        rare = cover(chosen, vocabulary, _LEAST, generator)
        return cls(
            model,
            views(model, [*chosen, *rare[: max(1, len(chosen) // 4)]]),
            Unigram.of(everything, vocabulary),
            content_ids(everything, vocabulary),
            seed,
        )

    @property
    def layers(self) -> range:
        """Index of every MoE layer."""
        return range(len(self.views))

    @cached_property
    def tokens(self) -> Mapping[int, Gaussian]:
        """For each layer the reader of the row's own token."""
        return {
            layer: Gaussian.fit(view.hidden_PD, view.token_P, self.unigram.log_V)
            for layer, view in enumerate(self.views)
        }

    @cached_property
    def nexts(self) -> Mapping[int, Gaussian]:
        """For each layer the reader of the next token from a returned gradient."""
        found = {}
        for layer, view in enumerate(self.views):
            inside = view.next_P >= 0
            found[layer] = Gaussian.fit(directions(view.gradient_PD[inside]), view.next_P[inside], self.unigram.log_V)
        return found

    def some(self, layer: int) -> Tensor:
        """A random choice of a layer's rows for what is trained step by step, the same for every layer."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randperm(len(self.views[layer].token_P), generator=generator)[:_TRAINED]

    def linear(self, layer: int) -> Softmax:
        """A linear classifier for a layer."""
        view, rows = self.views[layer], self.some(layer)
        return Softmax.fit(self.tokens[layer], view.hidden_PD[rows], view.token_P[rows], seed=self.seed)

    def dictionary(self, layer: int, most: int) -> Nearest:
        """Vectors of a layer with their tokens, a random choice of at most so many."""
        view, rows = self.views[layer], self.some(layer)[:most]
        return Nearest(view.hidden_PD[rows], view.token_P[rows])

    @cached_property
    def orders(self) -> Mapping[int, Linker]:
        """For each layer, which row follows which."""
        return {
            layer: Linker.fit(view.hidden_PD[:-1][view.follows_P], view.hidden_PD[1:][view.follows_P])
            for layer, view in enumerate(self.views)
        }

    @cached_property
    def upwards(self) -> Mapping[int, Linker]:
        """For each layer but the last, which row of the layer above is of the same token."""
        return {
            layer: Linker.fit(view.hidden_PD, above.hidden_PD)
            for layer, (view, above) in enumerate(itertools.pairwise(self.views))
        }
