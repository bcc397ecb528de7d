"""A whole audit: missing pieces are told and end nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from coterie.audit import pieces, run
from coterie.audit.adversaries import DEFAULT
from coterie.audit.evidence import Evidence, LedgerClaim
from coterie.audit.figures import NOT_AUDITED, experts_figures, private_figures, tokens_figures
from coterie.audit.findings import Audited, Finding, Outcome, RunKind, Unit
from coterie.audit.run import Asked, audit, concluded, contradicted, part_of, public_files
from coterie.audit.verdicts import verdicts
from coterie.cli import audit as command
from coterie.config import PrivacyRules
from coterie.errors import AuditError, CheckpointError
from helpers.synthetic_findings import experts, finding, findings, member, noised, private, tokens, working

Read = Callable[..., Evidence]


def evidence(exchange: str = "tokens", claim: LedgerClaim | None = None, received: int = 2, **more: Any) -> Evidence:
    transcripts = {f"party{number}": SimpleNamespace(rounds=2, stopped=None) for number in range(received)}
    values: dict[str, Any] = {
        "owner": "alder",
        "exchange": exchange,
        "trunk": "shared",
        "privacy": claim,
        "start": Path("start"),
        "public": [[1, 2, 3]] * 30,
        "received": transcripts,
        "answers": SimpleNamespace(),
        "run_folder": Path("run"),
    }
    return Evidence(**(values | more))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A party's run folder, every piece of the audit standing still."""
    (tmp_path / "party.yaml").write_text("", "utf-8")
    identified = Audited(
        part=RunKind.TOKENS,
        owner="alder",
        parties=("alder", "birch"),
        config_hash="5f",
        model="toy",
        start="9a",
        rounds=4,
        recorded=2,
    )
    monkeypatch.setattr(run, "federation_run", lambda evidence, part: identified.model_copy(update={"part": part}))
    monkeypatch.setattr(run, "load_yaml", lambda *_: SimpleNamespace(privacy="none"))
    monkeypatch.setattr(pieces, "instruments", lambda *_: working())
    monkeypatch.setattr(pieces, "on_model", lambda *_, **__: "it was left alone")
    monkeypatch.setattr(pieces, "on_epsilon", lambda *_: "it was left alone")
    return tmp_path


def reading(monkeypatch: pytest.MonkeyPatch, *answers: Evidence | Exception) -> None:
    left = list(answers)

    def read(*_: Any) -> Evidence:
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(run.Evidence, "read", read)


def attacks(monkeypatch: pytest.MonkeyPatch, some: tuple[Finding, ...] | Exception) -> None:
    def attack(evidence: Evidence, *, seed: int, budget_s: float) -> list[Finding]:
        if isinstance(some, Exception):
            raise some
        return list(some)

    for package in ("tokens", "experts"):
        monkeypatch.setattr(f"coterie.audit.{package}.attack.attack", attack)


def audited(folder: Path) -> Any:
    return audit([Asked(folder)], seed=3, budget_s=10)


