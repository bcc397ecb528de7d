"""What the closing screen, the page and the JSON say about given figures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from coterie.demonstration.plan import ARMS, make_plan
from coterie.demonstration.plot import COLOURS, MARKERS, save_plot
from coterie.demonstration.report import save_report
from coterie.demonstration.results import Figures, Results, Wire, _mean, _shares
from coterie.demonstration.verdict import headline, meaning, not_protected, tables
from coterie.training.evaluate import Evaluation

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
        best={arm: dict.fromkeys(PARTIES, (60, 4.0)) for arm in ("isolated", "tokens")},
        wire={"tokens": Wire(102_000_000, 100_000_000)},
    )


def test_better_for_all_is_said_in_one_sentence() -> None:
    assert headline(results()) == (
        "All 3 parties got a better model together than alone, within 3 % of pooling all text."
    )
    assert headline(results((3.9, 3.99, 3.9))) == "All 3 parties got a better model together than alone."


def test_a_worse_party_is_named_as_worse() -> None:
    found = results((3.9, 4.1, 3.9))
    assert headline(found) == "Together against alone: alder and cedar better; birch worse."
    assert any(sentence.startswith("birch is worse together than alone: 4.1") for sentence in meaning(found))


def test_a_difference_within_chance_is_a_tie() -> None:
    tied = results(cedar=noisy(4.0, 2))
    assert headline(tied) == "Together against alone: alder and birch better; cedar no different beyond chance."
    assert any(sentence.startswith("cedar ties with itself alone") for sentence in meaning(tied))
    assert tied.as_json()["arms"]["tokens"]["minus_isolated"]["cedar"]["tie"] is True


def test_a_party_far_from_pooled_training_is_counted() -> None:
    sentences = " ".join(meaning(results((3.9, 3.99, 3.9))))
    assert "birch +3.6 %" in sentences
    assert "1 of 3 did not get there" in sentences
    assert "did not get there" not in " ".join(meaning(results()))


def test_alone_is_also_measured_at_its_best_moment() -> None:
    base = results()
    early = Results(**{**vars(base), "best": {**base.best, "isolated": dict.fromkeys(PARTIES, (40, 3.8))}})
    assert any("best after round 40 (3.800, below the loss together)" in sentence for sentence in meaning(early))


def test_the_warning_names_what_hosts_can_read() -> None:
    text = " ".join(not_protected(results()))
    assert "does NOT keep the text from the other parties" in text
    assert "99.9 %" in text


def test_without_a_federation_nothing_is_claimed() -> None:
    base = results()
    bare = Results(**{**vars(base), "arms": {k: v for k, v in base.arms.items() if k != "tokens"}, "wire": {}})
    assert "needs both" in headline(bare)
    assert not_protected(bare) == []
    assert bare.as_json()["wire"] == {"payload_bytes": 0, "tensor_bytes": 0, "ratio": None}
    assert len(tables(bare)) == 2


def test_the_json_has_the_agreed_shape() -> None:
    found = json.loads(json.dumps(results().as_json()))
    assert set(found) == {"parties", "rounds", "arms", "wire", "memory"}
    assert found["parties"] == list(PARTIES)
    assert found["rounds"] == 60
    assert list(found["arms"]) == ["public", "isolated", "tokens", "centralised"]
    assert found["arms"]["tokens"]["loss"]["alder"] == pytest.approx(3.9, abs=0.05)
    assert found["wire"] == {"payload_bytes": 102_000_000, "tensor_bytes": 100_000_000, "ratio": 1.02}
    assert set(found["memory"]) == set(found["arms"])
    assert set(found["memory"]["tokens"]["birch"]) == {"model_state_bytes", "peak_rss_bytes"}


def test_tables_have_every_arm_and_party() -> None:
    losses, memory, wire = tables(results())
    assert losses.columns == ("", *PARTIES)
    assert [row[0] for row in losses.rows] == [arm.title for arm in ARMS.values()]
    assert re.fullmatch(r"\d\.\d{3} \(\d+\.\d\)", losses.rows[0][1])
    assert "370 MB" in memory.title
    assert wire.rows == (("together, tokens", "102 MB", "100 MB", "1.020"),)


def test_the_page_opens_on_its_verdict_and_needs_nothing_else(tmp_path: Path) -> None:
    save_plot(results(), tmp_path / "losses.png")
    save_report(results(), tmp_path / "losses.png", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text("utf-8")
    assert (tmp_path / "losses.png").read_bytes()[1:4] == b"PNG"
    assert page.index(headline(results())) < page.index("<table>")
    assert page.index("What this does not protect") < page.index("<table>")
    assert "data:image/png;base64," in page
    assert not re.findall(r"(?:src|href)=[\"']?(?:https?:)?//", page)


def test_the_page_escapes_what_it_shows(tmp_path: Path) -> None:
    found = Results(**{**vars(results()), "subjects": dict.fromkeys(PARTIES, "<script>alert(1)</script>")})
    (tmp_path / "p.png").write_bytes(b"")
    save_report(found, tmp_path / "p.png", tmp_path / "report.html")
    assert "<script>" not in (tmp_path / "report.html").read_text("utf-8")


def test_a_plot_without_the_arm_alone_is_drawn_too(tmp_path: Path) -> None:
    base = results()
    few = Results(**{**vars(base), "arms": {"tokens": base.arms["tokens"]}, "curves": {}, "best": {}})
    save_plot(few, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").stat().st_size > 1000


def test_every_arm_has_a_look() -> None:
    assert set(COLOURS) == set(MARKERS) == set(ARMS)


def test_the_pooled_evaluation_is_shared_out_in_order(tmp_path: Path) -> None:
    whole = Evaluation(torch.arange(5, dtype=torch.float64), torch.tensor([1, 2, 3, 4, 5]))
    whole.save(tmp_path / "evaluation.safetensors")
    (tmp_path / "result.json").write_text('{"model_state_bytes": 7, "peak_rss_bytes": 8}', encoding="utf-8")
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
