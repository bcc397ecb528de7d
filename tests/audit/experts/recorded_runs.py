"""A federation of three parties in one process that was recorded whole, and what an audit of one starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from coterie.audit.answers import Answers
from coterie.audit.evidence import Evidence
from coterie.audit.experts.case import Owned
from coterie.audit.transcript import Transcript
from coterie.config import dump_yaml
from coterie.models.zoo.tiny import tiny_model
from coterie.training.party.in_process import InProcessFederation
from helpers.federations import full_models, make_parts, settings, text

LOT = 6


def trained(folder: Path, rounds: int = 2, **more: object) -> Path:
    """Every party starts from one public model."""
    start = folder / "start"
    model = tiny_model("olmoe")
    model.save_pretrained(start)
    config = settings(
        exchange="experts",
        privacy="none",
        model={"path": start},
        train__rounds=rounds,
        train__batch_size=LOT,
        transcript={"rounds": "all", "max_gib": 1.0},
        **more,
    )
    same = full_models()
    for each in same.values():
        each.load_state_dict(model.state_dict())
    parts = make_parts(config, same, folder)
    federation = InProcessFederation(config, folder / "coordinator")
    federation.coordinate()
    for part in parts.values():
        federation.up(part)
    federation.join()
    for end in federation.ends.values():
        if isinstance(end, BaseException):
            raise end
    dump_yaml(folder / "alder" / "federation.yaml", config)
    return folder


def transcripts(run: Path, *hosts: str) -> dict[str, Transcript]:
    return {name: Transcript.read(run / name, "alder") for name in hosts}


def evidence_of(run: Path, trunk: Literal["private", "shared"]) -> Evidence:
    public = [tuple(row["input_ids"].tolist()) for row in map(text(77, 200).__getitem__, range(200))]
    return Evidence(
        owner="alder",
        exchange="experts",
        trunk=trunk,
        privacy=None,
        start=run / "start",
        public=[list(record) for record in public],
        received=transcripts(run, "birch", "cedar"),
        answers=Answers.read(run / "alder"),
        run_folder=run / "alder",
    )


def own_records() -> list[Owned]:
    """Of the attacked party, which a real run reads from the files that its settings name."""
    own = text(10)
    return [Owned(row, int(own.document_S[row]), tuple(own[row]["input_ids"].tolist())) for row in range(len(own))]
