"""Evidence is of one run: what belongs to another is refused by code, before anything is scored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from coterie.audit.answers import Answers
from coterie.audit.evidence import Evidence, LedgerClaim
from coterie.audit.findings import RunKind
from coterie.audit.identified import federation_run
from coterie.audit.transcript import Transcript
from coterie.config import PartyConfig, dump_yaml
from coterie.errors import CheckpointError, CoterieError
from coterie.federation.wire.frame import FrameType
from coterie.federation.wire.frame_log import FrameLog
from coterie.federation.wire.recording import STOPPED
from coterie.federation.wire.transport import Address, Lane, Message
from coterie.training.data.tokenizer import train_tokenizer
from helpers.federations import PARTIES, settings

FACTS = {
    "parties": list(PARTIES), "federation": "grove", "exchange": "tokens", "placement": [[0, 1, 2, 0]], "parts": [],
    "push_dtype": "float32", "weights_dtype": "bfloat16", "rounds": None,
}  # fmt: skip


def recorded(
    folder: Path, kind: str, party: str, run: str = "r1", agreement: str = "a1", counts: int = 1, **facts: object
) -> Path:
    """What a party recorded of one dispatch of alder's; the key of it."""
    head = {**FACTS, "kind": kind, "party": party, "run": run, "agreement": agreement, **facts}
    log = FrameLog(folder / "private" / kind, head, [*PARTIES, "own"], 1 << 20)
    at = Address(round=1, attempt=1)
    if kind == "transcript":
        hosted = 2 if party == "cedar" else 1
        rows = (
            torch.ones(2, 4),
            torch.full((2,), counts, dtype=torch.uint8),
            torch.full((2,), hosted, dtype=torch.uint8),
        )
        log.append("alder", FrameType.REQUEST, Lane.FORWARD, Message("dispatch", at, {"keep": True}, rows))
    log.close()
    return folder


def owners_folder(folder: Path, *, path: bool = True) -> Path:
    """A run of alder's, as `coterie up` leaves it."""
    private = folder / "private"
    private.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"kind": "federation", "run": "r1", "agreement": "a1"}))
    (folder / "own.jsonl").write_text('{"text": "secrets of the alder"}\n')
    (folder / "public.jsonl").write_text('{"text": "anybody may read this"}\n{"text": "secrets of the alder"}\n')
    model = {"path": str(folder / "start")} if path else {"family": "olmoe"}
    dump_yaml(folder / "federation.yaml", settings(model=model))
    paths = {name: folder / name for name in ("kit", "trunk", "shard")}
    party = {"party": "alder", "federation": folder / "federation.yaml", "data": {"train": [folder / "own.jsonl"]}}
    dump_yaml(folder / "party.yaml", PartyConfig.model_validate({**party, **paths, "run_dir": folder}))
    tokenizer = train_tokenizer(["secrets of the alder", "anybody may read this"], 270)
    tokenizer.save_pretrained(str(private / "tokenizer"))
    return folder


def test_it_joins_what_lies_in_folders(tmp_path: Path) -> None:
    own = owners_folder(tmp_path / "alder")
    recorded(own, "transcript-answers", "alder")
    others = [recorded(tmp_path / name, "transcript", name) for name in ("birch", "cedar")]
    found = Evidence.read(own, others, [own / "public.jsonl"])
    assert (found.owner, found.exchange, found.trunk, found.privacy) == ("alder", "tokens", "private", None)
    assert found.start == own / "start"
    assert set(found.received) == {"birch", "cedar"}
    assert [len(list(found.received[name].dispatches())) for name in ("birch", "cedar")] == [1, 1]
    assert found.answers is not None
    assert len(found.public) == 1, "what is among the owner's records is not public knowledge"


def test_the_claim_is_the_ledgers(tmp_path: Path) -> None:
    own = owners_folder(tmp_path / "alder")
    result = {"privacy": {"epsilon": 7.9, "delta": 1e-5}}
    (own / "private" / "result.json").write_text(json.dumps(result))
    found = Evidence.read(own, [])
    assert found.privacy == LedgerClaim(7.9, 1e-5)
    assert (found.answers, found.public, dict(found.received)) == (None, [], {})


@pytest.mark.parametrize("wrong", [{"run": "r2"}, {"agreement": "a2"}])
@pytest.mark.parametrize("kind", ["transcript", "transcript-answers"])
def test_what_another_run_recorded_is_refused(kind: str, wrong: dict[str, str], tmp_path: Path) -> None:
    own = owners_folder(tmp_path / "alder")
    where = own if kind == "transcript-answers" else tmp_path / "birch"
    recorded(where, kind, "alder" if where == own else "birch", **wrong)
    with pytest.raises(CheckpointError) as caught:
        Evidence.read(own, [] if where == own else [where])
    assert caught.value.code == "transcript-other-run"


