"""FLARE's proof-of-concept mode: a hub that reads, three sites with files of their own, real commands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from coterie.federation.identity.provision import free_endpoints
from coterie.federation.wire.frame import FrameScope, FrameType, encode
from coterie.federation.wire.transport import Lane, Message
from coterie.models.tensors import raw_bytes
from helpers.federation_processes import MODEL, PARTIES, WORDS, make_folder, run_here
from helpers.flare_poc import HUB, JOB_S, Poc, pids

pytest.importorskip("nvflare", reason="the extra `nvflare` is not installed")

pytestmark = pytest.mark.slow

ROUNDS = 3
ENDPOINTS = [f"127.0.0.1:{port}" for port in (1, 2, 3, 4)]
"""Nobody listens there: who dialled them would not arrive."""
SITE = {name: name for name in PARTIES} | {"coordinator": "alder"}
WIDE = {**MODEL, "hidden_size": 64, "intermediate_size": 512}
"""6 MB of expert weights; masked integers of as many values are four times that, for each party and round."""


@pytest.fixture(scope="module")
def agreed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A private federation with masked pushes, ready to start; seeded, so that every run of it ends with the same."""
    folder = tmp_path_factory.mktemp("agreed") / "grove"
    make_folder(
        folder,
        ENDPOINTS,
        model={"family": "olmoe", "config": WIDE},
        exchange="experts",
        trunk="shared",
        aggregation="masked",
        noise_multiplier=2.5,
        privacy={"epsilon": 6.0, "delta": 1e-3, "lot_size": 8},
        train={"rounds": ROUNDS, "batch_size": 8, "micro_batch": 4, "eval_every": 0, "checkpoint_every": 1},
        deadline_s=120.0,
        round_deadline_s=900.0,
        join_deadline_s=900.0,
    )
    for name in PARTIES:
        path = folder / name / "party.yaml"
        party = yaml.safe_load(path.read_text())
        party["data"]["packing"] = "records"
        party["privacy"]["seeded"] = True
        path.write_text(yaml.safe_dump(party))
    export(folder)
    return folder


def export(folder: Path) -> None:
    run_here(
        "export-nvflare", str(folder / "federation.yaml"), "--site", "coordinator=alder", "--out", str(folder / "job")
    )


