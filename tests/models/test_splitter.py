"""A split model is the whole model: nothing lost, nothing invented, and its parts join to the original bit by bit."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from coterie.config import ModelSpec
from coterie.errors import ModelError, PlacementError
from coterie.models import seam
from coterie.models.build import build_model, quiet_loading
from coterie.models.catalogue import causal_lm_types
from coterie.models.exporter import export, split_spec
from coterie.models.partial import build_partial
from coterie.models.placement import Placement
from coterie.models.seam import ExpertsCall, RoutedRows, expert_layers, expert_rows
from coterie.models.shards import check_digests, expert_key, load_tensors, parse_expert_key, shard_file
from coterie.models.splitter import split
from coterie.models.tiny import VOCAB, tiny_model

PARTIES = ["alder", "birch", "cedar"]
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def save(family, folder, dtype=torch.float32, **overrides):
    model = tiny_model(family, dtype=dtype, **overrides)
    with quiet_loading():
        model.save_pretrained(folder, max_shard_size="100KB")
    return model


def split_tiny(family, tmp_path, dtype=torch.float32, **overrides):
    """A saved tiny model, its spec, and the folder of its parts."""
    model = save(family, tmp_path / "whole", dtype, **overrides)
    spec = ModelSpec(path=tmp_path / "whole", dtype=DTYPES[dtype])
    placement = Placement.of_spec("round_robin", PARTIES, model)
    split(spec, placement, tmp_path / "parts")
    return model, spec, tmp_path / "parts"


class ShardExperts:
    """Computes experts from shard files, weights read one expert at a time: the slow twin of a federation."""

    def __init__(self, folder):
        self.weights = {}
        for party in PARTIES:
            self.weights |= load_tensors(folder / shard_file(party))

    def __call__(self, call: ExpertsCall) -> Tensor:
        layer = call.layer

        def linear(name, x_RI, ends_E):
            parts, start = [], 0
            for expert, end in enumerate(ends_E.tolist()):
                weight = self.weights[expert_key(layer.index, expert, name)]
                rows = x_RI[start:end].to(weight.dtype)
                out = rows @ (weight if layer.layout.is_transposed else weight.T)
                parts.append(
                    out + self.weights[expert_key(layer.index, expert, f"{name}_bias")]
                    if layer.layout.has_bias
                    else out
                )
                start = end
            return torch.cat(parts)

        rows = RoutedRows.of(call.expert_ids_NK, layer.num_experts)
        out_RD = expert_rows(layer, call.hidden_ND[rows.token_R], rows.ends_E, linear)
        return rows.combine(out_RD, call.expert_weights_NK, call.hidden_ND.dtype)


@pytest.mark.parametrize("dtype", list(DTYPES), ids=list(DTYPES.values()))
@pytest.mark.parametrize("family", list(causal_lm_types()))
def test_split_and_export_give_the_original_back_bit_by_bit(family, dtype, tmp_path):
    _, spec, parts = split_tiny(family, tmp_path, dtype)
    export(parts, tmp_path / "joined")
    whole = build_model(spec).state_dict()
    joined = build_model(ModelSpec(path=tmp_path / "joined", dtype=spec.dtype)).state_dict()
    assert joined.keys() == whole.keys()
    for name, tensor in whole.items():
        assert joined[name].dtype == tensor.dtype, name
        assert torch.equal(joined[name], tensor), name


@pytest.mark.parametrize("family", list(causal_lm_types()))
def test_a_partial_model_with_experts_from_shards_gives_the_whole_models_outputs(family, tmp_path):
    _, spec, parts = split_tiny(family, tmp_path)
    whole = build_model(spec).eval()
    partial = build_partial(split_spec(parts), parts / "trunk.safetensors").eval()
    assert all(p.is_meta for layer in expert_layers(partial) for p in layer.parameters().values())
    held = [name for name, p in partial.named_parameters() if not p.is_meta]
    assert not [name for name in held if ".experts." in name and "shared" not in name]
    for name, buffer in whole.named_buffers():
        assert torch.equal(partial.get_buffer(name), buffer), name
        assert partial.get_buffer(name).dtype == buffer.dtype, name
    seam.select(partial, ShardExperts(parts))
    ids = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    expected = whole(input_ids=ids, use_cache=False).logits
    got = partial(input_ids=ids, use_cache=False).logits
    assert float((got - expected).norm() / expected.norm()) < 1e-5
    got.sum().backward()
    assert all(layer.parameters()["down_proj"].grad is None for layer in expert_layers(partial))
