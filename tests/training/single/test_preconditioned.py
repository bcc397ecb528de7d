"""`privacy.preconditioner`: a private run in other coordinates ends with an ordinary model, and can be resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from coterie.cli.app import main
from coterie.config import TrainConfig, dump_yaml
from coterie.errors import ConfigError, DataError, ModelError
from coterie.models import seam
from coterie.training.evaluate import evaluate
from coterie.training.loop import StopFlag
from coterie.training.single.preconditioned import PublicRecords, place_of
from coterie.training.single.prepared import prepare
from coterie.training.single.previewed import preview
from coterie.training.single.run import resume, start
from coterie.training.single.trained import evaluate_run, load_trained

NOTES = ["a cough and a fever", "a swollen knee", "no pain in the chest", "the cough is gone", "the fever too"]
SIZES = {
    "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 32,
}  # fmt: skip


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    rows = [json.dumps({"text": f"{note} {number}"}) for number, note in enumerate(NOTES * 6)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps({"text": note}) for note in NOTES) + "\n")
    public = [json.dumps({"text": f"the {word} is on the {word}"}) for word in ("mat", "cat", "hat", "sun")]
    public = [json.dumps({"text": f"the {word} is on the {word}"}) for word in ("mat", "cat", "hat", "sun")]
    (tmp_path / "public.jsonl").write_text("\n".join(public) + "\n")
    return {
        "model": {"family": "olmoe", "config": SIZES},
        "data": {
            "train": [tmp_path / "train.jsonl"], "test": [tmp_path / "test.jsonl"], "sequence_length": 16,
            "packing": "records",
            "tokenizer": {"train": {"files": [tmp_path / "public.jsonl"], "vocab_size": 265}},
        },
        "optim": {"lr": 5e-3},
        "train": {"rounds": 4, "checkpoint_every": 2},
        "privacy": {
            "epsilon": 8.0, "delta": 1e-3, "lot_size": 10, "physical_batch": 4, "ledger": tmp_path / "ledger",
            "preconditioner": {"path": tmp_path / "factors.safetensors", "provenance": "public"},
        },
        "run_dir": tmp_path / "run",
    }  # fmt: skip


def changed(settings: dict[str, Any], **privacy: Any) -> TrainConfig:
    return TrainConfig.model_validate(settings | {"privacy": settings["privacy"] | privacy})


def measured(config: TrainConfig, tmp_path: Path, *options: str) -> None:
    dump_yaml(tmp_path / "train.yaml", config)
    text = tmp_path / "public.jsonl"
    with pytest.raises(SystemExit) as ended:
        main(["precondition", str(tmp_path / "train.yaml"), "--text", str(text), *options])
    assert ended.value.code == 0


def weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    (found,) = config.run_dir.glob("*/model")
    return load_file(found / "model.safetensors")


def test_the_model_of_a_run_is_an_ordinary_one(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = changed(settings)
    measured(config, tmp_path, "--json", str(tmp_path / "figures.json"))
    figures = json.loads((tmp_path / "figures.json").read_text())
    # Embedding, head, attention's four, and the experts of the layer; the router is no plain matrix.
    assert (figures["records"], figures["modules"]) == (4, 7)
    assert "written to" in capsys.readouterr().out
    factors = load_file(tmp_path / "factors.safetensors")
    without = preview(changed(settings, preconditioner=None)).state_bytes
    assert preview(config).state_bytes == without + 4 * sum(value.numel() for value in factors.values())
    result = start(config)
    assert result.finished
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/public/model").eval()
    assert not [name for name in model.state_dict() if "precondition" in name]
    seam.select(model)
    test = prepare(changed(settings, preconditioner=None))[0].test
    assert test is not None
    assert evaluate(model, test, batch_size=4).loss == pytest.approx(result.loss, rel=1e-4)
    assert evaluate_run(load_trained(tmp_path / "run")).loss == pytest.approx(result.loss, rel=1e-4)
    assert result.loss != result.loss_before
    assert "preconditioner" not in result.statement, "it is public, and covered"


def test_without_power_a_run_learns_what_it_does_without(settings: dict[str, Any], tmp_path: Path) -> None:
    """The same seeded lots and noise, in coordinates that are the model's own."""
    config = changed(settings, seeded=True)
    measured(config, tmp_path, "--power", "0")
    start(config)
    other = changed(settings, seeded=True, preconditioner=None).model_copy(update={"run_dir": tmp_path / "other"})
    start(other)
    expected = weights(other)
    for name, value in weights(config).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4, msg=name)


