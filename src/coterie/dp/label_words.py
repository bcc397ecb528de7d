"""Classes asked of a language-model head: which of a few words stands at the place of the answer.

A classifier's own head starts from nothing and has few noisy rounds to learn in; the language-model head knows words
already. The loss is a softmax over the words of the classes alone, so nothing is spent on the rest of the vocabulary.

Shape letters: B records, T tokens, V vocabulary, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coterie.dp.heads import TARGETS, head_of
from coterie.dp.losses import IGNORED, Batch, outputs_of


@dataclass(frozen=True)
class LabelWords:
    """The words of the classes.

    A record's answer is its first label that is not -100: for a causal model the token itself, predicted from what is
    before it, for a masked one the token that the mask stands for.

    Attributes:
        ids: one token for each class, in the order of the classes.
    """

    ids: tuple[int, ...]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """[B] cross-entropy of each record's word among the words of the classes; 0 where a record has no answer.

        A label that is no class's word (in records that a check makes up) counts as one more.
        """
        logits_BV, label_B = self._answers(model, batch)
        known_B = label_B != IGNORED
        scores_BK = logits_BV[:, list(self.ids)]
        own_B = logits_BV.gather(1, label_B.clamp_min(0)[:, None])[:, 0]
        is_word_B = (label_B[:, None] == label_B.new_tensor(self.ids)).any(1)
        others = torch.cat([scores_BK, own_B.masked_fill(is_word_B, float("-inf"))[:, None]], 1)
        return torch.where(known_B, others.logsumexp(1) - own_B, torch.zeros_like(own_B))

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """[B, K] float32 logits of the classes' words at each record's answer."""
        return self._answers(model, batch)[0][:, list(self.ids)]

    def classes(self, batch: Batch) -> Tensor:
        """[B] which class each record's label is; -1 where it is none."""
        label_B = _first(batch["labels"])[1]
        found_BK = label_B[:, None] == label_B.new_tensor(self.ids)
        return torch.where(found_BK.any(1), found_BK.int().argmax(1), -1)

    def _answers(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """[B, V] float32 logits at the answers, and [B] their labels."""
        logits_BTV = outputs_of(model, {name: value for name, value in batch.items() if name not in TARGETS}).logits
        labels_BT = batch["labels"]
        if head_of(model).kind == "next":  # a label is predicted one place before; what nothing precedes, nowhere
            labels_BT = labels_BT.clone()
            labels_BT[:, 0] = IGNORED
            place_B, label_B = _first(labels_BT)
            place_B = (place_B - 1).clamp_min(0)
        else:
            place_B, label_B = _first(labels_BT)
        return logits_BTV[torch.arange(len(place_B), device=place_B.device), place_B].float(), label_B


def _first(labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """[B] place and label of the first label that is not -100; place 0 and -100 where there is none."""
    place_B = (labels_BT != IGNORED).int().argmax(1)
    return place_B, labels_BT.gather(1, place_B[:, None])[:, 0]