def test_the_figures_at_the_top_are_those_of_the_default_adversary(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading(monkeypatch, evidence())
    attacks(monkeypatch, tokens())
    found = audited(folder)
    assert (found.tokens.recovery, found.tokens.prior) == (0.981, 0.17)  # not the 0.9995 of all hosts together
    assert found.tokens.layers == {"0": 1.0, "1": 0.93, "2": 0.96, "3": 0.75}
    assert found.outcome is Outcome.OPEN
    assert found.experts.reasons == dict.fromkeys(("recovery", "prior", "auc"), NOT_AUDITED)
    assert found.identification.seed == 3


def test_the_run_s_own_push_is_the_largest_and_all_sizes_stand_beside_it() -> None:
    found = experts_figures(experts())
    assert (found.recovery, found.prior, found.auc) == (0.28, 0.15, 0.988)
    assert found.lots == {"1": 0.98, "4": 0.8, "16": 0.28}
    assert found.simulated == ("1", "4")


def test_membership_is_that_of_known_records_in_pushes_that_were_made() -> None:
    others = [member(1.0, 9.0, unit=unit, lot=64) for unit in (Unit.SIMULATED, Unit.PRESENCE)]
    assert experts_figures([*experts(), *others]).auc == 0.988
    alone = experts_figures(others)
    assert alone.auc is None
    assert "auc" in alone.reasons
    (told,) = [v for v in verdicts(RunKind.EXPERTS, others, working(), private()) if v.adversary is DEFAULT]
    assert told.outcome is Outcome.UNKNOWN
    assert "can be told" not in told.sentence


def test_a_run_s_own_push_that_carries_no_figure_is_not_stood_for_by_a_smaller_one() -> None:
    some = [each for each in experts() if each.lot != 16]
    own = finding(None, unit=Unit.PLACES, lot=16, prior=None)
    found = experts_figures([*some, own])
    assert (found.recovery, found.lots) == (None, {"1": 0.98, "4": 0.8})


def test_a_budget_s_figures_join_attacks_and_bounds() -> None:
    bounds = {"auc_allowed": 0.74, "epsilon_claimed": 8.0, "epsilon_lower": 0.5, "epsilon_ceiling": 3.6}
    found = private_figures(noised(), bounds, (7.99, 1e-5))
    assert (found.recovery, found.prior, found.advantage) == (0.171, 0.17, 0.001)
    assert (found.epsilon_claimed, found.epsilon_lower, found.epsilon_ceiling) == (7.99, 0.5, 3.6)
    assert (found.auc, found.auc_limit, found.auc_allowed) == (0.58, 0.741, 0.74), "each test has its own limit"
    assert found.reasons == {}
    unpromised = private_figures((member(0.6, 1.4),), bounds, (7.99, 1e-5))
    assert unpromised.auc_limit is None
    assert unpromised.reasons["auc_limit"] == "nothing is promised of this test"
    endless = private_figures(
        noised(), {**bounds, "epsilon_lower": math.inf, "epsilon_ceiling": math.inf}, (7.99, 1e-5)
    )
    assert endless.epsilon_lower is None
    assert endless.epsilon_ceiling is None
    assert "no bound" in endless.reasons["epsilon_lower"]
    without = private_figures(noised(), None, (7.99, 1e-5), "no record is left")
    assert without.epsilon_lower is None
    assert without.reasons["epsilon_lower"] == "no record is left"


def test_nothing_measured_is_null_with_the_attacks_own_reasons() -> None:
    found = tokens_figures([pieces.nothing("attacks", RunKind.TOKENS, "no key")])
    assert found.recovery is None
    assert found.reasons["recovery"] == "no key"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"received": 0}, "no transcript was given"),
        ({"answers": None}, "kept no key"),
    ],
)
def test_a_missing_piece_is_told_and_ends_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], words: str
) -> None:
    reading(monkeypatch, evidence(**more))
    found = audited(folder)
    assert found.outcome is Outcome.UNKNOWN
    assert found.tokens.recovery is None
    assert words in found.tokens.reasons["recovery"]
    assert any(words in sentence for sentence in found.untested)


def test_a_transcript_of_another_run_is_told_and_the_rest_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*given: Any) -> Evidence:
        given[-1]("What birch/run holds is of run 1234.")
        return evidence(received=0)

    monkeypatch.setattr(run.Evidence, "read", read)
    found = audit([Asked(folder, received=(Path("birch/run"),))], seed=3, budget_s=10)
    assert any("of run 1234" in sentence for sentence in found.untested)
    assert found.outcome is Outcome.UNKNOWN


def test_a_recording_that_stopped_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = {"birch": SimpleNamespace(rounds=None, stopped=3), "cedar": SimpleNamespace(rounds=None, stopped=None)}
    reading(monkeypatch, replace(evidence(), received=cut))  # type: ignore[arg-type]
    attacks(monkeypatch, tokens())
    told = audited(folder).untested
    assert any("birch received from round 3 on" in sentence for sentence in told)
    assert not any("cedar" in sentence for sentence in told)


def test_a_partys_model_is_put_together_from_run_folders_and_not_from_transcripts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    birch, cedar = folder / "birch", folder / "cedar"
    for one in (birch, cedar):
        one.mkdir()
    (birch / "party.yaml").write_text("", "utf-8")
    told: list[dict[str, Any]] = []

    def on_model(*_: Any, **named: Any) -> str:
        told.append(named)
        return "it was left alone"

    monkeypatch.setattr(pieces, "on_model", on_model)
    reading(monkeypatch, evidence())
    attacks(monkeypatch, tokens())
    one = Asked(folder, (birch, cedar), (folder / "public.txt",), whole=folder / "whole", references=(folder / "x",))
    audit([one], seed=3, budget_s=10)
    assert told == [
        {"whole": one.whole, "parties": [birch], "references": one.references, "public": one.public},
    ]


