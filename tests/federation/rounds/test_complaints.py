"""Who is dropped when one party refuses what another one sends: the rule at the coordinator, case by case."""

from __future__ import annotations

from pathlib import Path

import pytest

from coterie.federation.identity.certificates import COORDINATOR
from coterie.federation.rounds.coordinator import Coordinator, refusals_allowed
from coterie.federation.rounds.directives import Call, Directive, Refusal, decode, encode, is_kind
from coterie.federation.rounds.journal import Journal
from coterie.federation.rounds.state import Complaint, PartyReport, Phase, RoundPlan, State
from coterie.federation.wire.in_process import InProcessHub
from coterie.federation.wire.transport import Lane, Message

PARTIES = ("alder", "birch", "cedar", "dogwood")
AGREEMENT = "ab" * 32


class Desk:
    """A coordinator that hears reports and sends nothing by itself."""

    def __init__(self, folder: Path) -> None:
        hub = InProcessHub(PARTIES, coordinator=COORDINATOR)
        self.journal = Journal(folder, "grove", AGREEMENT)
        plan = RoundPlan(PARTIES, rounds=5, lease_s=60.0, quiet_s=60.0)
        self.coordinator = Coordinator(plan, hub.transport(COORDINATOR), self.journal, AGREEMENT)

    def report(self, party: str, instance: str = "", **fields: object) -> Message:
        report = PartyReport(instance or f"{party}-1", **fields)  # type: ignore[arg-type]
        return self.coordinator._handle(party, Lane.CONTROL, encode(Call(report, AGREEMENT)))

    def everybody(self) -> None:
        for party in PARTIES:
            self.report(party)

    def is_dropped(self, party: str, instance: str = "") -> bool:
        reply = self.report(party, instance, count=9)
        if not is_kind(reply, Refusal):
            return False
        assert decode(reply, Refusal, COORDINATOR).code == "member-dropped"
        return True


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    made = Desk(tmp_path)
    made.everybody()
    return made


def complaint(about: str, seq: int = 2**40) -> Complaint:
    return Complaint(about, seq, "message-unfit")


def test_a_member_that_one_party_refuses_is_dropped_and_its_new_process_is_let_in(desk: Desk) -> None:
    desk.report("alder", count=1, complaints=(complaint("cedar"),))
    assert desk.is_dropped("cedar")
    assert not desk.is_dropped("birch")
    assert not desk.is_dropped("alder")
    assert not desk.is_dropped("cedar", "cedar-2")


def test_a_complaint_about_an_earlier_process_counts_no_more(desk: Desk) -> None:
    seq = desk.journal.state.seq
    desk.report("alder", count=1, complaints=(complaint("cedar", seq),))
    assert desk.is_dropped("cedar")
    desk.journal.write(_later(desk.journal.state))
    desk.report("cedar", "cedar-2")
    desk.report("alder", count=2, complaints=(complaint("cedar", seq),))
    assert not desk.is_dropped("cedar", "cedar-2")


def test_a_party_that_refuses_most_of_the_others_is_dropped_itself(desk: Desk) -> None:
    desk.report("dogwood", count=1, complaints=(complaint("alder"), complaint("birch")))
    assert desk.is_dropped("dogwood")
    assert not desk.is_dropped("alder")
    assert not desk.is_dropped("birch")


@pytest.mark.parametrize("about", ["alder", "elsewhere"])
def test_a_complaint_about_oneself_or_about_nobody_changes_nothing(desk: Desk, about: str) -> None:
    reply = desk.report("alder", count=1, complaints=(complaint(about),))
    assert decode(reply, Directive, COORDINATOR).state.phase is not Phase.END
    assert not any(desk.is_dropped(party) for party in PARTIES)


def test_a_party_whose_reports_do_not_fit_is_dropped_by_the_coordinator_itself(desk: Desk) -> None:
    desk.coordinator._refused_too_often("birch", "control-body")
    assert desk.is_dropped("birch")


@pytest.mark.parametrize(("refusals", "attempts", "allowed"), [(2, 3, 2), (5, 3, 2), (2, 1, 1), (1, 9, 1)])
def test_a_member_is_dropped_before_its_misfits_end_the_run(refusals: int, attempts: int, allowed: int) -> None:
    assert refusals_allowed(RoundPlan(PARTIES, rounds=1, max_refusals=refusals, max_attempts=attempts)) == allowed


def _later(state: State):  # type: ignore[no-untyped-def]
    from dataclasses import replace

    from coterie.federation.rounds.state import Move

    return Move(replace(state, seq=state.seq + 1))
