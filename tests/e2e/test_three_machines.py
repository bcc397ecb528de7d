"""docs/how-to/federation.md from an agreed federation.yaml to the last round, on three machines.

Each organisation is a network namespace with an address and a host name of its own, and a folder; no file is copied
between the folders. The page's commands run as processes, with its own endpoints; the codes are those that `coterie
invite` shows.
"""

from __future__ import annotations

import json
import re
import shlex
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from coterie.federation.identity.kit import load_kit
from coterie.federation.identity.roster import load_roster
from coterie.models.zoo.tiny import tiny_model
from coterie.training.data.tokenizer import train_tokenizer
from helpers.forked import Fork, Starter
from helpers.network import Network, possible

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(possible()), reason=possible())]

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "federation.md").read_text("utf-8")
PARTIES = ("alder", "birch", "cedar")
LINES = ["the river and the stone", "wind and rain and leaf", "moss on the old stone wall"] * 4


class Machines:
    """Commands of the organisations, each in its own folder and namespace."""

    def __init__(self, starter: Starter, network: Network, folder: Path) -> None:
        self._starter, self._network, self._folder = starter, network, folder
        self._etc = folder / "etc"
        self._etc.mkdir()
        names = "".join(f"{network.address(name)} {name}.example\n" for name in PARTIES)
        (self._etc / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        (self._etc / "resolv.conf").write_text("nameserver 127.0.0.1\n")  # nobody: what has no name here has none
        self.running: dict[str, Fork] = {}
        self.counted: Counter[str] = Counter()
        for name in PARTIES:
            (folder / name).mkdir()

    def start(self, who: str, line: str) -> str:
        """Begin a command; gives the name of its process."""
        words = shlex.split(line)
        assert words[0] == "coterie"
        self.counted[who] += 1
        name = f"{who}-{words[1]}"
        pid = self._starter.ask(
            arguments=words[1:],
            cwd=str(self._folder / who),
            log=str(self._folder / f"{name}.log"),
            space=self._network.space(who),
            etc=str(self._etc),
            limits={},
            point="",
            nth=0,
        )
        self.running[name] = Fork(self._starter, pid)
        return name

    def log(self, name: str) -> str:
        path = self._folder / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def ends(self, name: str) -> None:
        code = self.running[name].wait(240.0)
        assert code == 0, f"{name}: {code}\n{self.log(name)}"

    def finds_all_in_place(self, name: str) -> None:
        """A doctor that misses nothing but those who have not started yet."""
        self.running[name].wait(120.0)
        found = re.findall(r"(?m)^(\w+) .*? (ok|bad|note) ", self.log(name))
        assert len(found) > 10, self.log(name)
        assert {check for check, state in found if state == "bad"} == {"reach"}, self.log(name)

    def says(self, name: str, pattern: str) -> re.Match[str]:
        until = time.monotonic() + 120.0
        while not (found := re.search(pattern, self.log(name))):
            assert self.running[name].poll() is None, self.log(name)
            assert time.monotonic() < until, self.log(name)
            time.sleep(0.05)
        return found

    def end(self) -> None:
        for process in self.running.values():
            if process.poll() is None:
                process.kill()
                process.wait()


@pytest.fixture
def machines(starter: Starter, tmp_path: Path) -> Iterator[Machines]:
    with Network(PARTIES) as network:
        made = Machines(starter, network, tmp_path)
        try:
            yield made
        finally:
            made.end()


def blocks(kind: str, text: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    return [block for language, block in fenced if language == kind]


def page_commands() -> Iterator[tuple[str, str]]:
    """(who, command) up to the start; what is shown of birch holds for cedar, too."""
    until = PAGE.index("The coordinator names who is missing")
    for block in blocks("", PAGE[:until]):
        for line in block.splitlines():
            if match := re.fullmatch(r"(alder|birch|cedar)\$ (.*)", line):
                yield match[1], match[2]
                if match[1] == "birch" and not match[2].startswith("coterie up"):
                    yield "cedar", match[2]


def agreement() -> str:
    """The page's federation.yaml, endpoints and all, with a few short rounds without a budget."""
    shared = yaml.safe_load(blocks("yaml", PAGE)[0])
    shared["train"] |= {"rounds": 2, "batch_size": 2, "eval_every": 0}
    shared |= {"privacy": "none", "weights_dtype": "float32", "join_deadline_s": 120}
    return yaml.safe_dump(shared)


def shorter_text(folder: Path) -> None:
    """Each party's settings as they were written for it, with few words a record and a ledger in its folder."""
    for settings in folder.glob("*/party.yaml"):
        party = yaml.safe_load(settings.read_text())
        party["data"]["sequence_length"] = 16
        settings.write_text(yaml.safe_dump(party | {"ledger": "ledger"}))


def test_an_agreed_file_becomes_a_run_without_a_file_being_copied(machines: Machines, tmp_path: Path) -> None:
    for name in ("alder", "cedar"):  # birch has no copy, and agrees to what comes
        (tmp_path / name / "federation.yaml").write_text(agreement())
    for name in PARTIES:
        for file in ("notes-2023.jsonl", "notes-2024.jsonl", "held-out.jsonl"):
            (tmp_path / name / file).write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    tokenizer = train_tokenizer(LINES, 270)
    tiny_model("olmoe", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "alder" / "olmoe")
    tokenizer.save_pretrained(str(tmp_path / "alder" / "olmoe"))
    joining: list[str] = []
    runs: list[str] = []
    for who, line in page_commands():
        action = line.split()[1]
        if action == "invite":
            joining.append(machines.start(who, line))
        elif action == "join":
            code = machines.says(joining[0], rf"(?m)^{who} +coterie join (\S+@alder\.example:7400)$")[1]
            answer = " --agree" if who == "birch" else ""
            joining.append(machines.start(who, re.sub(r"\S+@\S+", code, line, count=1) + answer))
        elif action in ("coordinator", "up"):
            runs.append(machines.start(who, line))
        elif action == "doctor":
            while joining:
                machines.ends(joining.pop())
                shorter_text(tmp_path)
            machines.finds_all_in_place(machines.start(who, line))
        else:
            machines.ends(machines.start(who, line))
    for name in runs:
        machines.ends(name)
    assert len(runs) == 4
    assert max(machines.counted.values()) <= 5, machines.counted
    rosters = {load_roster(load_kit(tmp_path / name / "kit")).content_hash() for name in PARTIES}
    assert len(rosters) == 1
    said = {name: set(re.findall(r"roster fingerprint (\S+);", machines.log(name))) for name in machines.running}
    read_out = {load_roster(load_kit(tmp_path / "birch" / "kit")).fingerprint()}
    assert all(said[name] == read_out for name in ("alder-invite", "birch-join", "cedar-join", *runs)), said
    ends = [sorted((tmp_path / name / "run" / "private" / "model").glob("*.safetensors")) for name in PARTIES]
    assert ends[0]
    assert len({tuple(path.read_bytes() for path in files) for files in ends}) == 1
    for name in ("birch", "cedar"):
        shards = {path.name for path in (tmp_path / name / "parts").glob("experts-*")}
        assert shards == {f"experts-{name}.safetensors"}
