"""What trackers hear: public figures and the round, in each library's real form where it is installed."""

from __future__ import annotations

import json
import logging
import math
import sys
import threading
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coterie.config import FederationConfig, PartyConfig, TrainConfig, load_yaml
from coterie.config.report import ReportSpec
from coterie.errors import ConfigError, PrivacyError
from coterie.training.metrics import MetricsWriter, read_metrics
from coterie.training.party.in_process import run_in_process
from coterie.training.party.process import keep_settings
from coterie.training.public_figures import figures_of_party, figures_of_train
from coterie.training.single.run import start
from coterie.training.trackers import check_report, reporting
from helpers.federations import full_models, make_parts, settings

BUDGET = {"epsilon", "delta", "noise_multiplier"}
PRIVACY = {"epsilon": 8.0, "delta": 1e-3, "lot_size": 4, "clip_norm": 1.0, "unit": "record"}
ROUND = {
    "loss_not_private": 5.25,
    "drawn_not_private": 17.0,
    "seconds": 3.5,
    "epsilon": 1.5,
    "lr": 0.01,
    "loss": 4.75,
}

FEDERATION: dict[str, Any] = {
    "name": "three", "model": {"family": "olmoe"}, "train": {"rounds": 2}, "coordinator": {"endpoint": "h:1"},
    "parties": {"alder": {"endpoint": "h:2"}, "birch": {"endpoint": "h:3"}},
}  # fmt: skip
PARTY = PartyConfig.model_validate(
    dict.fromkeys(("federation", "kit", "trunk", "shard", "run_dir"), "x")
    | {"party": "alder", "data": {"train": ["a.txt"], "provenance": "public"}}
)


class Recorded:
    """Stands where wandb's or mlflow's client would, and keeps every word that it is told."""

    def __init__(self) -> None:
        self.said: list[tuple[str, Any, Any]] = []
        self.fails = False

    def wandb(self) -> types.ModuleType:
        module: Any = types.ModuleType("wandb")
        module.Settings = lambda **options: options
        module.init = lambda **options: self.said.append(("init", options, None)) or self
        return module

    def log(self, figures: dict[str, float], step: int) -> None:
        if self.fails:
            raise RuntimeError("no route\nto the tracker")
        self.said.append(("log", step, dict(figures)))

    def finish(self) -> None:
        self.said.append(("finish", None, None))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    tracker = Recorded()
    monkeypatch.setitem(sys.modules, "wandb", tracker.wandb())
    return tracker


def train(private: bool = True, **changes: Any) -> TrainConfig:
    values = {
        "model": {"family": "olmoe"}, "data": {"train": ["notes.jsonl"]}, "train": {"rounds": 2},
        "run_dir": "run", **({"privacy": PRIVACY} if private else {}),
    }  # fmt: skip
    return TrainConfig.model_validate(values | changes)


PRIVATE_START = {"model": {"path": "start", "provenance": "private", "origin": "ours"}}


@pytest.mark.parametrize(
    ("config", "public"),
    [
        (train(), {"lr", *BUDGET, "load_most", "load_least"}),
        (train(privacy=PRIVACY | {"seeded": True}), {"lr"}),
        (train(private=False), {"lr"}),
        (
            train(private=False, data={"train": ["a.txt"], "provenance": "public"}),
            {"lr", "loss", "test_loss", "tokens", "seconds"},
        ),
        (train(private=False, data={"train": ["a.txt"], "provenance": "public"}, model={"path": "start"}), {"lr"}),
        (
            train(
                private=False,
                data={"train": ["a.txt"], "provenance": "public"},
                model={"path": "start", "provenance": "public", "overrule_origin": "the card says so"},
            ),
            {"lr"},
        ),
    ],
)
def test_only_what_the_promise_covers_may_leave(config: TrainConfig, public: set[str]) -> None:
    assert figures_of_train(config) == public


def test_a_party_tells_no_loss_even_of_public_text_since_others_text_is_in_the_model() -> None:
    assert figures_of_party(FederationConfig.model_validate(FEDERATION | {"privacy": "none"}), PARTY) == {"lr"}
    budget = FederationConfig.model_validate(FEDERATION | {"privacy": PRIVACY})
    assert figures_of_party(budget, PARTY) == {"lr", *BUDGET}
    seeded = PartyConfig.model_validate(PARTY.model_dump(exclude_none=True) | {"privacy": {"seeded": True}})
    assert figures_of_party(budget, seeded) == {"lr"}


@pytest.mark.parametrize("figure", ["loss_not_private", "test_loss", "seconds", "made_up"])
def test_asking_for_a_private_figure_is_refused_with_a_known_code(figure: str) -> None:
    spec = ReportSpec(wandb="project", figures=("epsilon", figure))
    with pytest.raises(PrivacyError, match=f"{figure}, which may not leave") as refused:
        check_report(spec, figures_of_train(train()))
    assert refused.value.code == "report-private-figure"


