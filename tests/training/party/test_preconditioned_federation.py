"""A federation in coordinates from public text: by the commands, to ordinary models at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from coterie.audit.adversaries import Adversary
from coterie.audit.answers import Answers
from coterie.audit.epsilon.subject import Subject
from coterie.audit.evidence import Evidence
from coterie.audit.experts.case import Case
from coterie.audit.experts.clipped import factors
from coterie.audit.experts.opened import Opened
from coterie.audit.experts.reader import Reader
from coterie.audit.experts.simulate import rows_of, summed
from coterie.audit.transcript import Transcript
from coterie.cli.app import main
from coterie.config import FederationConfig, ModelSpec, PartyConfig, PrivacyRules, dump_yaml, load_yaml
from coterie.errors import ConfigError, ModelError
from coterie.models.preconditioner import Preconditioner, attached
from coterie.models.split.exporter import export
from coterie.models.zoo.build import build_model
from coterie.models.zoo.tiny import tiny_model
from coterie.training.party.doctor import Diagnosis, diagnose
from coterie.training.party.in_process import run_in_process
from coterie.training.party.process import keep_settings, prepare_party
from coterie.training.party.run import PartyResult
from coterie.training.single.trained import evaluate_run, load_trained
from helpers.federations import PARTIES, settings

MASKED = {"trunk": "shared", "aggregation": "masked", "noise_multiplier": 2.0}


def command(*words: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    assert not ended.value.code, words


def prepared(
    folder: Path, coordinates: bool, seeded: bool = True, epsilon: float = 8.0, **changes: Any
) -> FederationConfig:
    """Settings and texts of three parties, in a folder; nothing is split yet."""
    tiny_model("olmoe", vocab_size=300).save_pretrained(folder / "base")
    privacy: dict[str, Any] = {"epsilon": epsilon, "delta": 1e-3, "lot_size": 6, "isolation": "exact"}
    if coordinates:
        privacy["preconditioner"] = {"path": str(folder / "factors.safetensors"), "provenance": "public"}
    config = settings(**{
        "exchange": "experts", "privacy": privacy, "weights_dtype": "float32",
        "model": {"path": str(folder / "base"), "provenance": "public"},
        "train__rounds": 2, "train__checkpoint_every": 0, **changes,
    })  # fmt: skip
    (folder / "text.txt").write_text("the river and the stone, wind and rain\n" * 10 + "a path under trees\n" * 6)
    (folder / "public.txt").write_text("the sun and the moss\nthe root of a fern, and the wind\n" * 4)
    dump_yaml(folder / "federation.yaml", config)
    for name in PARTIES:
        party = {
            "party": name, "federation": "federation.yaml", "kit": "kit", "run_dir": name,
            "data": {
                "train": "text.txt", "test": "text.txt", "split_text": "line", "sequence_length": 16,
                "packing": "records", "tokenizer": {"train": {"files": ["public.txt"], "vocab_size": 260}},
            },
            "trunk": "split/trunk.safetensors", "shard": f"split/experts-{name}.safetensors",
            "privacy": {"ledger": f"ledger-{name}", "seeded": seeded},
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(party))
    return config


def trained(folder: Path, *options: str, coordinates: bool = True, **changes: Any) -> dict[str, PartyResult]:
    config = prepared(folder, coordinates, **changes)
    if coordinates:
        command("precondition", str(folder / "alder.yaml"), "--text", str(folder / "public.txt"), *options)
    command("split", "--federation", str(folder / "federation.yaml"), "--out", str(folder / "split"))
    parts = []
    for name in PARTIES:
        own = load_yaml(folder / f"{name}.yaml", PartyConfig)
        parts.append(prepare_party(own, config))
        keep_settings(own, config)
    return run_in_process(config, parts, folder / "coordinator")[1]


def trunk_finding(folder: Path) -> Diagnosis:
    """What `coterie doctor` says of a party's trunk."""
    return next(found for found in diagnose(folder / "alder.yaml") if found.check == "trunk")


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder / name / "private" / "model").state_dict())


@pytest.mark.parametrize(
    "ways",
    [
        {"trunk": "private"},
        {"trunk": "shared"},
        {"trunk": "shared", "aggregation": "masked", "noise_multiplier": 2.0},
    ],
    ids=["private trunks", "shared trunk", "masked"],
)
def test_parties_end_with_ordinary_models_that_are_what_they_trained(ways: dict[str, Any], tmp_path: Path) -> None:
    results = trained(tmp_path, **ways)
    assert trunk_finding(tmp_path).state == "ok"
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    for name in PARTIES:
        own = weights(tmp_path, name)
        assert own.keys() == base.keys()
        assert any(not torch.equal(own[key], value) for key, value in base.items())
        assert evaluate_run(load_trained(tmp_path / name)).loss == pytest.approx(results[name].loss, rel=1e-4)
    newest = Path("private/checkpoints/round-00000002")
    shards = [tmp_path / name / newest / "experts.safetensors" for name in PARTIES]
    joined = tmp_path / "joined"
    export(tmp_path / "split", joined, trunk=tmp_path / "birch" / newest / "trunk.safetensors", shards=shards)
    for key, value in AutoModelForCausalLM.from_pretrained(joined).state_dict().items():
        torch.testing.assert_close(value, weights(tmp_path, "birch")[key], rtol=1e-5, atol=1e-6, msg=key)


