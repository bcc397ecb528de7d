"""`lot_size: auto`: lot, rounds and noise from public numbers, and the reasons."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from coterie.cli.app import main
from coterie.config import TrainConfig, dump_yaml
from coterie.dp import plan as plans
from coterie.dp.accounting.accountant import Mechanism
from coterie.dp.accounting.budget import Budget
from coterie.dp.plan import PrivacyPlan
from coterie.errors import BudgetError, ConfigError
from coterie.training.planning import record_time
from coterie.training.single import auto_lot, run
from coterie.training.single.run import RunResult
from helpers.private_settings import private_settings

SIZES = {
    "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 32,
}  # fmt: skip


def config(folder: Path, words: int = 3, **privacy: Any) -> TrainConfig:
    """Sixty records of so many words each."""
    folder.mkdir(exist_ok=True)
    rows = [{"text": f"{number} " + "a cough " * words} for number in range(60)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "public.txt").write_text("the a and is in on has no cough\n")
    values = {
        "model": {"family": "olmoe", "config": SIZES},
        "data": {
            "train": [folder / "train.jsonl"], "sequence_length": 32, "packing": "records",
            "tokenizer": {"train": {"files": [folder / "public.txt"], "vocab_size": 265}},
        },
        "train": {"rounds": 50},
        "privacy": {"epsilon": 8.0, "delta": 1e-3, "lot_size": "auto", "ledger": folder / "ledger", **privacy},
        "run_dir": folder / "run",
    }  # fmt: skip
    return TrainConfig.model_validate(values)


def plan() -> PrivacyPlan:
    return PrivacyPlan(Budget(8.0, 1e-5), 1, 1)


def test_with_time_to_spare_a_lot_is_half_of_the_records_and_rounds_are_all_that_are_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where noise grows as the root of the rounds, the noise of their average stays, and more rounds cost nothing."""
    monkeypatch.setattr(
        plans, "needed_noise", lambda budget, mechanism, rounds: mechanism.sampling_rate * math.sqrt(rounds)
    )
    found = auto_lot.choose(plan(), units=1000, rounds=200, seconds=0.001, hours=1.0)
    assert (found.chosen.lot_size, found.chosen.rounds) == (500, 200)
    assert found.chosen.hours == pytest.approx(200 * 500 * 0.001 / 3600)


def test_with_little_time_lots_are_large_and_rounds_few_but_not_fewer_than_learning_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where noise hardly grows with the rounds, one large lot would be best: forty steps remain."""
    monkeypatch.setattr(plans, "needed_noise", lambda *numbers: 0.7)
    found = auto_lot.choose(plan(), units=100_000, rounds=400, seconds=0.01, hours=0.1)
    assert found.chosen.rounds == auto_lot.FEWEST_ROUNDS
    assert found.chosen.lot_size == 36_000 // 40
    assert all(each.hours <= 0.1 for each in found.tried)
    few = auto_lot.choose(plan(), units=100_000, rounds=10, seconds=0.01, hours=0.1)
    assert few.chosen.rounds == 10  # what train.rounds allows


def test_noise_is_what_the_budget_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def calibrated(budget: Budget, mechanism: Mechanism, rounds: int) -> float:
        asked.append((budget.epsilon, mechanism.sampling_rate, rounds))
        return 1.25

    monkeypatch.setattr(plans, "needed_noise", calibrated)
    found = auto_lot.choose(plan(), units=1000, rounds=40, seconds=0.01, hours=1.0)
    assert asked == [(8.0, 0.5, 40)]
    assert found.chosen.noise_multiplier == 1.25
    assert found.chosen.run_noise == pytest.approx(1.25 / 500 / math.sqrt(40))
    assert "half of the 1000" in found.lines()[1]


def test_time_for_less_than_a_record_a_round_is_refused() -> None:
    with pytest.raises(BudgetError) as caught:
        auto_lot.choose(plan(), units=1000, rounds=100, seconds=60.0, hours=0.1)
    assert caught.value.code == "auto-lot-time"


def test_the_choice_does_not_know_how_long_the_text_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is measured on made-up records of full length, and only the number of records is counted."""
    shapes = []
    batch = record_time.synthetic_batch

    def seen(model: object, like: Any, rows: int, length: int) -> Any:
        made = batch(model, like, rows, length)
        shapes.append(tuple(made["input_ids"].shape))
        return made

    monkeypatch.setattr(record_time, "synthetic_batch", seen)
    monkeypatch.setattr(plans, "needed_noise", lambda *numbers: 0.7)
    monkeypatch.setattr(record_time.time, "monotonic", iter(range(100)).__next__)
    short, first = auto_lot.settled(config(tmp_path / "short", words=1))
    long, second = auto_lot.settled(config(tmp_path / "long", words=12))
    assert shapes == [(16, 32)] * 2  # physical_batch records of sequence_length
    assert first == second
    assert short.privacy is not None
    assert short.privacy.lot_size == long.privacy.lot_size == first.chosen.lot_size  # type: ignore[union-attr]
    assert short.train.rounds == first.chosen.rounds


