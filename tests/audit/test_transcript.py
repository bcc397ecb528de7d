"""A transcript is what a party received, byte for byte, and nothing else; the key says what it was made of."""

from __future__ import annotations

import stat
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from coterie.audit.answers import Answers
from coterie.audit.transcript import Dispatch, Transcript
from coterie.config import FederationConfig, PrivacySpec
from coterie.errors import CheckpointError
from coterie.federation.identity.certificates import COORDINATOR
from coterie.federation.wire.frame_log import files_in
from coterie.federation.wire.transport import Lane, Message
from coterie.models.seam import expert_layers
from coterie.training.metrics import read_metrics
from coterie.training.party.in_process import InProcessFederation
from coterie.training.party.inputs import PartyInputs, PrivacyInputs
from coterie.training.party.run import PartyResult
from coterie.training.purging import purge
from helpers.federations import PARTIES, full_models, make_parts, settings

RECORDED = {"rounds": "all", "max_gib": 1.0}
PATIENT = {"deadline_s": 60.0, "round_deadline_s": 600.0, "join_deadline_s": 300.0}
"""However busy the machine: an attempt that is tried again would be recorded twice."""
Seen = dict[str, list[tuple[str, bool, Lane, Message]]]


class Wiretap:
    """A transport that tells what arrives, written against the interface alone."""

    def __init__(self, transport: Any, seen: list[tuple[str, bool, Lane, Message]]) -> None:
        self._transport, self._seen, self._lock = transport, seen, threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def start(self, handler: Callable[[str, Lane, Message], Message | None]) -> None:
        def heard(peer: str, lane: Lane, message: Message) -> Message | None:
            self._hear(peer, False, lane, message)
            return handler(peer, lane, message)

        self._transport.start(heard)

    def request_async(self, peer: str, lane: Lane, message: Message, deadline_s: float) -> Future[Message]:
        future: Future[Message] = self._transport.request_async(peer, lane, message, deadline_s)
        future.add_done_callback(
            lambda done: done.exception() is None and self._hear(peer, True, lane, done.result())  # type: ignore[func-returns-value]
        )
        return future

    def _hear(self, peer: str, reply: bool, lane: Lane, message: Message) -> None:
        if peer != COORDINATOR:
            copied = tuple(tensor.clone() for tensor in message.tensors)
            with self._lock:
                self._seen.append((peer, reply, lane, Message(message.kind, message.address, message.body, copied)))


def run(config: FederationConfig, parts: dict[str, PartyInputs], folder: Path) -> tuple[InProcessFederation, Seen]:
    """A federation from beginning to end, and what a wiretap before each party heard."""
    federation, seen = InProcessFederation(config, folder / "coordinator"), {name: [] for name in parts}
    plain = federation.hub.transport
    federation.coordinate()
    federation.hub.transport = lambda name: Wiretap(plain(name), seen[name])  # type: ignore[assignment]
    for each in parts.values():
        federation.up(each)
    federation.join(900.0)
    for end in federation.ends.values():
        if isinstance(end, BaseException):
            raise end
    return federation, seen


def recorded(folder: Path, **changes: object) -> tuple[dict[str, PartyInputs], Seen]:
    """Two rounds, each evaluated, recorded whole."""
    config = settings(**PATIENT, train__rounds=2, train__eval_every=1, transcript=RECORDED, **changes)
    parts = make_parts(config, full_models(), folder)
    return parts, run(config, parts, folder)[1]


def facts(peer: str, reply: bool, lane: str, kind: str, at: Any, body: Any, tensors: Any) -> tuple:
    raw = [(t.dtype, tuple(t.shape), t.contiguous().view(torch.uint8).numpy().tobytes()) for t in tensors]
    return (peer, reply, lane, kind, *(getattr(at, n) for n in NUMBERS), tuple(sorted(body.items())), tuple(raw))


NUMBERS = ("round", "attempt", "micro_batch", "layer", "call", "part", "chunk")


