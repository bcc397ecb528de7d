"""Continue a prompt, one token at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from coterie.errors import DataError
from coterie.training.data.chat import special_tokens


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    tokens: int,
    temperature: float = 0.8,
    seed: int = 0,
    written: bool = False,
    ends: Collection[int] = (),
    show: Callable[[str], None] | None = None,
) -> str:
    """The continuation of ``prompt``: at most ``tokens`` new tokens, fewer when the text ends.

    Args:
        model: on any device.
        tokenizer: the model's own.
        prompt: may be empty where the tokenizer begins texts by a token.
        tokens: most new tokens.
        temperature: divides the logits before sampling; 0 takes the likeliest token.
        seed: of the sampling.
        written: a chat template wrote the prompt, with all tokens that begin a text.
        ends: tokens that end the continuation, beside the tokenizer's own, and the model's that are special.
        show: hears of each piece of the continuation as soon as it is known.

    Raises:
        DataError: the prompt has no token and the tokenizer no token that begins a text; or it is not UTF-8.

    Cost: a token at a time, with the family's own cache of what was computed before.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError:  # bytes of another encoding on the command line
        raise DataError("The prompt is not UTF-8 text.", code="data-encoding", fix="use a UTF-8 terminal") from None
    ids: list[int] = tokenizer(prompt, add_special_tokens=not written, verbose=False)["input_ids"]
    if not ids:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if first is None:
            raise DataError(
                "The prompt is empty.", code="data-empty-prompt", fix="give --prompt at least one character"
            )
        ids = [first]
    device = next(model.parameters()).device
    inputs_BT = torch.tensor([ids], device=device)
    how: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    last = _ends(model, tokenizer) | {*ends}
    settings = GenerationConfig(
        max_new_tokens=tokens,
        eos_token_id=sorted(last) or None,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **how,
    )
    pieces = _Pieces(tokenizer, last, show or (lambda piece: None))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.generate(
            inputs_BT,
            attention_mask=torch.ones_like(inputs_BT),
            generation_config=settings,
            streamer=pieces,
        )
    return pieces.text


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokenizer's end, and those that the model's generation settings name, as chat models have several.

    Settings of another tokenizer would name ordinary tokens: only special ones count.
    """
    named: int | list[int] | None = model.generation_config.eos_token_id
    ids = {named} if isinstance(named, int) else {*(named or ())}
    own = tokenizer.eos_token_id
    return (ids & special_tokens(tokenizer)) | (set() if own is None else {own})


class _Pieces:
    """A streamer of transformers' generation: tokens become text as they come, whole characters only."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, ends: Collection[int], show: Callable[[str], None]
    ) -> None:
        self._tokenizer, self._ends, self._show = tokenizer, ends, show
        self._ids: list[int] | None = None
        self.text = ""

    def put(self, value: Tensor) -> None:
        if self._ids is None:  # the prompt comes first
            self._ids = []
            return
        self._ids += [token for token in value.flatten().tolist() if token not in self._ends]
        self._tell(last=False)

    def end(self) -> None:
        self._tell(last=True)

    def _tell(self, last: bool) -> None:
        now: str = self._tokenizer.decode(self._ids or [])
        if last or (now.startswith(self.text) and not now.endswith("\ufffd")):
            self._show(now[len(self.text) :])
            self.text = now
