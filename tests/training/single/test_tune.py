"""Private tuning: what all trials and the last run cost together is the budget."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant

from coterie.config import TrainConfig, dump_yaml
from coterie.dp.accounting import statement
from coterie.dp.checks import self_check
from coterie.errors import ConfigError, DataError, RoundError
from coterie.training.single import run, tune
from coterie.training.single.prepared import MARKER, run_id
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
    plan = tune.plan_tuning(config(tmp_path), TRIED, 2, [tmp_path / "public.jsonl"])
    assert plan.rate == 8 / 40
    assert composed(plan.noise_multiplier, 0.2, 2 + 2 + 4) == pytest.approx(8.0, rel=5e-3)
    assert plan.trial_epsilon == pytest.approx(composed(plan.noise_multiplier, 0.2, 2), rel=5e-3)
    assert plan.epsilon == pytest.approx(composed(plan.noise_multiplier, 0.2, 4), rel=5e-3)
    assert plan.epsilon < 8.0 < 2 * plan.trial_epsilon + plan.epsilon  # composition is less than the sum


def test_public_text_that_cannot_be_used_is_refused_before_a_trial_is_spent(tmp_path: Path) -> None:
    settings = config(tmp_path)
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n')
    for name, code in (("nowhere.jsonl", "data-no-file"), ("blank.jsonl", "data-empty")):
        with pytest.raises(DataError) as refused:
            tune.plan_tuning(settings, TRIED, 2, [tmp_path / name])
        assert refused.value.code == code


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
    plan = tune.plan_tuning(settings, TRIED, 1, public)
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
        tune.tune(settings, tune.plan_tuning(settings, (*TRIED, "optim.lr=1"), 1, public), public, _start)
    assert other.value.code == "tune-other"


PLAN = tune.Plan((8.0, 1e-3), 1.0, 0.2, 1, 4, 3.0, 5.0, TRIED, "all others")


def diverged(own: TrainConfig) -> RunResult:
    raise RoundError("training has diverged.", code="run-diverged", fix="a lower rate")


def written(own: TrainConfig, run: str) -> None:
    """The folder of a run."""
    own.run_dir.mkdir(parents=True, exist_ok=True)
    dump_yaml(own.run_dir / "config.yaml", own)
    (own.run_dir / MARKER).write_text(json.dumps({"run": run}))


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Of runs by their folders' names, on public text."""
    found: dict[str, float] = {}
    monkeypatch.setattr(tune, "load_trained", lambda run_dir: run_dir)
    monkeypatch.setattr(tune, "evaluate_run", lambda run_dir, public: SimpleNamespace(loss=found[run_dir.name]))
    return found


def ran(doing: dict[str, Callable[[TrainConfig], Any]], asked: list[str]) -> tune.Run:
    """Runs that end at once, but for those that are to do something else."""

    def run(own: TrainConfig) -> Any:
        asked.append(own.run_dir.name)
        written(own, run_id(own))
        return doing.get(own.run_dir.name, lambda own: SimpleNamespace(finished=True, as_json=dict))(own)

    return run


@pytest.mark.parametrize(
    ("first", "doing"), [(math.nan, {}), (math.inf, {}), (0.1, {"1": diverged})], ids=["nan", "inf", "raised"]
)
def test_a_trial_that_diverged_is_never_chosen_and_the_others_go_on(
    first: float, doing: dict[str, Any], tmp_path: Path, losses: dict[str, float]
) -> None:
    losses |= {"1": first, "2": 2.0}
    asked = list[str]()
    tuned = tune.tune(config(tmp_path), PLAN, [], ran(doing, asked))
    assert tuned.chosen == TRIED[1]
    assert asked == ["1", "2", "run"]
    told = json.loads(json.dumps(tuned.as_json(), allow_nan=False))
    assert [trial["loss"] for trial in told["trials"]] == [None, 2.0]


def test_where_all_trials_diverged_nothing_is_trained(tmp_path: Path, losses: dict[str, float]) -> None:
    losses |= {"2": math.nan}
    asked = list[str]()
    with pytest.raises(RoundError, match="all 2 trials") as caught:
        tune.tune(config(tmp_path), PLAN, [], ran({"1": diverged}, asked))
    assert caught.value.code == "tune-diverged"
    assert asked == ["1", "2"]


def test_a_trial_that_failed_otherwise_is_not_a_result(tmp_path: Path, losses: dict[str, float]) -> None:
    def failed(own: TrainConfig) -> RunResult:
        raise RoundError("something else.", code="round-lost", fix="-")

    with pytest.raises(RoundError, match="something else"):
        tune.tune(config(tmp_path), PLAN, [], ran({"1": failed}, []))


@pytest.mark.parametrize("taken", ["run", "run-trials/1", "run-trials/2"])
def test_a_folder_that_holds_a_run_is_refused_before_anything_is_spent(taken: str, tmp_path: Path) -> None:
    settings = config(tmp_path)
    written(settings.model_copy(update={"run_dir": tmp_path / taken}), run_id(settings))
    with pytest.raises(ConfigError, match=f"{taken} holds a run") as caught:
        tune.tune(settings, PLAN, [], lambda own: pytest.fail("it began"))
    assert caught.value.code == "run-dir-taken"
    assert not (tmp_path / "run-trials" / tune.PLAN).exists()