def test_a_run_starts_with_numbers_so_that_a_resumed_one_chooses_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def start(found: TrainConfig, **how: object) -> RunResult:
        started.append(found)
        (found.run_dir / "public" / "model").mkdir(parents=True)  # what a finished run has written
        return RunResult(str(found.run_dir), 2, True, None, None, None, None, 0, 0)

    monkeypatch.setattr(run, "start", start)
    settings = config(tmp_path, compute_hours=1e-4)
    train = settings.train.model_copy(update={"rounds": 2})
    dump_yaml(tmp_path / "train.yaml", settings.model_copy(update={"train": train}))
    with pytest.raises(SystemExit) as ended:
        main(["train", str(tmp_path / "train.yaml")])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "lot_size: auto. One record of full length takes" in said
    (found,) = started
    assert isinstance(found.privacy.lot_size, int)
    assert f"chosen: lots of {found.privacy.lot_size}" in said
    assert found.train.rounds == 2


@pytest.mark.parametrize("rank", ["0", "1"])
def test_several_that_a_launcher_started_are_all_refused(
    rank: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dump_yaml(tmp_path / "train.yaml", config(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as ended:
        main(["train", str(tmp_path / "train.yaml")])
    assert ended.value.code not in (0, None)
    assert "this process is one of 2" in capsys.readouterr().err


def test_a_run_that_its_launcher_starts_again_measures_nothing_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    went_on = []

    def resume(run_dir: Path, **how: object) -> RunResult:
        went_on.append(run_dir)
        (run_dir / "public" / "model").mkdir(parents=True)  # what a finished run has written
        return RunResult(str(run_dir), 2, True, None, None, None, None, 0, 0)

    monkeypatch.setattr(run, "resume", resume)
    monkeypatch.setattr(auto_lot, "settled", lambda asked: pytest.fail("it was measured again"))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    settings = config(tmp_path)
    assert settings.privacy is not None
    dump_yaml(tmp_path / "train.yaml", settings)
    settings.run_dir.mkdir()
    dump_yaml(
        settings.run_dir / "config.yaml",
        settings.model_copy(update={"privacy": settings.privacy.model_copy(update={"lot_size": 7})}),
    )
    (settings.run_dir / "run.json").write_text('{"run": "a"}')
    with pytest.raises(SystemExit) as ended:
        main(["train", str(tmp_path / "train.yaml")])
    assert ended.value.code == 0
    assert went_on == [settings.run_dir]


def test_where_auto_cannot_be_it_says_so(tmp_path: Path) -> None:
    for several in ("devices", "experts_over", "layers_over"):
        with pytest.raises(ConfigError) as caught:
            auto_lot.settled(config(tmp_path).model_copy(update={several: 2}))
        assert caught.value.code == "auto-lot-devices"
    with pytest.raises(ValueError, match="`coterie plan --records`"):
        private_settings(privacy__lot_size="auto")
    with pytest.raises(ValueError, match="`max_lot` needs a number"):
        config(tmp_path, sampler="truncated_poisson", max_lot=20)
    with pytest.raises(ValueError, match="`noise_bands` needs a number"):
        config(tmp_path, noise_bands=4)
