"""A checkpoint is whole or it is not there; damaged and foreign ones are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from coterie.checkpoints import (
    CheckpointStore,
    keep_parts,
    load_model_tensors,
    model_tensors,
    part_folder,
    read_checkpoint,
    write_checkpoint,
    write_part,
)
from coterie.errors import CheckpointError

TENSORS = {"weights": {"w": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}}


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", run="a" * 64)


def test_what_is_written_is_read_back_exactly(store: CheckpointStore) -> None:
    written = store.write(5, TENSORS, {"note": [1, 2]})
    newest = store.newest()
    assert newest == written
    assert newest is not None
    assert newest.state == {"note": [1, 2]}
    loaded = newest.load("weights")
    assert all(torch.equal(loaded[name], TENSORS["weights"][name]) for name in ("w", "b"))
    assert loaded["b"].dtype == torch.bfloat16


def test_the_newest_complete_one_is_taken(store: CheckpointStore) -> None:
    assert store.newest() is None
    for number in (5, 10, 100):
        store.write(number, TENSORS, {})
    (store.folder / "round-00000200.part").mkdir()
    newest = store.newest()
    assert newest is not None
    assert newest.round == 100
    assert store.rounds() == [5, 10, 100]
    store.keep_last(2)
    assert store.rounds() == [10, 100]


def test_equal_content_has_an_equal_digest(tmp_path: Path, store: CheckpointStore) -> None:
    elsewhere = CheckpointStore(tmp_path / "elsewhere", run="a" * 64)
    assert store.write(5, TENSORS, {}).digest == elsewhere.write(5, TENSORS, {}).digest
    changed = {"weights": {"w": torch.zeros(1)}}
    assert store.write(6, TENSORS, {}).digest != elsewhere.write(6, changed, {}).digest


def part(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"weights": {f"e[{value}]": torch.full((3,), value)}}


def written(folder: Path, world: int, run: str = "a", round_no: int = 1) -> list[str]:
    """What all ranks but the first put down of a checkpoint; rank 0 has not written yet."""
    return [write_part(folder, rank, run, round_no, part(rank / world), {}) for rank in range(1, world)]


@pytest.mark.parametrize("after", [{"world": 3}, {"world": 2, "run": "b"}, {"world": 4, "round_no": 2}, {"world": 2}])
def test_a_crash_before_the_first_ranks_part_leaves_the_older_checkpoint_whole(
    after: dict[str, Any], tmp_path: Path
) -> None:
    """Whatever number of ranks the next one is of, and of whatever run and round."""
    folder = tmp_path / "saved"
    older = write_checkpoint(folder, "a", 1, part(0.0), {}, parts=written(folder, 2))
    written(folder, **after)
    pieces = dict(read_checkpoint(folder).pieces("weights"))
    assert older.round == 1
    assert {name: float(own[0]) for name, own in pieces.items()} == {"e[0.0]": 0.0, "e[0.5]": 0.5}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_parts_that_no_checkpoint_names_are_deleted_and_those_of_ranks_that_are_no_more(
    world: int, tmp_path: Path
) -> None:
    folder = tmp_path / "saved"
    write_checkpoint(folder, "a", 1, part(0.0), {}, parts=written(folder, 4))
    other = tmp_path / "saved-too"
    write_checkpoint(other, "a", 1, part(0.0), {}, parts=written(other, 2))
    now = write_checkpoint(folder, "a", 2, part(0.0), {}, parts=written(folder, world, round_no=2))
    for rank in range(world):
        keep_parts(folder, rank, world)
    kept = sorted(path for path in tmp_path.glob("saved.rank-*/*"))
    assert kept == [part_folder(folder, rank, digest) for rank, digest in enumerate(now.parts, 1)]
    assert len(list(tmp_path.glob("saved.rank-*"))) == world - 1
    assert len(list(read_checkpoint(other).pieces("weights"))) == 2


class Crash(BaseException):
    """The end of a process."""


@pytest.mark.parametrize("step", ["checkpoints.save_tensors", "checkpoints.write_json", "storage._sync_tree"])
def test_a_crash_while_writing_leaves_the_earlier_one(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    store.write(5, TENSORS, {})

    def crash(*args: object, **named: object) -> None:
        raise Crash

    with monkeypatch.context() as patched:
        patched.setattr(f"coterie.{step}", crash)
        with pytest.raises(Crash):
            store.write(6, TENSORS, {})
    newest = store.newest()
    assert newest is not None
    assert newest.round == 5
    newest.load("weights")
    assert store.write(6, TENSORS, {}).round == 6, "what the crash left does not stand in the way"


def damage(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(bytes(raw))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


@pytest.mark.parametrize("harm", [damage, cut, Path.unlink])
def test_a_file_that_changed_since_is_refused_naming_the_way_back(
    store: CheckpointStore, harm: Callable[[Path], None]
) -> None:
    store.write(5, TENSORS, {})
    newest = store.write(6, TENSORS, {})
    harm(newest.path / "weights.safetensors")
    with pytest.raises(CheckpointError) as caught:
        newest.load("weights")
    assert caught.value.code == "checkpoint-torn"
    assert "weights.safetensors" in caught.value.message
    assert caught.value.fix == "delete that folder to go on from round 5"
    shutil.rmtree(newest.path)
    assert store.newest() == store.get(5)


def test_a_folder_without_a_manifest_is_refused(store: CheckpointStore) -> None:
    written = store.write(5, TENSORS, {})
    (written.path / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read"):
        store.newest()


def test_a_checkpoint_of_another_run_is_refused(store: CheckpointStore) -> None:
    store.write(5, TENSORS, {})
    other = CheckpointStore(store.folder, run="b" * 64)
    with pytest.raises(CheckpointError, match="belongs to another run") as caught:
        other.newest()
    assert caught.value.code == "checkpoint-foreign"


def test_a_renamed_checkpoint_is_refused(store: CheckpointStore) -> None:
    store.write(5, TENSORS, {}).path.rename(store.folder / "round-00000009")
    with pytest.raises(CheckpointError, match="round 5"):
        store.newest()


@pytest.mark.parametrize("tied", [False, True])
def test_model_weights_survive_saving(
    store: CheckpointStore, make_tiny: Callable[..., PreTrainedModel], tied: bool
) -> None:
    model = make_tiny("qwen3_moe", tie_word_embeddings=tied)
    other = make_tiny("qwen3_moe", tie_word_embeddings=tied, seed=9)
    written = store.write(1, {"weights": model_tensors(model)}, {})
    load_model_tensors(other, written.load("weights"))
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_buffers_that_act_like_weights_are_saved(make_tiny: Callable[..., PreTrainedModel]) -> None:
    model = make_tiny("deepseek_v3")
    buffers = {name for name in model.state_dict() if name.endswith("e_score_correction_bias")}
    assert buffers
    assert buffers <= set(model_tensors(model))


def test_weights_of_another_model_are_refused(make_tiny: Callable[..., PreTrainedModel]) -> None:
    model = make_tiny("qwen3_moe")
    with pytest.raises(CheckpointError, match="do not fit the model"):
        load_model_tensors(model, model_tensors(make_tiny("olmoe")))
    wider = make_tiny("qwen3_moe", vocab_size=97)
    with pytest.raises(CheckpointError, match="do not fit the model"):
        load_model_tensors(model, model_tensors(wider))


@pytest.mark.parametrize("content", ["[]", "5", "null", "[" * 100_000, '{"run": 5}', "\udcff"])
def test_a_manifest_of_any_other_content_is_a_damaged_checkpoint(store: CheckpointStore, content: str) -> None:
    good = store.write(5, TENSORS, {})
    (good.path / "manifest.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError) as caught:
        store.newest()
    assert caught.value.code == "checkpoint-torn"


@pytest.mark.parametrize("files", [[], "x", {"weights.safetensors": "x"}, {"weights.safetensors": {}}])
def test_a_manifest_whose_list_of_files_is_something_else_is_a_damaged_checkpoint(
    store: CheckpointStore, files: object
) -> None:
    good = store.write(5, TENSORS, {})
    manifest = json.loads((good.path / "manifest.json").read_text())
    (good.path / "manifest.json").write_text(json.dumps({**manifest, "files": files}))
    with pytest.raises(CheckpointError) as caught:
        store.newest()
    assert caught.value.code == "checkpoint-torn"


def test_tensors_that_share_their_memory_are_saved_once(store: CheckpointStore) -> None:
    models = [nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)) for _ in range(2)]
    for model in models:
        model[1].weight.data = model[0].weight.data
    written = store.write(1, {"weights": model_tensors(models[0])}, {})
    assert written.load("weights").keys() == {"0.weight"}
    load_model_tensors(models[1], written.load("weights"))
    assert torch.equal(models[1][1].weight, models[0][1].weight)
