"""A split model is the whole model: nothing lost, nothing invented, and its parts join to the original bit by bit."""

from __future__ import annotations

import json
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

from coterie.config import ModelSpec
from coterie.errors import ModelError, PlacementError
from coterie.models import seam
from coterie.models.seam import expert_layers
from coterie.models.split.exporter import export, split_spec
from coterie.models.split.origins import save_tensors
from coterie.models.split.partial import build_partial
from coterie.models.split.placement import Placement
from coterie.models.split.read_checkpoint import layer_group, stream_checkpoint
from coterie.models.split.shards import (
    TensorFileWriter,
    check_digests,
    expert_key,
    load_tensors,
    parse_expert_key,
    shard_file,
)
from coterie.models.split.splitter import split
from coterie.models.zoo.build import build_model, quiet_loading
from coterie.models.zoo.catalogue import causal_lm_types
from coterie.models.zoo.tiny import VOCAB, tiny_config, tiny_model
from helpers.shard_experts import ShardExperts

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


@pytest.fixture(scope="module", params=causal_lm_types())
def in_float32(request, tmp_path_factory):
    """Of a family: the whole model, the folder of its parts, and a folder for more."""
    folder = tmp_path_factory.mktemp("float32")
    _, spec, parts = split_tiny(request.param, folder)
    yield build_model(spec).eval(), parts, folder
    shutil.rmtree(folder)


def assert_export_gives_back(whole, parts, folder, dtype):
    export(parts, folder / "joined")
    joined = build_model(ModelSpec(path=folder / "joined", dtype=dtype)).state_dict()
    assert joined.keys() == whole.state_dict().keys()
    for name, tensor in whole.state_dict().items():
        assert joined[name].dtype == tensor.dtype, name
        assert torch.equal(joined[name], tensor), name


def test_split_and_export_give_the_original_back_bit_by_bit(in_float32):
    whole, parts, folder = in_float32
    assert_export_gives_back(whole, parts, folder, "float32")


@pytest.mark.parametrize("family", list(causal_lm_types()))
def test_split_and_export_of_bfloat16_give_the_original_back_bit_by_bit(family, tmp_path):
    _, spec, parts = split_tiny(family, tmp_path, torch.bfloat16)
    assert_export_gives_back(build_model(spec), parts, tmp_path, "bfloat16")


def sizes_and_formats(folder):
    files = [folder / "trunk.safetensors", *(folder / shard_file(party) for party in PARTIES)]
    stored = {tensor.dtype for path in files for tensor in load_tensors(path).values() if tensor.is_floating_point()}
    return sum(path.stat().st_size for path in files), stored


def test_a_bfloat16_checkpoint_is_split_into_as_many_bytes_whatever_it_is_trained_in(tmp_path):
    whole = save("olmoe", tmp_path / "whole", torch.bfloat16)
    spec = ModelSpec(path=tmp_path / "whole", dtype="float32")
    split(spec, Placement.of_spec("round_robin", PARTIES, whole), tmp_path / "parts")
    size, stored = sizes_and_formats(tmp_path / "parts")
    weights = sum(p.numel() for p in whole.parameters())
    assert stored == {torch.bfloat16}
    assert 2 * weights < size < 2.3 * weights  # headers count in a model as small as this
    partial = build_partial(spec, tmp_path / "parts" / "trunk.safetensors")
    for name, param in partial.named_parameters():
        if not param.is_meta:
            assert param.dtype == torch.float32
            assert torch.equal(param, whole.get_parameter(name).float()), name
    assert_export_gives_back(whole, tmp_path / "parts", tmp_path, "bfloat16")


def test_a_checkpoint_with_one_wider_weight_is_split_without_loss(tmp_path):
    whole = save("olmoe", tmp_path / "whole", torch.bfloat16)
    (file, *_) = sorted((tmp_path / "whole").glob("*.safetensors"))
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name] = tensors[name].float() + 2**-12
    save_file(tensors, file, metadata={"format": "pt"})
    split(ModelSpec(path=tmp_path / "whole"), Placement.of_spec("round_robin", PARTIES, whole), tmp_path / "parts")
    assert sizes_and_formats(tmp_path / "parts")[1] == {torch.float32}
    assert_export_gives_back(build_model(ModelSpec(path=tmp_path / "whole")), tmp_path / "parts", tmp_path, "float32")


