"""`docs/evidence.md` and its pictures from what `quality.py` left.

    python benchmarks/quality_report.py quality --out docs    # also copies the figures to docs/evidence
    python benchmarks/quality_report.py docs/evidence --out docs

No figure of that page is typed by hand. An interval is Student's over seeds, 95 %; a figure without one has one seed.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from scipy.stats import t as student

from coterie.training.tasks.questions import SETS

FILES = ("jobs.jsonl", "about.json")
ANSWERS = "commonsense.json"
"""Left by `quality_tasks.py`; the page says so where it is missing."""
TITLES = {
    "public": "public model",
    "isolated": "each party alone",
    "tokens": "together, `tokens`",
    "experts_own_trunks": "together, `experts`, private trunks",
    "experts": "together, `experts`",
    "centralised": "all text in one place",
}
WAYS = {
    "domains": "{parties} parties, each with a set of its own",
    "iid": "{parties} parties alike, the same text dealt out evenly, all measured on every set",
    "scarce": "{parties} parties with {scarce} kB of a set of its own each, read several times over",
    "unequal": "{parties} parties with a set of its own each, every further one with 0.6 times as much text",
}
"""How text is dealt out."""
COLOURS = {
    "public": "#9a9a9a",
    "isolated": "#d1495b",
    "tokens": "#2e6f95",
    "experts_own_trunks": "#8e6cae",
    "experts": "#3a9d6b",
    "centralised": "#3c3c3c",
}
MARKERS = {
    "public": "s",
    "isolated": "o",
    "tokens": "D",
    "experts_own_trunks": "P",
    "experts": "v",
    "centralised": "^",
}
LEVEL = 0.95

Losses = Mapping[str, float]
"""Domain to nats per token."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds; ``half`` is half its interval's width, None for one seed."""

    mean: float
    half: float | None
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        count, mean = len(values), sum(values) / len(values)
        if count == 1:
            return cls(mean, None, 1)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
        return cls(mean, float(student.ppf((1 + LEVEL) / 2, count - 1)) * deviation / math.sqrt(count), count)

    def text(self, form: str = ".3f") -> str:
        return f"{self.mean:{form}}" + ("" if self.half is None else f" ± {self.half:{form.lstrip('+')}}")

    @property
    def beyond_chance(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.half is not None and abs(self.mean) > self.half


class Jobs:
    """Finished jobs, as `quality.py` wrote them down."""

    def __init__(self, folder: Path) -> None:
        self.about: dict[str, Any] = json.loads((folder / "about.json").read_text("utf-8"))
        lines = (folder / "jobs.jsonl").read_text("utf-8").splitlines()
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
        answers = folder / ANSWERS
        self.answers: dict[str, list[dict[str, Any]]] = (
            json.loads(answers.read_text("utf-8")) if answers.exists() else {}
        )

    @property
    def domains(self) -> tuple[str, ...]:
        """In the order in which parties join."""
        public = next(row for row in self.rows if row["arm"] == "public")
        return tuple(public["loss"])

    @property
    def missing(self) -> list[str]:
        done = {row["key"] for row in self.rows}
        return [key for key in self.about["jobs"] if key not in done]

    def losses(
        self, arm: str, parties: int, epsilon: float | None = None, split: str = "domains"
    ) -> dict[int, Losses]:
        """Seed to the losses of the first so many domains; seeds of which a part is missing are left out."""
        if split == "iid" and arm == "centralised":  # the same text in one place, however it is dealt out
            split = "domains"
        wanted = self.domains if split == "iid" else self.domains[:parties]
        found: dict[int, dict[str, list[float]]] = {}
        if parties > len(self.domains):
            return {}
        for row in self.rows:
            if row["arm"] != arm or row["epsilon"] != epsilon:
                continue
            if arm != "public" and row["split"] != split:
                continue
            if arm not in ("public", "isolated") and row["parties"] != parties:
                continue
            for name, loss in row["loss"].items():
                found.setdefault(row["seed"], {}).setdefault(name, []).append(loss)
        whole = {seed: losses for seed, losses in found.items() if set(wanted) <= set(losses)}
        if arm == "isolated" and split == "iid":  # one run a party, each measured on every domain
            whole = {seed: losses for seed, losses in whole.items() if len(losses[wanted[0]]) == parties}
        return {
            seed: {name: sum(losses[name]) / len(losses[name]) for name in wanted} for seed, losses in whole.items()
        }

    def by_domain(
        self, arm: str, parties: int, epsilon: float | None = None, split: str = "domains"
    ) -> list[Estimate]:
        """An estimate for each domain; empty where the arm was not run."""
        return _columns(list(self.losses(arm, parties, epsilon, split).values()))

    def against(
        self,
        arm: str,
        other: str,
        parties: int,
        epsilon: float | None = None,
        *,
        split: str = "domains",
        compare: Callable[[float, float], float] = lambda ours, theirs: ours - theirs,
    ) -> list[Estimate]:
        """An arm beside another of the same seed, for each domain."""
        ours, theirs = (self.losses(name, parties, epsilon, split) for name in (arm, other))
        return _columns(
            [
                {name: compare(ours[seed][name], theirs[seed][name]) for name in ours[seed]}
                for seed in sorted(ours.keys() & theirs.keys())
            ]
        )

    def gain(self, arm: str, parties: int, epsilon: float | None = None) -> Estimate | None:
        """How much lower than alone, mean over the parties' domains."""
        ours, alone = self.losses(arm, parties, epsilon), self.losses("isolated", parties, epsilon)
        means = [_mean(alone[seed]) - _mean(ours[seed]) for seed in sorted(ours.keys() & alone.keys())]
        return Estimate.of(means) if means else None


def _columns(seeds: Sequence[Losses]) -> list[Estimate]:
    return [Estimate.of([losses[name] for losses in seeds]) for name in seeds[0]] if seeds else []


def _of_seeds(found: Mapping[int, Losses], those: Mapping[int, Losses]) -> list[Losses]:
    """An arm that other ways of dealing share has seeds that this way may not have."""
    return [losses for seed, losses in found.items() if seed in those]


def _mean(losses: Losses) -> float:
    return sum(losses.values()) / len(losses)


# ---- the page ----


def page(jobs: Jobs) -> str:
    """The text of evidence.md."""
    parts = [_head(jobs), _claims(jobs), _losses(jobs, 7), _losses(jobs, 3), _budgets(jobs), _further(jobs)]
    parts += [_course(jobs), _other_shares(jobs), _commonsense(jobs), _limits(jobs)]
    return "\n".join(part for part in parts if part)


def _head(jobs: Jobs) -> str:
    about = jobs.about
    sizes, machine = about["sizes"], about["machine"]
    done, all_jobs = len(jobs.rows), len(about["jobs"])
    quick = "**These are figures of `--quick`: they show that every step works, and nothing else.**\n\n"
    state = (
        "Every job is finished."
        if not jobs.missing
        else f"**{done} of {all_jobs} jobs are finished**; what is missing stands [at the end](#what-is-missing)."
    )
    sets = ", ".join(f"`{name}`" for name in jobs.domains)
    return f"""# Evidence

Seven public text sets play seven parties' private domains: what does training together give, what does it cost to
keep a budget, and does it come near having all text in one place? `benchmarks/quality_report.py` writes this page
from `docs/evidence/jobs.jsonl`, which `benchmarks/quality.py` leaves; no figure is typed by hand.

{quick if about["quick"] else ""}{state}

Measured on {machine["cores"]} cores of {machine["processor"]}, Python {machine["python"]}, torch {machine["torch"]},
coterie {about["coterie"]}. The machine was not idle: seconds are rough.

- **Parties**, in the order in which they join: {sets}.
  Each holds {sizes["text"] // 1000} kB of its set to train on and is measured on {sizes["held_out"] // 1000} kB held
  out.
- **Model**: {sizes["family"]}, {sizes["model"]["num_hidden_layers"]} layers of width {sizes["model"]["hidden_size"]},
  {sizes["model"]["num_experts"]} experts of which {sizes["model"]["num_experts_per_tok"]} are chosen, and
  {sizes["vocabulary"]} tokens. Everybody starts from one public checkpoint, one for each seed, trained for
  {sizes["public_rounds"]} rounds on documentation of Python's library and questions of the commonsense sets; its
  tokenizer is from that text.
- **Without privacy**: {sizes["rounds"]} rounds of {sizes["batch"]} sequences of {sizes["sequence_length"]} tokens for
  each party. **With a budget**: {sizes["private_rounds"]} rounds of lots of {sizes["lot_size"]} for each party, delta
  {sizes["delta"]:g}. A record is one sequence: a piece of a longer document. Settings are the demo's; nothing was
  tuned on these sets.{_isolation(jobs)}
- **Together** runs the project's coordinator, rounds and exchanges, with parties as threads of one process. `tokens`
  has private trunks, `experts` a shared one. *In one place* takes as many sequences a round as all parties together.
- `±` is half a 95 % interval over up to {len(sizes["seeds"])} seeds (Student's: wide); a figure without it has one,
  and may stand beside means over several. What is said of two arms compares them seed by seed.
"""


def _isolation(jobs: Jobs) -> str:
    """Which private federations added records up in floating point: rows from before this was settled say nothing."""
    private = [row for row in jobs.rows if row["arm"] == "experts" and row["epsilon"] is not None]
    exact = [f"`{row['key']}`" for row in private if row.get("isolation") is None]
    if len(exact) == len(private):
        return ""
    rest = f", but {', '.join(exact)} with `exact`" if exact else ""
    return f" Private federations ran with `isolation: fast`{rest}: the same sums up to rounding."


def _claims(jobs: Jobs) -> str:
    lines = ["## What was claimed, and what came out\n"]
    for parties, split in ((7, "domains"), (3, "domains"), (7, "iid"), (7, "scarce"), (7, "unequal")):
        found = _verdicts(jobs, parties, split)
        if found or split == "domains":
            title = WAYS[split].format(parties=parties, scarce=jobs.about["sizes"]["scarce"] // 1000)
            lines += [f"{title}:\n", *(f"- {line}" for line in found or ["not run yet."]), ""]
    return "\n".join(lines)


def _verdicts(jobs: Jobs, parties: int, split: str) -> list[str]:
    found = _within(jobs, parties, split)
    found += _what_costs(jobs, parties, split)
    found += _lower(jobs, "tokens", parties, None, split)
    found += _equal(jobs, parties, split)
    if split == "unequal" and found:
        found.append(
            "In one place a sequence is drawn from all text, so who has more of it counts more; together every party "
            "counts alike."
        )
    found += _lower(jobs, "experts", parties, None, split)
    found += _interference(jobs, parties) if split == "domains" else []
    found += _best_rounds(jobs, parties, split)
    for epsilon in jobs.about["sizes"]["epsilons"]:
        found += _lower(jobs, "experts", parties, epsilon, split)
    return found


def _within(jobs: Jobs, parties: int, split: str = "domains") -> list[str]:
    """One sentence: how far `tokens` is behind all text in one place."""
    behind = jobs.against("tokens", "centralised", parties, split=split, compare=_percent)
    if not behind:
        return []
    worst = max(range(len(behind)), key=lambda i: behind[i].mean)
    within = sum(estimate.mean <= 3 for estimate in behind)
    return [
        f"`tokens` within 3 % of one place: on {within} of {len(behind)} domains; {_worst(behind[worst])}, on "
        f"`{jobs.domains[worst]}`."
    ]


def _equal(jobs: Jobs, parties: int, split: str = "domains") -> list[str]:
    """One sentence: where `experts` is furthest from all text in one place."""
    equal = jobs.against("experts", "centralised", parties, split=split, compare=_percent)
    if not equal:
        return []
    furthest = max(range(len(equal)), key=lambda i: abs(equal[i].mean))
    away = equal[furthest].text("+.2f")
    return [f"`experts` equal to one place: furthest away {away} %, on `{jobs.domains[furthest]}`."]


def _percent(ours: float, theirs: float) -> float:
    return 100 * (ours / theirs - 1)


def _worst(furthest: Estimate) -> str:
    if furthest.mean > 0:
        return f"at worst {furthest.text('.1f')} % behind"
    return f"at the least {Estimate(-furthest.mean, furthest.half, furthest.seeds).text('.1f')} % ahead"


def _what_costs(jobs: Jobs, parties: int, split: str = "domains") -> list[str]:
    """Whether a private trunk or the exchange is what lies between `tokens` and one place, mean over domains."""
    arms = ("tokens", "experts_own_trunks", "centralised")
    losses = [jobs.losses(arm, parties, split=split) for arm in arms]
    seeds = sorted(set.intersection(*(set(some) for some in losses)))
    if not seeds:
        return []
    tokens, own_trunks, one_place = ([_mean(some[seed]) for seed in seeds] for some in losses)
    trunk = Estimate.of([100 * (ours / theirs - 1) for ours, theirs in zip(own_trunks, one_place, strict=True)])
    exchange = Estimate.of([100 * (ours / theirs - 1) for ours, theirs in zip(tokens, own_trunks, strict=True)])
    return [
        f"What costs `tokens` that, on the mean over domains: private trunks {trunk.text('+.2f')} % (`experts` with "
        f"private trunks beside one place), the exchange itself {exchange.text('+.2f')} % (`tokens` beside that)."
    ]


def _interference(jobs: Jobs, parties: int) -> list[str]:
    """What it means where all text in one place is worse than each domain alone."""
    differences = jobs.against("centralised", "isolated", parties)
    worse = sum(d.mean > 0 for d in differences)
    if not worse:
        return []
    sizes = jobs.about["sizes"]
    tokens = sizes["rounds"] * sizes["batch"] * sizes["sequence_length"]
    return [
        f"All text in one place is itself worse than each party alone on {worse} of {len(differences)} domains: so "
        "unlike are these domains, and no exchange can be held to more. Alone, every step of this small model serves "
        f"one domain; and {tokens // 1000},000 tokens of training do not use up the {sizes['text'] // 1000} kB of a "
        "party, so nobody lacks text. Who has enough text of a kind that nobody else has gains nothing from training "
        "together."
    ]


def _best_rounds(jobs: Jobs, parties: int, split: str) -> list[str]:
    """What a comparison after the last round hides where whoever trains alone had learnt most before it."""
    seed = jobs.about["sizes"]["seeds"][0]
    arms = ("isolated", "tokens", "experts", "centralised")
    courses = {arm: course for arm in arms if (course := _course_of(jobs, arm, parties, seed, None, split))}
    best = {arm: min(course, key=lambda point: point[1]) for arm, course in courses.items()}
    if "isolated" not in best or best["isolated"][0] == courses["isolated"][-1][0]:
        return []
    each = ", ".join(f"{TITLES[arm]} {loss:.3f} (round {number})" for arm, (number, loss, _) in best.items())
    return [
        "Alone, parties had learnt most before the last round, and learnt their text by heart then. Each at the "
        f"round at which it was best, mean over domains, one seed: {each}."
    ]


def _lower(jobs: Jobs, arm: str, parties: int, epsilon: float | None, split: str = "domains") -> list[str]:
    """One sentence: on how many domains an arm is better than its party alone."""
    differences = jobs.against(arm, "isolated", parties, epsilon, split=split)
    if not differences:
        return []
    budget = "" if epsilon is None else f" at epsilon {epsilon:g}"
    better = [d.mean < 0 for d in differences]
    worse = [
        f"`{name}` ({d.text('+.3f')})" for name, d in zip(jobs.domains, differences, strict=False) if d.mean >= 0
    ]
    sure = sum(d.beyond_chance and d.mean < 0 for d in differences)
    seeds = differences[0].seeds
    chance = f"; beyond chance, over {seeds} seeds, on {sure}" if seeds > 1 else "; one seed"
    rest = f"; not on {', '.join(worse)}" if worse else ""
    return [f"`{arm}`{budget} better than alone: on {sum(better)} of {len(better)} domains{rest}{chance}."]


def _losses(jobs: Jobs, parties: int) -> str:
    rows = [(TITLES[arm], estimates) for arm in TITLES if (estimates := jobs.by_domain(arm, parties))]
    if len(rows) < 2:
        return ""
    picture = f"![held-out losses, {parties} parties](evidence/losses-{parties}.svg)\n"
    return f"## {parties} parties, without privacy\n\nHeld-out loss, nats per token; lower is better.\n\n" + (
        _table(jobs.domains[:parties], rows) + "\n" + picture
    )


def _budgets(jobs: Jobs) -> str:
    parts = ["## Under a budget\n\nEvery record of every party within epsilon, in each row.\n"]
    for parties in (7, 3):
        rows = [("public model", jobs.by_domain("public", parties))] + [
            (f"{TITLES[arm]}, epsilon {epsilon:g}", estimates)
            for epsilon in jobs.about["sizes"]["epsilons"]
            for arm in ("isolated", "experts", "centralised")
            if (estimates := jobs.by_domain(arm, parties, epsilon))
        ]
        if len(rows) > 1:
            parts.append(f"{parties} parties:\n\n{_table(jobs.domains[:parties], rows)}")
    noise = _noise(jobs)
    return "\n".join(parts) + noise if len(parts) > 1 else ""


def _noise(jobs: Jobs) -> str:
    spent = [
        (row["epsilon"], facts["epsilon"], facts["noise_multiplier"])
        for row in jobs.rows
        for facts in row.get("spent", {}).values()
    ]
    lines = []
    for epsilon in jobs.about["sizes"]["epsilons"]:
        of_it = [row for row in spent if row[0] == epsilon]
        if of_it:
            most, noises = max(row[1] for row in of_it), [row[2] for row in of_it]
            lines.append(
                f"- epsilon {epsilon:g}: {len(of_it)} ledgers, at most {most:.3f} spent in one run; noise multiplier "
                f"{min(noises):.2f} to {max(noises):.2f}."
            )
    return "\nWhat the ledgers say:\n\n" + "\n".join(lines) + "\n" if lines else ""


def _further(jobs: Jobs) -> str:
    counts = sorted({row["parties"] for row in jobs.rows if row["parties"] > 1})
    arms: list[tuple[str, float | None]] = [("tokens", None), ("experts", None), ("centralised", None)]
    arms += [(arm, epsilon) for epsilon in jobs.about["sizes"]["epsilons"] for arm in ("experts", "centralised")]
    rows = []
    for arm, epsilon in arms:
        gains = [jobs.gain(arm, count, epsilon) for count in counts]
        if any(gains):
            rows.append((_named(arm, epsilon), [gain.text("+.3f") if gain else "" for gain in gains]))
    if not rows:
        return ""
    head = [f"{count} parties" for count in counts]
    return (
        "## What each further party brings\n\nNats per token below each party alone, mean over the parties that take "
        "part (so later columns average more domains).\n\n"
        + _plain_table(head, rows)
        + "\n![gain by number of parties](evidence/gain.svg)\n"
    )


def _named(arm: str, epsilon: float | None) -> str:
    return TITLES[arm] + ("" if epsilon is None else f", epsilon {epsilon:g}")


def _course(jobs: Jobs) -> str:
    if not any(row["curve"] for row in jobs.rows if row["parties"] > 1):
        return ""
    return (
        "## Over rounds and seconds\n\n![loss over rounds and seconds](evidence/course.svg)\n\n"
        "Seconds are those of rounds on a machine that did other things besides; parties of a federation share one "
        "process here, so its seconds are about those of all parties one after the other.\n"
    )


def _other_shares(jobs: Jobs) -> str:
    parts = []
    for split in ("iid", "scarce", "unequal"):
        rows = [
            (_named(arm, epsilon), _columns(ours))
            for epsilon in (None, *jobs.about["sizes"]["epsilons"])
            for arm in ("isolated", "tokens", "experts_own_trunks", "experts", "centralised")
            if (ours := _of_seeds(jobs.losses(arm, 7, epsilon, split), jobs.losses("isolated", 7, epsilon, split)))
        ]
        if len(rows) > 1:
            title = WAYS[split].format(parties=7, scarce=jobs.about["sizes"]["scarce"] // 1000)
            parts.append(f"{title}:\n\n{_table(jobs.domains, rows)}")
    return "## Text dealt out in other ways\n\n" + "\n".join(parts) if parts else ""


def _commonsense(jobs: Jobs) -> str:
    if not jobs.answers:
        return ""
    some = next(iter(jobs.answers.values()))
    rows = [
        (TITLES[arm], [f"{max(one['accuracy'], one['normalised'] or 0.0):.3f}" for one in answers])
        for arm, answers in jobs.answers.items()
    ]
    rows.append(("guessing", [f"{one['guessing']:.3f} ± {one['luck']:.3f}" for one in some]))
    better = {
        (TITLES[arm], one["task"])
        for arm, answers in jobs.answers.items()
        for one in answers
        if one["better_than_guessing"]
    }
    verdict = (
        "Better than guessing: " + ", ".join(f"{title} on `{task}`" for title, task in sorted(better))
        if better
        else "No model is better than guessing on any set: it is too small for these questions, and its losses above "
        "say what it learnt"
    )
    asked = " or ".join(str(count) for count in sorted({one["questions"] for one in some}))
    missing = [f"`{task}`" for task in SETS if task not in {one["task"] for one in some}]
    left_out = (
        f" Not asked: {', '.join(missing)}, some of whose choices are longer than the "
        f"{jobs.about['sizes']['sequence_length']} tokens that the model reads."
        if missing
        else ""
    )
    return (
        "## Commonsense questions\n\nShare of right answers by lm-eval, the better of plain and by byte, of the "
        f"first {asked} questions of each set, without privacy. *Guessing*: the better of two guessers who never"
        " read a question, and how far luck takes one 95 times of 100.\n\n"
        + _plain_table([f"`{one['task']}`" for one in some], rows)
        + f"\n{verdict}.{left_out}\n"
    )


def _limits(jobs: Jobs) -> str:
    missing = jobs.missing
    lines = "\n".join(f"- `{key}`" for key in missing)
    left = (
        f"{len(missing)} jobs; `benchmarks/quality.py` goes on with them:\n\n{lines}\n" if missing else "Nothing.\n"
    )
    return f"""## What this does not show

The model has 2 million parameters and starts from little public text: what large models gain may differ. All text
is public, and one set may repeat what another says.

## What is missing

{left}"""


def _table(names: Iterable[str], rows: Iterable[tuple[str, Sequence[Estimate]]]) -> str:
    return _plain_table(list(names), [(title, [estimate.text() for estimate in row]) for title, row in rows])


def _plain_table(head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    lines = [f"| | {' | '.join(head)} |", f"|---|{'---|' * len(head)}"]
    return "\n".join([*lines, *(f"| {title} | {' | '.join(cells)} |" for title, cells in rows)]) + "\n"


# ---- the pictures ----


def draw(jobs: Jobs, folder: Path) -> None:
    """Write the pictures as SVG, the same bytes for the same figures."""
    plt.rcParams.update({"svg.hashsalt": "coterie", "svg.fonttype": "none", "font.size": 9})
    for parties in (7, 3):
        _draw_losses(jobs, parties, folder / f"losses-{parties}.svg")
    _draw_gain(jobs, folder / "gain.svg")
    _draw_course(jobs, folder / "course.svg")


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _dress(axes: Axes, title: str, y: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_ylabel(y)
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_losses(jobs: Jobs, parties: int, path: Path) -> None:
    arms = [arm for arm in TITLES if arm != "public" and jobs.by_domain(arm, parties)]
    if not arms:
        return
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    for number, arm in enumerate(arms):
        estimates = jobs.against(arm, "public", parties)
        at = [column + (number - (len(arms) - 1) / 2) * 0.15 for column in range(parties)]
        means, halves = [e.mean for e in estimates], [e.half or 0.0 for e in estimates]
        axes.errorbar(at, means, halves, fmt=MARKERS[arm], color=COLOURS[arm], capsize=3, label=_label(arm))
    axes.set_xticks(range(parties), jobs.domains[:parties])
    axes.legend(frameon=False, fontsize=8)
    _dress(axes, f"{parties} parties, without privacy: difference from the public model", "nats per token")
    _save(figure, path)


def _label(arm: str) -> str:
    return TITLES[arm].replace("`", "")


def _draw_gain(jobs: Jobs, path: Path) -> None:
    budgets: list[float | None] = [None, *jobs.about["sizes"]["epsilons"]]
    counts = sorted({row["parties"] for row in jobs.rows if row["parties"] > 1})
    figure, panels = plt.subplots(1, len(budgets), figsize=(3.4 * len(budgets), 3.2), layout="constrained")
    for axes, epsilon in zip(panels, budgets, strict=True):
        for arm in ("tokens", "experts", "centralised"):
            points = [(count, gain) for count in counts if (gain := jobs.gain(arm, count, epsilon)) is not None]
            if points:
                axes.errorbar(
                    [1, *(count for count, _ in points)],
                    [0.0, *(gain.mean for _, gain in points)],
                    [0.0, *(gain.half or 0.0 for _, gain in points)],
                    marker=MARKERS[arm], color=COLOURS[arm], capsize=3, label=_label(arm),
                )  # fmt: skip
        axes.set_xlabel("parties")
        axes.axhline(0, color=COLOURS["isolated"], linewidth=1)
        _dress(axes, "without privacy" if epsilon is None else f"epsilon {epsilon:g}", "nats below alone")
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


def _draw_course(jobs: Jobs, path: Path) -> None:
    """The most parties that were run, the first seed."""
    seed = jobs.about["sizes"]["seeds"][0]
    most = max((row["parties"] for row in jobs.rows if row["curve"]), default=0)
    if most < 2:
        return
    budgets: list[float | None] = [None, *jobs.about["sizes"]["epsilons"][:1]]
    figure, panels = plt.subplots(len(budgets), 2, figsize=(9, 3 * len(budgets)), layout="constrained", squeeze=False)
    start = _mean(jobs.losses("public", most)[seed])
    for (by_round, by_second), epsilon in zip(panels, budgets, strict=True):
        for arm in ("isolated", "tokens", "experts", "centralised"):
            course = _course_of(jobs, arm, most, seed, epsilon)
            if not course:
                continue
            points = [(0, start, 0.0), *(point for point in course if point[0] > 0)]
            rounds, losses, seconds = zip(*points, strict=True)
            how = {"marker": MARKERS[arm], "color": COLOURS[arm], "markersize": 4, "label": _label(arm)}
            by_round.plot(rounds, losses, **how)
            by_second.plot(seconds, losses, **how)
        budget = "without privacy" if epsilon is None else f"epsilon {epsilon:g}"
        for axes, name in ((by_round, "round"), (by_second, "seconds")):
            axes.set_xlabel(name)
            _dress(axes, f"{most} parties, {budget}", "nats per token")
        if by_round.get_legend_handles_labels()[1]:
            by_round.legend(frameon=False, fontsize=8)
    _save(figure, path)


def _course_of(
    jobs: Jobs, arm: str, parties: int, seed: int, epsilon: float | None, split: str = "domains"
) -> list[tuple[int, float, float]]:
    rows = [
        row
        for row in jobs.rows
        if (row["arm"], row["seed"], row["epsilon"], row["split"]) == (arm, seed, epsilon, split)
        and (arm == "isolated" or row["parties"] == parties)
    ]
    if len(rows) < (parties if arm == "isolated" else 1):
        return []
    return [
        (points[0][0], sum(point[1] for point in points) / len(points), sum(point[2] for point in points))
        for points in zip(*(row["curve"] for row in rows), strict=True)
    ]


def write(folder: Path, docs: Path) -> None:
    """Write the page, its pictures and its figures below ``docs``."""
    beside = docs / "evidence"
    beside.mkdir(parents=True, exist_ok=True)
    if folder.resolve() != beside.resolve():
        for name in (*FILES, *([ANSWERS] if (folder / ANSWERS).exists() else [])):
            shutil.copyfile(folder / name, beside / name)
    jobs = Jobs(folder)
    draw(jobs, beside)
    (docs / "evidence.md").write_text(page(jobs), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    write(asked.folder, asked.out)


if __name__ == "__main__":
    main()
