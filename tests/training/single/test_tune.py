"""Private tuning: what all trials and the last run cost together is the budget."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant

from coterie.config import TrainConfig
from coterie.dp.accounting import statement
from coterie.dp.checks import self_check
from coterie.errors import ConfigError
from coterie.training.single import run, tune
from coterie.training.single.run import RunResult
from coterie.training.single.trained import evaluate_run, load_trained

SIZES = {
    "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 32,
}  # fmt: skip
TRIED = ("optim.lr=1e-3", "optim.lr=5e-2,privacy.clip_norm=0.5")


def config(folder: Path, **privacy: Any) -> TrainConfig:
    rows = [{"text": f"{number} a cough and a fever"} for number in range(40)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "public.jsonl").write_text('{"text": "a fever and a cough and no pain"}\n')
    (folder / "public.txt").write_text("the a and is in on has no cough\n")
    return TrainConfig.model_validate({
        "model": {"family": "olmoe", "config": SIZES},
        "data": {
            "train": [folder / "train.jsonl"], "sequence_length": 16, "packing": "records",
            "tokenizer": {"train": {"files": [folder / "public.txt"], "vocab_size": 265}},
        },
        "train": {"rounds": 4, "eval_every": 0},
        "privacy": {"epsilon": 8.0, "delta": 1e-3, "lot_size": 8, "ledger": folder / "ledger", **privacy},
        "run_dir": folder / "run",
    })  # fmt: skip


def composed(noise_multiplier: float, rate: float, rounds: int) -> float:
    """Epsilon of so many rounds by dp-accounting alone."""
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, 1e-4)
    event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise_multiplier))
    return float(accountant.compose(event, rounds).get_epsilon(1e-3))


def test_all_trials_and_the_last_run_together_cost_the_budget(tmp_path: Path) -> None:
    plan = tune.plan_tuning(config(tmp_path), TRIED, 2)
    assert plan.rate == 8 / 40
    assert composed(plan.noise_multiplier, 0.2, 2 + 2 + 4) == pytest.approx(8.0, rel=5e-3)
    assert plan.trial_epsilon == pytest.approx(composed(plan.noise_multiplier, 0.2, 2), rel=5e-3)
    assert plan.epsilon == pytest.approx(composed(plan.noise_multiplier, 0.2, 4), rel=5e-3)
    assert plan.epsilon < 8.0 < 2 * plan.trial_epsilon + plan.epsilon  # composition is less than the sum


def _start(own: TrainConfig) -> RunResult:
    return run.start(own)


@pytest.fixture
def _compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """No subjects here: the engine's comparison with batches of one, and what copies of a record are promised."""
    monkeypatch.setattr(self_check, "check", lambda *arguments: SimpleNamespace(unused=()))
    monkeypatch.setattr(statement, "group_epsilon", lambda *arguments: 99.0)


@pytest.mark.slow
@pytest.mark.usefixtures("_compared")
def test_the_ledger_adds_all_up_to_the_budget_and_the_best_on_public_text_is_trained(tmp_path: Path) -> None:
    settings, public = config(tmp_path), [tmp_path / "public.jsonl"]
    plan = tune.plan_tuning(settings, TRIED, 1)
    tuned = tune.tune(settings, plan, public, _start)
    losses = [evaluate_run(load_trained(tmp_path / "run-trials" / str(n)), public).loss for n in (1, 2)]
    assert [trial.loss for trial in tuned.trials] == pytest.approx(losses)
    assert tuned.chosen == TRIED[losses.index(min(losses))]
    assert tuned.result is not None
    assert tuned.result.privacy is not None
    assert tuned.result.privacy["epsilon"] == pytest.approx(plan.epsilon, rel=1e-3)
    lifetime = tuned.result.privacy["lifetime"]["epsilon"]
    assert 0.97 * 8.0 < lifetime <= 8.0
    with pytest.raises(ConfigError) as other:
        tune.tune(settings, tune.plan_tuning(settings, (*TRIED, "optim.lr=1"), 1), public, _start)
    assert other.value.code == "tune-other"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ("train.rounds=9", "train.rounds=9"),
        ("privacy.epsilon=9", "privacy.epsilon=9"),
        ("privacy.lot_size=20", "privacy.lot_size=20"),
        ("optim.speed=3", "optim.speed=3"),
        ("optim.lr", "optim.lr"),
    ],
)
def test_a_trial_may_change_nothing_that_a_round_costs(tmp_path: Path, settings: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        tune.changed(config(tmp_path), settings)
    assert caught.value.code == "tune-setting"


def test_numbers_are_read_as_in_a_settings_file(tmp_path: Path) -> None:
    found = tune.changed(config(tmp_path), "optim.lr=1e-2,optim.schedule=linear,privacy.clip_norm=0.25")
    assert (found.optim.lr, found.optim.schedule) == (0.01, "linear")
    assert found.privacy is not None
    assert found.privacy.clip_norm == 0.25


@pytest.mark.parametrize(
    ("change", "tried", "rounds", "why"),
    [
        (lambda c: c.model_copy(update={"privacy": None}), TRIED, 1, "no `privacy` block"),
        (lambda c: c, TRIED[:1], 1, "two different settings"),
        (lambda c: c, (TRIED[0], TRIED[0]), 1, "two different settings"),
        (lambda c: c, TRIED, 5, "a trial of 5 rounds, in a run of 4"),
    ],
)
def test_what_cannot_be_counted_is_refused(
    tmp_path: Path, change: Callable[[TrainConfig], TrainConfig], tried: tuple[str, ...], rounds: int, why: str
) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        tune.plan_tuning(change(config(tmp_path)), tried, rounds)
    assert caught.value.code == "tune-what"
