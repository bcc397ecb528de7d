"""Processes that are killed, frozen and started again, at named points and at random moments."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import psutil
import pytest
from record import RECORD
from trial import BACK_S, ENDLESS, NAMED_S, SLACK, Trial

from coterie.federation.identity.certificates import COORDINATOR
from helpers import kill_points
from helpers.federation_processes import PARTIES, make_folder
from helpers.forked import ForkedProcesses

PART = "Processes"


def frozen_party(trial: Trial, name: str) -> None:
    trial.goes_on()
    trial.all.signal(signal.SIGSTOP, name)
    named = trial.named(name)
    before = trial.committed()
    trial.all.signal(signal.SIGCONT, name)
    back = trial.goes_on(before)
    RECORD.tried(
        PART, "a party frozen (SIGSTOP) and let go", "it is waited for; the same process goes on", 1, named, back
    )
    assert named < SLACK * NAMED_S
    assert back < SLACK * BACK_S


def killed_party(trial: Trial, name: str) -> None:
    trial.goes_on()
    before = trial.kill(name)
    named = trial.named(name)
    trial.again(name)
    back = trial.goes_on(before)
    RECORD.tried(PART, "a party killed (-9)", "all go back to the newest checkpoint and on", 1, named, back)
    assert named < SLACK * NAMED_S
    assert back < SLACK * BACK_S


def frozen_coordinator(trial: Trial) -> None:
    trial.goes_on()
    before = trial.committed()
    trial.all.signal(signal.SIGSTOP, COORDINATOR)
    begun = time.monotonic()
    while not all(trial.silent(name) >= 3.5 for name in PARTIES):
        assert time.monotonic() - begun < 60.0
        time.sleep(0.05)
    named = time.monotonic() - begun
    trial.all.signal(signal.SIGCONT, COORDINATOR)
    back = trial.goes_on(before)
    assert "waiting for the coordinator, which has been silent" in trial.all.log(PARTIES[0])
    RECORD.tried(
        PART, "the coordinator frozen and let go", "every party says so; nobody is blamed for it", 1, named, back
    )
    assert named < SLACK * NAMED_S
    assert back < SLACK * BACK_S


@pytest.mark.slow
def test_frozen_and_killed_processes_are_named_and_the_run_goes_on(processes: ForkedProcesses):
    trial = Trial(processes)
    frozen_party(trial, "birch")
    killed_party(trial, "cedar")
    frozen_coordinator(trial)
    trial.no_traceback()


@pytest.mark.faults
def test_killed_at_every_named_point_the_run_goes_on_and_no_published_checkpoint_is_torn(processes: ForkedProcesses):
    """Each process that comes back is the one that dies at the next point."""
    trial = Trial(processes)
    for victim, points in (("cedar", kill_points.PARTY), (COORDINATOR, kill_points.COORDINATOR)):
        trial.kill(victim)
        for point in points:
            before = trial.committed()
            # Late enough that something new is published in between: a run that only repeats itself ends.
            trial.up_to(victim, point, 1 if "loaded" in point else 2 if "checkpoint" in point else 5)
            after = trial.committed()
            assert after >= before or victim != COORDINATOR  # what was committed may be given up, never forgotten
            RECORD.tried(PART, f"{'coordinator' if victim == COORDINATOR else 'a party'} killed {point}", "all go on")
        before = trial.committed()
        trial.again(victim)
        trial.goes_on(before)
    assert "checkpoint-none-common" not in trial.all.log(COORDINATOR)
    trial.no_traceback()


@pytest.mark.faults
def test_killed_at_every_stage_of_a_masked_push_the_run_goes_on_and_no_stream_masks_two_values(
    processes: ForkedProcesses,
):
    """Under a budget. Each time all go back to an older checkpoint; in the end the killed party's spool is gone, too,
    and every party counts the draws that all burn."""
    rules = {"epsilon": 8.0, "delta": 1e-3, "clip_norm": 1.0, "lot_size": 4}
    trial = Trial(
        processes, exchange="experts", privacy=rules, aggregation="masked", trunk="shared", noise="shared",
        colluding=1, noise_multiplier=4.0, train={**ENDLESS, "rounds": 2000},
    )  # fmt: skip
    trial.kill("cedar")
    for point in kill_points.MASKED:
        trial.up_to("cedar", point, 5)
        RECORD.tried(PART, f"a party killed {point} (masked push)", "all go on, under new masks")
    for path in ledgers(processes.folder, "cedar"):
        for spooled in path.parent.glob("spool/*/*"):
            spooled.unlink()
    before = trial.committed()
    trial.again("cedar")
    trial.goes_on(before)
    RECORD.tried(
        PART, "a party killed and its spool lost (masked push)", "its rounds are drawn anew by all, and counted"
    )
    trial.no_traceback()
    noted = (processes.folder / "streams.log").read_text().splitlines()
    # A part whose connection broke is masked again, to the same bytes.
    masked = {tuple(line.split()) for line in noted}
    streams = {stream for stream, _ in masked}
    assert len(streams) > 2 * len(kill_points.MASKED)
    assert len(streams) == len(masked)
    for name in PARTIES:
        (path,) = ledgers(processes.folder, name)
        kinds = [json.loads(line) for line in path.read_text().splitlines()]
        draws = [
            (e["data"]["round"], e["data"]["draw"], e["data"]["digest"]) for e in kinds if e["kind"] == "release"
        ]
        assert len({draw[:2] for draw in draws}) == len({draw[2] for draw in draws}) == len(draws)
        assert any(draw > 0 for _, draw, _ in draws), name


def ledgers(folder: Path, name: str) -> list[Path]:
    """Of one party; each has its own place here."""
    return list((folder / name / "ledger").glob("*/ledger.jsonl"))


@pytest.mark.faults
def test_killed_at_random_moments_the_run_goes_on(processes: ForkedProcesses):
    draw, trial = random.Random(4), Trial(processes, lost_party="pause")
    for _ in range(12):
        victim = draw.choice((COORDINATOR, *PARTIES))
        time.sleep(draw.uniform(0.0, 2.0))
        before = trial.kill(victim)
        trial.again(victim)
        back = trial.goes_on(before)
        RECORD.tried(PART, "any process killed at a random moment, started at once", "all go on", 1, None, back)
        assert back < SLACK * BACK_S + (20.0 if victim == COORDINATOR else 0.0)  # it reads its files meanwhile
    assert "checkpoint-none-common" not in trial.all.log(COORDINATOR)
    trial.no_traceback()


@pytest.mark.faults
def test_busy_process_that_lets_no_other_python_run_is_not_taken_for_lost(processes: ForkedProcesses):
    """Ten seconds in one call that never lets go: no heartbeat is sent, but gRPC answers pings."""
    trial = Trial(processes)
    trial.kill("cedar")
    trial.start_with("cedar", "busy", 3)
    trial.all.until(lambda status: "busy from now on" in trial.all.log("cedar"))
    since = len(trial.all.log(COORDINATOR))
    trial.all.until(lambda status: "no longer busy" in trial.all.log("cedar"))
    trial.goes_on()
    said = trial.all.log(COORDINATOR)[since:]
    assert "cedar" not in said, said
    RECORD.tried(PART, "a party busy for 10 s without a heartbeat", "it is waited for and not taken for lost")


@pytest.mark.faults
def test_soak_of_two_thousand_rounds_with_flat_memory_and_descriptors(processes: ForkedProcesses):
    rounds = 2000
    make_folder(processes.folder, train={**ENDLESS, "rounds": rounds, "checkpoint_every": 50})
    processes.coordinate()
    for name in PARTIES:
        processes.up(name)
    used: list[dict[str, tuple[int, int]]] = []
    for mark in range(400, rounds - 100, 100):
        processes.until(lambda status, mark=mark: status["committed"] >= mark, 1800.0)  # type: ignore[misc]
        used.append({name: used_by(process.pid) for name, process in processes.running.items()})
    assert set(processes.wait(600).values()) == {0}
    for name in used[0]:
        memory, descriptors = zip(*(each[name] for each in used), strict=True)
        assert max(memory[-3:]) < 1.05 * max(memory[:3]) + 2**20, (name, memory)
        assert max(descriptors[-3:]) <= max(descriptors[:3]) + 2, (name, descriptors)
    growth = max(max(each[name][0] for each in used[-3:]) / used[0][name][0] - 1.0 for name in used[0])
    RECORD.tried(
        PART, "soak, rounds", f"memory grew by {100 * growth:.1f} % from round 400 on, descriptors did not", rounds
    )


def used_by(pid: int) -> tuple[int, int]:
    """Resident bytes and open descriptors."""
    process = psutil.Process(pid)
    return process.memory_info().rss, process.num_fds()
