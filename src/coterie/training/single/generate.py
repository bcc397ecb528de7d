"""Continue a prompt, one token at a time."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coterie.errors import DataError


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    tokens: int,
    temperature: float = 0.8,
    seed: int = 0,
) -> str:
    """The continuation of ``prompt``: at most ``tokens`` new tokens, fewer when the text ends.

    Args:
        model: on any device.
        tokenizer: the model's own.
        prompt: may be empty where the tokenizer begins texts by a token.
        tokens: most new tokens.
        temperature: divides the logits before sampling; 0 takes the likeliest token.
        seed: of the sampling.

    Raises:
        DataError: the prompt has no token and the tokenizer no token that begins a text; or it is not UTF-8.

    Cost: the whole text is computed again for each token, because not every family's cache works the same way.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError:  # bytes of another encoding on the command line
        raise DataError("The prompt is not UTF-8 text.", code="data-encoding", fix="use a UTF-8 terminal") from None
    ids: list[int] = tokenizer(prompt, verbose=False)["input_ids"]
    if not ids:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if first is None:
            raise DataError(
                "The prompt is empty.", code="data-empty-prompt", fix="give --prompt at least one character"
            )
        ids = [first]
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    given = len(ids)
    for _ in range(tokens):
        inputs_BT = torch.tensor([ids], device=device)
        logits_V = model(input_ids=inputs_BT, use_cache=False).logits[0, -1].float().cpu()
        if temperature > 0:
            chances_V = torch.softmax(logits_V / temperature, dim=-1)
            chosen = int(torch.multinomial(chances_V, 1, generator=generator))
        else:
            chosen = int(logits_V.argmax())
        if chosen == tokenizer.eos_token_id:
            break
        ids.append(chosen)
    text: str = tokenizer.decode(ids[given:])
    return text
