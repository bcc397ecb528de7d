"""`benchmarks/quality.py`: which jobs there are, where their text comes from, one of each kind run, and the page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import quality

    threads = torch.get_num_threads()
    yield quality
    torch.set_num_threads(threads)


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import quality_report

    return quality_report


def test_every_arm_runs_with_three_seeds_for_one_three_and_seven_parties_and_one_for_the_rest(
    quality: ModuleType,
) -> None:
    jobs = quality.jobs_of(quality.sizes_of(quick=False))
    keys = [job.key for job in jobs]
    assert len(set(keys)) == len(keys)
    seeds: dict[tuple[Any, ...], set[int]] = {}
    for job in jobs:
        seeds.setdefault((job.arm, job.parties, job.epsilon, job.split), set()).add(job.seed)
    for arm, epsilons in (("tokens", [None]), ("experts", [None, 8.0, 3.0]), ("centralised", [None, 8.0, 3.0])):
        for epsilon in epsilons:
            for parties in range(2, 8):
                expected = {0, 1, 2} if parties in (3, 7) else {0}
                assert seeds[arm, parties, epsilon, "domains"] == expected
    alone = {(job.party, job.seed, job.epsilon) for job in jobs if job.arm == "isolated" and job.split == "domains"}
    assert len(alone) == 7 * 3 * 3
    assert {job.split for job in jobs} == {"domains", "unequal", "iid", "scarce"}


def test_a_rerun_leaves_out_what_is_finished_and_repeats_a_line_that_was_cut_short(
    quality: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "jobs.jsonl"
    assert quality.finished(path) == set()
    path.write_text('{"key": "one"}\n{"key": "tw', encoding="utf-8")
    assert quality.finished(path) == {"one"}
    assert path.read_text("utf-8") == '{"key": "one"}\n'


def test_parties_alike_hold_the_same_text_as_parties_with_a_set_each(quality: ModuleType) -> None:
    from quality_text import Domain, dealt, shares

    domains = {name: Domain([f"{name} {number} " + "x" * 60 for number in range(9)], []) for name in ("one", "two")}
    own = shares(domains, dict.fromkeys(domains, 400))
    mixed = dealt(domains, 400)
    assert 400 - 40 < sum(map(len, own["one"])) <= 400
    assert sorted(text for texts in mixed.values() for text in texts) == sorted(own["one"] + own["two"])
    assert all(any(text.startswith(name) for text in mixed[party]) for party in mixed for name in domains)


def test_what_a_set_holds_out_is_never_trained_on(quality: ModuleType) -> None:
    from quality_text import data_folder, read_domains

    try:
        folder = data_folder()
    except FileNotFoundError:
        pytest.skip("the text sets are not here")
    for name, domain in read_domains(folder).items():
        assert domain.train, name
        assert domain.test, name
        assert not set(domain.train) & set(domain.test), name


@pytest.mark.slow
def test_one_job_of_each_kind_measures_every_domain_it_has(quality: ModuleType, tmp_path: Path) -> None:
    from coterie.demonstration.plan import make_plan
    from quality_jobs import Job, Worker
    from quality_text import DOMAINS, write_texts

    words = ["a", "small", "round", "of", "made", "up", "words", "about", "nothing"]
    texts = [" ".join(words[(i + j) % len(words)] for j in range(30)) for i in range(20)]
    write_texts(tmp_path / "text" / "public.jsonl", texts)
    for number, name in enumerate(DOMAINS):
        write_texts(tmp_path / "text" / "domains" / f"{name}.jsonl", texts[: 5 + number])
        write_texts(tmp_path / "text" / "test" / f"{name}.jsonl", texts[-1 - number :])
    plan = make_plan(3, quick=True)
    plan = replace(plan, rounds=2, eval_every=1, public_rounds=1, batch=2, vocab_size=300)
    plan = replace(plan, model={**plan.model, "num_hidden_layers": 1, "num_experts": 4})
    worker = Worker(tmp_path, quality.Sizes(plan))
    lines = {}
    together = ("tokens", "experts", "experts_own_trunks")
    for job in (
        Job("public", 0, 0), Job("isolated", 1, 0, party="gsm8k"), *(Job(arm, 2, 0) for arm in together),
    ):  # fmt: skip
        (tmp_path / job.key).mkdir()
        lines[job.arm] = worker.run(job, tmp_path / job.key)
    assert set(lines["public"]["loss"]) == set(DOMAINS)
    assert set(lines["isolated"]["loss"]) == {"gsm8k"}
    for arm in together:
        assert set(lines[arm]["loss"]) == set(DOMAINS[:2])
        rounds, losses, seconds = zip(*lines[arm]["curve"], strict=True)
        assert rounds == (1, 2)
        assert losses[-1] == pytest.approx(sum(lines[arm]["loss"].values()) / 2, abs=1e-4)
        assert seconds[1] > seconds[0] >= 0
        assert lines[arm]["loss"] != {name: lines["public"]["loss"][name] for name in DOMAINS[:2]}


def test_an_interval_over_three_seeds_is_students(report: ModuleType) -> None:
    estimate = report.Estimate.of([1.0, 2.0, 3.0])
    # t(0.975, 2) is 4.3027 in tables; the standard error is 1 / sqrt(3)
    assert estimate.half == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    assert report.Estimate.of([2.0]).text() == "2.000"
    assert not estimate.beyond_chance
    assert report.Estimate.of([1.0, 1.1, 1.2]).beyond_chance


def test_a_way_of_one_seed_has_no_row_of_other_seeds(report: ModuleType) -> None:
    """All text in one place is the same for parties alike and unlike, and has the seeds of both."""
    one_place = {0: {"one": 3.0}, 1: {"one": 2.0}}
    assert report._of_seeds(one_place, {0: {"one": 3.5}}) == [{"one": 3.0}]  # noqa: SLF001
    assert report._of_seeds(one_place, {}) == []  # noqa: SLF001


def test_who_alone_was_best_before_the_last_round_is_compared_at_that(
    report: ModuleType, quality: ModuleType, tmp_path: Path
) -> None:
    folder = written(tmp_path, quality, {"isolated": 3.0, "tokens": 2.9})
    lines = [json.loads(line) for line in (folder / "jobs.jsonl").read_text("utf-8").splitlines()]
    for row in lines:
        row["curve"] = (
            [[6, 2.5, 1.0], [12, 3.0, 2.0]] if row["arm"] == "isolated" else [[6, 2.8, 1.0], [12, 2.6, 2.0]]
        )
    (folder / "jobs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    (said,) = report._best_rounds(report.Jobs(folder), 3, "domains")  # noqa: SLF001
    assert said.endswith("each party alone 2.500 (round 6), together, `tokens` 2.600 (round 12).")
    for row in lines:
        row["curve"] = [[6, 3.0, 1.0], [12, 2.5, 2.0]]
    (folder / "jobs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    assert report._best_rounds(report.Jobs(folder), 3, "domains") == []  # noqa: SLF001


def written(folder: Path, quality: ModuleType, losses: dict[str, float]) -> Path:
    """Figures of three parties: their arm and how far it is from the public loss of 4."""
    names = ("one", "two", "three")
    rows = [{"key": "public", "arm": "public", "parties": 0, "loss": dict.fromkeys(names, 4.0)}]
    rows += [
        {"key": f"isolated-{name}", "arm": "isolated", "parties": 1, "loss": {name: losses["isolated"]}}
        for name in names
    ]
    rows += [
        {"key": arm, "arm": arm, "parties": 3, "loss": dict.fromkeys(names, loss)}
        for arm, loss in losses.items()
        if arm != "isolated"
    ]
    common = {"seed": 0, "epsilon": None, "split": "domains", "curve": [[1, 3.0, 2.0]]}
    lines = [json.dumps({**common, **row}) + "\n" for row in rows]
    (folder / "jobs.jsonl").write_text("".join(lines), encoding="utf-8")
    about = {"quick": False, "sizes": quality.sizes_of(quick=False).as_json(), "coterie": "1"}
    machine = {"cores": 2, "processor": "a processor", "python": "3", "torch": "2"}
    about |= {"jobs": [*(str(row["key"]) for row in rows), "tokens-7"], "machine": machine}
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")
    return folder


def test_the_page_says_what_holds_what_does_not_and_what_is_missing(
    quality: ModuleType, report: ModuleType, tmp_path: Path
) -> None:
    losses = {"isolated": 3.5, "tokens": 3.4, "experts_own_trunks": 3.36, "experts": 3.6, "centralised": 3.2}
    text = report.page(report.Jobs(written(tmp_path, quality, losses)))
    assert "`tokens` within 3 % of one place: on 0 of 3 domains; at worst 6.2 % behind, on `one`." in text
    assert "`tokens` better than alone: on 3 of 3 domains; one seed." in text
    assert "`experts` equal to one place: furthest away +12.50 %, on `one`." in text
    assert "`experts` better than alone: on 0 of 3 domains; not on `one` (+0.100)" in text
    assert "| together, `tokens` | 3.400 | 3.400 | 3.400 |" in text
    assert "| together, `tokens` | +0.100 |" in text  # gain of three parties
    assert "private trunks +5.00 % (`experts` with private" in text
    assert "the exchange itself +1.19 % (`tokens` beside that)" in text
    assert "**8 of 9 jobs are finished**" in text
    assert "- `tokens-7`" in text
    assert "Commonsense" not in text


def test_commonsense_answers_stand_beside_guessing(quality: ModuleType, report: ModuleType, tmp_path: Path) -> None:
    folder = written(tmp_path, quality, {"isolated": 3.5, "centralised": 3.2})
    row = {"task": "boolq", "questions": 500, "normalised": None, "guessing": 0.62, "luck": 0.043}
    answers = {
        "public": [{**row, "accuracy": 0.61, "better_than_guessing": False}],
        "centralised": [{**row, "accuracy": 0.67, "better_than_guessing": True}],
    }
    (folder / "commonsense.json").write_text(json.dumps(answers), encoding="utf-8")
    report.write(folder, tmp_path / "docs")
    text = (tmp_path / "docs" / "evidence.md").read_text("utf-8")
    assert "| public model | 0.610 |" in text
    assert "| guessing | 0.620 ± 0.043 |" in text
    assert "Better than guessing: all text in one place on `boolq`" in text
    assert (tmp_path / "docs" / "evidence" / "commonsense.json").is_file()


def test_pictures_are_the_same_bytes_for_the_same_figures(
    quality: ModuleType, report: ModuleType, tmp_path: Path
) -> None:
    losses = {"isolated": 3.5, "tokens": 3.4, "centralised": 3.2}
    jobs = report.Jobs(written(tmp_path, quality, losses))
    drawn = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        report.draw(jobs, tmp_path / name)
        drawn.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert set(drawn[0]) == {"losses-3.svg", "gain.svg", "course.svg"}
    assert drawn[0] == drawn[1]