def test_of_several_transcripts_the_good_ones_stay_and_the_others_are_named(tmp_path: Path) -> None:
    own = owners_folder(tmp_path / "alder")
    strange = {"parties": ["alder", "birch", "yew"], "placement": [[0, 1, 2, 0]]}
    given = {
        recorded(tmp_path / "birch", "transcript", "birch"): None,
        recorded(tmp_path / "again", "transcript", "birch"): "transcript-twice",
        recorded(tmp_path / "other", "transcript", "cedar", run="r2"): "transcript-other-run",
        recorded(tmp_path / "yew", "transcript", "yew", **strange): "transcript-outsider",
        recorded(tmp_path / "bent", "transcript", "cedar", counts=9): "transcript-damaged",
        recorded(tmp_path / "dtype", "transcript", "cedar", push_dtype="bfloat16"): "transcript-damaged",
        recorded(tmp_path / "placed", "transcript", "cedar", placement=[[0, 1, 2, 2]]): "transcript-damaged",
        tmp_path / "nothing": "transcript-none",
        recorded(tmp_path / "cedar", "transcript", "cedar"): None,
    }
    told: list[str] = []
    found = Evidence.read(own, list(given), leave_out=told.append)
    assert found.received["birch"].files[0].is_relative_to(tmp_path / "birch")
    assert found.received["cedar"].files[0].is_relative_to(tmp_path / "cedar")
    assert len(told) == sum(code is not None for code in given.values())
    for folder, code in given.items():
        if code is not None:
            with pytest.raises(CheckpointError) as caught:
                Evidence.read(own, [tmp_path / "birch", folder])
            assert caught.value.code == code, folder


def test_a_transcript_that_was_cut_counts_the_rounds_before_alone(tmp_path: Path) -> None:
    own = owners_folder(tmp_path / "alder")
    found = Evidence.read(own, [recorded(tmp_path / "birch", "transcript", "birch")])
    rounds = federation_run(found, RunKind.TOKENS).rounds
    assert federation_run(found, RunKind.TOKENS).recorded == rounds
    head = {**FACTS, "kind": "transcript", "party": "cedar", "run": "r1", "agreement": "a1"}
    log = FrameLog(tmp_path / "cedar" / "private" / "transcript", head, [*PARTIES, STOPPED], 1 << 20)
    log.append(STOPPED, FrameType.ONE_WAY, Lane.CONTROL, Message(STOPPED, Address(round=2)))
    log.close()
    cut = Evidence.read(own, [tmp_path / "birch", tmp_path / "cedar"])
    assert rounds > 1
    assert federation_run(cut, RunKind.TOKENS).recorded == 1


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    own = owners_folder(tmp_path / "alder", path=False)
    cases = {
        "audit-start": (own, []),
        "run-dir-none": (tmp_path / "nothing", []),
        "transcript-none": (owners_folder(tmp_path / "second"), [tmp_path / "birch"]),
        "transcript-own": (owners_folder(tmp_path / "third"), [recorded(tmp_path / "fourth", "transcript", "alder")]),
    }
    for code, (folder, received) in cases.items():
        with pytest.raises(CoterieError) as caught:
            Evidence.read(folder, received)
        assert caught.value.code == code


def test_a_run_of_one_party_alone_is_none(tmp_path: Path) -> None:
    own = owners_folder(tmp_path / "alder")
    (own / "run.json").write_text('{"run": "r1"}')
    with pytest.raises(CheckpointError) as caught:
        Evidence.read(own, [])
    assert caught.value.code == "run-dir-none"


def test_what_a_later_version_recorded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="more") as caught:
        Transcript.read(recorded(tmp_path / "birch", "transcript", "birch", more=1))
    assert caught.value.code == "transcript-damaged"
    with pytest.raises(CheckpointError, match="`more`") as caught:
        Answers.read(recorded(tmp_path / "alder", "transcript-answers", "alder", more=1))
    assert caught.value.code == "format-unknown"


def test_a_key_with_entries_of_another_kind_is_refused(tmp_path: Path) -> None:
    folder = recorded(tmp_path, "transcript-answers", "alder")
    head = {**FACTS, "kind": "transcript-answers", "party": "alder", "run": "r1", "agreement": "a1"}
    log = FrameLog(folder / "private" / "transcript-answers", head, [*PARTIES, "own"], 1 << 20)
    log.append("own", FrameType.ONE_WAY, Lane.CONTROL, Message("masked-lot", Address(round=1)))
    log.close()
    with pytest.raises(CheckpointError, match="`masked-lot`") as caught:
        Answers.read(folder)
    assert caught.value.code == "format-unknown"
