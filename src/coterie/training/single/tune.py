"""Private tuning: a few settings are tried, and the best goes on to a whole run, all within one budget.

Every trial is a private run of its own, counted in the ledger like any other. All of them and the last run take the
same noise multiplier, the one at which their rounds together cost the budget; so what the ledger adds up in the end
is the budget, and not one epsilon a trial. The choice looks at public text, since a loss on private text would tell
of it without noise.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from coterie.config import TrainConfig
from coterie.config.base import content_hash
from coterie.config.load import value_of
from coterie.dp.accounting.accountant import epsilon, needed_noise
from coterie.dp.accounting.budget import Budget
from coterie.dp.accounting.digits import epsilon_digits
from coterie.dp.private_data import PrivateData
from coterie.errors import ConfigError, RoundError
from coterie.models.zoo.build import build_model
from coterie.storage import json_object, write_json
from coterie.training.data.documents import read_documents
from coterie.training.data.public_text import check_not_private, read_public
from coterie.training.data.tokenizer import get_tokenizer, tokenize
from coterie.training.single.prepared import MARKER, read_run, run_id
from coterie.training.single.run import RunResult
from coterie.training.single.setup import plan_of, with_vocabulary
from coterie.training.single.trained import evaluate_run, load_trained

MAY_DIFFER = ("optim.", "privacy.clip_norm", "privacy.clipping")
"""Settings that trials may differ in: what a round costs follows from none of them."""
_OF_ONE_KIND = {"momentum": "sgd", "noise_floor": "adamw_corrected"}
"""Settings of an optimiser that stay behind where a trial takes another."""
PLAN = "tune.json"
_MARGIN = 1.0003
"""More noise than the budget needs, so that rounding of each run's own noise never adds up beyond it."""

Run = Callable[[TrainConfig], RunResult]
"""Does a run, or goes on with it; one that is done tells its result again."""


@dataclass(frozen=True)
class Plan:
    """What tuning costs, in public numbers; written down before anything is spent.

    Attributes:
        budget: epsilon and delta of everything together.
        noise_multiplier: of every round.
        rate: q of every lot.
        trial_rounds, rounds: of a trial and of the last run.
        trial_epsilon, epsilon: that each spends by itself.
        tried: the trials' settings, in order.
        settings: digest of all other settings.
    """

    budget: tuple[float, float]
    noise_multiplier: float
    rate: float
    trial_rounds: int
    rounds: int
    trial_epsilon: float
    epsilon: float
    tried: tuple[str, ...]
    settings: str

    def lines(self) -> list[str]:
        """In sentences."""
        count = len(self.tried)
        return [
            f"epsilon {self.budget[0]:g} at delta {self.budget[1]:g} for everything together: {count} trials of "
            f"{self.trial_rounds} rounds and a run of {self.rounds}, all with noise multiplier "
            f"{self.noise_multiplier:.3f}",
            f"a trial spends epsilon {epsilon_digits(self.trial_epsilon)} by itself, the last run "
            f"{epsilon_digits(self.epsilon)}; the ledger adds all of them up, and what other runs spent on this text",
        ]


@dataclass(frozen=True)
class Trial:
    """One trial's settings and its loss on the public text; not finite where it diverged."""

    settings: str
    loss: float


@dataclass(frozen=True)
class Tuned:
    """How tuning ended. ``result`` is the last run's; None where a trial was stopped."""

    plan: Plan
    trials: tuple[Trial, ...]
    chosen: str | None
    result: RunResult | None

    def as_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "plan": asdict(self.plan),
            "trials": [asdict(trial) | {"loss": _finite(trial.loss)} for trial in self.trials],
            "chosen": self.chosen,
            "result": None if self.result is None else self.result.as_json(),
        }


