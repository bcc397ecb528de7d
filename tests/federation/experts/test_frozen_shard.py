"""Hosted experts that nobody trains are served from where they lie: the same bytes, and none of them held."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from coterie.errors import ModelError, RoundError
from coterie.federation.experts.frozen_shard import FrozenShard
from coterie.federation.experts.parts import Part, digest_of
from coterie.federation.experts.serve_weights import CHUNK, OFFER, WeightService
from coterie.federation.rounds.attempt import Attempt
from coterie.federation.wire.transport import Message
from coterie.models.seam import expert_layers
from coterie.models.split.origins import save_tensors
from coterie.models.split.shards import StoredTensors, expert_key
from coterie.models.zoo.tiny import tiny_model

HOSTED = (1, 3)
ATTEMPT = Attempt(1)


def world(stored: torch.dtype) -> tuple[list, dict[str, Tensor], Part, dict[str, Tensor]]:
    """A model's layers, a shard of two experts of each, the part of layer 1, and its tensors stacked by hand."""
    layers = expert_layers(tiny_model("gpt_oss"))  # with biases: tensors of very different sizes
    shard = {
        expert_key(layer.index, expert, name): param[expert].detach().to(stored).clone()
        for layer in layers
        for expert in HOSTED
        for name, param in layer.parameters().items()
    }
    stacked = {name: param[list(HOSTED)].detach().to(stored) for name, param in layers[1].parameters().items()}
    shapes = tuple((name, tuple(value.shape)) for name, value in stacked.items())
    return layers, shard, Part(0, "alder", 1, HOSTED, shapes, trained=False), stacked


@pytest.mark.parametrize("from_file", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16])
def test_any_piece_of_a_part_is_that_piece_of_its_wire_form(
    tmp_path: Path, from_file: bool, stored: torch.dtype, wire: torch.dtype
) -> None:
    layers, shard, part, stacked = world(stored)
    if from_file:
        save_tensors(tmp_path / "shard", shard, "", 0)
    frozen = FrozenShard(layers, StoredTensors(tmp_path / "shard") if from_file else shard)
    whole = torch.cat([value.to(wire).reshape(-1) for value in stacked.values()])
    assert part.encode(stacked, wire).equal(whole.view(torch.uint8))
    edges = [0, 1, 7, whole.numel() // 3, whole.numel() - 1, whole.numel()]
    for start in edges:
        for stop in edges:
            if start <= stop:
                assert torch.equal(frozen.values(part, start, stop, wire), whole[start:stop]), (start, stop)


def test_what_is_served_of_a_frozen_part_is_what_a_held_one_serves_in_every_round(tmp_path: Path) -> None:
    layers, shard, part, stacked = world(torch.bfloat16)
    save_tensors(tmp_path / "shard", shard, "", 0)
    asked: list[tuple[int, int]] = []
    frozen = FrozenShard(layers, StoredTensors(tmp_path / "shard"))

    def values(of: Part, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        asked.append((start, stop))
        return frozen.values(of, start, stop, dtype)

    def nothing(of: Part) -> dict[str, Tensor]:
        raise AssertionError(f"{of} is held")

    service = WeightService((part,), nothing, torch.bfloat16, still=values)
    held = WeightService((part,), lambda _: stacked, torch.bfloat16)
    for round_no in (1, 2):
        attempt = Attempt(round_no)
        service.begin(attempt)
        held.begin(attempt)
        for kind in (OFFER, CHUNK):
            message = Message(kind, attempt.address(part=0, chunk=0))
            ours, theirs = service.handle("birch", message), held.handle("birch", message)
            assert ours.body == theirs.body
            assert all(torch.equal(a, b) for a, b in zip(ours.tensors, theirs.tensors, strict=True))
        assert service.digest(0, attempt) == digest_of(part.encode(stacked, torch.bfloat16))
    assert len(asked) == 3, "once for the digest of all rounds, and for each piece that somebody fetched"


def test_a_shard_that_lacks_a_parameter_or_has_another_shape_is_refused(tmp_path: Path) -> None:
    layers, shard, _, _ = world(torch.float32)
    key = expert_key(0, 3, "down_proj")
    for changed in ({**shard, key: shard[key][:-1]}, {k: v for k, v in shard.items() if k != key}):
        with pytest.raises(ModelError) as caught:
            FrozenShard(layers, changed)
        assert caught.value.code == "host-shard"
        assert key in caught.value.message


def test_stored_tensors_are_those_of_the_file_in_the_number_format_that_is_asked_for(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4).to(torch.bfloat16), "n": torch.arange(3)}
    save_tensors(tmp_path / "file", tensors, "", 0)
    stored, wide = StoredTensors(tmp_path / "file"), StoredTensors(tmp_path / "file", torch.float32)
    assert stored.keys() == wide.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(stored[name], tensor)
        assert wide[name].dtype == (torch.float32 if name == "a" else torch.int64)
        assert torch.equal(wide[name], tensor.to(wide[name].dtype))
    with pytest.raises(KeyError):
        stored["b"]
    (tmp_path / "file").unlink()
    with pytest.raises(ModelError, match="There is no file"):
        stored["a"]


def _replaced(path: Path, other: dict[str, Tensor]) -> None:
    save_tensors(path.with_name("other"), other, "", 0)
    path.with_name("other").replace(path)


def _written_to(path: Path, other: dict[str, Tensor]) -> None:
    with path.open("r+b") as file:
        file.seek(-2, 2)
        file.write(b"\x7f\x7f")


def _cut_off(path: Path, other: dict[str, Tensor]) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 2)


@pytest.mark.parametrize("change", [_replaced, _written_to, _cut_off])
def test_a_shard_that_changes_while_it_is_served_is_refused_by_name(
    tmp_path: Path, change: Callable[[Path, dict[str, Tensor]], None]
) -> None:
    """Also where the new one is whole, of the same shapes, and was never compared with anything."""
    layers, shard, part, _ = world(torch.bfloat16)
    save_tensors(tmp_path / "shard", shard, "", 0)
    frozen = FrozenShard(layers, StoredTensors(tmp_path / "shard"))
    frozen.values(part, 0, part.num_values, torch.bfloat16)
    change(tmp_path / "shard", {key: value + 1 for key, value in shard.items()})
    with pytest.raises(ModelError, match=str(tmp_path / "shard")) as caught:
        frozen.values(part, 0, part.num_values, torch.bfloat16)
    assert caught.value.code in ("model-changed-file", "model-torn-file")


def test_a_party_does_not_compute_on_own_experts_that_are_not_what_it_offered() -> None:
    """Its own parts cross no wire, where the others would notice."""
    layers, shard, part, _ = world(torch.bfloat16)
    service = WeightService((part,), lambda _: {}, torch.bfloat16, still=FrozenShard(layers, shard).values)
    service.begin(ATTEMPT)
    assert digest_of(service.read(0, ATTEMPT)) == service.digest(0, ATTEMPT)
    shard[expert_key(1, 3, "down_proj")][0, 0] += 1
    with pytest.raises(RoundError, match="changed after it was offered") as caught:
        service.read(0, ATTEMPT)
    assert caught.value.code == "weights-changed"