@pytest.mark.parametrize("exchange", ["tokens", "experts"])
def test_it_equals_what_a_wiretap_heard(exchange: str, tmp_path: Path) -> None:
    privacy = {} if exchange == "tokens" else {"privacy": "none", "trunk": "shared"}
    parts, seen = recorded(tmp_path, exchange=exchange, **privacy)
    for party in PARTIES:
        transcript = Transcript.read(parts[party].run_dir)
        assert (transcript.party, transcript.exchange, transcript.parties) == (party, exchange, PARTIES)
        found = [facts(e.peer, e.reply, e.lane, e.kind, e, dict(e.body), e.tensors.values()) for e in transcript]
        heard = [
            facts(p, r, lane.name.lower(), m.kind, m.address, m.body, m.tensors) for p, r, lane, m in seen[party]
        ]
        assert sorted(found, key=repr) == sorted(heard, key=repr)
        for peer in PARTIES:  # one peer's lane is heard by one thread: there the order is that of arrival
            for lane in ("control", "forward", "backward"):
                assert [e for e in found if e[:3] == (peer, False, lane)] == [
                    e for e in heard if e[:3] == (peer, False, lane)
                ]
        phases = {(e.kind, e.phase) for e in transcript if not e.reply}
        only = (
            ("dispatch", "gradient", "tokens") if exchange == "tokens" else ("push-end", "weights-offer", "declare")
        )
        assert {(kind, "train") for kind in only} <= phases
        assert ("dispatch" if exchange == "tokens" else "weights-offer", "evaluation") in phases
        assert not {"gradient", "push-end", "declare"} & {kind for kind, phase in phases if phase == "evaluation"}


def test_without_the_setting_nothing_is_written(tmp_path: Path) -> None:
    config = settings(**PATIENT, train__rounds=1)
    parts = make_parts(config, full_models(), tmp_path)
    run(config, parts, tmp_path)
    assert not list(tmp_path.glob("*/private/transcript*"))
    with pytest.raises(CheckpointError) as caught:
        Transcript.read(parts["birch"].run_dir)
    assert caught.value.code == "transcript-none"
    with pytest.raises(CheckpointError) as caught:
        Answers.read(parts["birch"].run_dir)
    assert caught.value.code == "answers-none"


@pytest.mark.parametrize("combine", ["host", "owner"])
def test_rows_of_the_key_are_the_rows_that_crossed(combine: str, tmp_path: Path) -> None:
    """Layer 0's hidden vectors follow from the owner's starting trunk and its text: computed here by plain HF."""
    parts, _ = recorded(tmp_path, combine=combine)
    owner, answers = parts["alder"], Answers.read(parts["alder"].run_dir)
    assert (answers.owner, answers.run) == ("alder", Transcript.read(parts["birch"].run_dir).run)
    start, figures = full_models()["alder"], read_metrics(owner.run_dir / "private")
    committed = {(row["round"], row["attempt"]) for row in figures if "attempt" in row}
    seen_records: set[tuple[str, int]] = set()
    for host in ("birch", "cedar"):
        for dispatch in Transcript.read(parts[host].run_dir, "alder").dispatches():
            rows = answers.rows(host, dispatch)
            data = owner.train if dispatch.phase == "train" else owner.test
            assert data is not None
            real = rows.ids_M >= 0
            for at in real.nonzero().flatten().tolist():
                record, position = int(rows.record_M[at]), int(rows.position_M[at])
                ids = data[record]["input_ids"]
                assert int(rows.ids_M[at]) == int(ids[position])
                assert int(rows.next_M[at]) == (int(ids[position + 1]) if position + 1 < len(ids) else -1)
                assert int(rows.document_M[at]) == int(data.document_S[record])
            seen_records |= {(dispatch.phase, int(record)) for record in rows.record_M[real]}
            if dispatch.round == 1 and dispatch.phase == "train" and dispatch.layer == 0:
                hidden = first_inputs(start, owner, rows.record_M[real].unique().tolist())
                for at in real.nonzero().flatten().tolist():
                    expected = hidden[int(rows.record_M[at])][int(rows.position_M[at])]
                    torch.testing.assert_close(dispatch.hidden_MD[at], expected, rtol=1e-4, atol=1e-5)
            if (dispatch.round, dispatch.attempt) in committed:
                assert dispatch.gradient is not None
                lines = len(dispatch.hidden_MD) if combine == "host" else len(dispatch.ids_P)
                assert dispatch.gradient.shape == (lines, dispatch.hidden_MD.shape[1])
            elif dispatch.phase == "evaluation":
                assert dispatch.gradient is None
    assert {record for phase, record in seen_records if phase == "evaluation"} == set(range(7)), "all held-out text"


