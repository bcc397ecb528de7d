"""A party of several ranks in a federation: the federation is what it would be with one."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from coterie.cli import ranks as ranks_command
from coterie.cli.ranks import start_party_if_asked
from coterie.config import FederationConfig, PartyConfig, dump_yaml, load_yaml
from coterie.dp.noise.joint_noise import LOAD
from coterie.errors import CoterieError, RoundError
from coterie.ranks.ranks import Alone
from coterie.training.experts.gateway import END, OPEN
from coterie.training.party.helping import HelpingRank
from coterie.training.party.process import check_compared
from helpers import listening, party_tasks
from helpers.comparing import relative
from helpers.federation_commands import folder as folder
from helpers.federation_commands import made as made
from helpers.rank_processes import run_ranks, values
from helpers.waiting import until

LORA = {"rank": 2, "alpha": 4.0, "modules": ["q_proj"]}
STAGES = [
    (0, "lot 1|0", "before"),
    (1, "lot 3|0", "done"),
    (1, "spool 3|0", "done"),
    (0, "spool 3|0", "told"),
    (0, "count 3|0", "told"),
    (1, "count 4|0", "told"),
    (1, "who has which sums", "told"),
]
"""Who is killed, at which step, and when. After `count` sums are on disk and counted, and nothing has left; then the
gateway asks who has which, and pushes."""
SHORT = {"train__rounds": 2}
KINDS = [
    ("fast", SHORT),
    ("private", {**SHORT, "trunk": "private"}),
    ("plain", SHORT),
    ("plain", {**SHORT, "lora": LORA}),
    ("balanced", SHORT),
    ("masked", SHORT),
]


def party(folder: Path, exchange: str = "experts", **changes: Any) -> PartyConfig:
    """A party.yaml beside the federation.yaml that it names."""
    federation = {
        "name": "grove", "model": {"family": "olmoe"}, "exchange": exchange, "privacy": "none",
        "train": {"rounds": 2},
        "parties": {"alder": {"endpoint": "127.0.0.1:7000"}, "birch": {"endpoint": "127.0.0.1:7001"}},
        "coordinator": {"endpoint": "127.0.0.1:7002"},
    }  # fmt: skip
    dump_yaml(folder / "federation.yaml", FederationConfig.model_validate(federation))
    return PartyConfig.model_validate(
        {
            "party": "alder",
            "federation": folder / "federation.yaml",
            "kit": "kit",
            "trunk": "trunk",
            "shard": "shard",
            "run_dir": "run",
            "data": {"train": ["notes.jsonl"]},
            "device": "cpu",
            **changes,
        }
    )


def refused(config: PartyConfig) -> str:
    with pytest.raises(CoterieError) as caught:
        start_party_if_asked(config, ["up"])
    assert str(caught.value).count("\n") <= 5
    return caught.value.code


def test_what_a_party_of_several_ranks_cannot_do_is_said_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks_command, "_run", lambda count, arguments: pytest.fail("ranks were started"))
    assert refused(party(tmp_path, "tokens", devices=2)) == "config-devices"
    monkeypatch.setattr(ranks_command, "_cores", lambda: 2)
    assert refused(party(tmp_path, devices=3)) == "ranks-cores"
    monkeypatch.setenv("WORLD_SIZE", "2")
    for devices in (1, 2):
        assert refused(party(tmp_path, devices=devices)) == "ranks-missing"
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert refused(party(tmp_path, devices=2, device="auto")) == "ranks-gpus"


STAND_IN = """#!/bin/sh
if [ "$RANK" = 1 ]; then echo "no room on the disk" >&2; exit 3; fi
exec sleep 600
"""


def test_where_rank_0_does_not_end_the_rank_that_failed_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(ranks_command, "_cores", lambda: 2)
    monkeypatch.setattr(ranks_command, "_GRACE_S", 0.2)
    with pytest.raises(typer.Exit) as ended:
        start_party_if_asked(party(tmp_path, devices=2), ["up"])
    assert ended.value.exit_code == 1
    said = capsys.readouterr().err
    assert "rank 1 ended with 3" in said
    assert "no room on the disk" in said


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="looks at what listens as Linux shows it")
def test_ranks_that_a_command_starts_listen_on_loopback_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever variables of another run, or of a cluster, say."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{listening.__file__}" "{tmp_path}"\n')
    python.chmod(0o700)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    monkeypatch.setattr(sys, "executable", str(python))
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, listening.seen_by_others())
    with pytest.raises(typer.Exit) as ended:
        start_party_if_asked(party(tmp_path, devices=2), ["up"])
    assert ended.value.exit_code == 0
    for rank in "01":
        said = json.loads((tmp_path / rank).read_text())
        assert set(said["listens"]) == {"127.0.0.1"}
        assert said["nccl"] in ("=lo", "=lo0")


PATIENT = """#!/bin/sh
echo $$ > "{folder}/rank-$RANK"
while [ ! -e "{folder}/end" ]; do sleep 0.05; done
"""
COMMAND = """
import signal, subprocess, sys, time
from coterie.cli.ranks import _run

