"""Which trackers hear of a run, and of which of its figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from coterie.config.base import LocalPath, Spec


def _check_textfile(path: Path) -> Path:
    if path.suffix != ".prom":
        raise ValueError(f"{path.name} does not end in .prom: node_exporter's textfile collector reads no other file")
    return path


class ReportSpec(Spec):
    """Trackers outside the run folder. What they hear has left: only figures that may be public go there."""

    prometheus: Annotated[LocalPath, AfterValidator(_check_textfile)] | None = Field(
        default=None,
        description="File for node_exporter's textfile collector, `NAME.prom`, in a folder that it reads.",
    )
    wandb: str | None = Field(
        default=None, min_length=1, description="Project of Weights & Biases; its own variables say where that is."
    )
    mlflow: str | None = Field(
        default=None, min_length=1, description="Experiment of MLflow; `MLFLOW_TRACKING_URI` says where that is."
    )
    figures: tuple[str, ...] | None = Field(
        default=None,
        description="Figures by their names in metrics.jsonl, beside the round; absent: all that may be public. One "
        "that may not is refused.",
    )

    @model_validator(mode="after")
    def _some_tracker(self) -> ReportSpec:
        if self.prometheus is None and self.wandb is None and self.mlflow is None:
            raise ValueError("name a tracker: `prometheus`, `wandb` or `mlflow`")
        return self
