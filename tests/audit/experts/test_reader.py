"""The adversary's view of a model against the model's own forward and plain autograd."""

from __future__ import annotations

import pytest
import torch
from push_world import every_expert, small_model, small_reader, texts
from torch.nn import functional as F

from coterie.audit.experts.reader import Reader
from coterie.audit.experts.simulate import rows_of, summed
from coterie.models.grouped import as_EIO
from coterie.models.zoo.tiny import VOCAB

FAMILIES = ["qwen3_moe", "gpt_oss", "nemotron_h", "olmoe", "deepseek_v3"]
"""Biases, the other storage and no gate; shared experts, dense layers first, latent attention, Mamba."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_push_of_supposed_records_is_the_models_own_gradient(family: str) -> None:
    records = [*texts(3, 7, VOCAB, 0), *texts(2, 5, VOCAB, 1)]
    reader = small_reader(family)
    opened = summed(rows_of(reader, records), every_expert(reader))

    plain = small_model(family)
    for record in records:
        ids = torch.tensor([record])
        logits = plain(input_ids=ids, use_cache=False).logits
        F.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="sum").backward()
    for layer in reader.layers:
        own = plain.get_submodule(layer.name)
        names = layer.layout.up_name, "down_proj"
        first, second = (as_EIO(getattr(own, name).grad, layer.layout.is_transposed) for name in names)
        for expert in range(layer.num_experts):
            found = opened.experts[layer.index, expert]
            torch.testing.assert_close(found.first_DG, first[expert], atol=1e-5 * float(first.norm()), rtol=0)
            torch.testing.assert_close(found.second_FD, second[expert], atol=1e-5 * float(second.norm()), rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [0, 1, 6])
def test_continuations_look_as_the_whole_text_does(family: str, length: int) -> None:
    reader = small_reader(family)
    prefixes = torch.tensor([text[:length] for text in texts(2, 6, VOCAB, 0)], dtype=torch.long).view(2, length)
    candidates = torch.arange(5, 5 + 140).remainder(VOCAB).view(2, 70)
    views = reader.continuations(prefixes, candidates)
    whole = torch.cat([prefixes.repeat_interleave(70, 0), candidates.reshape(-1, 1)], 1)
    for view, all_places in zip(views, reader.views(whole), strict=True):
        hidden = all_places.hidden_ND.view(140, length + 1, -1)[:, -1]
        torch.testing.assert_close(view.hidden_ND, hidden, atol=1e-4 * float(hidden.abs().max()), rtol=0)
        assert torch.equal(view.experts_NK, all_places.experts_NK.view(140, length + 1, -1)[:, -1])
        assert torch.equal(view.expert_R.bincount(minlength=8), view.experts_NK.flatten().bincount(minlength=8))


def test_families_without_such_masks_are_computed_row_by_row() -> None:
    assert small_reader("qwen3_moe").side_by_side
    assert not small_reader("nemotron_h").side_by_side


@pytest.mark.parametrize("side_by_side", [True, False])
@pytest.mark.parametrize("length", [1, 4])
def test_the_last_layers_gradient_at_a_place_follows_from_the_next_token_alone(
    side_by_side: bool, length: int
) -> None:
    reader = small_reader()
    reader.side_by_side = side_by_side
    whole = torch.tensor(texts(2, 9, VOCAB, 3))
    (*_, last) = reader.rows(whole)
    guessed = torch.stack([whole[:, length], whole[:, length] + 1], 1)
    found = reader.last_rows(whole[:, :length], guessed)
    for record in range(2):
        place = last.token_R == record * 9 + length - 1
        right, wrong = found.token_R == 2 * record, found.token_R == 2 * record + 1
        torch.testing.assert_close(found.before_RG[right], last.before_RG[place], atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(found.after_RD[right], last.after_RD[place], atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(found.hidden_RD[right], last.hidden_RD[place], atol=1e-5, rtol=1e-4)
        assert not torch.allclose(found.before_RG[wrong], last.before_RG[place], rtol=1e-2)


def test_a_few_layers_are_seen_without_the_rest() -> None:
    reader = small_reader()
    whole = reader.continuations(torch.tensor([[5, 6]]), torch.tensor([[7, 8]]))
    (first,) = reader.continuations(torch.tensor([[5, 6]]), torch.tensor([[7, 8]]), depth=1)
    assert len(whole) == len(reader.layers) > 1
    assert torch.equal(first.hidden_ND, whole[0].hidden_ND)


def test_a_model_is_left_as_it_computes() -> None:
    model = small_model()
    ids = torch.tensor(texts(1, 6, VOCAB, 0))
    before = model(input_ids=ids).logits
    Reader(model).rows(ids)
    assert torch.equal(model(input_ids=ids).logits, before)