def test_without_power_a_federation_learns_what_it_does_without(tmp_path: Path) -> None:
    """The same seeded lots and noise, in coordinates that are the model's own."""
    for name in ("with", "without"):
        (tmp_path / name).mkdir()
    trained(tmp_path / "with", "--power", "0", trunk="shared")
    trained(tmp_path / "without", coordinates=False, trunk="shared")
    expected = weights(tmp_path / "without", "cedar")
    for key, value in weights(tmp_path / "with", "cedar").items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-4, msg=key)


def test_parts_in_other_coordinates_than_agreed_are_refused(tmp_path: Path) -> None:
    config = prepared(tmp_path, coordinates=True)
    command("precondition", str(tmp_path / "alder.yaml"), "--text", str(tmp_path / "public.txt"))
    command("split", str(tmp_path / "base"), "--party", "alder", "--party", "birch", "--party", "cedar",
            "--out", str(tmp_path / "split"))  # fmt: skip
    own = load_yaml(tmp_path / "alder.yaml", PartyConfig)
    with pytest.raises(ModelError, match="split without a preconditioner, and the federation agreed on one"):
        prepare_party(own, config)
    rules = config.privacy
    assert isinstance(rules, PrivacyRules)
    plain = config.model_copy(update={"privacy": rules.model_copy(update={"preconditioner": None})})
    prepare_party(own, plain)
    found = trunk_finding(tmp_path)
    assert (found.state, found.code) == ("bad", "model-coordinates")
    spread = own.model_copy(update={"experts_over": 2})
    fast = config.model_copy(update={"privacy": rules.model_copy(update={"isolation": "fast"})})
    with pytest.raises(ConfigError, match="`preconditioner`"):
        prepare_party(spread, fast)


@pytest.mark.parametrize("gone", [True, False])
def test_an_audit_computes_in_the_coordinates_of_the_signed_trunk(gone: bool, tmp_path: Path) -> None:
    """A party that joined was never handed the settings' file; elsewhere it may have been made anew."""
    config = prepared(tmp_path, coordinates=True, seeded=False)
    command("precondition", str(tmp_path / "alder.yaml"), "--text", str(tmp_path / "public.txt"))
    command("split", "--federation", str(tmp_path / "federation.yaml"), "--out", str(tmp_path / "split"))
    signed = Preconditioner.load(tmp_path / "factors.safetensors").tensors()
    if gone:
        (tmp_path / "factors.safetensors").unlink()
    else:
        (tmp_path / "other.txt").write_text("zebra quagga okapi\nanother thing entirely here\n" * 8)
        command("precondition", str(tmp_path / "alder.yaml"), "--text", str(tmp_path / "other.txt"))
    found = attached(Subject.of_party(load_yaml(tmp_path / "birch.yaml", PartyConfig), config).model).tensors()
    assert found.keys() == signed.keys()
    assert all(torch.equal(found[name].cpu(), own) for name, own in signed.items())
    (tmp_path / "split/trunk.safetensors").unlink()
    with pytest.raises(ModelError, match=r"There is no file .*trunk\.safetensors"):
        Subject.of_party(load_yaml(tmp_path / "birch.yaml", PartyConfig), config)


def test_adapters_exclude_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is for training all weights"):
        prepared(tmp_path, coordinates=True, lora={"rank": 2})


def test_an_audit_reads_pushes_in_the_coordinates_that_they_were_made_in(tmp_path: Path) -> None:
    """A push is what its records add there, and noise; in the model's own coordinates their gradients are others."""
    results = trained(tmp_path, epsilon=1000.0, trunk="shared", transcript={"rounds": "all", "max_gib": 1.0})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "alder" / "private" / "tokenizer")
    lines = (tmp_path / "public.txt").read_text().splitlines()
    evidence = Evidence(
        owner="alder",
        exchange="experts",
        trunk="shared",
        privacy=None,
        start=tmp_path / "base",
        public=[tokenizer(line)["input_ids"] for line in lines] * 8,
        received={name: Transcript.read(tmp_path / name, "alder") for name in ("birch", "cedar")},
        answers=Answers.read(tmp_path / "alder"),
        run_folder=tmp_path / "alder",
    )
    case = Case(evidence, 0)
    records = [record.ids for record in case.lot(1)]
    opened = case.opened(Adversary.ALL_HOSTS, 1)
    assert len(records) > 1

    spent = results["alder"].privacy
    assert spent is not None
    noise = spent["noise_multiplier"] * case.clip_norm
    plain = Reader(build_model(ModelSpec(path=evidence.start)).float())

    def misfit(reader: Reader) -> float:
        """How far off a push's inner product with what the lot adds to it is, in standard deviations of noise."""
        scale = factors(reader.model, records, case.clip_norm)
        supposed = summed(rows_of(reader, records), list(opened.experts), scale)

        def flat(sums: Opened) -> torch.Tensor:
            sides = [(sums.experts[key].first_DG, sums.experts[key].second_FD) for key in opened.experts]
            return torch.cat([side.flatten().double() for pair in sides for side in pair])

        own = flat(supposed)
        return abs(float((flat(opened) - own) @ own)) / (noise * float(own.norm()))

    assert misfit(case.reader) < 4.0
    assert misfit(plain) > 6.0