class Slow(subprocess.Popen):
    '''Returns a while after the process runs, as on a busy machine.'''
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        time.sleep({pause})

subprocess.Popen, sys.executable = Slow, {python!r}
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever nohup these tests run under
sys.exit(_run(2, []))
"""


@pytest.fixture
def command(tmp_path: Path, pause: float) -> Iterator[tuple[subprocess.Popen[bytes], list[int]]]:
    """A command whose two ranks run until a file ``end`` is there; ``pause``: s until it knows what it started."""
    python = tmp_path / "python"
    python.write_text(PATIENT.replace("{folder}", str(tmp_path)))
    python.chmod(0o700)
    path = os.pathsep.join(filter(None, sys.path))
    started = subprocess.Popen(
        [sys.executable, "-c", COMMAND.format(pause=pause, python=str(python))],
        env=os.environ | {"PYTHONPATH": path},
    )
    everybody = [started.pid]
    try:
        files = [tmp_path / f"rank-{rank}" for rank in range(2)]
        until(lambda: all(file.exists() and file.read_text().strip() for file in files), 120.0)
        everybody += [int(file.read_text()) for file in files]
        yield started, everybody
    finally:
        if started.poll() is None:
            for pid in everybody:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            started.wait()


DELAYS = pytest.mark.parametrize("pause", [0.0, 2.0], ids=["ranks known", "last rank not yet known"])


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux whether a process stands still")
@DELAYS
def test_ranks_stand_still_while_the_command_that_started_them_does(
    tmp_path: Path, command: tuple[subprocess.Popen[bytes], list[int]]
) -> None:
    """Ctrl-Z: they meet at a store of that command's, and would give it up."""
    started, everybody = command

    def still() -> set[bool]:
        states = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in everybody]
        return {state == "T" for state in states}

    os.kill(started.pid, signal.SIGTSTP)
    until(lambda: still() == {True})
    os.kill(started.pid, signal.SIGCONT)
    until(lambda: still() == {False})
    (tmp_path / "end").touch()
    assert started.wait(60.0) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@DELAYS
def test_every_rank_hears_of_a_request_to_end(
    command: tuple[subprocess.Popen[bytes], list[int]], number: signal.Signals
) -> None:
    """Also the one that was just started: it would be waited for, and then killed."""
    started, _ = command
    os.kill(started.pid, number)
    assert started.wait(120.0) == 128 + number  # 1, where a rank did not hear of it


def test_experts_of_a_party_are_spread_over_gpus_only_where_ranks_compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = party(tmp_path, experts_over=2, device="auto")
    plain = load_yaml(tmp_path / "federation.yaml", FederationConfig)
    budget = {"epsilon": 8.0, "delta": 1e-5, "lot_size": 8, "isolation": "fast"}
    check_compared(config, FederationConfig.model_validate({**plain.model_dump(), "privacy": budget}))
    check_compared(party(tmp_path, devices=2, device="auto"), plain)
    check_compared(party(tmp_path, experts_over=2, device="cpu"), plain)
    with pytest.raises(CoterieError, match="over CPUs only") as caught:
        check_compared(config, plain)
    assert caught.value.code == "ranks-device"


@pytest.mark.parametrize(
    ("gpus", "changes", "ranks"),
    [(4, {}, 4), (5, {"experts_over": 2}, 4), (0, {}, 1), (4, {"device": "cpu"}, 1), (0, {"experts_over": 2}, 2)],
)
def test_devices_auto_is_a_rank_for_each_gpu_in_whole_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, changes: dict[str, Any], ranks: int
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert party(tmp_path, **{"device": "auto", "devices": "auto", **changes}).ranks == ranks


def test_ranks_of_a_party_that_read_other_settings_are_refused(folder: Path) -> None:
    for ended in run_ranks(2, party_tasks.reading, folder, {"deadline_s": 5.0}):
        assert ended.error is not None
        assert ended.error.startswith("ranks-differ: the ranks differ in federation.yaml")


