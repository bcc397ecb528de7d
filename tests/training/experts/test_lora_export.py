"""What a federation with adapters trained can be used: merged into one model, or as an adapter for plain peft."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from coterie.audit.model.target import _joined
from coterie.cli.app import main
from coterie.config import FederationConfig, LoraSpec, PartyConfig
from coterie.dp.accounting import statement
from coterie.errors import CheckpointError, ModelError
from coterie.federation.rounds.state import State
from coterie.federation.wire.in_process import InProcessHub
from coterie.models.lora import attach_adapters
from coterie.models.narrow import Narrow
from coterie.models.seam import expert_layers
from coterie.models.split.adapted import AdaptedModel
from coterie.models.split.exporter import export
from coterie.models.split.origins import origin_of, save_tensors
from coterie.models.split.placement import Placement
from coterie.models.split.shards import load_tensors, parse_expert_key
from coterie.models.split.splitter import split
from coterie.models.split.trainings import read_trainings
from coterie.models.zoo.build import build_model
from coterie.models.zoo.tiny import tiny_model
from coterie.training.party.in_process import run_in_process
from coterie.training.party.inputs import trunk_tensors
from coterie.training.party.process import keep_settings, prepare_party, settings_of_run
from coterie.training.party.run import make_actor
from coterie.training.party.store import PartyStore
from helpers.federations import PARTIES, settings
from helpers.private_federation import skip_comparison

peft = pytest.importorskip("peft")
IDS = torch.tensor([[5, 17, 3, 80, 41, 9]])


@dataclass(frozen=True)
class Trained:
    """A federation's folder after its last round."""

    folder: Path
    base: Path
    config: FederationConfig

    @property
    def split(self) -> Path:
        return self.folder / "split"

    def part(self, party: str, stem: str, round_no: int = 2) -> Path:
        return self.folder / party / "private" / "checkpoints" / f"round-{round_no:08d}" / f"{stem}.safetensors"

    @property
    def shards(self) -> list[Path]:
        return [self.part(name, "experts") for name in PARTIES]

    def party(self, name: str) -> PartyConfig:
        text, private = str(self.folder / "text.txt"), self.config.privacy != "none"
        files = [str(self.folder / "public.txt")]
        tokenizer = {"train": {"files": files, "vocab_size": 260}, "provenance": "public"}
        return PartyConfig.model_validate(
            {
                "party": name, "federation": str(self.folder / name / "federation.yaml"), "kit": "kit",
                "run_dir": str(self.folder / name),
                "data": {"train": text, "sequence_length": 16, "tokenizer": tokenizer},
                "trunk": str(self.split / "trunk.safetensors"),
                "shard": str(self.split / f"experts-{name}.safetensors"),
                "privacy": {"ledger": str(self.folder / f"ledger-{name}")} if private else None,
            }
        )  # fmt: skip

    def reference(self) -> nn.Module:
        """The starting model with alder's adapters, computed by peft alone."""
        assert self.config.lora is not None
        model = attach_adapters(AutoModelForCausalLM.from_pretrained(self.base), self.config.lora, seed=5)
        trained = {key: value for key, value in load_tensors(self.part("alder", "trunk")).items() if "lora_" in key}
        missing = {name for name, p in model.named_parameters() if p.requires_grad} ^ trained.keys()
        assert not missing
        model.load_state_dict(trained, strict=False)
        return model.eval()


def begun(family: str, folder: Path, private: bool, stored: torch.dtype = torch.float32, **model: str) -> Trained:
    """A federation's folder before its first round: the base model, its split, and text."""
    base = folder / "base"
    tiny_model(family, vocab_size=300, dtype=stored).save_pretrained(base)
    lora = LoraSpec(rank=2, alpha=4.0, modules=("q_proj", "o_proj"))
    budget = {"epsilon": 8.0, "delta": 1e-3, "lot_size": 5}
    config = settings(
        exchange="experts", privacy=budget if private else "none", lora=lora.model_dump(), trunk="shared",
        model={"path": str(base), "provenance": "public"} | model,
        train__rounds=2, train__checkpoint_every=1, optim__lr=0.05,
    )  # fmt: skip
    whole = build_model(config.model, meta=True)
    split(config.model, Placement.of_spec(config.placement, list(PARTIES), whole), folder / "split")
    (folder / "text.txt").write_text("the river and the stone, wind and rain\n" * 30)
    (folder / "public.txt").write_text("the moss and the root of a fern\n" * 30)
    return Trained(folder, base, config)


def trained(family: str, folder: Path, private: bool) -> Trained:
    done = begun(family, folder, private)
    parts = [prepare_party(done.party(name), done.config) for name in PARTIES]
    run_in_process(done.config, parts, folder / "coordinator")
    return done