def test_weights_that_training_widened_are_exported_as_wide(tmp_path):
    """The split holds bfloat16, and what was trained from it float32: nothing of that is rounded away."""
    whole = save("olmoe", tmp_path / "whole", torch.bfloat16)
    spec, parts = ModelSpec(path=tmp_path / "whole", dtype="float32"), tmp_path / "parts"
    split(spec, Placement.of_spec("round_robin", PARTIES, whole), parts)
    files = {}
    for stem in ("trunk", *(f"experts-{party}" for party in PARTIES)):
        moved = {
            name: tensor.float() + 2**-12 for name, tensor in load_tensors(parts / f"{stem}.safetensors").items()
        }
        files[stem] = tmp_path / f"{stem}.safetensors"
        save_tensors(files[stem], moved, "run", 3)
    trunk, *shards = files.values()
    export(parts, tmp_path / "joined", trunk=trunk, shards=shards)
    joined = AutoModelForCausalLM.from_pretrained(tmp_path / "joined")
    for name, param in joined.named_parameters():
        assert param.dtype == torch.float32, name
        assert torch.equal(param, whole.get_parameter(name).float() + 2**-12), name


def test_a_partial_model_with_experts_from_shards_gives_the_whole_models_outputs(in_float32):
    whole, parts, _ = in_float32
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
    assert float(((got - expected).norm() / expected.norm()).detach()) < 1e-5
    got.sum().backward()
    assert all(layer.parameters()["down_proj"].grad is None for layer in expert_layers(partial))


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "nemotron_h", "gemma4_text"])
def test_the_exported_files_hold_the_names_that_transformers_itself_saves(family, tmp_path):
    _, _, parts = split_tiny(family, tmp_path)
    export(parts, tmp_path / "joined")
    index = "model.safetensors.index.json"
    saved = json.loads((tmp_path / "whole" / index).read_text())["weight_map"]
    joined = json.loads((tmp_path / "joined" / index).read_text())["weight_map"]
    assert joined.keys() == saved.keys()
    for name, file in saved.items():
        stored = load_file(tmp_path / "whole" / file)[name]
        assert torch.equal(load_file(tmp_path / "joined" / joined[name])[name], stored), name


def test_every_expert_is_in_its_hosts_shard_and_nowhere_else(tmp_path):
    model = save("nemotron_h", tmp_path / "whole")
    hosted = {"alder": {0: [0, 1, 2, 3, 4, 5, 6], 1: [7]}, "birch": {0: [7], 1: [0, 1, 2, 3, 4, 5, 6]}}
    placement = Placement.of_hosted(hosted, PARTIES, [8, 8])
    split(ModelSpec(path=tmp_path / "whole"), placement, tmp_path / "parts")
    for party in PARTIES:
        shard = load_tensors(tmp_path / "parts" / shard_file(party))
        found: dict[int, set[int]] = {}
        for key, tensor in shard.items():
            layer, expert, parameter = parse_expert_key(key)
            found.setdefault(layer, set()).add(expert)
            whole = expert_layers(model)[layer].parameters()[parameter]
            assert torch.equal(tensor, whole[expert]), key
        assert found == {layer: set(experts) for layer, experts in placement.hosted(party).items()}
    assert not [name for name in load_tensors(tmp_path / "parts" / "trunk.safetensors") if ".experts." in name]


def test_a_tied_head_is_stored_once_and_tied_again(tmp_path):
    _, _, parts = split_tiny("qwen3_moe", tmp_path, tie_word_embeddings=True)
    trunk = load_tensors(parts / "trunk.safetensors")
    assert "model.embed_tokens.weight" in trunk
    assert "lm_head.weight" not in trunk
    partial = build_partial(split_spec(parts), parts / "trunk.safetensors")
    assert partial.lm_head.weight is partial.model.embed_tokens.weight
    export(parts, tmp_path / "joined")
    joined = build_model(ModelSpec(path=tmp_path / "joined"))
    assert joined.lm_head.weight is joined.model.embed_tokens.weight


