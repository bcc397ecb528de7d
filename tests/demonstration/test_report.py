"""What the closing screen, the page and the JSON say about given figures."""

from __future__ import annotations

import base64
import json
import math
import re
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from coterie.demonstration.plan import ARMS, make_plan
from coterie.demonstration.plot import COLOURS, MARKERS, draw
from coterie.demonstration.report import save_report
from coterie.demonstration.results import Figures, Promise, Results, Wire, _mean, _shares
from coterie.demonstration.tables import tables
from coterie.demonstration.verdict import headline, meaning, not_protected
from coterie.dp.accounting.accountant import Mechanism, epsilon
from coterie.training.evaluate import Evaluation
from helpers.synthetic_findings import findings

PARTIES = ("alder", "birch", "cedar")
SEQUENCES = 400


def evaluation(loss: float, seed: int = 0) -> Evaluation:
    """Sequences of different length whose losses scatter around ``loss``, in the same way for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(20, 64, (SEQUENCES,), generator=generator)
    scatter = torch.randn(SEQUENCES, generator=generator, dtype=torch.float64)
    scatter -= (scatter * tokens).sum() / tokens.sum()
    return Evaluation((loss + 0.3 * scatter) * tokens, tokens)


def figures(loss: float, seed: int = 0) -> Figures:
    return Figures(evaluation(loss, seed), 32_000_000, 600_000_000)


def noisy(loss: float, party: int) -> Figures:
    """The same on average, with another scatter: no difference beyond chance."""
    base = evaluation(loss, party)
    other = torch.randn(SEQUENCES, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    other -= (other * base.tokens_S).sum() / base.tokens_S.sum()
    return Figures(Evaluation(base.loss_S + 0.2 * other * base.tokens_S, base.tokens_S), 1, 1)


def results(tokens: tuple[float, ...] = (3.9, 3.9, 3.9), **together: Figures) -> Results:
    """Given losses together, or a party's own figures there."""
    found = {
        "public": {party: figures(4.5, seed) for seed, party in enumerate(PARTIES)},
        "isolated": {party: figures(4.0, seed) for seed, party in enumerate(PARTIES)},
        "tokens": {party: figures(tokens[seed], seed) for seed, party in enumerate(PARTIES)} | together,
        "centralised": {party: figures(3.85, seed) for seed, party in enumerate(PARTIES)},
    }
    return Results(
        plan=make_plan(3),
        subjects=dict.fromkeys(PARTIES, "networking"),
        arms=found,
        curves={arm: [(20, 4.2), (40, 4.0)] for arm in found if arm != "public"},
        best={arm: dict.fromkeys(PARTIES, (48, 4.0)) for arm in ("isolated", "tokens")},
        wire={"tokens": Wire(102_000_000, 100_000_000)},
    )


def promised(loss: float, seed: int) -> Figures:
    base = figures(loss, seed)
    return Figures(base.evaluation, base.model_state_bytes, base.peak_rss_bytes, Promise(7.99, 1e-5, 0.8, 12))


def private_results(together: tuple[float, ...] = (4.2, 4.2, 4.2)) -> Results:
    """All arms of the demo; the private federation's losses are given."""
    base = results()
    losses = {
        "isolated_dp": (4.3, 4.3, 4.3),
        "experts_dp": together,
        "experts_dp_shared": (4.18, 4.18, 4.18),
        "centralised_dp": (4.15, 4.15, 4.15),
    }
    private = {
        arm: {party: promised(each[seed], seed) for seed, party in enumerate(PARTIES)} for arm, each in losses.items()
    }
    arms = {**base.arms, "experts": base.arms["tokens"], **private}
    return Results(
        plan=replace(base.plan, units=dict.fromkeys(PARTIES, 1280)),
        subjects=base.subjects,
        arms={arm: arms[arm] for arm in ARMS},
        curves={**base.curves, **{arm: [(4, 4.3), (12, 4.2)] for arm in ("experts", *private)}},
        best={**base.best, **{arm: dict.fromkeys(PARTIES, (12, 4.2)) for arm in private if arm != "centralised_dp"}},
        wire={
            **base.wire,
            "experts": Wire(303, 300),
            "experts_dp": Wire(204, 200),
            "experts_dp_shared": Wire(255, 250),
        },
    )


def test_better_for_all_is_said_in_one_sentence() -> None:
    assert headline(results()) == (
        "Together against alone. `tokens`: all 3 parties got a better model, within 3 % of pooling all text."
    )
    far = results((3.9, 3.99, 3.9))
    assert headline(far) == "Together against alone. `tokens`: all 3 parties got a better model."


def test_private_arms_are_compared_with_private_arms_only() -> None:
    found = private_results()
    assert headline(found) == (
        "Together against alone. `tokens`, `experts`, `experts` within epsilon 8 and `experts` within epsilon 8, "
        "noise shared: all 3 parties got a better model, within 3 % of pooling all text."
    )
    figures = found.as_json()["arms"]["experts_dp"]
    assert figures["minus_isolated"]["alder"]["mean"] == pytest.approx(-0.1, abs=1e-6)  # 4.2 against 4.3
    assert figures["minus_centralised"]["birch"]["mean"] == pytest.approx(0.05, abs=1e-6)
    worse = private_results((4.2, 4.35, 4.2))
    assert "`experts` within epsilon 8: alder and cedar better, birch worse" in headline(worse)