@pytest.mark.parametrize(
    ("tracker", "package"), [("prometheus", "prometheus_client"), ("wandb", "wandb"), ("mlflow", "mlflow")]
)
def test_a_missing_extra_is_one_sentence(tracker: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    spec = ReportSpec.model_validate({tracker: "run.prom"})
    with pytest.raises(ConfigError, match=f"needs the package {package}, which is not installed") as missing:
        check_report(spec, frozenset())
    assert missing.value.code == "report-no-extra"
    assert f"pip install 'coterie[{tracker}]'" in str(missing.value)


def test_whatever_metrics_hold_a_tracker_hears_public_figures_alone(tmp_path: Path, recorded: Recorded) -> None:
    with (
        reporting(ReportSpec(wandb="project"), frozenset({"epsilon", "lr"}), tmp_path, "alder") as trackers,
        MetricsWriter(tmp_path, trackers=trackers) as metrics,
    ):
        metrics.log(1, **ROUND)
        metrics.log(1, test_loss=4.5, epsilon=math.inf)
    assert [what for what, *_ in recorded.said] == ["init", "log", "log", "finish"]
    assert recorded.said[1] == ("log", 1, {"round": 1.0, "epsilon": 1.5, "lr": 0.01})
    assert recorded.said[2] == ("log", 1, {"round": 1.0})
    assert read_metrics(tmp_path)[0]["loss_not_private"] == 5.25, "the owner has all of it"


def test_figures_that_were_named_are_sent_alone(tmp_path: Path, recorded: Recorded) -> None:
    spec = ReportSpec(wandb="project", figures=("epsilon",))
    with reporting(spec, frozenset({"epsilon", "lr"}), tmp_path) as trackers:
        trackers.log(3, ROUND)
    assert recorded.said[1] == ("log", 3, {"round": 3.0, "epsilon": 1.5})


def test_a_run_that_goes_on_has_the_same_name_and_another_run_another(tmp_path: Path, recorded: Recorded) -> None:
    for folder in ("one", "one", "two"):
        (tmp_path / folder).mkdir(exist_ok=True)
        with reporting(ReportSpec(wandb="project"), frozenset(), tmp_path / folder):
            pass
    first, again, other = [options["id"] for what, options, _ in recorded.said if what == "init"]
    assert first == again != other


def test_a_tracker_that_fails_is_told_of_once_and_training_goes_on(
    tmp_path: Path, recorded: Recorded, caplog: pytest.LogCaptureFixture
) -> None:
    recorded.fails = True
    with (
        caplog.at_level(logging.WARNING),
        reporting(ReportSpec(wandb="project"), frozenset({"epsilon"}), tmp_path) as trackers,
    ):
        trackers.log(1, ROUND)
        trackers.log(2, ROUND)
    assert [record.getMessage() for record in caplog.records] == ["wandb hears no more of this run: no route"]


def test_a_slow_tracker_holds_no_round_up(
    tmp_path: Path, recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = threading.Event()
    monkeypatch.setattr(recorded, "log", lambda *_, **__: heard.wait(30))
    with reporting(ReportSpec(wandb="project"), frozenset({"epsilon"}), tmp_path) as trackers:
        for round_no in range(1, 4):
            trackers.log(round_no, ROUND)  # each would wait 30 s, were it not for the thread
        assert not heard.is_set()
        heard.set()


def test_a_tracker_that_takes_no_run_stops_it_before_it_begins(
    tmp_path: Path, recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(**_: Any) -> None:
        raise RuntimeError("no API key\nmore lines")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuses)
    with (
        pytest.raises(ConfigError, match="wandb does not take this run: no API key") as refused,
        reporting(ReportSpec(wandb="project"), frozenset(), tmp_path),
    ):
        pass
    assert refused.value.code == "report-tracker"
    assert "more lines" not in str(refused.value)


def test_settings_ask_for_a_tracker_and_for_a_file_that_the_collector_reads() -> None:
    with pytest.raises(ValueError, match="name a tracker"):
        ReportSpec()
    with pytest.raises(ValueError, match=r"does not end in \.prom"):
        ReportSpec.model_validate({"prometheus": "figures.txt"})


@pytest.fixture
def make_private(tmp_path: Path) -> Callable[..., TrainConfig]:
    notes = [f"note {at} says that a patient with code zebra{at} has a cough" for at in range(24)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": note}) + "\n" for note in notes))
    (tmp_path / "public.txt").write_text("the a and is in on has no\n")
    sizes = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 32,
    }  # fmt: skip
    data = {
        "train": [tmp_path / "train.jsonl"], "test": [tmp_path / "train.jsonl"], "sequence_length": 16,
        "packing": "records", "tokenizer": {"train": {"files": [tmp_path / "public.txt"], "vocab_size": 260}},
    }  # fmt: skip

    def make(**changes: Any) -> TrainConfig:
        return train(
            model={"family": "olmoe", "config": sizes}, data=data, run_dir=tmp_path / "run",
            train={"rounds": 2, "micro_batch": 4, "eval_every": 1}, device="cpu", **changes,
        )  # fmt: skip

    return make


def test_a_private_run_tells_what_the_statement_tells(
    make_private: Callable[..., TrainConfig], recorded: Recorded
) -> None:
    result = start(make_private(report_to={"wandb": "project"}))
    logs = [figures for what, _, figures in recorded.said if what == "log"]
    assert set().union(*logs) == {"round", *BUDGET}
    last = {name: value for figures in logs for name, value in figures.items()}
    assert last["epsilon"] == pytest.approx(result.privacy["epsilon"])
    assert last["delta"] == result.privacy["delta"]
    assert last["noise_multiplier"] == pytest.approx(result.privacy["noise_multiplier"])
    assert "zebra" not in json.dumps(recorded.said, default=str)


def test_a_private_run_that_asks_for_a_loss_spends_nothing(
    make_private: Callable[..., TrainConfig], recorded: Recorded, tmp_path: Path
) -> None:
    with pytest.raises(PrivacyError, match="may not leave"):
        start(make_private(report_to={"wandb": "project", "figures": ["loss_not_private"]}))
    assert not recorded.said
    assert not list(tmp_path.rglob("ledger.jsonl"))


def test_trackers_do_not_make_another_run_of_it(make_private: Callable[..., TrainConfig]) -> None:
    from coterie.training.single.prepared import run_id

    assert run_id(make_private()) == run_id(make_private(report_to={"wandb": "project"}))


def test_prometheus_own_parser_reads_the_textfile(tmp_path: Path) -> None:
    parser = pytest.importorskip("prometheus_client.parser", reason="needs coterie[prometheus]")
    path = tmp_path / "alder.prom"
    with reporting(ReportSpec(prometheus=path), frozenset({"epsilon", "lr"}), tmp_path, "alder") as trackers:
        trackers.log(1, ROUND)
        trackers.log(2, ROUND | {"epsilon": 1.75})
    families = list(parser.text_string_to_metric_families(path.read_text()))
    samples = {sample.name: sample for family in families for sample in family.samples}
    assert {name: sample.value for name, sample in samples.items()} == {
        "coterie_round": 2.0, "coterie_epsilon": 1.75, "coterie_lr": 0.01,
    }  # fmt: skip
    assert {family.type for family in families} == {"gauge"}
    assert samples["coterie_round"].labels["party"] == "alder"
    assert path.stat().st_mode & 0o777 == 0o644, "the collector is another user"


def test_mlflow_keeps_a_run_over_restarts_in_its_local_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs coterie[mlflow]")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for round_no in (1, 2):
        with reporting(ReportSpec(mlflow="notes"), frozenset({"epsilon"}), tmp_path, "alder") as trackers:
            trackers.log(round_no, ROUND)
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("notes").experiment_id])
    assert run.data.metrics == {"round": 2.0, "epsilon": 1.5}
    assert [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, "round")] == [
        (1, 1),
        (2, 2),
    ]
    assert run.info.status == "FINISHED"
    assert not run.data.params


