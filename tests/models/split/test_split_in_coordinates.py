"""A checkpoint that is split in other coordinates is the same function, and comes back as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from coterie.config import ModelSpec
from coterie.dp.losses import default_loss
from coterie.errors import ModelError
from coterie.models import seam
from coterie.models.preconditioner import Factors, Preconditioner, attached
from coterie.models.second_moments import measure
from coterie.models.split.exporter import export, split_spec
from coterie.models.split.partial import build_partial
from coterie.models.split.placement import Placement
from coterie.models.split.shards import load_tensors
from coterie.models.split.splitter import split
from coterie.models.zoo.build import quiet_loading
from coterie.models.zoo.tiny import VOCAB, tiny_model
from helpers.shard_experts import ShardExperts

PARTIES = ["alder", "birch", "cedar"]
IDS = torch.randint(3, VOCAB, (3, 9), generator=torch.Generator().manual_seed(2))


def split_in_coordinates(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = tiny_model(family, dtype=dtype)
    with quiet_loading():
        model.save_pretrained(folder / "whole")
    model = model.float().eval()
    seam.select(model)
    records = [{"input_ids": own[None], "attention_mask": torch.ones(1, 9), "labels": own[None]} for own in IDS]
    factors = measure(model, records, default_loss, power=0.4)
    placement = Placement.of_spec("round_robin", PARTIES, model)
    split(ModelSpec(path=folder / "whole"), placement, folder / "parts", preconditioner=factors)
    return model


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "gpt_oss", "qwen3_5_moe_text", "jamba", "gemma4_text"])
def test_trunk_and_shards_are_the_same_function_and_join_to_the_original(family: str, tmp_path: Path) -> None:
    model = split_in_coordinates(family, tmp_path)
    parts = tmp_path / "parts"
    partial = build_partial(split_spec(parts), parts / "trunk.safetensors").eval()
    assert len(attached(partial).factors) > 3
    seam.select(partial, ShardExperts(parts))
    with torch.no_grad():
        expected = model(input_ids=IDS, use_cache=False).logits
        torch.testing.assert_close(partial(input_ids=IDS, use_cache=False).logits, expected, rtol=1e-3, atol=1e-4)
    moved = load_tensors(parts / "trunk.safetensors")
    plain = model.state_dict()
    assert any(name in plain and not torch.equal(value, plain[name]) for name, value in moved.items())
    export(parts, tmp_path / "joined")
    joined = AutoModelForCausalLM.from_pretrained(tmp_path / "joined").state_dict()
    assert joined.keys() == plain.keys()
    for name, value in joined.items():
        torch.testing.assert_close(value, plain[name], rtol=1e-5, atol=1e-6, msg=name)


def test_a_bfloat16_checkpoint_is_split_in_float32(tmp_path: Path) -> None:
    """In other coordinates its weights are no longer numbers of bfloat16; joined, they are again."""
    model = split_in_coordinates("olmoe", tmp_path, torch.bfloat16)
    parts = tmp_path / "parts"
    tensors = [t for file in parts.glob("*.safetensors") for t in load_tensors(file).values()]
    assert {t.dtype for t in tensors if t.is_floating_point()} == {torch.float32}
    export(parts, tmp_path / "joined")
    joined = AutoModelForCausalLM.from_pretrained(tmp_path / "joined").state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(joined[name].float(), value, rtol=1e-4, atol=1e-6, msg=name)


def test_factors_of_another_model_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    with quiet_loading():
        model.save_pretrained(tmp_path / "whole")
    placement = Placement.of_spec("round_robin", PARTIES, model)
    other = Preconditioner({"model.nowhere": Factors(torch.eye(3), None)})
    with pytest.raises(ModelError, match="no matrix of this model"):
        split(ModelSpec(path=tmp_path / "whole"), placement, tmp_path / "parts", preconditioner=other)
    assert not (tmp_path / "parts").exists()
