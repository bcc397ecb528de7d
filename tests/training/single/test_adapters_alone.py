"""`lora:` in train.yaml: what is trained, kept, resumed and written is what plain peft does with the same text."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from coterie.cli.app import main
from coterie.cli.output import big
from coterie.config import TrainConfig, dump_yaml
from coterie.errors import CheckpointError, ModelError
from coterie.models.split.adapted import AdaptedModel
from coterie.models.split.trainings import read_trainings
from coterie.models.zoo.build import structure_of
from coterie.models.zoo.tiny import tiny_model
from coterie.training.loop import StopFlag
from coterie.training.single import private_stepper
from coterie.training.single.generate import generate
from coterie.training.single.prepared import prepare
from coterie.training.single.previewed import preview
from coterie.training.single.run import resume, start
from coterie.training.single.trained import evaluate_run, load_trained
from coterie.training.single.tune import Plan, tune

peft = pytest.importorskip("peft")

NOTES = ["a cough and a fever", "a swollen knee", "no pain in the chest", "the cough is gone", "the fever too"]
MODULES = ["q_proj", "shared_expert.up_proj", "gate"]
LORA = {"rank": 2, "alpha": 6.0, "modules": MODULES}
"""Routed experts, attention, a shared expert, and the router."""
IDS = torch.tensor([[5, 17, 3, 80, 41, 9]])
MakeConfig = Callable[..., TrainConfig]


@pytest.fixture
def make_config(tmp_path: Path) -> MakeConfig:
    """Settings for a tiny checkpoint and a few notes; all of them are in every round."""
    tiny_model("qwen2_moe", vocab_size=300, num_hidden_layers=1).save_pretrained(tmp_path / "base")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": note}) + "\n" for note in NOTES))
    (tmp_path / "public.txt").write_text("the a and is in on has no\n")

    def make(name: str = "run", **changes: Any) -> TrainConfig:
        data = {
            "train": [tmp_path / "train.jsonl"], "test": [tmp_path / "train.jsonl"], "sequence_length": 12,
            "packing": "records", "tokenizer": {"train": {"files": [tmp_path / "public.txt"], "vocab_size": 280}},
        }  # fmt: skip
        train = {"rounds": 4, "batch_size": len(NOTES), "micro_batch": 2, "checkpoint_every": 2, "eval_every": 0}
        values = {
            "model": {"path": tmp_path / "base", "provenance": "public"},
            "data": data | changes.pop("data", {}),
            "optim": {"lr": 1e-2, "schedule": "constant"},
            "train": train | changes.pop("train", {}),
            "lora": LORA,
            "run_dir": tmp_path / name,
        }
        return TrainConfig.model_validate(values | changes)

    return make


def private(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    rules = {"epsilon": 8.0, "delta": 1e-3, "lot_size": len(NOTES), "physical_batch": 2}
    return {**rules, "ledger": tmp_path / "ledger", **changes}


def start_of(config: TrainConfig) -> Any:
    return AutoModelForCausalLM.from_pretrained(config.model.path)


def adapter_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def peft_alone(config: TrainConfig) -> tuple[Any, dict[str, Tensor]]:
    """The checkpoint with peft's own adapters, at the start of the run, and the whole text as one batch."""
    prepared, _ = prepare(config)
    stacked = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
    settings = peft.LoraConfig(r=2, lora_alpha=6, target_modules=MODULES[:2], target_parameters=stacked)
    model = peft.get_peft_model(start_of(config), settings)
    began = {name: value for name, value in prepared.model.named_parameters() if value.requires_grad}
    own = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert began.keys() == own.keys()
    for name, value in own.items():
        assert "lora_B" not in name or not began[name].any(), "adapters start by changing nothing"
        value.data.copy_(began[name])
    return model.train(), prepared.train.batch(list(range(len(NOTES))))


def trained_values(model: nn.Module) -> dict[str, Tensor]:
    """By the names that peft saves them under."""
    own = {name: value for name, value in model.named_parameters() if value.requires_grad}
    return {name.replace(".default", ""): value.detach() for name, value in own.items()}


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 2e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-4, atol=atol), name