def first_inputs(model: nn.Module, owner: PartyInputs, records: list[int]) -> dict[int, torch.Tensor]:
    """What goes into the first MoE layer's experts for whole records, [T, D] each."""
    caught: list[torch.Tensor] = []
    layer = expert_layers(model)[0]
    hook = layer.module.register_forward_pre_hook(lambda module, args: caught.append(args[0].detach()))
    try:
        found = {}
        for record in records:
            with torch.no_grad():
                model(input_ids=owner.train[record]["input_ids"].unsqueeze(0))
            found[record] = caught.pop()
        return found
    finally:
        hook.remove()


def test_a_push_is_the_sum_of_its_records_gradients(tmp_path: Path) -> None:
    config = settings(
        **PATIENT,
        exchange="experts", privacy="none", trunk="shared", weights_dtype="float32", train__rounds=2,
        transcript={"rounds": 1},
    )  # fmt: skip
    one = full_models()["alder"]
    parts = make_parts(config, dict.fromkeys(PARTIES, one), tmp_path)
    run(config, parts, tmp_path)
    answers = Answers.read(parts["alder"].run_dir)
    pushes = list(Transcript.read(parts["birch"].run_dir, "alder").pushes())
    assert {push.round for push in pushes} == {1}, "the second round was not to be recorded"
    assert {push.part.host for push in pushes} == {"birch"}
    named, layers = dict(one.named_parameters()), expert_layers(one)
    transcript = Transcript.read(parts["birch"].run_dir)
    served = transcript.weights(1, 1)
    assert {number for number, part in enumerate(transcript.parts) if part.host != "birch"} == served.keys()
    for number, tensors in served.items():
        part = transcript.parts[number]
        for name, value in tensors.items():
            whole = named[name] if part.layer < 0 else layers[part.layer].parameters()[name][list(part.experts)]
            assert torch.equal(value, whole.detach()), name
    records = answers.records(pushes[0])
    assert len(records) == config.train.batch_size
    for record in records:
        assert list(record.ids) == parts["alder"].train[record.row]["input_ids"].tolist()
        ids = torch.tensor(record.ids).unsqueeze(0)
        logits = one(input_ids=ids, use_cache=False).logits[0, :-1]
        functional.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
    for push in pushes:
        for name, found in push.sums.items():
            grad = named[name].grad if push.part.layer < 0 else layers[push.part.layer].parameters()[name].grad
            assert grad is not None
            expected = grad if push.part.layer < 0 else grad[list(push.part.experts)]
            assert float((found - expected).norm()) <= 1e-4 * float(expected.norm()) + 1e-7, name


def test_a_private_run_records_the_noised_sums_and_the_owners_key_the_lots(tmp_path: Path) -> None:
    """What a host keeps is what was spooled to be sent; nothing un-noised but the lots' records is anywhere new."""
    rules = {"epsilon": 8.0, "delta": 1e-3, "lot_size": 6, "isolation": "fast"}
    config = settings(
        **PATIENT, exchange="experts", privacy=rules, trunk="shared", train__rounds=2, transcript=RECORDED
    )
    models = full_models()
    parts = make_parts(config, dict.fromkeys(PARTIES, models["alder"]), tmp_path)
    parts = {name: with_budget(each, tmp_path / f"{name}-ledger") for name, each in parts.items()}
    run(config, parts, tmp_path)
    answers = Answers.read(parts["alder"].run_dir)
    received = Transcript.read(parts["birch"].run_dir, "alder")
    pushes = list(received.pushes())
    assert {push.round for push in pushes} == {1, 2}
    lots = {push.round: [record.row for record in answers.records(push)] for push in pushes}
    figures = read_metrics(parts["alder"].run_dir / "private")
    sizes = {int(row["round"] or 0): row["drawn_not_private"] for row in figures if "drawn_not_private" in row}
    assert {number: len(rows) for number, rows in lots.items()} == sizes
    assert all(rows == sorted(set(rows)) for rows in lots.values())
    names = {path.name for path in (parts["alder"].run_dir / "private").iterdir()}
    assert {"transcript", "transcript-answers"} <= names
    kinds = {entry.kind for entry in received if not entry.reply}
    assert kinds == {"weights-offer", "weights-chunk", "declare", "push-begin", "push-chunk", "push-end"}