def test_private_arms_tell_what_they_spent() -> None:
    arms = private_results().as_json()["arms"]
    assert {arm for arm, figures in arms.items() if "privacy" in figures} == {
        "isolated_dp",
        "experts_dp",
        "experts_dp_shared",
        "centralised_dp",
    }
    spent = {"epsilon": 7.99, "delta": 1e-5, "noise_multiplier": 0.8, "rounds": 12}
    assert arms["experts_dp"]["privacy"] == dict.fromkeys(PARTIES, spent)
    privacy = next(table for table in tables(private_results()) if table.title.startswith("privacy spent"))
    assert privacy.rows[1] == ("private: together", *["epsilon 7.990 (noise 0.80, 12 rounds)"] * 3)


def test_losses_of_private_arms_are_labelled_as_not_private() -> None:
    told = " ".join(not_protected(private_results()))
    assert "losses above are NOT private" in told
    assert "(epsilon 8, delta 1e-05)" in told
    assert "`privacy: none`" in told
    assert "losses above" not in " ".join(not_protected(results()))


def test_shared_noise_is_explained_and_what_is_left_against_all_others_said() -> None:
    found = private_results()
    told = " ".join(meaning(found))
    # Of three parties, t = 1: shares of 1 / sqrt(2), which add up to sqrt(3 / 2).
    assert "a party adds 0.71 of its noise" in told
    assert "holds 1.22 times the noise of one place, in place of 1.73 times" in told
    assert "compared with whole noise at every party: alder -0.020, birch -0.020, cedar -0.020 nats" in told
    warned = " ".join(not_protected(found))
    assert "holds against any 1 of the 2 other parties together, and outsiders" in warned
    mechanism = Mechanism(0.8 / math.sqrt(2), found.plan.private.lot_size / 1280)
    assert f"it is epsilon {epsilon([(mechanism, 12)], 1e-5):.1f}" in warned
    assert "noise shared" not in " ".join(not_protected(results()))


def test_wire_adds_up_all_federations() -> None:
    wire = private_results().as_json()["wire"]
    assert wire["payload_bytes"] == 102_000_000 + 303 + 204 + 255
    assert wire["arms"]["experts_dp"] == {"payload_bytes": 204, "tensor_bytes": 200, "ratio": 1.02}


def test_a_worse_party_is_named_as_worse() -> None:
    found = results((3.9, 4.1, 3.9))
    assert headline(found) == "Together against alone. `tokens`: alder and cedar better, birch worse."
    assert any("compared with training alone: alder and cedar better, birch worse" in s for s in meaning(found))
    assert next(t for t in tables(found) if t.title.startswith("difference")).rows[0][2].startswith("+0.100 (")


def test_a_difference_within_chance_is_a_tie() -> None:
    tied = results(cedar=noisy(4.0, 2))
    assert headline(tied) == (
        "Together against alone. `tokens`: alder and birch better, cedar no different beyond chance."
    )
    assert tied.as_json()["arms"]["tokens"]["minus_isolated"]["cedar"]["tie"] is True


def test_a_party_far_from_pooled_training_is_counted() -> None:
    sentences = " ".join(meaning(results((3.9, 3.99, 3.9))))
    assert "birch +3.6 %" in sentences
    assert "1 of 3 did not get there" in sentences
    assert "did not get there" not in " ".join(meaning(results()))


def test_alone_is_also_measured_at_its_best_moment() -> None:
    base = results()
    early = Results(**{**vars(base), "best": {**base.best, "isolated": dict.fromkeys(PARTIES, (32, 3.8))}})
    assert any("best after round 32 (3.800, below the loss together)" in sentence for sentence in meaning(early))


def test_the_warning_names_what_hosts_can_read() -> None:
    text = " ".join(not_protected(results()))
    assert "does NOT keep the text from the other parties" in text
    assert "nearly all of them" in text


def test_the_warning_quotes_this_run_s_own_audit() -> None:
    found = Results(**{**vars(private_results()), "audit": findings()})
    text = " ".join(not_protected(found))
    for piece in (
        "in this run, 98.1 % of all tokens",
        "98.0 % of a simulated push of 1 record, 80.0 % of a simulated push of 4 records, 28.0 % of its own push of "
        "16 records",
        "read 17.1 % of places, the public model alone 17.0 % (difference +0.1 points",
        "at least 0.50; 8 is claimed, and these canaries could have shown at most 3.60",
    ):
        assert piece in text
    assert "nearly all of them" not in text
    assert found.as_json()["audit"]["tokens"]["recovery"] == 0.981


