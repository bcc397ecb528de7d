"""Text that is planted so that its traces can be looked for: secrets in several copies, and texts by coin flip.

A *secret* is a code after a sentence that names what it opens; whoever attacks knows the sentence and ranks codes
(Carlini et al. 2019, arXiv:1802.08232). A *sampled* canary is text that the public starting model wrote at full
temperature, so it is public, may be looked at, and pulls hard (2606.10481). A *new-token* canary ends in a token that
occurs nowhere else in the text, or hardly (2503.06808). Of the last two each is in the text or not by a coin's flip.
"""

from __future__ import annotations

import random
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Kind = Literal["secret", "sampled", "new_token"]
KINDS: tuple[Kind, ...] = ("secret", "sampled", "new_token")
DIGITS = 5
COPIES = (1, 2, 4, 8, 16)
_SENTENCE = "The access code of locker {name} is"
_WORDS_TOKENS = 12
"""Tokens of sampled text before a new token."""


@dataclass(frozen=True)
class Canary:
    """One planted text, or one that could have been.

    Attributes:
        text: the whole of it; the prefix, then the secret.
        copies: how often it is in the text; 0: it is not.
        prefix: what an attacker knows; empty for sampled text.
    """

    kind: Kind
    text: str
    copies: int
    prefix: str = ""

    @property
    def secret(self) -> str:
        """What an attacker looks for: what follows the prefix."""
        return self.text[len(self.prefix) :]


def code(draw: random.Random) -> str:
    """A secret, one of 10^5, all equally likely; a space before each digit makes each a token of its own."""
    return "".join(f" {draw.randrange(10)}" for _ in range(DIGITS))


def make_secrets(draw: random.Random, *, names: int = 5, copies: Sequence[int] = COPIES) -> list[Canary]:
    """``names`` secrets for each number of copies, and as many that are in no text as for two of them."""
    wanted = [count for count in copies for _ in range(names)] + [0] * (2 * names)
    labels: set[str] = set()
    while len(labels) < len(wanted):
        labels.add("".join(draw.choices(string.ascii_uppercase, k=4)))
    found = []
    for label, count in zip(sorted(labels, key=lambda _: draw.random()), wanted, strict=True):
        prefix = _SENTENCE.format(name=label)
        found.append(Canary("secret", prefix + code(draw), count, prefix))
    return found


def make_sampled(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, draw: random.Random, *, count: int, tokens: int
) -> list[Canary]:
    """Texts that the starting model writes from nothing, each in the text or not by a coin."""
    texts = sample_texts(model, tokenizer, count, tokens, draw.getrandbits(62))
    return [Canary("sampled", text, draw.getrandbits(1)) for text in texts]


def make_new_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    draw: random.Random,
    *,
    count: int,
) -> list[Canary]:
    """Sampled words and then one token each that occurs nowhere in ``texts``; where there are too few, the rarest.

    Returns:
        At most ``count``: fewer where the vocabulary has not so many tokens that stand alone as text.
    """
    seen: Counter[int] = Counter()
    for text in texts:
        seen.update(tokenizer(text, verbose=False)["input_ids"])
    words = sample_texts(model, tokenizer, count, _WORDS_TOKENS, draw.getrandbits(62))
    pieces = _standing(tokenizer, sorted(range(len(tokenizer)), key=lambda token: (seen[token], draw.random())))
    found = []
    for prefix, (token, piece) in zip(words, pieces, strict=False):
        if _ids(tokenizer, prefix + piece)[-1:] == [token]:
            found.append(Canary("new_token", prefix + piece, draw.getrandbits(1), prefix))
    return found


def _standing(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int]) -> Iterable[tuple[int, str]]:
    """Tokens that are printable text and stay one token behind a word, in the order given."""
    special = set(tokenizer.all_special_ids)
    for token in tokens:
        piece = tokenizer.decode([token]) if token not in special else ""
        readable = piece.strip() and piece.isprintable() and "�" not in piece
        if readable and _ids(tokenizer, "the" + piece) == [*_ids(tokenizer, "the"), token]:
            yield token, piece


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


@torch.no_grad()
def sample_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, tokens: int, seed: int
) -> list[str]:
    """Different texts of a model, from its end token (or the first of the vocabulary) on, at temperature 1.

    Cost: the whole text is computed again for each token, because not every family's cache works the same way.
    """
    device, was_training = next(model.parameters()).device, model.training
    generator = torch.Generator().manual_seed(seed)
    first = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), 0)
    banned = torch.tensor(sorted(set(tokenizer.all_special_ids)), dtype=torch.int64)
    found: dict[str, None] = {}
    model.eval()
    try:
        while len(found) < count:
            ids_BT = torch.full((min(count, 64), 1), first)
            for _ in range(tokens):
                logits_BV = model(input_ids=ids_BT.to(device), use_cache=False).logits[:, -1].float().cpu()
                logits_BV[:, banned] = -torch.inf
                logits_BV[:, len(tokenizer) :] = -torch.inf
                ids_BT = torch.cat([ids_BT, _drawn(logits_BV, generator)], 1)
            found |= {text: None for ids in ids_BT[:, 1:].tolist() if (text := _clean(tokenizer.decode(ids)))}
    finally:
        model.train(was_training)
    return list(found)[:count]


def _drawn(logits_BV: Tensor, generator: torch.Generator) -> Tensor:
    return torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)


def _clean(text: str) -> str:
    """As a text file may hold it."""
    return "".join(letter if letter.isprintable() and letter != "�" else " " for letter in text).strip()