def with_budget(parts: PartyInputs, ledger: Path) -> PartyInputs:
    assert parts.federation.privacy is not None
    rules = parts.federation.privacy.model_dump()  # type: ignore[union-attr]
    spec = PrivacySpec(**rules, ledger=ledger, physical_batch=4)
    return replace(parts, privacy=PrivacyInputs(spec, parts.federation.train.rounds))


def test_it_stops_at_the_agreed_size_says_so_and_training_goes_on(tmp_path: Path) -> None:
    limit = 60_000
    config = settings(
        **PATIENT, train__rounds=2, train__eval_every=1, transcript={"rounds": "all", "max_gib": limit / 2**30}
    )
    parts = make_parts(config, full_models(), tmp_path)
    federation, seen = run(config, parts, tmp_path)
    assert all(end.finished for end in federation.ends.values() if isinstance(end, PartyResult))
    found = Transcript.read(parts["birch"].run_dir)
    assert found.stopped in (1, 2)
    assert sum(path.stat().st_size for path in found.files) <= limit
    assert 0 < len(list(found)) < len(seen["birch"])


def test_recording_changes_no_loss(tmp_path: Path) -> None:
    losses = []
    for transcript in (None, RECORDED):
        folder = tmp_path / str(transcript is None)
        config = settings(**PATIENT, exchange="experts", privacy="none", train__rounds=2, transcript=transcript)
        parts = make_parts(config, full_models(), folder)
        federation, _ = run(config, parts, folder)
        losses.append({name: end.loss for name, end in federation.ends.items() if isinstance(end, PartyResult)})
    assert losses[0] == losses[1]
    assert set(losses[0]) == set(PARTIES)


def test_files_are_the_owners_alone_and_purge_removes_them(tmp_path: Path) -> None:
    parts, _ = recorded(tmp_path)
    run_dir = parts["alder"].run_dir
    folders = [run_dir / "private" / name for name in ("transcript", "transcript-answers")]
    for folder in folders:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert {stat.S_IMODE(path.stat().st_mode) for path in files_in(folder)} == {0o600}
    (run_dir / "config.yaml").write_text(PLAIN, encoding="utf-8")  # in-process runs keep no party.yaml
    removed = purge(run_dir).removed
    assert {*folders} <= {*removed}
    assert not any(folder.exists() for folder in folders)


PLAIN = "model: {family: olmoe}\ndata: {train: [a.txt]}\ntrain: {rounds: 1}\nrun_dir: .\n"


def test_transcripts_of_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    (first, _), (second, _) = recorded(tmp_path / "a"), recorded(tmp_path / "b")
    ours, theirs = (Transcript.read(parts["birch"].run_dir) for parts in (first, second))
    assert ours.run != theirs.run
    theirs.files[0].rename(ours.files[0].with_name("000009.frames"))
    with pytest.raises(CheckpointError) as caught:
        Transcript.read(first["birch"].run_dir)
    assert caught.value.code == "transcript-mixed"


def test_a_key_that_does_not_know_a_dispatch_says_so(tmp_path: Path) -> None:
    parts, _ = recorded(tmp_path)
    answers = Answers.read(parts["alder"].run_dir)
    strange = next(iter(Transcript.read(parts["birch"].run_dir, "cedar").dispatches()))
    assert isinstance(strange, Dispatch)
    with pytest.raises(CheckpointError) as caught:
        answers.rows("nobody", strange)
    assert caught.value.code == "answers-missing"


def test_without_evaluation_no_held_out_text_crosses_and_no_loss_is_known(tmp_path: Path) -> None:
    parts, _ = recorded(tmp_path, evaluate=False)
    for party in PARTIES:
        assert {entry.phase for entry in Transcript.read(parts[party].run_dir)} == {"train"}
        assert not (parts[party].run_dir / "private" / "evaluation.safetensors").exists()