@pytest.fixture(scope="module", params=["olmoe", "gpt_oss"])
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Experts stored one way, within a budget (olmoe), and transposed, with biases, without one (gpt_oss)."""
    with pytest.MonkeyPatch.context() as patch:
        skip_comparison(patch)
        patch.setattr(statement, "group_epsilon", lambda *_: 0.0)  # of copies; it takes longer than all else
        return trained(request.param, tmp_path_factory.mktemp(request.param), private=request.param == "olmoe")


@torch.inference_mode()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def test_merged_weights_equal_pefts_own_merge(done: Trained, tmp_path: Path) -> None:
    export(done.split, tmp_path / "merged", trunk=done.part("alder", "trunk"), shards=done.shards)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    reference = done.reference()
    assert not torch.allclose(logits(AutoModelForCausalLM.from_pretrained(done.base)), logits(reference), atol=1e-3)
    assert torch.allclose(logits(merged), logits(reference), atol=1e-4)
    expected = reference.merge_and_unload().state_dict()  # type: ignore[operator]
    for name, value in merged.state_dict().items():
        assert torch.allclose(value, expected[name], atol=1e-6), name


def test_the_adapter_loads_in_plain_peft(done: Trained, tmp_path: Path) -> None:
    trunk = str(done.part("alder", "trunk"))
    with pytest.raises(SystemExit) as end:
        main(["export", str(done.split), "--trunk", trunk, "--adapter", "--out", str(tmp_path / "adapter")])
    assert not end.value.code
    base = AutoModelForCausalLM.from_pretrained(done.base)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.allclose(logits(loaded), logits(done.reference()), atol=1e-5)
    assert str(done.folder) not in (tmp_path / "adapter" / "adapter_config.json").read_text()
    size = sum(path.stat().st_size for path in (tmp_path / "adapter").iterdir())
    assert size < 0.5 * done.part("alder", "trunk").stat().st_size + 200_000


def test_every_party_ends_with_the_adapters(done: Trained) -> None:
    """In `public` after a budget, else in `private`; with what everybody's rounds were made under."""
    private = done.config.privacy != "none"
    for name in PARTIES:
        folder = done.folder / name / ("public" if private else "private") / "adapter"
        loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(done.base), folder).eval()
        assert torch.allclose(logits(loaded), logits(done.reference()), atol=1e-5)
        behind = {training.run.split("-")[-1]: training.privacy for training in read_trainings(folder)}
        assert behind == dict.fromkeys(PARTIES, "budget" if private else "none")
        result = json.loads((done.folder / name / "private" / "result.json").read_text())
        assert (result["finished"], result["model"]) == (True, str(folder))
        words = "adapters of rank 2 (LoRA) on gate_up_proj, down_proj, q_proj, o_proj"
        assert not private or 0 < result["privacy"]["epsilon"] <= 8
        assert not private or result["privacy"]["trained"] == f"{words}; everything else stays as it was loaded"
        told = [path.read_text("utf-8") for path in done.folder.rglob("ledger.jsonl")]
        assert any(words in entries for entries in told) is private


@pytest.mark.parametrize("adapter", [False, True])
def test_parts_that_were_taken_away_still_say_what_they_were_trained_under(
    done: Trained, tmp_path: Path, adapter: bool
) -> None:
    away = [Path(shutil.copy(path, tmp_path / f"{n}.safetensors")) for n, path in enumerate(done.shards)]
    trunk = Path(shutil.copy(done.part("alder", "trunk"), tmp_path / "trunk.safetensors"))
    export(done.split, tmp_path / "out", trunk=trunk, shards=away, adapter=adapter)
    behind = {training.run.split("-")[-1]: training.privacy for training in read_trainings(tmp_path / "out")}
    assert behind == dict.fromkeys(
        ["alder"] if adapter else PARTIES, "none" if done.config.privacy == "none" else "budget"
    )


def test_checkpoints_hold_what_changes_and_name_the_rest_by_digest(done: Trained) -> None:
    for name in PARTIES:
        for stem, base in (("trunk", "trunk"), ("experts", f"experts-{name}")):
            assert origin_of(done.part(name, stem)).base == origin_of(done.split / f"{base}.safetensors").content
        assert load_tensors(done.part(name, "experts")) == {}
        for stem in ("trunk", "trunk-optimizer", "hosted"):
            kept = load_tensors(done.part(name, stem))
            assert [n for n in kept if "lora_" not in n and not n.startswith(("received", "ledger"))] == [], stem
        folder = done.part(name, "trunk").parent
        saved = sum(path.stat().st_size for path in folder.iterdir())
        adapters = sum(value.nbytes for value in load_tensors(done.part(name, "trunk")).values())
        assert saved < 4 * adapters + 40_000, "adapters, a share of them with two moments, and headers"