def test_a_checkpoint_that_stores_a_tied_head_twice_is_read_unless_the_two_differ(tmp_path):
    save("qwen3_moe", tmp_path / "whole", tie_word_embeddings=True)
    placement = Placement.round_robin(PARTIES, [8, 8, 8])
    embedding = "model.embed_tokens.weight"

    def add_head(weights):
        if embedding in weights:
            weights["lm_head.weight"] = weights[embedding].clone()

    edit(tmp_path / "whole", add_head)
    split(ModelSpec(path=tmp_path / "whole"), placement, tmp_path / "parts")
    assert "lm_head.weight" not in load_tensors(tmp_path / "parts" / "trunk.safetensors")

    def differ(weights):
        if "lm_head.weight" in weights:
            weights["lm_head.weight"] += 1

    edit(tmp_path / "whole", differ)
    with pytest.raises(ModelError) as error:
        split(ModelSpec(path=tmp_path / "whole"), placement, tmp_path / "other")
    assert error.value.code == "model-tied-differ"


def test_random_weights_of_a_family_are_split_the_same_for_the_same_seed(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 3, "num_experts": 8, "vocab_size": 32}
    settings = {**sizes, "num_attention_heads": 2, "num_key_value_heads": 2}
    spec = ModelSpec(family="olmoe", config=settings)
    placement = Placement.round_robin(PARTIES, [8, 8, 8])
    first = split(spec, placement, tmp_path / "first", seed=1)
    second = split(spec, placement, tmp_path / "second", seed=1)
    assert first["files"] == second["files"]
    model = build_model(spec, seed=1)
    shard = load_tensors(tmp_path / "first" / shard_file("alder"))
    assert torch.equal(shard[expert_key(0, 0, "down_proj")], expert_layers(model)[0].parameters()["down_proj"][0])


def edit(folder, change):
    """Change the weights of a saved checkpoint, file by file, and its index accordingly."""
    index_path = folder / "model.safetensors.index.json"
    weight_map = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights = load_file(path)
        change(weights)
        save_file(weights, path, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(weights, path.name)
    index_path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refused_split(tmp_path, code, change=None, family="qwen3_moe"):
    """Splitting a changed checkpoint fails and leaves nothing behind."""
    model = save(family, tmp_path / "whole")
    if change is not None:
        edit(tmp_path / "whole", change)
    placement = Placement.of_spec("round_robin", PARTIES, model)
    with pytest.raises(ModelError) as error:
        split(ModelSpec(path=tmp_path / "whole"), placement, tmp_path / "parts")
    assert error.value.code == code
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole"], "nothing half-written"
    return error.value.message


def test_a_missing_trunk_weight_stops_the_split(tmp_path):
    message = refused_split(tmp_path, "model-bad-checkpoint", lambda w: w.pop("model.norm.weight", None))
    assert "misses `model.norm.weight`" in message


def test_a_missing_expert_stops_the_split_instead_of_renumbering_the_others(tmp_path):
    def drop(weights):
        for part in ("gate_proj", "up_proj", "down_proj"):
            weights.pop(f"model.layers.1.mlp.experts.3.{part}.weight", None)

    assert "model.layers.1.mlp.experts" in refused_split(tmp_path, "model-bad-checkpoint", drop)


def test_one_missing_matrix_of_one_expert_stops_the_split(tmp_path):
    message = refused_split(
        tmp_path, "model-bad-checkpoint", lambda w: w.pop("model.layers.2.mlp.experts.0.up_proj.weight", None)
    )
    assert "model.layers.2.mlp.experts.gate_up_proj" in message


def test_an_unknown_weight_stops_the_split(tmp_path):
    def add(weights):
        if "model.norm.weight" in weights:
            weights["model.layers.0.mlp.surprise.weight"] = torch.zeros(2)

    assert "surprise" in refused_split(tmp_path, "model-bad-checkpoint", add)


def test_a_weight_of_another_shape_stops_the_split(tmp_path):
    def shrink(weights):
        if "model.norm.weight" in weights:
            weights["model.norm.weight"] = weights["model.norm.weight"][:-1].clone()

    assert "in another shape `model.norm.weight`" in refused_split(tmp_path, "model-bad-checkpoint", shrink)


def test_a_torn_weight_file_stops_the_split(tmp_path):
    save("qwen3_moe", tmp_path / "whole")
    last = sorted((tmp_path / "whole").glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.raises(ModelError) as error:
        split(ModelSpec(path=tmp_path / "whole"), Placement.round_robin(PARTIES, [8, 8, 8]), tmp_path / "parts")
    assert error.value.code == "model-torn-file"
    assert not (tmp_path / "parts").exists()


def test_pickled_weights_are_not_read(tmp_path):
    save("qwen3_moe", tmp_path / "whole")
    for path in (tmp_path / "whole").glob("model*"):
        path.unlink()
    (tmp_path / "whole" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"no model\.safetensors") as error:
        split(ModelSpec(path=tmp_path / "whole"), Placement.round_robin(PARTIES, [8, 8, 8]), tmp_path / "parts")
    assert error.value.code == "model-bad-checkpoint"


def test_a_quantised_checkpoint_is_refused(tmp_path):
    save("qwen3_moe", tmp_path / "whole")
    path = tmp_path / "whole" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "mxfp4"}}))
    with pytest.raises(ModelError) as error:
        split(ModelSpec(path=tmp_path / "whole"), Placement.round_robin(PARTIES, [8, 8, 8]), tmp_path / "parts")
    assert error.value.code == "model-quantized"


