"""Every family behind the interface builds small, with all of its parameters at work."""

from __future__ import annotations

import pytest
import torch

from coterie.errors import ModelError
from coterie.models.seam import expert_layers
from coterie.models.zoo.catalogue import causal_lm_types, modeling_files, modules_without_causal_lm
from coterie.models.zoo.tiny import EXPERTS, VOCAB, tiny_config, tiny_model

FAMILIES = list(causal_lm_types())
# Parameters that no loss reaches, by the families' own design: indexers choose keys with a hard top-k, and
# correction biases only shift the choice of experts.
NO_GRADIENT = ("indexer", "e_score_correction_bias", "expert_bias")


def test_the_list_of_families_is_not_empty_and_covers_every_modeling_file():
    assert len(FAMILIES) > 20
    assert len(modules_without_causal_lm()) < len(modeling_files())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_builds_small_with_two_moe_layers_and_every_parameter_in_use(family):
    model = tiny_model(family)
    layers = expert_layers(model)
    assert len(layers) >= 2
    assert all(layer.num_experts == EXPERTS for layer in layers)
    assert sum(p.numel() for p in model.parameters()) < 300_000
    ids = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    logits = model(input_ids=ids, use_cache=False).logits
    assert logits.shape[:2] == (2, 12)
    logits.square().sum().backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not [name for name in unused if not any(part in name for part in NO_GRADIENT)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_seed_gives_the_same_model_and_no_parameter_stays_at_zero(family):
    first, second, other = tiny_model(family), tiny_model(family), tiny_model(family, seed=1)
    others = dict(other.named_parameters())
    seconds = dict(second.named_parameters())
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, seconds[name]), name
        assert not torch.equal(parameter, others[name]), name
        assert torch.isfinite(parameter).all(), name
        assert parameter.count_nonzero() == parameter.numel(), name


def test_building_a_model_leaves_the_global_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    tiny_model("qwen3_moe", seed=5)
    assert torch.equal(torch.rand(2), expected)


def test_an_unknown_family_is_refused_with_the_list_of_known_ones():
    with pytest.raises(ModelError, match=r"`switch_transformers` is not") as error:
        tiny_config("switch_transformers")
    assert error.value.code == "model-unknown-family"
    assert "qwen3_moe" in (error.value.fix or "")