def test_a_checkpoint_puts_the_adapters_back_on_the_same_weights_alone(done: Trained, tmp_path: Path) -> None:
    party = done.party("alder")
    inputs = prepare_party(party, done.config)
    store = PartyStore(inputs.run_dir, "alder", done.config.content_hash(), inputs.train.digest())
    actor = make_actor(inputs, InProcessHub(PARTIES).transport("alder"), store)
    try:
        before = trunk_tensors(inputs.model)
        (newest,) = [saved for saved in store.held() if saved.round == 2]
        frozen = {name: value.clone() for name, value in before.items() if "lora_" not in name}
        actor.load(newest, State(round=2))
        saved = load_tensors(done.part("alder", "trunk"))
        for name, value in trunk_tensors(inputs.model).items():
            assert torch.equal(value, saved[name] if name in saved else frozen[name]), name
        actor.inputs.bases["trunk"] = "f" * 64  # type: ignore[index]
        with pytest.raises(CheckpointError) as caught:
            actor.load(newest, State(round=2))
        assert caught.value.code == "checkpoint-base"
    finally:
        actor.close()


def test_adapters_are_merged_into_the_weights_that_they_were_trained_on_alone(done: Trained, tmp_path: Path) -> None:
    for gone in ("trunk", "experts-birch"):
        shutil.copytree(done.split, tmp_path / gone)
        (tmp_path / gone / f"{gone}.safetensors").unlink()
        with pytest.raises(ModelError) as caught:
            export(tmp_path / gone, tmp_path / "out", trunk=done.part("alder", "trunk"), shards=done.shards)
        assert caught.value.code == "model-no-base"
    whole = tmp_path / "whole.safetensors"
    assert done.config.lora is not None
    save_tensors(whole, load_tensors(done.part("alder", "trunk")), "run", 2, done.config.lora.model_dump(mode="json"))
    with pytest.raises(ModelError, match="as an earlier version wrote them"):
        export(done.split, tmp_path / "out", trunk=whole, shards=[])
    assert not (tmp_path / "out").exists()


def test_an_audit_joins_the_parties_adapters_with_the_weights_that_each_began_with(done: Trained) -> None:
    for name in PARTIES:
        keep_settings(done.party(name), done.config)
    others = [done.folder / name for name in PARTIES if name != "alder"]
    joined = _joined(settings_of_run(done.folder / "alder"), done.config, others)
    assert torch.allclose(logits(joined.eval()), logits(done.reference()), atol=1e-4)


def test_adapters_of_one_round_do_not_go_with_shards_of_another(done: Trained, tmp_path: Path) -> None:
    earlier = [done.part(name, "experts", round_no=1) for name in PARTIES]
    with pytest.raises(ModelError) as caught:
        export(done.split, tmp_path / "merged", trunk=done.part("alder", "trunk"), shards=earlier)
    assert caught.value.code == "model-parts-mixed"
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(("named", "trunk"), [({}, torch.float32), ({"dtype": "bfloat16"}, torch.bfloat16)])
def test_frozen_experts_keep_the_number_format_of_their_checkpoint(
    tmp_path: Path, named: dict[str, str], trunk: torch.dtype
) -> None:
    """The trunk computes in what is named, and lies as it came; so do experts."""
    start = begun("olmoe", tmp_path, private=False, stored=torch.bfloat16, **named)
    inputs = prepare_party(start.party("alder"), start.config)
    formats = {p.requires_grad: set() for p in inputs.model.parameters()}
    for param in inputs.model.parameters():
        formats[param.requires_grad].add(param.dtype)
    assert formats == {False: {trunk}, True: {torch.float32}}
    matrices = [p for p in inputs.model.parameters() if not p.requires_grad and not p.is_meta and p.ndim > 1]
    wide = [p for p in matrices if not isinstance(p, Narrow) and p.dtype == torch.float32]
    assert len(wide) == (0 if named else 1), "the output layer's"
    experts = inputs.weights().experts
    assert {value.dtype for value in experts.values()} == {torch.bfloat16}
    base = AutoModelForCausalLM.from_pretrained(start.base, dtype=torch.bfloat16)
    for key, value in experts.items():
        layer, expert, name = parse_expert_key(key)
        assert torch.equal(value, expert_layers(base)[layer].parameters()[name][expert]), key


def test_a_run_without_adapters_has_none_to_export(tmp_path: Path) -> None:
    tiny_model("olmoe").save_pretrained(tmp_path / "base")
    model = build_model(settings(model={"path": str(tmp_path / "base")}).model)
    counts = [layer.num_experts for layer in expert_layers(model)]
    split(
        settings(model={"path": str(tmp_path / "base")}).model, Placement.round_robin(["a"], counts), tmp_path / "s"
    )
    with pytest.raises(ModelError) as caught:
        export(tmp_path / "s", tmp_path / "adapter", adapter=True)
    assert caught.value.code == "model-no-adapters"


def test_a_trunk_whose_adapter_settings_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as error:
        AdaptedModel(tiny_model("olmoe"), {"rank": "many", "beta": 1}, tmp_path / "trunk.safetensors")
    assert error.value.code == "model-bad-trunk"
    assert "beta" in error.value.message
    assert "rank" in error.value.message