def test_a_placement_of_another_model_and_a_full_folder_are_refused(tmp_path):
    save("qwen3_moe", tmp_path / "whole")
    spec = ModelSpec(path=tmp_path / "whole")
    with pytest.raises(PlacementError, match="3 MoE layers of 8 experts"):
        split(spec, Placement.round_robin(PARTIES, [8, 8]), tmp_path / "parts")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "mine.txt").write_text("keep")
    with pytest.raises(ModelError) as error:
        split(spec, Placement.round_robin(PARTIES, [8, 8, 8]), tmp_path / "parts")
    assert error.value.code == "model-out-exists"
    assert (tmp_path / "parts" / "mine.txt").read_text() == "keep"


def test_the_manifest_knows_every_file_and_notices_a_changed_one(tmp_path):
    _, _, parts = split_tiny("qwen3_moe", tmp_path)
    manifest = check_digests(parts)
    assert set(manifest["files"]) >= {"trunk.safetensors", "model/config.json", *map(shard_file, PARTIES)}
    assert Placement.from_json(manifest["placement"]).content_hash() == manifest["placement_hash"]
    (parts / shard_file("birch")).unlink()
    check_digests(parts)  # a party has only its own shard
    path = parts / shard_file("alder")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelError, match="experts-alder") as error:
        check_digests(parts)
    assert error.value.code == "model-changed-file"
    with pytest.raises(ModelError) as error:
        check_digests(tmp_path)
    assert error.value.code == "model-no-manifest"


@pytest.fixture
def qwen_parts(tmp_path):
    return split_tiny("qwen3_moe", tmp_path)[2]


def refused_export(parts, code, **given):
    with pytest.raises(ModelError) as error:
        export(parts, parts.parent / "joined", **given)
    assert error.value.code == code
    assert not (parts.parent / "joined").exists()
    return error.value.message


def trained_files(parts, run="r", round_no=5):
    """Trunk and shards as parties of a run write them, with the split's own values."""
    folder = parts.parent / f"{run}-{round_no}"
    folder.mkdir()
    made = [folder / name for name in ("trunk.safetensors", *map(shard_file, PARTIES))]
    for path in made:
        save_tensors(path, load_tensors(parts / path.name), run, round_no)
    return made[0], made[1:]


@pytest.mark.parametrize(("run", "round_no"), [("r", 6), ("other", 5), ("", 0)])
@pytest.mark.parametrize("which", [0, 1, 3])
def test_an_export_of_files_that_do_not_belong_together_is_refused(qwen_parts, run, round_no, which):
    trunk, shards = trained_files(qwen_parts)
    files = [trunk, *shards]
    if run:
        other = trained_files(qwen_parts, run, round_no)
        files[which] = [other[0], *other[1]][which]
    else:
        files[which] = qwen_parts / files[which].name  # as it was before training
    message = refused_export(qwen_parts, "model-parts-mixed", trunk=files[0], shards=files[1:])
    assert str(files[which]) in message or which == 0
    trained = refused_export(qwen_parts, "model-parts-mixed", trunk=trunk)  # the split's own shards are the default
    assert "before any training" in trained


