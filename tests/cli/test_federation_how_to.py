"""A federation by hand, and from its start to its end, in a folder for every organisation.

Commands of docs/how-to/federation-by-hand.md, then those of docs/how-to/federation.md from its start on, run in this
process, `scp` copies between the folders, and the rounds themselves go without a network. How parties join by a code
is in tests/e2e/test_three_machines.py.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from coterie.audit.epsilon.subject import Subject
from coterie.cli.app import main
from coterie.config import FederationConfig, PartyConfig, load_yaml
from coterie.dp.accounting import statement
from coterie.federation.identity.provision import free_endpoints
from coterie.models.zoo.tiny import tiny_model
from coterie.training.data.tokenizer import train_tokenizer
from coterie.training.party.in_process import run_in_process
from coterie.training.party.process import keep_settings, party_forecast, prepare_party
from coterie.training.planning import forecast
from coterie.training.planning.forecast import Forecast
from helpers.private_federation import already_compared as already_compared

HOW_TO = Path(__file__).parents[2] / "docs" / "how-to"
PAGE = (HOW_TO / "federation.md").read_text("utf-8")
BY_HAND = (HOW_TO / "federation-by-hand.md").read_text("utf-8")
PARTIES = ("alder", "birch", "cedar")
LINES = ["the river and the stone", "wind and rain and leaf", "The patient has a cough"] * 10


def blocks(kind: str, text: str = PAGE) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    return [text for language, text in fenced if language == kind]


def commands() -> Iterator[tuple[str, str]]:
    """(who, command); what is shown of birch holds for cedar, too, also where alder sends something to birch."""
    started = PAGE.index("## 4. Start")
    for block in blocks("", BY_HAND + PAGE[started:]):
        for line in block.splitlines():
            if match := re.fullmatch(r"(alder|birch|cedar)\$ (.*)", line):
                yield match[1], match[2]
                again = re.sub("birch|cedar", lambda name: "cedar" if name[0] == "birch" else "birch", line)
                if "birch" in line and not ("cedar" in line and match[1] == "alder"):
                    yield again.split("$")[0], again.split("$ ", 1)[1]


def settings(folder: Path) -> None:
    """The page's own files, with endpoints that are here, and a few short rounds."""
    shared, own = (yaml.safe_load(block) for block in blocks("yaml")[:2])
    endpoints = free_endpoints(4)
    shared["parties"] = {name: {"endpoint": endpoint} for name, endpoint in zip(PARTIES, endpoints, strict=False)}
    shared["coordinator"] = {"endpoint": endpoints[3]}
    shared["train"] |= {"rounds": 2, "batch_size": 4}
    shared["privacy"] |= {"lot_size": 4, "delta": 1e-3}
    shared["weights_dtype"] = "float32"
    for name in PARTIES:
        home = folder / name
        home.mkdir()
        (home / "federation.yaml").write_text(yaml.safe_dump(shared))
        text = yaml.safe_dump(own).replace("birch", name)
        party = yaml.safe_load(text) | {"privacy": {"ledger": "ledger"}}
        party["data"] |= {"sequence_length": 16}
        (home / "party.yaml").write_text(yaml.safe_dump(party))
        rows = "".join(f'{{"text": "{line}"}}\n' for line in LINES)
        for file in (*party["data"]["train"], party["data"]["test"]):
            (home / file).write_text(rows)


def starting_model(folder: Path) -> None:
    tokenizer = train_tokenizer(LINES, 270)
    tiny_model("olmoe", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))


def copy(words: list[str], folder: Path, home: Path) -> None:
    """`scp`, where NAME.example:PATH is the path in another organisation's folder."""

    def place(word: str) -> Path:
        machine, colon, path = word.partition(".example:")
        return folder / machine / path if colon else home / word

    *sources, target = [place(word) for word in words if word != "-r"]
    if len(sources) > 1:
        target.mkdir(exist_ok=True)
    for source in sources:
        at = target / source.name if target.is_dir() else target
        if source.is_dir():
            shutil.copytree(source, at)
        else:
            shutil.copy(source, at)


def train(folder: Path) -> Forecast:
    """What the four processes do between `coordinator` and the end; gives what alder says before it joins."""
    configs = {name: load_yaml(folder / name / "party.yaml", PartyConfig) for name in PARTIES}
    federation = load_yaml(folder / "alder" / "federation.yaml", FederationConfig)
    parts = [prepare_party(config, federation) for config in configs.values()]
    for config in configs.values():
        keep_settings(config, load_yaml(config.federation, FederationConfig))
    alder = parts[0]
    assert alder.privacy is not None
    told = party_forecast(alder, alder.privacy)
    run_in_process(federation, parts, folder / "coordinator")
    return told


@pytest.mark.slow
@pytest.mark.usefixtures("already_compared")
def test_every_command_of_the_page_works_in_its_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (statement, forecast):  # of copies and whole documents; it takes longer than all else
        monkeypatch.setattr(module, "group_epsilon", lambda *_: 0.0)
    settings(tmp_path)
    starting_model(tmp_path / "alder" / "olmoe")
    fingerprint, told, done = "", None, []
    for who, line in commands():
        words = shlex.split(line.replace("9F:2C:...", fingerprint).replace("round-00000200", "round-00000002"))
        monkeypatch.chdir(tmp_path / who)
        if words[0] == "scp":
            copy(words[1:], tmp_path, tmp_path / who)
            continue
        assert words[0] == "coterie"
        if words[1] in ("doctor", "status", "dashboard"):  # of processes that run; tests/e2e has them
            continue
        if words[1] in ("coordinator", "up"):
            told = told or train(tmp_path)
            continue
        with pytest.raises(SystemExit) as ended:
            main(words[1:])
        shown = capsys.readouterr()
        assert not ended.value.code, (who, line, shown.err)
        done.append(words[1])
        if found := re.search(r"fingerprint (\S+)", shown.out):
            fingerprint = fingerprint or found[1]
    assert told is not None
    (ledger,) = (tmp_path / "alder" / "ledger").rglob("ledger.jsonl")
    (run,) = (entry for entry in map(json.loads, ledger.read_text().splitlines()) if entry["kind"] == "run")
    counted = run["data"]["mechanism"]
    assert (told.noise_multiplier, told.rate) == (counted["noise_multiplier"], counted["sampling_rate"])
    assert told.rounds == run["data"]["rounds"]
    claim = Subject.of_run(tmp_path / "alder" / "run", start=tmp_path / "alder" / "olmoe").claim
    assert claim.recorded, "an audit goes by what the ledger says"
    assert claim.mechanism.noise_multiplier == counted["noise_multiplier"]
    assert {"split", "request", "approve", "install", "roster", "eval", "generate", "export"} <= set(done)
    ends = [tmp_path / "cedar" / "joined", *(tmp_path / name / "run" / "public" / "model" for name in PARTIES)]
    models = [AutoModelForCausalLM.from_pretrained(path).state_dict() for path in ends]
    for other in models[1:]:
        assert models[0].keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in models[0].items())
    for file in (tmp_path / "birch" / "run" / "public").rglob("*"):
        assert file.is_dir() or str(tmp_path).encode() not in file.read_bytes(), file
    card = (ends[1] / "privacy.json").read_text()
    assert [f"grove-{name}" in card for name in PARTIES] == [True] * 3
    assert json.loads(card)["promise"] == "budget"