def test_weights_and_biases_offline_files_hold_figures_and_nothing_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="needs coterie[wandb]")
    import socket

    monkeypatch.setenv("WANDB_MODE", "offline")
    with reporting(ReportSpec(wandb="notes"), frozenset({"epsilon"}), tmp_path, "alder") as trackers:
        trackers.log(1, ROUND)
    (written,) = tmp_path.rglob("run-*.wandb")
    content = written.read_bytes()
    assert b"epsilon" in content
    host = socket.gethostname().encode()
    of_protobuf = bytes([len(host)]) + host  # a short name alone may stand in any random word
    for absent in (b"drawn_not_private", b"5.25", of_protobuf, str(Path.cwd()).encode(), b"pytest"):
        assert absent not in content, absent


def test_a_party_tells_its_tracker_no_loss_while_it_trains_with_others(tmp_path: Path, recorded: Recorded) -> None:
    config = settings()
    parts = make_parts(config, full_models(), tmp_path)
    with reporting(ReportSpec(wandb="project"), frozenset({"lr"}), tmp_path, "alder") as trackers:
        parts["alder"] = replace(parts["alder"], trackers=trackers)
        run_in_process(config, list(parts.values()), tmp_path / "coordinator")
    logs = [(step, set(figures)) for what, step, figures in recorded.said if what == "log"]
    assert {step for step, _ in logs} == {1, 2, 3, 4}
    assert set().union(*(names for _, names in logs)) == {"round", "lr"}
    assert any("test_loss" in row for row in read_metrics(parts["alder"].run_dir / "private"))


def test_a_party_that_goes_on_from_its_run_folder_writes_the_same_textfile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    federation = FederationConfig.model_validate(FEDERATION | {"privacy": "none"})
    spec = ReportSpec.model_validate({"prometheus": "alder.prom"})
    keep_settings(PARTY.model_copy(update={"run_dir": Path("run"), "report_to": spec}), federation)
    kept = load_yaml(tmp_path / "run" / "party.yaml", PartyConfig)
    assert kept.report_to == ReportSpec(prometheus=tmp_path / "alder.prom")