def test_an_export_of_trained_files_refuses_a_config_that_changed_since_the_split(qwen_parts):
    """Another number of experts per token is another model, with tensors of the same shapes."""
    trunk, shards = trained_files(qwen_parts)
    config = qwen_parts / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_experts_per_tok": 1}))
    message = refused_export(qwen_parts, "model-changed-file", trunk=trunk, shards=shards)
    assert "model/config.json" in message


def test_an_export_of_files_that_were_changed_or_say_nothing_is_refused(qwen_parts, tmp_path):
    trunk, shards = trained_files(qwen_parts)
    raw = bytearray(shards[1].read_bytes())
    raw[-1] ^= 1
    shards[1].write_bytes(raw)
    assert str(shards[1]) in refused_export(qwen_parts, "model-changed-file", trunk=trunk, shards=shards)
    save_file(load_tensors(shards[0]), shards[1])
    assert str(shards[1]) in refused_export(qwen_parts, "model-no-origin", trunk=trunk, shards=shards)


def test_parts_of_another_split_of_the_same_shape_are_refused(qwen_parts, tmp_path):
    (tmp_path / "again").mkdir()
    tiny = tiny_model("qwen3_moe", seed=7)
    tiny.save_pretrained(tmp_path / "again" / "whole")
    spec = ModelSpec(path=tmp_path / "again" / "whole")
    other = tmp_path / "again" / "parts"
    split(spec, Placement.of_spec("round_robin", PARTIES, tiny), other)
    name = shard_file("birch")
    shards = [
        path / name for path, name in zip((qwen_parts, other, qwen_parts), map(shard_file, PARTIES), strict=True)
    ]
    assert "of another split" in refused_export(qwen_parts, "model-parts-mixed", shards=shards)
    shutil.copy(other / name, qwen_parts / name)
    assert name in refused_export(qwen_parts, "model-changed-file")


def test_an_export_without_one_partys_shard_names_the_missing_experts(qwen_parts):
    (qwen_parts / shard_file("birch")).unlink()
    assert "misses `layer.0.expert.1.down_proj`" in refused_export(qwen_parts, "model-bad-shard")


def test_an_expert_in_two_shards_is_refused(qwen_parts):
    shutil.copy(qwen_parts / shard_file("birch"), qwen_parts / shard_file("dogwood"))
    assert "experts-birch.safetensors and in experts-dogwood" in refused_export(qwen_parts, "model-shards-overlap")


def test_an_export_takes_trained_files_in_any_order(qwen_parts):
    shards = [qwen_parts / shard_file(party) for party in PARTIES]
    weights = load_tensors(shards[1])
    key = expert_key(2, 0, "down_proj")
    weights[key] = weights[key] + 1
    trunk, trained = trained_files(qwen_parts)
    save_tensors(trained[1], weights, "r", 5)
    export(qwen_parts, qwen_parts.parent / "joined", trunk=trunk, shards=[trained[1], trained[2], trained[0]])
    before = build_model(ModelSpec(path=qwen_parts.parent / "whole")).state_dict()
    after = build_model(ModelSpec(path=qwen_parts.parent / "joined")).state_dict()
    name = "model.layers.2.mlp.experts.down_proj"
    assert torch.equal(after[name][0], before[name][0] + 1)
    assert torch.equal(after[name][1:], before[name][1:])
    assert [key for key in before if not torch.equal(before[key], after[key])] == [name]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.norm.weight"), "misses `model.norm.weight`"),
        (lambda t: t.update(extra=torch.zeros(1)), "`extra`"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), "in another shape `model.norm.weight`"),
    ],
)
def test_a_trunk_that_does_not_fit_is_refused_by_the_partial_model_and_the_export(qwen_parts, change, words):
    trunk = load_tensors(qwen_parts / "trunk.safetensors")
    change(trunk)
    path, shards = trained_files(qwen_parts)
    save_tensors(path, trunk, "r", 5)
    with pytest.raises(ModelError) as error:
        build_partial(split_spec(qwen_parts), path)
    assert error.value.code == "model-bad-trunk"
    assert words in error.value.message
    assert words in refused_export(qwen_parts, "model-bad-shard", trunk=path, shards=shards)