@pytest.mark.parametrize("told", [True, False])
def test_a_rank_leaves_with_an_error_that_the_others_have_not_heard_of(
    told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gateway(Alone):
        def tell(self, step: str, make: object, *, patient: bool = False) -> dict[str, str]:
            return {"what": next(steps)}

    def fails(rank: HelpingRank, step: object) -> None:
        error = RoundError("layer 1 is not what was fetched.", code="weights-changed")
        error.known_to_all = told
        raise error

    steps = iter([OPEN, END])
    rank = object.__new__(HelpingRank)
    rank.__dict__.update(_ranks=Gateway(), _layers=io.BytesIO(), _contribution=io.BytesIO())
    monkeypatch.setattr(HelpingRank, "_do", fails)
    with nullcontext() if told else pytest.raises(RoundError, match="not what was fetched"):
        rank.run()
    assert list(steps) == ([] if told else [END])


def worst(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """The largest difference of what any party stores, over its size."""
    return max(
        relative(torch.tensor(found["stored"][name][key]), torch.tensor(value))
        for name, stored in expected["stored"].items()
        for key, value in stored.items()
    )


def test_a_value_that_is_no_number_is_no_small_difference() -> None:
    expected = {"stored": {"alder": {"first": [1.0], "second": [1.0, 2.0]}}}
    found = {"stored": {"alder": {"first": [1.0], "second": [math.nan, 2.0]}}}
    assert worst(found, expected) == math.inf


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A private federation whose parties are one process each."""
    return values(run_ranks(1, party_tasks.federation, tmp_path_factory.mktemp("alone"), "private", SHORT))[0]


def assert_lie_once(owns: list[list[dict[str, int]]]) -> None:
    """What is pushed lies at one rank, and no rank has much more than its share."""
    for own in zip(*owns, strict=True):
        names = [name for each in own for name in each if LOAD not in name.split()]
        assert sorted(names) == sorted(set(names))
        sizes = [sum(each.values()) for each in own]
        assert len(sizes) == 2
        assert max(sizes) <= 0.65 * sum(sizes)


@pytest.mark.slow
def test_a_party_of_two_ranks_gives_the_federation_that_one_rank_gives(alone: Any, tmp_path: Path) -> None:
    found = values(run_ranks(2, party_tasks.federation, tmp_path, "private", SHORT))
    assert found[0]["trunks"] == found[1]["trunks"]
    assert len({*found[0]["trunks"]}) == 2
    assert worst(found[0], alone) <= 1e-6
    assert found[0]["privacy"] == alone["privacy"]
    assert found[0]["counted"] == alone["counted"] == [(1, 0), (2, 0)]
    assert_lie_once([each["own"] for each in found])


@pytest.mark.ranks
@pytest.mark.parametrize(("kind", "changes"), KINDS)
def test_so_it_does_whatever_the_parties_agreed_on(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    one, two = (
        values(run_ranks(world, party_tasks.federation, tmp_path / str(world), kind, changes)) for world in (1, 2)
    )
    assert_lie_once([each["own"] for each in two])
    assert two[0]["trunks"] == two[1]["trunks"] != []
    assert worst(two[0], one[0]) <= 1e-6
    assert two[0]["privacy"] == one[0]["privacy"]
    assert two[0]["counted"] == one[0]["counted"]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["noise at every rank", "missing exchange"])
def test_planted_faults_are_seen(fault: str, alone: Any, tmp_path: Path) -> None:
    found = values(run_ranks(2, party_tasks.faulty, tmp_path, "private", SHORT, fault))
    assert worst(found[0], alone) > 1e-3


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A longer one where one party has two ranks."""
    return values(run_ranks(2, party_tasks.federation, tmp_path_factory.mktemp("whole"), "private", {}))[0]


@pytest.mark.ranks
@pytest.mark.parametrize(("rank", "step", "when"), STAGES)
def test_invariant_8_a_party_whose_rank_was_killed_goes_on_and_the_federation_ends_as_if_nothing_had_been(
    rank: int, step: str, when: str, tmp_path: Path, whole: Any
) -> None:
    ended = run_ranks(2, party_tasks.deadly, tmp_path, "private", {}, rank, step, when, patience_s=10.0)
    assert ended[rank].exit == -9
    assert ended[1 - rank].error is not None
    assert ended[1 - rank].error.startswith("ranks-")
    again = values(run_ranks(2, party_tasks.federation, tmp_path, "private", {}, attempt=1))
    assert again[0]["counted"] == whole["counted"] == [(1, 0), (2, 0), (3, 0), (4, 0)]
    assert again[0]["trunk"] == whole["trunk"]
    assert again[0]["trunks"] == again[1]["trunks"] != []
    assert again[0]["stored"] == whole["stored"]


@pytest.mark.ranks
@pytest.mark.parametrize("world", [1, 3])
def test_what_was_counted_is_pushed_byte_for_byte_by_another_number_of_ranks(
    world: int, tmp_path: Path, whole: Any
) -> None:
    run_ranks(2, party_tasks.deadly, tmp_path, "private", {}, 1, "count 4|0", "told", patience_s=10.0)
    again = values(run_ranks(world, party_tasks.federation, tmp_path, "private", {}, attempt=1))
    assert again[0]["counted"] == whole["counted"]
    assert again[0]["stored"] == whole["stored"]
