"""The page of an audit, as text and as a browser shows it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from coterie.audit.findings import Over, RunKind, TokensFigures
from coterie.audit.metrics import Estimate
from coterie.audit.report.findings_page import audit_page, save_report
from coterie.audit.report.shareable import shareable
from coterie.audit.run import ALWAYS_UNTESTED
from coterie.audit.verdicts import controls
from helpers.synthetic_findings import finding, findings, member, noised, private, tokens, working

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def rendered(page: Path, *arguments: str) -> str:
    """What headless Chromium makes of a page: its document after everything ran."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here; the page's text is tested without one")
    flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000")
    command = [CHROMIUM, *flags, *arguments, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def words(html: str) -> str:
    inside = re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", inside).replace("\xa0", " ").replace("&nbsp;", " "))


def test_the_page_opens_on_its_verdict_and_needs_nothing_else() -> None:
    page = audit_page(findings())
    assert page.index("one other party reads 98.1\xa0% of all tokens.") < page.index("What each adversary could do")
    assert page.index("What each adversary could do") < page.index("<table")
    assert "<script" not in page
    assert not re.findall(r"(?:src|href|url)\s*[=(]", page)
    assert "viewport" in page
    assert "@media print" in page


def test_every_section_is_there() -> None:
    told = words(audit_page(findings()))
    for title in (
        "What each adversary could do",
        "Do the instruments work?",
        "What was tested",
        "What was not",
        "Channels",
        "Layer by attack",
        "Reading pushed sums",
        "Membership",
        "Epsilon from below",
        "What to try next",
        "Every attack",
        "What was audited, with what",
    ):
        assert title in told
    for piece in ("commit 0123456789ab", "5f" * 32, "seed 7", "81 s, 140 s of processor time", "epsilon 7.99"):
        assert piece in told


def test_an_alarm_stands_in_a_red_box_before_everything() -> None:
    some = {RunKind.EXPERTS_DP: (*noised(), member(0.9, 2.0, allowed=0.741))}
    page = audit_page(findings(some))
    assert page.index("A promise is contradicted") < page.index("What each adversary could do")
    assert "Membership is told better than the claim allows (AUC 0.74)" in page


def test_instruments_that_fail_are_said_beside_the_controls() -> None:
    page = words(audit_page(findings(measured=working(positive=0.5))))
    assert "No verdict counts as held: the positive control read 50.0 % of tokens, by its interval" in page


def test_a_missing_value_shows_its_reason_and_no_number() -> None:
    page = words(audit_page(findings({RunKind.TOKENS: (*tokens(), finding(None, name="too short"))})))
    assert re.search(r"too short T2 - - too few places", page)


def test_what_is_shown_is_escaped() -> None:
    page = audit_page(findings({RunKind.TOKENS: (finding(name="<script>alert(1)</script>"),)}))
    assert "<script>" not in page


def test_the_edition_to_pass_on_says_what_it_leaves_out() -> None:
    page = words(audit_page(shareable(findings())))
    assert "edition to pass on" in page
    assert "Left out of this edition" in page
    assert "98.1 %" not in page


SECRET, COUNT = "4817263", 4817263.0


def test_no_fact_about_the_text_is_anywhere_in_the_edition_to_pass_on() -> None:
    """Every place of an audit that may quote the text holds one number, which must be gone from page and figures."""
    told = f"there are {SECRET} documents trained on"
    premise = {"name": "noise", "verdict": "consistent", "sentence": told, "chance": None}
    measured = premise | dict.fromkeys(("value", "expected", "error"), COUNT)
    bounds = dict.fromkeys(("epsilon_claimed", "delta", "epsilon_lower", "epsilon_ceiling", "auc_allowed"), 0.5)
    of_run = dict.fromkeys(("canaries", "claimed", "lower", "ceiling", "gaussian_lower", "gaussian_ceiling"), 1)
    run = of_run | {"score": "loss", "verdict": "consistent", "auc": COUNT, "ratio": COUNT}
    epsilon = bounds | {
        "verdict": "consistent", "premises": [measured], "one_run": [run], "sentences": [told],
        "epsilon_measured": COUNT, "seconds": {"premises": COUNT},
    }  # fmt: skip
    rate = Estimate(COUNT, COUNT, COUNT, int(COUNT))
    members = finding(name="reads", lot=int(COUNT), sentence=told).model_copy(update={"value": rate, "prior": rate})
    whole = findings({
        RunKind.EXPERTS_DP: (members, finding(None, reason=told, sentence=told, over=Over.PUBLIC)),
        RunKind.TOKENS: (finding(name="planted", over=Over.PUBLIC, sentence=told), finding(None, reason=told)),
    })  # fmt: skip
    whole = whole.model_copy(
        update={
            "epsilon": epsilon,
            "tested": (told,),
            "untested": (told, *ALWAYS_UNTESTED),
            "next_settings": (told,),
            "tokens": TokensFigures(recovery=None, layers={"0": COUNT}, prior=COUNT, reasons={"recovery": told}),
            "experts_dp": private(epsilon_lower=None).model_copy(update={"reasons": {"epsilon_lower": told}}),
            "controls": controls(*[None] * 4, dict.fromkeys(("positive", "negative", "prior", "gap"), told)),
        }
    )
    assert SECRET in json.dumps(whole.as_json())
    assert SECRET in audit_page(whole)
    shown = shareable(whole)
    assert SECRET not in json.dumps(shown.as_json())
    page = audit_page(shown).replace(",", "")
    assert SECRET not in page
    assert "4.8173e+06" not in page
    assert shown.tested == (
        "`experts` with a budget: reads, on hidden vectors",
        "`tokens`: planted, on hidden vectors",
        "premise: noise",
    )
    assert set(ALWAYS_UNTESTED) <= set(shown.untested)
    assert shown.epsilon is not None
    assert (shown.epsilon["epsilon_lower"], shown.epsilon["premises"]) == (
        0.5,
        [{"name": "noise", "verdict": "consistent"}],
    )


def test_an_audit_of_nothing_has_a_page_too() -> None:
    assert "Nothing was audited." in audit_page(findings({}))


@pytest.mark.slow
def test_a_browser_shows_verdict_and_figures_at_every_width(tmp_path: Path) -> None:
    save_report(findings(), tmp_path / "audit.html")
    document = rendered(tmp_path / "audit.html", "--dump-dom", "--window-size=1100,900")
    told = words(document)
    assert "one other party reads 98.1 % of all tokens" in told
    assert "97.1 to 99.1" in told
    assert document.count("<svg") >= 8
    for name, width in (("wide", 1100), ("phone", 375)):
        picture = tmp_path / f"{name}.png"
        rendered(tmp_path / "audit.html", f"--screenshot={picture}", f"--window-size={width},1200")
        assert picture.stat().st_size > 20_000


@pytest.mark.slow
def test_nothing_is_wider_than_a_phone(tmp_path: Path) -> None:
    save_report(findings(), tmp_path / "audit.html")
    page = (tmp_path / "audit.html").read_text("utf-8")
    probe = "<script>document.title = `${document.documentElement.scrollWidth} of ${innerWidth}`</script>"
    inside = (page + probe).replace("&", "&amp;").replace('"', "&quot;")
    narrow = f'<iframe id=f width=375 height=900 srcdoc="{inside}">'
    tell = "<script>onload = () => document.body.append(f.contentDocument.title)</script>"
    (tmp_path / "frame.html").write_text(f"<body>{narrow}</iframe>{tell}", "utf-8")
    found = re.search(r"(\d+) of (\d+)</body>", rendered(tmp_path / "frame.html", "--dump-dom"))
    assert found is not None
    assert int(found[1]) <= int(found[2]) == 375