def test_a_missing_trunk_file_a_folder_that_is_no_split_and_a_foreign_key_are_refused(qwen_parts, tmp_path):
    spec = split_spec(qwen_parts)
    (qwen_parts / "trunk.safetensors").unlink()
    with pytest.raises(ModelError) as error:
        build_partial(spec, qwen_parts / "trunk.safetensors")
    assert error.value.code == "model-no-file"
    with pytest.raises(ModelError) as error:
        split_spec(tmp_path)
    assert error.value.code == "model-no-manifest"
    for key in ("layer.1.expert.01.down_proj", "model.norm.weight", "layer.1.expert.-1.x"):
        with pytest.raises(ModelError):
            parse_expert_key(key)
    assert parse_expert_key(expert_key(3, 12, "up_proj")) == (3, 12, "up_proj")


def test_a_partial_model_takes_the_dtype_of_its_spec(qwen_parts):
    spec = split_spec(qwen_parts).model_copy(update={"dtype": "bfloat16"})
    partial = build_partial(spec, qwen_parts / "trunk.safetensors")
    assert partial.model.norm.weight.dtype == torch.bfloat16
    assert expert_layers(partial)[0].parameters()["down_proj"].dtype == torch.bfloat16


def test_only_one_decoder_layer_is_in_memory_at_a_time(tmp_path):
    save("qwen3_moe", tmp_path / "whole")
    model = build_model(ModelSpec(path=tmp_path / "whole"), meta=True)
    names = list(model.state_dict())
    before: list[weakref.ref] = []
    seen: list[str] = []
    kept = []  # a careless reader keeps what it was given
    for group in stream_checkpoint(tmp_path / "whole", model):
        assert not [ref for ref in before if ref() is not None], "a tensor of the group before is still there"
        assert all(tensor.is_meta for tensor in model.state_dict().values())
        before = [weakref.ref(tensor) for tensor in group.values()]
        seen += group
        kept.append(group)
        assert len({layer_group(name) for name in group}) == 1
    assert sorted(seen) == sorted(names)


def test_a_tensor_file_written_in_any_order_is_read_by_safetensors_and_is_aligned(tmp_path):
    tensors = {
        "flags": torch.tensor([True, False, True]),
        "half": torch.randn(3).bfloat16(),
        "wide": torch.randn(2, 3, dtype=torch.float64),
        "strided": torch.randn(4, 3).t(),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 4),
    }
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    path = tmp_path / "some.safetensors"
    with TensorFileWriter(path, shapes) as writer:
        for name in sorted(tensors, reverse=True):
            writer.write(name, tensors[name])
            assert not path.exists()
    loaded = load_file(path)
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor), name
        assert loaded[name].dtype == tensor.dtype, name
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + length])
    for name, (dtype, _) in shapes.items():
        assert (8 + length + header[name]["data_offsets"][0]) % dtype.itemsize == 0, name


def test_a_tensor_file_that_fails_on_the_way_leaves_nothing(tmp_path):
    with (
        pytest.raises(RuntimeError, match="power cut"),
        TensorFileWriter(tmp_path / "x.safetensors", {"a": (torch.float32, (2,))}),
    ):
        raise RuntimeError("power cut")
    assert list(tmp_path.iterdir()) == []


def test_the_text_part_of_a_vision_language_checkpoint_is_split_without_its_tower(tmp_path):
    tower = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    text = tiny_config("qwen3_5_moe_text").to_dict()
    config = Qwen3_5MoeConfig(text_config=text, vision_config={**tower, "num_position_embeddings": 16})
    whole = Qwen3_5MoeForConditionalGeneration._from_config(config)
    with quiet_loading():
        whole.save_pretrained(tmp_path / "whole")
    spec = ModelSpec(path=tmp_path / "whole")
    model = build_model(spec)
    assert type(model).__name__ == "Qwen3_5MoeForCausalLM"
    split(spec, Placement.of_spec("round_robin", PARTIES, model), tmp_path / "parts")
    assert not [name for name in load_tensors(tmp_path / "parts" / "trunk.safetensors") if "visual" in name]
    export(tmp_path / "parts", tmp_path / "joined")
    joined = build_model(ModelSpec(path=tmp_path / "joined")).state_dict()
    assert joined.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(joined[name], tensor), name
    expected = whole.model.language_model.layers[1].mlp.experts.down_proj
    assert torch.equal(joined["model.layers.1.mlp.experts.down_proj"], expected)