@pytest.fixture(scope="module")
def expected(agreed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """What each party ends with where members dial each other, without FLARE."""
    folder = tmp_path_factory.mktemp("direct") / "grove"
    shutil.copytree(agreed, folder)
    at = dict(zip((*PARTIES, "coordinator"), free_endpoints(4), strict=True))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in `Poc`: with more threads sums are rounded otherwise
    running = []
    for name, listen in at.items():
        command = [sys.executable, "-P", "-m", "coterie"]
        if name == "coordinator":
            command += ["coordinator", str(folder / "federation.yaml")]
        else:
            command += ["up", str(folder / name / "party.yaml")]
        command += ["--listen", listen]
        command += [word for other, there in at.items() if other != name for word in ("--dial", f"{other}={there}")]
        with (folder / f"{name}.log").open("ab") as log:
            running.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        assert [each.wait(1200) for each in running] == [0] * 4, [(folder / f"{n}.log").read_text() for n in at]
    finally:
        for each in running:
            each.kill()
    return {name: trained(folder, name) for name in PARTIES}


def trained(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Trunk, experts and their optimisers' state that a party ends with; beside them lie hashes of its ledger, which
    differ by when the run was."""
    last = checkpoint(folder, name, ROUNDS)
    tensors = {
        (path.name, key): value for path in last.glob("*.safetensors") for key, value in load_file(path).items()
    }
    found = {f"{file}|{key}": value for (file, key), value in tensors.items() if not key.startswith("ledger:")}
    assert len(found) > 50
    return found


def checkpoint(folder: Path, name: str, round_number: int) -> Path:
    return folder / name / "run" / "private" / "checkpoints" / f"round-{round_number:08d}"


class World:
    """A hub whose owner reads everything it forwards, and three sites."""

    def __init__(self, folder: Path, agreed: Path) -> None:
        self._folder, self._agreed = folder, agreed
        self.read = folder / "read"
        self.read.mkdir()
        self.poc = Poc(folder / "flare", PARTIES)

    def start(self) -> None:
        path = [str(Path(__file__).parents[1] / "helpers" / "reading_hub"), os.environ.get("PYTHONPATH", "")]
        paths = os.pathsep.join(os.path.abspath(each) for each in path if each)
        self.poc.start({"READING_HUB": str(self.read), "PYTHONPATH": paths})

    def federation(self, name: str) -> Path:
        """The agreed federation in a folder of its own, and every site willing to run its members there."""
        folder = self._folder / name
        shutil.copytree(self._agreed, folder)
        for site in PARTIES:
            self.poc.willing(site, members(folder, site))
        return folder


def members(folder: Path, site: str) -> dict[str, dict[str, str]]:
    found = {site: {"settings": str(folder / site / "party.yaml")}}
    if site == SITE["coordinator"]:
        kit, run_dir = str(folder / "kits" / "coordinator"), str(folder / "coordinator")
        found["coordinator"] = {"settings": str(folder / "federation.yaml"), "kit": kit, "run_dir": run_dir}
    return found


@pytest.fixture(scope="module")
def world(agreed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("world"), agreed)
    with made.poc:
        made.start()
        yield made


def assert_ended(world: World, job: str, folder: Path, expected: dict[str, dict[str, torch.Tensor]]) -> None:
    assert world.poc.ended(job) == "FINISHED:COMPLETED", "\n".join(
        (folder / site / f"flare-{site}.log").read_text()[-3000:] for site in PARTIES
    )
    for name in PARTIES:
        result = json.loads((folder / name / "run" / "private" / "result.json").read_text("utf-8"))
        assert (result["finished"], result["rounds"]) == (True, ROUNDS)
        assert result["privacy"]["rounds"] == ROUNDS
        found = trained(folder, name)
        assert found.keys() == expected[name].keys()
        torch.testing.assert_close(found, expected[name], rtol=0, atol=0)


def what_crosses(folder: Path) -> dict[str, bytes]:
    """Bytes that would be seen if anything of a frame were: weights as they are served, words, keys, headers."""
    row = hosted(folder).flatten()[1000:1032]
    return {
        "weights as served": bytes(raw_bytes(row.bfloat16())),
        "weights as kept": bytes(raw_bytes(row)),
        "a frame's header": frame(row)[:6],
        "a key": b"PRIVATE KEY",
        **{word: f" {word} ".encode() for word in WORDS},
    }


def hosted(folder: Path) -> torch.Tensor:
    """Weights that birch serves in the first round."""
    return max(load_file(folder / "birch" / "experts-birch.safetensors").values(), key=torch.numel)


def frame(values: torch.Tensor) -> bytes:
    message = Message("weights", tensors=(values,))
    return b"".join(encode(FrameScope.of_run("grove"), FrameType.REQUEST, Lane.FORWARD, 1, message).chunks())


def test_a_private_federation_ends_as_without_flare_and_the_hub_has_ciphertext_and_sizes(
    world: World, expected: dict[str, dict[str, torch.Tensor]]
) -> None:
    folder = world.federation("private")
    assert_ended(world, world.poc.submit(folder / "job"), folder, expected)

    carried = (world.read / "carried").read_bytes()
    pieces = [json.loads(line) for line in (world.read / "pieces.jsonl").read_text().splitlines()]
    once = {(*piece["ends"], piece["told"]["stream"], piece["told"].get("number")): piece["size"] for piece in pieces}
    sizes = sum(once.values())  # on a busy machine FLARE sends some again
    crossed = 0
    for name in PARTIES:
        result = json.loads((folder / name / "run" / "private" / "result.json").read_text("utf-8"))
        crossed += sum(counts["sent"] for counts in result["wire"].values())
    assert crossed > 30 << 20, "many messages of many megabytes"
    assert crossed < sizes < len(carried), "the hub had all of it"
    assert sizes < 1.1 * crossed
    assert {tuple(sorted(piece["told"])) for piece in pieces} <= {
        ("member", "op", "stream"), ("number", "op", "stream"), ("op", "stream"),
    }  # fmt: skip
    first = {piece["begins"][:4] for piece in pieces if piece["told"].get("number") == 0}
    assert first == {"1603"}, "a TLS handshake, in both directions"

    secrets = what_crosses(folder)
    plain = frame(hosted(folder)) + frame(hosted(folder).bfloat16())
    looked_for = {what for what, value in secrets.items() if value in plain}
    assert {"weights as served", "weights as kept", "a frame's header"} <= looked_for, "that is what frames hold"
    assert b"tie.request" in carried, "and the hub's own words are found"
    assert not [what for what, value in secrets.items() if value in carried]
    for name in PARTIES:
        assert not [word for word in WORDS if f" {word} " in world.poc.logs(name)], "nor do FLARE's logs have any"


def test_a_site_runs_nothing_that_it_has_not_named_and_its_reasons_stay_with_it(world: World, agreed: Path) -> None:
    folder = world.federation("unwilling")
    (folder / "birch" / "party.yaml").unlink()
    world.poc.willing("cedar", {})
    assert world.poc.ended(world.poc.submit(folder / "job")) == "FINISHED:EXECUTION_EXCEPTION"
    for site, why in (("birch", "party.yaml"), ("cedar", "does not name cedar")):
        refusals = (world.poc.place(site) / "local" / "coterie.log").read_text()
        assert why in refusals
        assert "coterie starts nothing here (" in world.poc.logs(site)
        assert why not in world.poc.logs(site), "a hub may collect those"
    assert not list(folder.glob("*/flare-*.log")), "nobody started anything"


def test_a_job_with_settings_or_code_of_its_own_gets_neither_in(world: World) -> None:
    """Settings in a job are never read. Code: coterie starts nothing beside it, and FLARE does not let it in where a
    site's own rights say so."""
    folder = world.federation("code")
    site = folder / "job" / "site"
    shutil.copy(folder / "birch" / "party.yaml", site / "config" / "party.yaml")
    other = {"birch": {"settings": "/elsewhere/party.yaml"}}
    (site / "config" / "coterie.json").write_text(json.dumps({"members": other}))
    (site / "custom").mkdir()
    (site / "custom" / "numba.py").write_text("raise SystemExit('the hub was here')")
    assert world.poc.ended(world.poc.submit(folder / "job")) == "FINISHED:EXECUTION_EXCEPTION"
    for name in PARTIES:
        assert "flare-code" in (world.poc.place(name) / "local" / "coterie.log").read_text()
    assert not list(folder.glob("*/flare-*.log"))

    world.poc.forbid_code("birch")
    world.poc.kill(*world.poc.pids("client_train", str(world.poc.place("birch"))))  # FLARE's script starts it again
    assert not world.poc.ended(world.poc.submit(folder / "job")).endswith("COMPLETED")
    assert "birch: NVFLARE_ERROR: BYOC not permitted" in world.poc.logs(HUB)


def test_a_hub_killed_in_the_middle_ends_the_members_and_the_job_submitted_again_goes_on(
    world: World, expected: dict[str, dict[str, torch.Tensor]]
) -> None:
    """As when its machine fails: the service and the job's process there are gone at once; FLARE's script starts the
    service again, which no longer knows of the job, and the sites end what they run for it."""
    folder = world.federation("killed")
    world.poc.submit(folder / "job")
    wait_until(lambda: all(checkpoint(folder, name, 1).exists() for name in PARTIES), world)
    hub = str(world.poc.place(HUB))
    world.poc.kill(*world.poc.pids("server_train", hub), *world.poc.pids("runner_process", hub))
    assert pids(folder)
    wait_until(lambda: not pids(folder), world)
    assert not checkpoint(folder, "alder", ROUNDS).exists()
    assert_ended(world, world.poc.submit(folder / "job"), folder, expected)
    for name in PARTIES:
        assert "restoring from round" in (folder / name / f"flare-{name}.log").read_text()


def wait_until(happened: Callable[[], bool], world: World) -> None:
    until = time.monotonic() + JOB_S
    while not happened():
        assert time.monotonic() < until, world.poc.logs(HUB)[-4000:]
        time.sleep(0.05)
