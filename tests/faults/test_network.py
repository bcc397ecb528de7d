"""Lines between members that are cut, cut one way, late, lossy and slow, in network namespaces of our own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from record import RECORD
from trial import BACK_S, NAMED_S, SLACK, Trial

from coterie.federation.identity.certificates import COORDINATOR
from helpers.federation_processes import PARTIES
from helpers.forked import ForkedProcesses, Starter
from helpers.network import Network, possible

PART = "Network"
pytestmark = [pytest.mark.faults, pytest.mark.skipif(bool(possible()), reason=possible())]


@pytest.fixture
def network() -> Iterator[Network]:
    with Network((COORDINATOR, *PARTIES)) as made:
        yield made


@pytest.fixture
def trial(network: Network, starter: Starter, tmp_path: Path) -> Iterator[Trial]:
    endpoints = [f"{network.address(name)}:7{index}00" for index, name in enumerate((*PARTIES, COORDINATOR))]
    spaces = {name: network.space(name) for name in network.members}
    made = ForkedProcesses(starter, tmp_path / "grove", spaces)
    try:
        yield Trial(made, endpoints=endpoints)
    finally:
        made.end()


def line_named(trial: Trial, one: str, other: str) -> float:
    begun = time.monotonic()
    trial.all.until(lambda status: [one, other] in status.get("cut", []), 90.0)
    return time.monotonic() - begun


def check(named: float, back: float) -> None:
    assert named < SLACK * NAMED_S
    assert back < SLACK * BACK_S


def test_cut_lines_are_named_and_the_run_goes_on_once_they_are_mended(network: Network, trial: Trial):
    for both in (True, False):
        how = "both ways" if both else "one way"
        pairs = [("alder", "birch"), ("birch", "cedar")] if both else [("alder", "cedar"), ("cedar", "birch")]
        for one, other in pairs:
            network.cut(one, other, both=both)
            named = line_named(trial, *sorted((one, other)))
            before = trial.committed()
            network.mend(one, other)
            back = trial.goes_on(before)
            happened = "the two are named; the run waits, and goes on"
            RECORD.tried(PART, f"line between two parties cut {how}", happened, 1, named, back)
            check(named, back)
        for one, other in (("birch", COORDINATOR), (COORDINATOR, "cedar")):
            party = one if one != COORDINATOR else other
            network.cut(one, other, both=both)
            named = trial.named(party)
            before = trial.committed()
            network.mend(one, other)
            back = trial.goes_on(before)
            happened = "the party is named; the run waits, and goes on"
            RECORD.tried(PART, f"line between a party and the coordinator cut {how}", happened, 1, named, back)
            check(named, back)
    trial.no_traceback()


@pytest.mark.parametrize(
    ("fault", "how"),
    [
        ("100 ms later each way", {"delay_s": 0.1}),
        ("2 % of all packets lost", {"loss": 0.02}),
        ("1 Mbit/s for all together", {"bytes_per_s": 125_000.0}),
    ],
)
def test_late_lossy_and_slow_networks_only_take_longer(
    network: Network, trial: Trial, fault: str, how: dict[str, float]
):
    since = len(trial.all.log(COORDINATOR))
    network.roughen(**how)
    begun, before = time.monotonic(), trial.committed()
    trial.all.until(lambda status: status["committed"] >= before + 3, 240.0)
    lasted = (time.monotonic() - begun) / 3
    log = trial.all.log(COORDINATOR)[since:]
    assert "lost" not in log, log
    assert "no connection" not in log, log
    RECORD.tried(PART, fault, f"rounds take {lasted:.1f} s; nobody is taken for lost")
    before = trial.kill("cedar")
    trial.named("cedar")
    trial.again("cedar")
    RECORD.tried(PART, f"a party killed, with {fault}", "it comes back", 1, None, trial.goes_on(before))