def test_a_folder_without_a_run_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading(monkeypatch, CheckpointError("holds no run", code="run-dir-none"))
    with pytest.raises(CheckpointError, match="holds no run"):
        audited(folder)


def test_an_attack_that_cannot_be_made_says_why(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading(monkeypatch, evidence(exchange="experts"))
    attacks(monkeypatch, AuditError("Nothing was pushed.", code="audit-no-pushes"))
    found = audited(folder)
    assert "Nothing was pushed" in found.experts.reasons["recovery"]
    assert "played in its place" not in " ".join(found.untested), "nothing was played"


def test_what_no_attack_here_reads_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading(monkeypatch, evidence(exchange="experts"))
    attacks(monkeypatch, experts())
    told = " ".join(audited(folder).untested)
    for words in ("`experts` without a budget: T1", "adapters (`lora`)", "classifiers"):
        assert words in told


def test_several_runs_fill_several_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"tokens": tokens(), "experts": experts(), "dp": noised()}
    reading(monkeypatch, evidence(), evidence("experts"), evidence("experts", LedgerClaim(7.99, 1e-5)))
    monkeypatch.setattr(pieces, "on_exchange", lambda e, *_: list(found["dp" if e.privacy else e.exchange]))
    whole = audit([Asked(folder)] * 3, seed=0, budget_s=10)
    assert set(whole.findings) == {RunKind.TOKENS, RunKind.EXPERTS, RunKind.EXPERTS_DP}
    assert (whole.tokens.recovery, whole.experts.recovery, whole.experts_dp.recovery) == (0.981, 0.28, 0.171)
    assert whole.experts_dp.epsilon_claimed == 7.99
    assert [one.part for one in whole.identification.runs] == [RunKind.TOKENS, RunKind.EXPERTS, RunKind.EXPERTS_DP]
    assert len(whole.headline) == 3


def test_a_run_under_a_budget_is_one_before_anything_was_spent() -> None:
    agreed: Any = SimpleNamespace(privacy=PrivacyRules.model_construct())
    assert part_of(evidence("experts"), agreed) is RunKind.EXPERTS_DP
    assert part_of(evidence("experts"), SimpleNamespace(privacy="none")) is RunKind.EXPERTS  # type: ignore[arg-type]
    assert part_of(evidence(), agreed) is RunKind.TOKENS


def test_alarms_of_the_audit_of_epsilon_are_told_one_by_one() -> None:
    premise = {"verdict": "ALARM", "sentence": "Noise is half of what is claimed."}
    run_ = {"verdict": "ALARM", "score": "shares", "alarm_lower": 3.2, "claimed": 2.0}
    quiet = {"verdict": "consistent", "sentence": "Lots are drawn as stated."}
    told = contradicted({"verdict": "ALARM", "premises": [premise, quiet], "one_run": [run_], "sentences": []})
    assert told == [
        "Noise is half of what is claimed.",
        "Canaries told apart by shares prove an epsilon of at least 3.20 where 2 was claimed.",
    ]
    assert contradicted({"verdict": "consistent", "premises": [], "one_run": [], "sentences": []}) == []


def test_only_an_audit_of_epsilon_that_concluded_lets_a_claim_stand() -> None:
    whole = {"verdict": "consistent", "premises": [{"verdict": "consistent"}]}
    assert concluded(whole)
    assert not concluded(None)
    assert not concluded({**whole, "premises": []})
    assert not concluded({**whole, "verdict": "cannot conclude"})
    assert not concluded({**whole, "verdict": "ALARM"})


def test_an_alarm_of_the_audit_of_epsilon_is_one_of_the_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    premise = {"name": "noise", "verdict": "ALARM", "sentence": "Noise is half of what is claimed."}
    told = {"auc_allowed": 0.74, "epsilon_claimed": 8.0, "epsilon_lower": 0.5, "epsilon_ceiling": 3.6}
    epsilon = {**told, "verdict": "ALARM", "premises": [premise], "one_run": [], "sentences": []}
    monkeypatch.setattr(pieces, "on_epsilon", lambda *_: epsilon)
    reading(monkeypatch, evidence("experts", LedgerClaim(7.99, 1e-5)))
    attacks(monkeypatch, noised())
    found = audited(folder)
    assert found.outcome is Outcome.ALARM
    assert all(premise["sentence"] in verdict.sentence for verdict in found.verdicts)