def test_plain_training_is_a_peft_loop(make_config: MakeConfig) -> None:
    config = make_config()
    model, batch = peft_alone(config)
    values = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(values, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for _ in range(config.train.rounds):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    result = start(config)
    assert result.loss is not None
    assert result.loss_before is not None
    assert result.loss < result.loss_before
    with torch.no_grad():
        assert result.loss == pytest.approx(float(model.eval()(**batch).loss), rel=1e-5)
    assert_near(adapter_of(config.run_dir / "adapter"), trained_values(model), atol=2e-4)


def test_merged_expert_weights_are_never_formed(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    merged: list[str] = []
    wrapper = peft.tuners.lora.layer.ParamWrapper
    own = vars(wrapper)["_activate_lora"]

    def seen(self: Any, names: list[str]) -> Any:
        merged.append(self.parameter_name)
        return own(self, names)

    monkeypatch.setattr(wrapper, "_activate_lora", seen)
    config = make_config(train={"rounds": 1})
    start(config)
    assert set(merged) == {"weight"}, "the router's, which is small"
    model, batch = peft_alone(config)
    model(**batch)
    assert {"gate_up_proj", "down_proj"} <= set(merged), "peft's own way, which the test has to see"


def test_private_training_is_records_alone_clipped_and_added(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seeded, with next to no noise and every record in every lot; two rounds of many, as epsilon takes long here."""
    made = private_stepper.plan_of
    monkeypatch.setattr(
        private_stepper, "plan_of", lambda *arguments: replace(made(*arguments), noise_multiplier=1e-6)
    )
    clip, rate = 0.05, 0.5
    rules = private(tmp_path, clip_norm=clip, seeded=True)
    optim = {"kind": "sgd", "momentum": 0.0, "lr": rate, "schedule": "constant"}
    config = make_config(privacy=rules, optim=optim, train={"rounds": 400})
    model, batch = peft_alone(config)
    values = [each for each in model.parameters() if each.requires_grad]
    for _ in range(2):
        sums = [torch.zeros_like(each) for each in values]
        for record in range(len(NOTES)):
            one = {name: value[record : record + 1] for name, value in batch.items()}
            gradients = torch.autograd.grad(model(**one).loss, values)
            norm = torch.stack([each.norm() for each in gradients]).norm()
            assert norm > clip, "clipping bites"
            for total, each in zip(sums, gradients, strict=True):
                total += each * (clip / norm)
        with torch.no_grad():
            for value, total in zip(values, sums, strict=True):
                value -= rate * total / len(NOTES)
    prepared, documents = prepare(config)
    with closing(private_stepper.PrivateStepper(prepared, documents)) as stepper:
        stepper.step()
        stepper.step()
    assert_near(trained_values(prepared.model), trained_values(model))


def test_a_budget_s_adapter_is_public_and_says_what_was_trained(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(privacy=private(tmp_path), train={"rounds": 2})
    result = start(config)
    folder = config.run_dir / "public" / "adapter"
    loaded = peft.PeftModel.from_pretrained(start_of(config), str(folder)).eval()
    trained = load_trained(config.run_dir)
    with torch.no_grad():
        assert torch.allclose(loaded(IDS).logits, trained.model(IDS).logits, atol=1e-5)
        assert not torch.allclose(loaded(IDS).logits, start_of(config)(IDS).logits, atol=1e-4)
    assert [each.privacy for each in read_trainings(folder)] == ["budget"]
    named = f"gate_up_proj, down_proj, {', '.join(MODULES)}"
    words = f"adapters of rank 2 (LoRA) on {named}; everything else stays as it was loaded"
    assert words in result.statement
    assert result.privacy is not None
    assert result.privacy["trained"] == words
    assert any(words in each.read_text("utf-8") for each in (tmp_path / "ledger").rglob("*.jsonl")), "in the ledger"


@pytest.mark.parametrize("kind", ["plain", "private"])
def test_a_resumed_run_ends_as_one_that_was_never_stopped(kind: str, make_config: MakeConfig, tmp_path: Path) -> None:
    rules = {} if kind == "plain" else {"privacy": private(tmp_path, seeded=True)}
    whole, parts = (make_config(name, **rules, train={"rounds": 2, "checkpoint_every": 1}) for name in "ab")
    place, stop = "adapter" if kind == "plain" else "private/adapter", StopFlag()
    start(whole)
    start(parts, stop=stop, watch=lambda *_: stop.set() and None)
    (saved,) = (parts.run_dir / "private" / "checkpoints").glob("round-00000001")
    held = load_file(saved / "weights.safetensors")
    assert len(held) == len(adapter_of(whole.run_dir / place))
    assert all(".lora_" in name for name in held), "frozen weights are not kept again"
    assert all(".lora_" in name for name in load_file(saved / "optimizer.safetensors"))
    assert resume(parts.run_dir).finished
    first, second = adapter_of(whole.run_dir / place), adapter_of(parts.run_dir / place)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_is_not_resumed_on_other_weights(make_config: MakeConfig, tmp_path: Path) -> None:
    config, stop = make_config(), StopFlag()
    start(config, stop=stop, watch=lambda *_: stop.set() and None)
    tiny_model("qwen2_moe", vocab_size=300, num_hidden_layers=1, seed=5).save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match="adapters of other weights") as error:
        resume(config.run_dir)
    assert error.value.code == "checkpoint-base"


def test_export_merges_or_copies_and_the_run_folder_answers(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(train={"rounds": 2})
    start(config)
    for arguments in (["--out", str(tmp_path / "merged")], ["--adapter", "--out", str(tmp_path / "copied")]):
        with pytest.raises(SystemExit) as ended:
            main(["export", str(config.run_dir), *arguments])
        assert ended.value.code == 0
    trained = load_trained(config.run_dir)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    plain = peft.PeftModel.from_pretrained(start_of(config), str(tmp_path / "copied")).eval()
    with torch.no_grad():
        assert torch.allclose(merged(IDS).logits, plain(IDS).logits, atol=1e-5)
        assert torch.allclose(merged(IDS).logits, trained.model(IDS).logits, atol=1e-6)
    assert {"privacy.json", "tokenizer.json"} <= {each.name for each in (tmp_path / "merged").iterdir()}
    assert [each.privacy for each in read_trainings(tmp_path / "merged")] == ["none"]
    assert evaluate_run(trained).tokens > 0
    assert isinstance(generate(trained.model, trained.tokenizer, "the", tokens=3), str)


def test_only_a_finished_run_is_exported(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped, stop = make_config("stopped"), StopFlag()
    start(stopped, stop=stop, watch=lambda *_: stop.set() and None)
    with pytest.raises(SystemExit) as ended:
        main(["export", str(stopped.run_dir), "--out", str(tmp_path / "out")])
    assert ended.value.code not in (0, None)
    assert "no adapter yet" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_tuning_chooses_between_adapters(make_config: MakeConfig, tmp_path: Path) -> None:
    """Trials without noise in place of private ones, which take long to account for."""
    config = make_config("tuned", privacy=private(tmp_path))
    plan = Plan((8.0, 1e-3), 1.0, 1.0, 1, 2, 1.0, 2.0, ("optim.lr=1e-2", "optim.lr=1e-9"), "")
    done = tune(config, plan, config.data.train, lambda own: start(own.model_copy(update={"privacy": None})))
    assert done.chosen == "optim.lr=1e-2"
    assert adapter_of(config.run_dir / "adapter")


def test_a_plan_counts_what_is_trained(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(train={"rounds": 1})
    prepared, _ = prepare(config)
    trained = sum(each.numel() for each in prepared.model.parameters() if each.requires_grad)
    found = preview(config)
    assert found.trained == trained
    result = start(config)
    assert found.state_bytes == pytest.approx(result.model_state_bytes, rel=0.05)
    dump_yaml(tmp_path / "train.yaml", make_config("other"))
    with pytest.raises(SystemExit):
        main(["plan", str(tmp_path / "train.yaml")])
    said = capsys.readouterr().out
    assert f"{big(trained)} values of adapters are trained" in said
    assert "full training or adapters (LoRA; `lora` trains them):" in said


@pytest.mark.parametrize(("rank", "said"), [(16, False), (17, True)])
def test_adapters_larger_than_their_matrix_are_remarked_on(
    rank: int, said: bool, make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """32 x 32 values: a rank of 17 has 17 x 64 = 1088 of them, one of 16 has as many."""
    dump_yaml(tmp_path / "train.yaml", make_config(lora={"rank": rank, "experts": ["gate_up_proj"]}))
    with pytest.raises(SystemExit):
        main(["train", str(tmp_path / "train.yaml"), "--dry-run"])
    shown = " ".join(capsys.readouterr().out.split())
    words = "on `gate_up_proj` holds 1,088 values, and the matrix itself 1,024"
    assert (words in shown, "at most 16 does" in shown) == (said, said)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora": {"experts": []}}, "names nothing that gets an adapter"),
        ({"model": {"family": "olmoe"}}, "are random"),
        ({"devices": 2, "privacy": True}, "trained in one process"),
        ({"experts_over": 2, "privacy": True}, "trained in one process"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(
    changes: dict[str, Any], words: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    rules = {"privacy": private(tmp_path)} if "privacy" in changes else {}
    with pytest.raises(ValidationError, match=words):
        make_config(**{**changes, **rules})


def test_half_precision_and_recomputed_activations_change_rounding_alone(make_config: MakeConfig) -> None:
    whole, half = make_config("whole"), make_config("half")
    model = half.model.model_copy(update={"dtype": "bfloat16", "gradient_checkpointing": True})
    half = half.model_copy(update={"model": model})
    assert start(half).loss == pytest.approx(start(whole).loss, rel=0.01)
    assert all(each.dtype is torch.float32 for each in adapter_of(half.run_dir / "adapter").values())


def test_a_missing_peft_names_the_extra(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config()
    monkeypatch.setitem(sys.modules, "peft", None)
    for read in (start, preview):
        with pytest.raises(ModelError) as error:
            read(config)
        assert "coterie[lora]" in str(error.value)
        assert not (config.run_dir / "run.json").exists()


def test_what_adapters_add_to_each_weight_is_what_peft_merges(make_config: MakeConfig) -> None:
    config = make_config(train={"rounds": 2})
    start(config)
    (saved,) = (config.run_dir / "private" / "checkpoints").iterdir()
    empty = structure_of(start_of(config).config, torch.float32)
    changes = AdaptedModel(empty, LORA, saved / "weights.safetensors").changes
    before, after = start_of(config).state_dict(), load_trained(config.run_dir).model.state_dict()
    own = {name for name, value in before.items() if not torch.equal(value, after[name])}
    names = dict(load_trained(config.run_dir).model.named_parameters())
    assert changes.keys() == own & names.keys()
    for name, change in changes.items():
        assert torch.allclose(before[name] + change(), after[name], atol=1e-6), name