def test_a_run_that_was_stopped_ends_as_one_that_was_not(settings: dict[str, Any], tmp_path: Path) -> None:
    config = changed(settings, seeded=True)
    measured(config, tmp_path)
    start(config)
    other = config.model_copy(update={"run_dir": tmp_path / "other"})
    stop = StopFlag()
    start(other, stop=stop, watch=lambda done, step, evaluation: stop.set() if done == 2 else None)
    # A run keeps what it began with: a file that was made anew meanwhile, or is gone, changes nothing.
    measured(config, tmp_path, "--power", "0.4", "--records", "2")
    assert load_trained(tmp_path / "other").rounds == 2
    (tmp_path / "factors.safetensors").unlink()
    assert resume(tmp_path / "other").finished
    expected = weights(config)
    for name, value in weights(other).items():
        assert torch.equal(value, expected[name]), name


def test_factors_from_private_text_keep_the_model_at_home(settings: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "factors.safetensors"
    whose = {"path": path, "provenance": "private", "not_covered": "the notes of another ward"}
    config = changed(settings, preconditioner=whose)
    measured(config, tmp_path)
    result = start(config)
    assert "the notes of another ward" in result.statement
    assert (tmp_path / "run/private/model").is_dir()
    assert not (tmp_path / "run/public/model").exists()


def test_what_does_not_fit_is_refused_in_a_sentence(settings: dict[str, Any], tmp_path: Path) -> None:
    config = changed(settings)
    for entry in (preview, start):
        with pytest.raises(ModelError, match="There is no file"):
            entry(config)
    assert not (tmp_path / "ledger").exists()
    assert not (tmp_path / "run/run.json").exists()
    measured(config, tmp_path)
    with pytest.raises(ModelError, match="rows, the model needs 24"):
        start(changed(settings | {"model": {"family": "olmoe", "config": SIZES | {"hidden_size": 24}}}))
    with pytest.raises(ConfigError, match="name no preconditioner"):
        place_of(changed(settings, preconditioner=None))
    with pytest.raises(ConfigError, match="is something else"):
        place_of(changed(settings, preconditioner={"path": tmp_path / "public.jsonl", "provenance": "public"}))
    assert (tmp_path / "public.jsonl").read_text().startswith("{")
    with pytest.raises(DataError, match="no data file"):
        PublicRecords.of(config, [tmp_path / "absent.jsonl"], 3)
    with pytest.raises(DataError, match=r"train\.jsonl is a file of `data\.train`"):
        PublicRecords.of(config, [tmp_path / "public.jsonl", tmp_path / "train.jsonl"], 3)
    path = {"model": {"path": "m", "provenance": "public"}}
    for more, said in (({"lora": {"rank": 2}} | path, "leave out `lora`"), ({"experts_over": 2}, "`experts_over`")):
        with pytest.raises(ValidationError, match=said):
            changed(settings | more)
    with pytest.raises(ValidationError, match="provenance"):
        changed(settings, preconditioner={"path": tmp_path / "factors.safetensors"})
    with pytest.raises(ValidationError, match=r"say in `privacy\.preconditioner\.not_covered` whose records"):
        changed(settings, preconditioner={"path": tmp_path / "factors.safetensors", "provenance": "private"})


def test_a_federation_s_factors_are_measured_where_no_text_is(settings: dict[str, Any], tmp_path: Path) -> None:
    config = changed(settings)
    (tmp_path / "train.jsonl").unlink()
    assert len(PublicRecords.of(config, [tmp_path / "public.jsonl"], 3).drawn) == 3