def changed(config: TrainConfig, settings: str) -> TrainConfig:
    """The settings with those of a trial, ``optim.lr=1e-3,privacy.clip_norm=0.5``.

    Raises:
        ConfigError: a trial names a setting that it may not change, or gives it a value that does not fit (code
            ``tune-setting``).
    """
    known, values = config.model_dump(), config.model_dump(exclude_unset=True)  # defaults may follow from the rest
    given: set[str] = set()
    try:
        for each in re.split(r",(?![^\[]*\])", settings):
            name, equals, text = (part.strip() for part in each.partition("="))
            section, _, key = name.partition(".")
            if not equals:
                raise _unfit(each.strip(), "it gives no value")
            if not name.startswith(MAY_DIFFER):
                raise _unfit(
                    each.strip(),
                    "what a round costs has to be the same in all trials, so they may differ in the optimiser and in "
                    "how records are clipped",
                )
            if key not in (known.get(section) or {}):
                raise _unfit(each.strip(), "there is no such setting")
            if name in given:
                raise _unfit(settings, f"`{name}` is there twice")
            given.add(name)
            values.setdefault(section, {})[key] = value_of(text)
        if values.get("optim", {}).get("kind") != config.optim.kind:
            for name, kind in _OF_ONE_KIND.items():
                if f"optim.{name}" not in given and kind != values.get("optim", {}).get("kind"):
                    values.get("optim", {}).pop(name, None)
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        found = error.errors(include_url=False)
        problems = (f"`{'.'.join(map(str, each['loc']))}`: {each['msg']}" for each in found)
        raise _unfit(settings, "; ".join(problems)) from None
    except ValueError as error:
        raise _unfit(settings, str(error)) from None


def _unfit(settings: str, why: str) -> ConfigError:
    return ConfigError(
        f"a trial says `{settings}`.",
        code="tune-setting",
        why=why,
        fix="for example --try optim.lr=1e-3,privacy.clip_norm=0.5",
    )


def plan_tuning(config: TrainConfig, tried: Sequence[str], trial_rounds: int, public: Sequence[Path]) -> Plan:
    """Count what all trials and the last run cost together. Reads the text, trains nothing.

    Raises:
        DataError: the text cannot be used, that to choose by neither.
        ConfigError: fewer than two trials, no budget, a mechanism that this cannot count, see also `changed`.
        BudgetError: no noise reaches the budget.
    """
    spec = config.privacy
    problem = _problem(config, tried, trial_rounds)
    if spec is None or problem:
        raise ConfigError(
            f"`coterie tune` cannot do this: {problem}.",
            code="tune-what",
            fix="give train.yaml a budget and a lot_size, and two settings or more with --try",
        )
    data = config.data
    documents = read_documents(data.train, data, user_column=spec.user_column)
    tokenizer = get_tokenizer(data.tokenizer, config.model, data)
    records = tokenize(documents, data, tokenizer)
    judge = read_public(public, data, "--public")
    check_not_private(judge, public, documents, data.train, "--public", "choose by text that is nobody's secret")
    tokenize(judge, data, tokenizer)  # before a trial is spent that nothing could judge
    plan = plan_of(config, spec, build_model(with_vocabulary(config.model, tokenizer), meta=True))
    units = PrivateData.of(records, users=records.users, records_per_user=plan.records_per_user).units.count
    least = plan.lots(units).mechanism(1.0)
    rounds = config.train.rounds
    together = len(tried) * trial_rounds + rounds
    budget = Budget(spec.epsilon, spec.delta)
    sigma = _MARGIN * needed_noise(budget, least, together)

    def spent(count: int) -> float:
        return epsilon([(replace(least, noise_multiplier=sigma), count)], spec.delta)

    return Plan(
        (spec.epsilon, spec.delta), sigma, least.sampling_rate, trial_rounds, rounds, spent(trial_rounds),
        spent(rounds), tuple(tried), content_hash(config, without={"run_dir", "device"}),
    )  # fmt: skip


def _problem(config: TrainConfig, tried: Sequence[str], trial_rounds: int) -> str:
    spec = config.privacy
    if spec is None:
        return "train.yaml has no `privacy` block, and without a budget there is nothing to share out"
    if config.ranks > 1:
        return "trials are of one process each, and `devices`, `experts_over` or `layers_over` asks for several"
    if spec.seeded:
        return "`seeded` runs are not private"
    if spec.lot_size == "auto" or spec.noise_bands > 1 or spec.adaptive_quantile is not None:
        return "`lot_size: auto`, `noise_bands` and `adaptive_quantile` change what a round costs from run to run"
    if len(tried) < 2:
        return "it takes two different settings or more to choose"
    if not 1 <= trial_rounds <= config.train.rounds:
        return f"a trial of {trial_rounds} rounds, in a run of {config.train.rounds}"
    same: dict[str, str] = {}
    for settings in tried:
        digest = content_hash(changed(config, settings))
        if digest in same:
            return f"`{same[digest]}` and `{settings}` are the same settings, and each would be paid for"
        same[digest] = settings
    return ""