def test_controls_need_public_text_and_a_federation() -> None:
    assert "--public" in pieces.instruments(evidence(public=[]), 0).reasons["positive"]
    assert "federation" in pieces.instruments(None, 0).reasons["positive"]


def test_public_files_are_found_in_folders_and_below(tmp_path: Path) -> None:
    (tmp_path / "b" / "c").mkdir(parents=True)
    for name in ("a.txt", "b/d.txt", "b/c/e.txt"):
        (tmp_path / name).write_text("x", "utf-8")
    found = public_files([tmp_path / "b", tmp_path / "a.txt"])
    assert [path.name for path in found] == ["e.txt", "d.txt", "a.txt"]


@pytest.mark.parametrize(
    ("outcome", "code"), [(Outcome.ALARM, 3), (Outcome.OPEN, 0), (Outcome.HELD, 0), (Outcome.UNKNOWN, 4)]
)
def test_the_exit_code_tells_alarm_conclusion_and_neither(outcome: Outcome, code: int) -> None:
    assert command.exit_code(findings().model_copy(update={"outcome": outcome})) == code


def test_the_command_writes_page_and_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "_audited", lambda *_: findings())
    from coterie.cli.app import main

    with pytest.raises(SystemExit) as end:
        main(["audit", str(tmp_path), "--json", str(tmp_path / "audit.json"), "--shareable"])
    assert end.value.code == 0
    told = json.loads((tmp_path / "audit.json").read_text("utf-8"))
    assert told["left_out"]
    assert told["tokens"]["recovery"] is None
    assert "edition to pass on" in (tmp_path / "private" / "audit-shareable.html").read_text("utf-8")
    shown = capsys.readouterr().out
    assert "98.1" not in shown
    assert "Not tested" in shown


def test_the_command_names_the_model_and_what_never_saw_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from coterie.cli.app import main

    asked: list[Asked] = []
    monkeypatch.setattr(command, "_audited", lambda one, *_: asked.append(one) or findings())
    (tmp_path / "whole").mkdir()
    (tmp_path / "other").mkdir()
    models = ["--model", str(tmp_path / "whole"), "--reference", str(tmp_path / "other")]
    with pytest.raises(SystemExit):
        main(["audit", str(tmp_path), *models])
    assert (asked[0].whole, asked[0].references) == (tmp_path / "whole", (tmp_path / "other",))
    with pytest.raises(SystemExit) as end:
        main(["audit", str(tmp_path), "--reference", str(tmp_path / "none")])
    assert end.value.code == 1
    assert "audit-model-none" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["audit", "prepare"], ["audit", "run", "train.yaml"], ["audit", "run", "--out", "x"]]
)
def test_prepare_and_audit_do_not_share_arguments(arguments: list[str]) -> None:
    from coterie.cli.app import main

    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2


@pytest.mark.parametrize(("option", "code"), [("--public", "audit-public-none"), ("--start", "audit-model-none")])
def test_what_is_named_and_not_there_is_said_at_once(
    option: str, code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from coterie.cli.app import main

    with pytest.raises(SystemExit) as end:
        main(["audit", str(tmp_path), option, str(tmp_path / "none")])
    assert end.value.code == 1
    assert code in capsys.readouterr().err


@pytest.mark.parametrize(("claim", "left"), [(None, "exact"), (LedgerClaim(8.0, 1e-5), "noised")])
def test_under_masks_the_audit_says_what_each_adversary_could_open_and_that_it_was_not_tried(
    claim: LedgerClaim | None, left: str
) -> None:
    part = RunKind.EXPERTS if claim is None else RunKind.EXPERTS_DP
    (found,) = pieces.on_exchange(evidence("experts", claim, received=0, masked=True), part, 1, 1.0)
    assert found.value is None
    assert found.reason is not None
    assert (
        f"all others together (T4) subtract all of theirs and are left with this party's sums, {left}" in found.reason
    )
    assert "(T1, T2, T3) holds the sums of all parties" in found.reason
    assert found.reason.endswith("Neither was attacked")