@pytest.mark.parametrize("taken", ["run", "run-trials/2"])
def test_tuning_that_goes_on_takes_no_other_run_for_its_own(
    taken: str, tmp_path: Path, losses: dict[str, float]
) -> None:
    settings, asked = config(tmp_path), list[str]()
    losses |= {"1": 1.0, "2": 2.0}
    stopped = ran({"1": lambda own: SimpleNamespace(finished=False)}, asked)
    assert tune.tune(settings, PLAN, [], stopped).result is None
    other = settings.model_copy(update={"run_dir": tmp_path / taken})
    written(other, run_id(other))
    with pytest.raises(ConfigError, match=f"{taken} holds a run") as caught:
        tune.tune(settings, PLAN, [], ran({}, asked))
    assert caught.value.code == "run-dir-taken"
    assert asked == ["1", "1", *(["2"] if taken == "run" else [])]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ("train.rounds=9", "train.rounds=9"),
        ("privacy.epsilon=9", "privacy.epsilon=9"),
        ("privacy.lot_size=20", "privacy.lot_size=20"),
        ("optim.speed=3", "optim.speed=3"),
        ("optim.lr", "optim.lr"),
        ("optim=3", "optim=3"),
        ("optim.lr=abc", "optim.lr=abc"),
        ("optim.lr=[", r"optim.lr=\["),
        ("optim.lr=!!int x", "optim.lr=!!int x"),
        ("optim.lr=-1", "optim.lr=-1"),
        ("optim.lr=.nan", "optim.lr=.nan"),
        ("optim.lr=1e999", "optim.lr=1e999"),
        ("optim.lr=1e-3,privacy.clip_norm=", "privacy.clip_norm="),
        ("optim.betas=[0.9,0.99", r"optim.betas=\["),
        ("optim.nope=3", "there is no such setting"),
        ("optim.lr", "it gives no value"),
        ("train.rounds=3", "what a round costs has to be the same"),
        ("run_dir.x=3", "what a round costs has to be the same"),
        ("privacy.clip_norms=3", "there is no such setting"),
        ("optim.lr=1e-3,optim.lr=2e-3", "is there twice"),
        ("optim.kind=sgd,optim.noise_floor=2.0", "noise_floor"),
        ("privacy.clipping=per_lyer", "per_lyer"),
    ],
)
def test_a_trial_may_change_nothing_that_a_round_costs_and_says_values_that_fit(
    tmp_path: Path, settings: str, named: str
) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        tune.changed(config(tmp_path), settings)
    assert caught.value.code == "tune-setting"


def test_numbers_are_read_as_in_a_settings_file(tmp_path: Path) -> None:
    found = tune.changed(config(tmp_path), "optim.lr=1e-2,optim.schedule=linear,privacy.clip_norm=0.25")
    assert (found.optim.lr, found.optim.schedule) == (0.01, "linear")
    assert found.privacy is not None
    assert found.privacy.clip_norm == 0.25
    assert tune.changed(config(tmp_path), "optim.betas=[0.2, 0.9],optim.lr=1e-3").optim.betas == (0.2, 0.9)


def test_a_trial_of_another_optimiser_is_what_the_settings_file_would_be(tmp_path: Path) -> None:
    own = config(tmp_path).model_dump(exclude_unset=True)
    sgd = TrainConfig.model_validate(own | {"optim": {"kind": "sgd", "momentum": 0.8, "lr": 0.1}})
    for tried, written in (
        ("optim.kind=adamw,optim.lr=1e-3", {"kind": "adamw", "lr": 1e-3}),
        ("optim.kind=adamw_corrected,optim.lr=1e-3", {"kind": "adamw_corrected", "lr": 1e-3}),
        ("optim.momentum=0.5", {"kind": "sgd", "momentum": 0.5, "lr": 0.1}),
    ):
        assert tune.changed(sgd, tried) == TrainConfig.model_validate(own | {"optim": written})
    with pytest.raises(ConfigError, match="`momentum` is for `kind: sgd`"):
        tune.changed(sgd, "optim.kind=adamw,optim.momentum=0.5")


def test_text_that_is_trained_on_chooses_nothing(tmp_path: Path) -> None:
    own = config(tmp_path)
    with pytest.raises(DataError) as refused:
        tune.plan_tuning(own, TRIED, 2, [tmp_path / "train.jsonl"])
    assert (refused.value.code, refused.value.where) == ("data-not-public", "--public")


@pytest.mark.parametrize(
    ("change", "tried", "rounds", "why"),
    [
        (lambda c: c.model_copy(update={"privacy": None}), TRIED, 1, "no `privacy` block"),
        (lambda c: c.model_copy(update={"devices": 2}), TRIED, 1, "trials are of one process"),
        (lambda c: c.model_copy(update={"experts_over": 2}), TRIED, 1, "trials are of one process"),
        (lambda c: c, TRIED[:1], 1, "two different settings"),
        (lambda c: c, (TRIED[0], TRIED[0]), 1, "are the same settings"),
        (lambda c: c, ("optim.lr=1e-3", "optim.lr=0.001"), 1, "are the same settings"),
        (lambda c: c, TRIED, 5, "a trial of 5 rounds, in a run of 4"),
    ],
)
def test_what_cannot_be_counted_is_refused(
    tmp_path: Path, change: Callable[[TrainConfig], TrainConfig], tried: tuple[str, ...], rounds: int, why: str
) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        tune.plan_tuning(change(config(tmp_path)), tried, rounds, [tmp_path / "public.jsonl"])
    assert caught.value.code == "tune-what"