def tune(config: TrainConfig, plan: Plan, public: Sequence[Path], run: Run) -> Tuned:
    """Try every setting, choose by the loss on public text, and train with it. Goes on where it was stopped.

    Args:
        config: the settings of the last run, in whose run_dir it is; trials are beside it, in ``RUN_DIR-trials``.
        plan: of `plan_tuning`.
        public: text to choose by; nobody's secret.
        run: does a run.

    Raises:
        ConfigError: other trials were begun there (code ``tune-other``), or a run that is none of these is there
            (code ``run-dir-taken``).
        RoundError: all trials diverged (code ``tune-diverged``).
    """
    folder = config.run_dir.with_name(f"{config.run_dir.name}-trials")
    trials = {
        settings: _limited(changed(config, settings), folder / str(number), plan.trial_rounds, plan.trial_epsilon)
        for number, settings in enumerate(plan.tried, start=1)
    }
    _begin(folder / PLAN, plan, [*(own.run_dir for own in trials.values()), config.run_dir])
    found: list[Trial] = []
    for settings, own in trials.items():
        loss = _tried(own, public, run)
        if loss is None:
            return Tuned(plan, tuple(found), None, None)
        found.append(Trial(settings, loss))
    best = min(found, key=lambda trial: (not math.isfinite(trial.loss), trial.loss))
    if not math.isfinite(best.loss):
        raise RoundError(
            f"all {len(found)} trials diverged.",
            code="tune-diverged",
            why="none of these settings can be trained with",
            fix="choose another run_dir, lower rates for --try, and a smaller budget: what was spent stays counted",
        )
    last = _limited(changed(config, best.settings), config.run_dir, plan.rounds, plan.epsilon)
    return Tuned(plan, tuple(found), best.settings, _run(last, run))


def _tried(own: TrainConfig, public: Sequence[Path], run: Run) -> float | None:
    """A trial's loss on public text, infinite where it diverged, as its noised weights say; None: it was stopped."""
    try:
        if not _run(own, run).finished:
            return None
    except RoundError as error:
        if error.code != "run-diverged":
            raise
        return math.inf
    return evaluate_run(load_trained(own.run_dir), public).loss


def _run(own: TrainConfig, run: Run) -> RunResult:
    """Do a run, or go on with it if what is in its folder is this one."""
    if (own.run_dir / MARKER).exists() and read_run(own.run_dir)[1].get("run") != run_id(own):
        raise _taken(own.run_dir)
    return run(own)


def _begin(path: Path, plan: Plan, run_dirs: Sequence[Path]) -> None:
    """Write the plan down, or hold it to what was written."""
    if path.exists():
        kept: Mapping[str, Any] = json_object(path.read_bytes())
        if kept != _plain(plan):
            raise ConfigError(
                f"{path.parent} holds trials of other settings.",
                code="tune-other",
                why="they were counted with their own numbers, and more trials would cost more than the budget",
                fix="go on with the same settings and --try, or choose another run_dir and a budget for it",
            )
        return
    for run_dir in run_dirs:
        if (run_dir / MARKER).exists():
            raise _taken(run_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, _plain(plan))


def _taken(run_dir: Path) -> ConfigError:
    return ConfigError(
        f"{run_dir} holds a run that is none of these trials, nor what they are for.",
        code="run-dir-taken",
        why="going on with it would show it as what was tuned",
        fix="choose another run_dir",
    )


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


def _plain(plan: Plan) -> dict[str, Any]:
    values = asdict(plan)
    return {**values, "budget": list(plan.budget), "tried": list(plan.tried)}


def _limited(config: TrainConfig, run_dir: Path, rounds: int, budget: float) -> TrainConfig:
    """A run of so many rounds that spends so much."""
    assert config.privacy is not None
    privacy = config.privacy.model_copy(update={"epsilon": budget})
    train = config.train.model_copy(update={"rounds": rounds})
    return config.model_copy(update={"privacy": privacy, "train": train, "run_dir": run_dir})
