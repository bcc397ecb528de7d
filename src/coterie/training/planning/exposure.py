"""What other parties can read of a party that trains without a budget, and up to which sizes: all words from here.

The measure behind `Reach` is the span of an expert's sum. The gradient of an expert's first projection is a sum of
outer products with the hidden vectors of just the tokens that chose the expert, so its rows span these vectors; as
long as they are fewer than the width, a candidate token is tested by whether its vector lies in the span. (For dense
models: Petrov et al., arXiv:2405.15586.) An expert sees about K / E of a push's tokens, so a push stays open up to
E / K times the width.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from coterie.config import FederationConfig, LoraSpec
from coterie.models import seam
from coterie.models.sizes import experts_per_token
from coterie.models.zoo.build import build_model


@dataclass(frozen=True)
class Reach:
    """How large a push can be and still be read.

    Attributes:
        width: dimensions of the span: the model's width; where adapters are trained, at most their rank.
        experts: E of the layer that has most.
        chosen: K, experts of a token.
    """

    width: int
    experts: int
    chosen: int

    @property
    def tokens(self) -> int:
        """About as many tokens in one party's push can be read one by one, experts chosen evenly."""
        return self.width * self.experts // self.chosen

    @classmethod
    def of_model(cls, model: PreTrainedModel, lora: LoraSpec | None = None) -> Reach:
        """By a model's dimensions; no weight is read."""
        text = model.config.get_text_config()
        width = int(text.hidden_size)
        experts = max(layer.num_experts for layer in seam.expert_layers(model))
        return cls(width if lora is None else min(width, lora.rank), experts, experts_per_token(text))

    @classmethod
    def of_federation(cls, federation: FederationConfig) -> Reach:
        """By the model that federation.yaml names.

        Raises:
            ModelError: there is no such model.
        """
        return cls.of_model(build_model(federation.model, meta=True), federation.lora)


def of_tokens(federation: FederationConfig) -> list[str]:
    """What crosses in `tokens`."""
    lines = [
        "`exchange: tokens`. The parties that host experts can read this party's text from the hidden vectors they "
        "receive; take part only if you trust them with it"
    ]
    if federation.evaluate:
        every = federation.train.eval_every
        when = f"every {every} rounds and after the last one" if every else "after the last round"
        lines.append(
            f"held-out text crosses as well: all of `data.test` goes to the same hosts {when}; with `evaluate: "
            "false` in federation.yaml none of it does, and no held-out loss is known"
        )
    return lines


def of_questions(federation: FederationConfig) -> list[str]:
    """What crosses when a party asks the finished model, experts with their hosts."""
    if federation.exchange == "tokens":
        return [
            "`exchange: tokens`. What is asked goes to the hosts of its experts as hidden vectors, and so does every "
            "token of an answer: they can read both"
        ]
    return [
        "`exchange: experts`. The hosts' weights come here, each layer once, and are kept for this command; no text "
        "leaves, and others see no more than that this party fetched them"
    ]


def of_pushes(federation: FederationConfig, reach: Reach, round_tokens: int | None = None) -> list[str]:
    """What crosses in `experts` with `privacy: none`.

    Args:
        federation: shared settings.
        reach: of its model.
        round_tokens: most tokens that the party has in one round; None: not known.
    """
    when = "in every round, since all parties are served the whole model"
    if federation.trunk == "private":
        when = "in the first rounds, and less once the private trunk has moved away from the public start"
    if federation.aggregation == "masked":
        parties = len(federation.parties)
        return [
            "`privacy: none`, pushes masked. A host reads the sum of all parties' pushes, of none alone. That is no "
            f"promise: while the {parties} parties' pushes hold about {reach.tokens:,} tokens together, or fewer, "
            f"records can be rebuilt from their sum {when}; and a party that subtracts its own push is left with the "
            "others'",
            "the way out is a budget: `privacy:` with epsilon and delta in federation.yaml",
        ]
    return [
        "`privacy: none`. A push without noise gives whole records back: an expert's sum holds the hidden vectors of "
        "just the tokens that chose it, and a host that knows the starting model rebuilds the text from them, "
        f"{when}. Everybody who fetches weights can learn from how they change, too; nothing bounds it",
        f"how large a push can be read: about {reach.tokens:,} tokens (width {reach.width:,} x {reach.experts} "
        f"experts / {reach.chosen} a token); what rare experts saw, beyond that as well"
        + _compared(reach, round_tokens),
        "the way out is a budget: `privacy:` with epsilon and delta in federation.yaml. With three parties or more, "
        "`aggregation: masked` shows hosts only what all parties' sums add up to; that is less, and no promise",
    ]


def _compared(reach: Reach, round_tokens: int | None) -> str:
    if round_tokens is None:
        return ""
    inside = "all of it can be read" if round_tokens <= reach.tokens else "beyond, for experts that are chosen evenly"
    return f". A round of this party has up to {round_tokens:,}: {inside}"
