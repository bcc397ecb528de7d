"""What a model was trained under goes along with it, by whatever way it is copied, saved again or taken apart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from coterie.config import LoraSpec, ModelSpec
from coterie.dp.accounting.provenance import Artefact, as_loaded
from coterie.errors import ModelError, ProvenanceError
from coterie.models.lora import attach_adapters
from coterie.models.seam import expert_layers
from coterie.models.split.exporter import export
from coterie.models.split.origins import origin_of
from coterie.models.split.placement import Placement
from coterie.models.split.saved import save_model
from coterie.models.split.splitter import split
from coterie.models.split.trainings import Training, read_trainings, trainings_of, write_trainings
from coterie.models.zoo.build import build_model
from coterie.models.zoo.tiny import tiny_model
from coterie.models.zoo.upcycle import upcycle_checkpoint

OPEN = Training("a1b2", "none")
Way = Callable[[Path, Path], Path]


def by_transformers(saved: Path, folder: Path) -> Path:
    AutoModelForCausalLM.from_pretrained(saved).save_pretrained(folder / "again")
    return folder / "again"


def by_hand(saved: Path, folder: Path) -> Path:
    (folder / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(saved / name, folder / "bare" / name)
    return folder / "bare"


def by_peft(saved: Path, folder: Path) -> Path:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"])
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(saved), settings)
    adapted.merge_and_unload().save_pretrained(folder / "merged")
    return folder / "merged"


def by_parts(saved: Path, folder: Path) -> Path:
    spec = ModelSpec(path=by_hand(saved, folder))
    counts = [layer.num_experts for layer in expert_layers(build_model(spec, meta=True))]
    split(spec, Placement.round_robin(["alder", "birch"], counts), folder / "split")
    for part in (folder / "split").glob("*.safetensors"):
        assert origin_of(part).trainings == (OPEN,)
    joined = export(folder / "split", folder / "joined")
    assert json.loads((joined / "privacy.json").read_text())["promise"] == "none"
    return joined


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_model(tiny_model("olmoe", vocab_size=300), tmp_path / "saved", None, [OPEN])
    return tmp_path / "saved"


@pytest.mark.parametrize("way", [by_transformers, by_hand, by_peft, by_parts])
def test_no_way_of_copying_makes_a_model_public(saved: Path, tmp_path: Path, way: Way) -> None:
    copied = way(saved, tmp_path)
    assert read_trainings(copied) == (OPEN,)
    moved = copied.rename(tmp_path / "elsewhere")
    model = AutoModelForCausalLM.from_pretrained(moved)
    shutil.rmtree(moved)  # what is loaded still knows
    with pytest.raises(ProvenanceError, match="declared public, but run a1b2 trained them on private text"):
        as_loaded((Artefact("weights", "public"),), model)


def test_a_dense_model_hands_what_it_knows_to_the_experts_made_from_it(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    write_trainings(tmp_path / "dense", [OPEN])
    (tmp_path / "dense" / "coterie.json").unlink()
    upcycle_checkpoint(tmp_path / "dense", tmp_path / "moe", 4, 2)
    assert read_trainings(tmp_path / "moe") == (OPEN,)


def test_later_trainings_follow_earlier_ones_and_each_is_there_once(saved: Path, tmp_path: Path) -> None:
    model, budget = AutoModelForCausalLM.from_pretrained(saved), Training("c3", "budget", "ledger", 8.0, 1e-5)
    save_model(model, tmp_path / "next", None, (*trainings_of(model), budget))
    assert read_trainings(tmp_path / "next") == (OPEN, budget)
    assert trainings_of(AutoModelForCausalLM.from_pretrained(tmp_path / "next")) == (OPEN, budget)


@pytest.mark.parametrize(
    "wrong", [["a1b2"], [{"run": "a1b2"}], 7, {}, "", None, [{"run": ["a1b2"], "privacy": "none"}]]
)
def test_a_record_that_cannot_be_read_is_refused_wherever_it_lies(saved: Path, wrong: object) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "coterie_trainings": wrong}))
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        read_trainings(saved)


@pytest.mark.parametrize("way", ["link to nowhere", "folder"])
def test_a_record_that_is_there_and_no_file_is_not_taken_for_none(saved: Path, way: str) -> None:
    (saved / "coterie.json").unlink()
    if way == "folder":
        (saved / "coterie.json").mkdir()
    else:
        (saved / "coterie.json").symlink_to(saved / "blobs" / "a1b2")
    with pytest.raises(ModelError, match=r"coterie\.json cannot be read"):
        read_trainings(saved)


def test_a_model_with_adapters_says_what_is_behind_its_weights(saved: Path) -> None:
    model = attach_adapters(AutoModelForCausalLM.from_pretrained(saved), LoraSpec(rank=2), seed=0)
    assert trainings_of(model) == (OPEN,)