def test_the_page_leads_to_the_audit_s_page(tmp_path: Path) -> None:
    save_report(Results(**{**vars(results()), "audit": findings()}), b"", b"", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text("utf-8")
    assert '<a href="audit.html">' in page
    assert "one other party reads" in page


def test_without_a_federation_nothing_is_claimed() -> None:
    base = results()
    bare = Results(**{**vars(base), "arms": {k: v for k, v in base.arms.items() if k != "tokens"}, "wire": {}})
    assert "a comparison needs" in headline(bare)
    assert not_protected(bare) == []
    assert bare.as_json()["wire"] == {"payload_bytes": 0, "tensor_bytes": 0, "ratio": None, "arms": {}}
    assert len(tables(bare)) == 2


def test_the_json_has_the_agreed_shape() -> None:
    found = json.loads(json.dumps(results().as_json()))
    assert set(found) == {"coterie", "revision", "parties", "rounds", "arms", "wire", "memory"}
    assert found["parties"] == list(PARTIES)
    assert found["rounds"] == 48
    assert list(found["arms"]) == ["public", "isolated", "tokens", "centralised"]
    assert found["arms"]["tokens"]["loss"]["alder"] == pytest.approx(3.9, abs=0.05)
    moved = {"payload_bytes": 102_000_000, "tensor_bytes": 100_000_000, "ratio": 1.02}
    assert found["wire"] == {**moved, "arms": {"tokens": moved}}
    assert set(found["memory"]) == set(found["arms"])
    assert set(found["memory"]["tokens"]["birch"]) == {"model_state_bytes", "peak_rss_bytes"}


def test_tables_have_every_arm_and_party() -> None:
    losses, differences, privacy, memory, wire = tables(private_results())
    assert losses.columns == differences.columns == privacy.columns == ("", *PARTIES)
    assert [row[0] for row in losses.rows] == [row[0] for row in memory.rows] == [a.title for a in ARMS.values()]
    assert len(differences.rows) == 2 * 4
    assert re.fullmatch(r"\d\.\d{3} \(\d+\.\d\)", losses.rows[0][1])
    assert "370 MB" in memory.title
    assert wire.rows[0] == ("together, tokens", "102 MB", "100 MB", "1.020")


def test_the_page_opens_on_its_verdict_and_picture_and_needs_nothing_else(tmp_path: Path) -> None:
    wide, tall = draw(private_results()), draw(private_results(), tall=True)
    save_report(results(), wide, tall, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text("utf-8").replace("\xa0", " ")
    for png, upright in ((wide, False), (tall, True)):
        assert png.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", png[16:24])
        assert (height > width) == upright
        assert base64.b64encode(png).decode() in page
    verdict = headline(results()).replace("`tokens`", "<code>tokens</code>")
    assert page.index(verdict) < page.index("<table")
    assert page.index(verdict) < page.index("<picture") < page.index("What this does not protect")
    assert page.index("What this does not protect") < page.index("<table")
    assert "data:image/png;base64," in page
    assert not re.findall(r"(?:src|href)=[\"']?(?:https?:)?//", page)


def test_the_page_escapes_what_it_shows(tmp_path: Path) -> None:
    found = Results(**{**vars(results()), "subjects": dict.fromkeys(PARTIES, "<script>alert(1)</script>")})
    save_report(found, b"", b"", tmp_path / "report.html")
    assert "<script>" not in (tmp_path / "report.html").read_text("utf-8")


def test_a_plot_without_the_arm_alone_is_drawn_too() -> None:
    base = results()
    few = Results(**{**vars(base), "arms": {"tokens": base.arms["tokens"]}, "curves": {}, "best": {}})
    assert len(draw(few)) > 1000


def test_every_arm_has_a_look() -> None:
    assert set(COLOURS) == set(MARKERS) == set(ARMS)


def test_the_pooled_evaluation_is_shared_out_in_order(tmp_path: Path) -> None:
    whole = Evaluation(torch.arange(5, dtype=torch.float64), torch.tensor([1, 2, 3, 4, 5]))
    (tmp_path / "private").mkdir()
    whole.save(tmp_path / "private" / "evaluation.safetensors")
    figures = '{"model_state_bytes": 7, "peak_rss_bytes": 8}'
    (tmp_path / "private" / "result.json").write_text(figures, encoding="utf-8")
    shares = _shares(tmp_path, {"alder": 2, "birch": 3})
    assert shares["alder"].evaluation.tokens_S.tolist() == [1, 2]
    assert shares["birch"].evaluation.loss_S.tolist() == [2.0, 3.0, 4.0]


def test_the_mean_course_weighs_parties_by_their_text() -> None:
    each = {"alder": [(1, 4.0), (2, 3.0)], "birch": [(1, 2.0), (2, 1.0)]}
    assert _mean(each, {"alder": 30, "birch": 10}) == [(1, 3.5), (2, 2.5)]


def test_a_quick_demo_draws_no_conclusion_from_its_losses() -> None:
    base = results()
    quick = Results(**{**vars(base), "plan": make_plan(3, quick=True)})
    assert "say nothing about the losses" in headline(quick)
    assert not any("than alone" in sentence for sentence in meaning(quick))
