"""What an attacker prepares on a small real model, and the controls."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from coterie.audit.tokens.controls import halves, negative_control, positive_control, split
from coterie.audit.tokens.views import cover, last_rows, views
from coterie.audit.verdicts import controls
from coterie.errors import AuditError
from coterie.models import seam
from coterie.models.zoo.tiny import VOCAB, tiny_model
from helpers.federations import text


def public(sequences: int) -> list[list[int]]:
    found = text(999, sequences)
    return [found[row]["input_ids"].tolist() for row in range(len(found))]


def test_views_are_what_experts_are_given_and_the_gradients_at_their_outputs() -> None:
    model = tiny_model("olmoe")
    seam.select(model)
    texts = [[5, 9, 11, 30], [7, 8]]
    found = views(model, texts)
    assert all(param.grad is None and param.requires_grad for param in model.parameters())
    caught: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(index: int):  # type: ignore[no-untyped-def]
        def hook(module, args, out):  # type: ignore[no-untyped-def]
            out.retain_grad()
            caught[index] = (args[0].detach(), out)

        return hook

    layers = seam.expert_layers(model)
    hooks = [layer.module.register_forward_hook(keep(layer.index)) for layer in layers]
    place = 0
    for number, ids in enumerate(texts):
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum").backward()
        inside = slice(place, place + len(ids))
        for layer, view in zip(layers, found, strict=True):
            hidden, out = caught[layer.index]
            torch.testing.assert_close(view.hidden_PD[inside], hidden, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(view.gradient_PD[inside], out.grad, rtol=1e-3, atol=1e-5)
            assert view.token_P[inside].tolist() == ids
            assert view.next_P[inside].tolist() == [*ids[1:], -1]
            assert (view.text_P[inside] == number).all()
        place += len(ids)
    for hook in hooks:
        hook.remove()
    rows, expected = last_rows(model, [[5, 9, 11], [5, 9, 12]])
    torch.testing.assert_close(rows[1].hidden_PD[0], found[1].hidden_PD[2], rtol=1e-4, atol=1e-5)
    assert expected.shape == (2, VOCAB)


def test_rare_tokens_are_put_into_copies_of_public_text() -> None:
    texts = public(30)
    copies = cover(texts, VOCAB, 4, torch.Generator().manual_seed(0))
    counts = torch.bincount(torch.tensor([token for each in [*texts, *copies] for token in each]), minlength=VOCAB)
    assert int(counts.min()) >= 3, "a copy may overwrite what it came with"
    assert cover(texts, VOCAB, 0, torch.Generator()) == []


def test_controls_are_tried_on_texts_drawn_by_the_seed_and_on_enough_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [[number] * 10 for number in range(80)]
    apart, rest = split(texts)
    assert (len(apart), len(rest)) == (20, 60)  # 200 tokens, not an eighth of the texts
    with pytest.raises(AuditError, match="hold 190 tokens") as caught:
        split(texts[:38])
    assert caught.value.code == "audit-public"
    model = tiny_model("olmoe")
    seam.select(model)
    drawn = [set(halves(model, [[3 + n] * 10 for n in range(60)], seed)[1].token_P.tolist()) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert max(drawn[0]) > 3 + len(drawn[0]), "not the first ones in the file"
    monkeypatch.setattr("coterie.audit.tokens.controls.MOST_TOKENS", 505)
    monkeypatch.setattr("coterie.audit.tokens.controls._FEWEST", 4)
    monkeypatch.setattr("coterie.audit.tokens.controls.LEAST_TOKENS", 10)
    few = halves(model, [[3 + n] * 10 for n in range(80)], 0)[1]
    assert len(few.token_P) == 60, "an eighth of the 50 texts that are enough, not of 80"


def test_controls_read_what_is_there_and_nothing_else() -> None:
    model = tiny_model("olmoe")
    seam.select(model)
    texts = public(400)
    negative = negative_control(model, texts)
    assert abs(negative.value.value - negative.prior.value) <= 0.02
    positive = positive_control(model, texts)
    assert controls(positive.value, negative.value, negative.prior, negative.gap, {}).passed
    assert positive.value.value >= 0.95
    assert positive.prior.value < 0.2
    with pytest.raises(AuditError) as caught:
        positive_control(model, texts[:5])
    assert caught.value.code == "audit-public"
