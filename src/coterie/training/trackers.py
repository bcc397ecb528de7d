"""Public figures of a run to trackers: Prometheus, Weights & Biases, MLflow.

A tracker is imported when it is asked for. It never holds a round up and never ends a run: a thread sends, and a
tracker that fails later is told of once and left out. It hears the round and the figures that
`coterie.training.public_figures` allows, and of the machine nothing: no settings, paths, code, host name or load.
"""

from __future__ import annotations

import importlib
import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from coterie.config.report import ReportSpec
from coterie.errors import ConfigError
from coterie.storage import write_whole, writing
from coterie.training.public_figures import check_public

_PATIENCE_S = 30.0
"""For figures that are still on the way when a run ends."""
_READABLE_BY_ALL = 0o644
_PACKAGES = {"prometheus": "prometheus_client", "wandb": "wandb", "mlflow": "mlflow"}
"""What a tracker, and the extra of its name, needs."""
_NAME = "tracker-run"
_log = logging.getLogger(__name__)


class Tracker(Protocol):
    """One place that figures go to."""

    def send(self, round_no: int, figures: Mapping[str, float]) -> None:
        """Say a round's figures, the round among them."""

    def close(self) -> None:
        """Everything has been said."""


@dataclass(frozen=True)
class RunNames:
    """What a tracker calls a run.

    Attributes:
        run: the same after a restart, and of no other run.
        party: of a federation; empty for a run of one party alone.
    """

    run: str
    party: str = ""

    def __str__(self) -> str:
        return f"{self.party}-{self.run}" if self.party else self.run

    def labels(self) -> dict[str, str]:
        return {"run": self.run, "party": self.party}


class Trackers:
    """All trackers of a run.

    Args:
        spec: what was asked for.
        public: the figures that may leave; no other one does, whatever is given to `log`.
        names: of the run.
        private: folder for what a tracker's library writes.

    Raises:
        PrivacyError, ConfigError: as for `reporting`.
    """

    def __init__(self, spec: ReportSpec, public: frozenset[str], names: RunNames, private: Path) -> None:
        check_public(spec.figures or (), public)
        self._figures = public if spec.figures is None else frozenset(spec.figures)
        self._trackers: dict[str, Tracker] = {}
        makers: dict[str, Callable[[], Tracker]] = {}
        if spec.prometheus is not None:
            textfile = spec.prometheus
            makers["prometheus"] = lambda: PrometheusTextfile(textfile, names)
        if spec.wandb is not None:
            project = spec.wandb
            makers["wandb"] = lambda: WandbRun(project, names, private)
        if spec.mlflow is not None:
            experiment = spec.mlflow
            makers["mlflow"] = lambda: MlflowRun(experiment, names)
        for name, make in makers.items():
            self._trackers[name] = _made(name, make)
        self._waiting: SimpleQueue[tuple[int, dict[str, float]] | None] = SimpleQueue()
        self._sender = threading.Thread(target=self._send_all, name="trackers", daemon=True)
        self._sender.start()

    def log(self, round_no: int, metrics: Mapping[str, float]) -> None:
        """Hand on those of a round's metrics that may leave; returns at once."""
        public = {name: value for name, value in metrics.items() if name in self._figures and math.isfinite(value)}
        self._waiting.put((round_no, {"round": float(round_no), **public}))

    def close(self) -> None:
        """Wait for what is on the way, but not for long."""
        self._waiting.put(None)
        self._sender.join(_PATIENCE_S)
        if self._sender.is_alive():
            _log.warning("trackers did not take all figures of this run in time; metrics.jsonl has them")

    def _send_all(self) -> None:
        while (said := self._waiting.get()) is not None:
            for name in list(self._trackers):
                self._try(name, lambda tracker, said=said: tracker.send(*said))  # type: ignore[misc]
        for name in list(self._trackers):
            self._try(name, lambda tracker: tracker.close())

    def _try(self, name: str, act: Callable[[Tracker], None]) -> None:
        try:
            act(self._trackers[name])
        except Exception as error:  # a tracker's library raises what it likes, and training goes on
            del self._trackers[name]
            _log.warning("%s hears no more of this run: %s", name, _first_line(error))


def check_report(spec: ReportSpec | None, public: frozenset[str]) -> None:
    """Refuse before anything is begun what `reporting` would refuse later.

    Args:
        spec: what was asked for; None: nothing.
        public: the figures that may leave.

    Raises:
        PrivacyError: a figure was asked for that may not leave (``report-private-figure``).
        ConfigError: a tracker's package is not installed (``report-no-extra``).
    """
    if spec is None:
        return
    check_public(spec.figures or (), public)
    for name in _PACKAGES:
        if getattr(spec, name) is not None:
            _imported(name)


