"""Every party of an `experts` federation ends with the whole model, and can measure it and ask it for text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from coterie.cli.app import main
from coterie.config import FederationConfig, PartyConfig, dump_yaml, load_yaml
from coterie.models.split.card import promise_of
from coterie.models.split.exporter import export
from coterie.models.split.placement import Placement
from coterie.models.split.splitter import split
from coterie.models.zoo.build import build_model
from coterie.models.zoo.tiny import tiny_model
from coterie.training.party.in_process import run_in_process
from coterie.training.party.process import keep_settings, prepare_party
from coterie.training.party.run import PartyResult
from helpers.federations import PARTIES, settings


def trained(folder: Path, **changes: object) -> tuple[FederationConfig, dict[str, PartyResult]]:
    tiny_model("olmoe", vocab_size=300).save_pretrained(folder / "base")
    GenerationConfig(eos_token_id=[2, 7]).save_pretrained(folder / "base")
    config = settings(**{
        "exchange": "experts", "privacy": "none", "weights_dtype": "float32", "trunk": "shared",
        "model": {"path": str(folder / "base"), "provenance": "public"},
        "train__rounds": 2, "train__checkpoint_every": 0, **changes,
    })  # fmt: skip
    model = build_model(config.model, meta=True)
    split(config.model, Placement.of_spec(config.placement, list(PARTIES), model), folder / "split")
    (folder / "text.txt").write_text("the river and the stone, wind and rain\n" * 30)
    (folder / "public.txt").write_text("the moss and the root of a fern\n" * 30)
    dump_yaml(folder / "federation.yaml", config)
    parts = []
    for name in PARTIES:
        party = {
            "party": name, "federation": "federation.yaml", "kit": "kit", "run_dir": name,
            "data": {
                "train": "text.txt", "test": "text.txt", "split_text": "line", "sequence_length": 16,
                "tokenizer": {"train": {"files": ["public.txt"], "vocab_size": 260}},
            },
            "trunk": "split/trunk.safetensors", "shard": f"split/experts-{name}.safetensors",
            "privacy": None if config.privacy == "none" else {"ledger": f"ledger-{name}"},
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(party))
        own = load_yaml(folder / f"{name}.yaml", PartyConfig)
        parts.append(prepare_party(own, config))
        keep_settings(own, config)
    return config, run_in_process(config, parts, folder / "coordinator")[1]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, PartyResult]]:
    folder = tmp_path_factory.mktemp("plain")
    return folder, trained(folder)[1]


def test_the_model_of_a_party_is_what_everybodys_parts_make(
    done: tuple[Path, dict[str, PartyResult]], tmp_path: Path
) -> None:
    folder, results = done
    newest = Path("private/checkpoints/round-00000002")
    shards = [folder / name / newest / "experts.safetensors" for name in PARTIES]
    export(
        folder / "split", tmp_path / "joined", trunk=folder / "birch" / newest / "trunk.safetensors", shards=shards
    )
    joined = AutoModelForCausalLM.from_pretrained(tmp_path / "joined").state_dict()
    base = load_file(folder / "base" / "model.safetensors")
    assert results["birch"].model == str(folder / "birch" / "private" / "model")
    own = AutoModelForCausalLM.from_pretrained(results["birch"].model).state_dict()
    assert own.keys() == joined.keys()
    assert all(torch.equal(own[name], value) for name, value in joined.items())
    assert GenerationConfig.from_pretrained(results["birch"].model).eos_token_id == [2, 7]
    assert any(not torch.equal(own[name], value) for name, value in base.items() if name in own)


def test_eval_and_generate_work_on_a_partys_run_folder(
    done: tuple[Path, dict[str, PartyResult]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, results = done
    for arguments in (["eval"], ["generate", "--prompt", "the river", "--tokens", "3"]):
        with pytest.raises(SystemExit) as ended:
            main([arguments[0], str(folder / "alder"), *arguments[1:]])
        assert not ended.value.code
    shown = capsys.readouterr().out
    assert f"{results['alder'].loss:.4g}" in shown
    assert "the river" in shown


def test_export_takes_the_run_folder_of_a_party(
    done: tuple[Path, dict[str, PartyResult]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, results = done
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        main(["export", str(folder / "alder"), "--out", str(out)])
    assert not ended.value.code
    own, theirs = (AutoModelForCausalLM.from_pretrained(each).eval() for each in (results["alder"].model, out))
    ids = torch.tensor([[5, 17, 3, 80]])
    with torch.no_grad():
        assert torch.equal(own(ids).logits, theirs(ids).logits)
    assert len(AutoTokenizer.from_pretrained(out)) > 0
    assert json.loads((out / "privacy.json").read_text())["promise"] == "none"
    capsys.readouterr()
    shutil.copytree(folder / "alder", tmp_path / "unfinished", ignore=shutil.ignore_patterns("model"))
    for run, more, words in (
        (folder / "alder", ["--adapter"], "it has no adapter"),
        (tmp_path / "unfinished", [], "holds no whole model"),
    ):
        with pytest.raises(SystemExit) as refused:
            main(["export", str(run), "--out", str(tmp_path / "none"), *more])
        assert refused.value.code == 1
        assert words in capsys.readouterr().err
        assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("provenance", ["public", "private"])
def test_a_model_that_a_budget_covers_promises_nothing_where_its_tokenizer_is_of_private_text(
    provenance: str, tmp_path: Path, done: tuple[Path, dict[str, PartyResult]]
) -> None:
    folder, _ = done
    budget = {"epsilon": 8.0, "delta": 1e-3, "lot_size": 4}
    federation = load_yaml(folder / "federation.yaml", FederationConfig).model_dump(mode="json") | {"privacy": budget}
    dump_yaml(tmp_path / "federation.yaml", FederationConfig.model_validate(federation))
    party = load_yaml(folder / "alder.yaml", PartyConfig).model_dump(mode="json")
    party["federation"], party["run_dir"] = tmp_path / "federation.yaml", tmp_path / "alder"
    party["privacy"] = {"ledger": tmp_path / "ledger"}
    party["data"]["tokenizer"] = {
        "path": folder / "alder" / "private" / "tokenizer", "provenance": provenance,
        "not_covered": "the notes of another ward" if provenance == "private" else None,
    }  # fmt: skip
    config = PartyConfig.model_validate(party)
    inputs = prepare_party(config, load_yaml(config.federation, FederationConfig))
    assert promise_of(inputs.trainings) == ("budget" if provenance == "public" else "none")