@contextmanager
def reporting(
    spec: ReportSpec | None, public: frozenset[str], private: Path, party: str = ""
) -> Iterator[Trackers | None]:
    """Inside, trackers hear of a run; None where none was asked for.

    Args:
        spec: what was asked for.
        public: the figures that may leave.
        private: the run's private folder; keeps the name, made by chance, under which trackers know the run.
        party: of a federation.

    Raises:
        PrivacyError: a figure was asked for that may not leave (``report-private-figure``).
        ConfigError: a tracker's package is not installed (``report-no-extra``), or it does not take the run
            (``report-tracker``).
    """
    if spec is None:
        yield None
        return
    trackers = Trackers(spec, public, RunNames(_run_name(private), party), private)
    try:
        yield trackers
    finally:
        trackers.close()


class PrometheusTextfile:
    """The newest figures in Prometheus' text format, for node_exporter's textfile collector."""

    def __init__(self, path: Path, names: RunNames) -> None:
        client = _imported("prometheus")
        self._client, self._path, self._labels = client, path, names.labels()
        self._registry = client.CollectorRegistry()
        self._gauges: dict[str, Any] = {}
        self._write()

    def send(self, round_no: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            if name not in self._gauges:
                self._gauges[name] = self._client.Gauge(
                    f"coterie_{name}", f"{name} of a run of coterie", list(self._labels), registry=self._registry
                )
            self._gauges[name].labels(**self._labels).set(value)
        self._write()

    def close(self) -> None:
        """The file stays: it says how far the run came."""

    def _write(self) -> None:
        """Whole or not at all, since it is read at any moment, and by another user."""
        write_whole(self._path, self._client.generate_latest(self._registry), _READABLE_BY_ALL, synced=False)


class WandbRun:
    """A run of Weights & Biases, which is told nothing but figures."""

    def __init__(self, project: str, names: RunNames, private: Path) -> None:
        wandb = _imported("wandb")
        quiet = wandb.Settings(
            console="off", silent=True, disable_code=True, disable_git=True, disable_job_creation=True,
            save_code=False, x_disable_meta=True, x_disable_machine_info=True, x_disable_stats=True,
            host="", program="", username="",
        )  # fmt: skip
        self._run = wandb.init(
            project=project,
            id=str(names),
            name=str(names),
            resume="allow",
            dir=str(private),
            settings=quiet,
            config={},
        )

    def send(self, round_no: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=round_no)

    def close(self) -> None:
        self._run.finish()


class MlflowRun:
    """A run of an MLflow experiment; a run that goes on is the same one there."""

    def __init__(self, experiment: str, names: RunNames) -> None:
        mlflow = _imported("mlflow")
        self._entities = importlib.import_module("mlflow.entities")
        self._client = mlflow.MlflowClient()
        found = self._client.get_experiment_by_name(experiment)
        where = self._client.create_experiment(experiment) if found is None else found.experiment_id
        tags = {f"coterie.{name}": value for name, value in names.labels().items()}
        same = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
        earlier = self._client.search_runs([where], same, max_results=1)
        if earlier:
            self._run = earlier[0].info.run_id
            self._client.set_terminated(self._run, "RUNNING")
        else:
            self._run = self._client.create_run(where, run_name=str(names), tags=tags).info.run_id

    def send(self, round_no: int, figures: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        said = [self._entities.Metric(name, value, now, round_no) for name, value in figures.items()]
        self._client.log_batch(self._run, metrics=said)

    def close(self) -> None:
        self._client.set_terminated(self._run)


def _made(name: str, make: Callable[[], Tracker]) -> Tracker:
    try:
        return make()
    except ConfigError:
        raise
    except Exception as error:  # a tracker's library raises what it likes
        raise ConfigError(
            f"{name} does not take this run: {_first_line(error)}",
            code="report-tracker",
            where=f"report_to.{name}",
            why="figures that nobody receives would be missed only when the run is over",
            fix="check the file, or the address and key that the tracker's own variables name",
        ) from error


def _imported(extra: str) -> Any:
    package = _PACKAGES[extra]
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"`report_to.{extra}` needs the package {package}, which is not installed.",
            code="report-no-extra",
            fix=f"install it with: pip install 'coterie[{extra}]'",
        ) from error


def _run_name(private: Path) -> str:
    kept = private / _NAME
    if not kept.exists():
        with writing(kept):
            write_whole(kept, secrets.token_hex(6).encode())
    return kept.read_text("ascii")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
