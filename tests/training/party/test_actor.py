"""Parties that train together in one process, against the same training written out by hand."""

from __future__ import annotations

import gc
import shutil
import types
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from coterie.cli.status import show
from coterie.errors import CheckpointError, DataError, RoundError
from coterie.federation.cancel import CancelToken
from coterie.federation.rounds.run_folder import read_status
from coterie.federation.wire.in_process import InProcessHub
from coterie.models.seam import expert_layers
from coterie.training.data.packing import Batch, Sequences
from coterie.training.metrics import read_metrics
from coterie.training.party.in_process import InProcessFederation, run_in_process
from coterie.training.party.run import PartyResult
from helpers.by_hand import ByHand, train_by_hand
from helpers.federations import PARTIES, assert_same, full_models, make_parts, settings, tokens_of
from helpers.kills import Deadly, Killed
from helpers.waiting import until


@pytest.mark.parametrize("in_flight", [1, 2])
def test_three_parties_train_as_the_same_loop_by_hand(tmp_path: Path, in_flight: int):
    config = settings(train__in_flight=in_flight)
    models = full_models()
    parts = make_parts(config, models, tmp_path)
    federation, results = run_in_process(config, list(parts.values()), tmp_path / "coordinator")
    train_by_hand(config, models, parts)
    assert_same(federation, models)
    assert all(result.finished and result.rounds == 4 for result in results.values())
    assert all(result.loss is not None for result in results.values())


# Cedar hosts nothing; alder hosts nothing of layer 1.
UNEVEN = {
    0: {0: "alder", 1: "birch", 2: "alder", 3: "birch", 4: "alder", 5: "birch", 6: "alder", 7: "birch"},
    1: dict.fromkeys(range(8), "birch"),
    2: {expert: ("alder", "birch")[expert // 4] for expert in range(8)},
}


def test_party_that_hosts_no_expert_trains_like_the_others(tmp_path: Path):
    config = settings(placement=UNEVEN)
    models = full_models()
    parts = make_parts(config, models, tmp_path)
    assert not any(parts["cedar"].placement.hosted("cedar").values())
    federation, results = run_in_process(config, list(parts.values()), tmp_path / "coordinator")
    train_by_hand(config, models, parts)
    assert_same(federation, models)
    assert all(result.finished for result in results.values())
    assert [s.state.committed_attempt for s in federation.statuses if s.state.phase == "step"] == [1, 1, 1, 1]


def test_parties_hold_no_weights_of_experts_hosted_elsewhere(tmp_path: Path):
    config = settings(train__rounds=1)
    models = full_models()
    parts = make_parts(config, models, tmp_path)
    federation, _ = run_in_process(config, list(parts.values()), tmp_path / "coordinator")
    for name in PARTIES:
        run = federation.runs[name]
        hosted = parts[name].placement.hosted(name)
        for layer in expert_layers(run.actor.inputs.model):
            for param in layer.parameters().values():
                assert param.is_meta
            for parameter, stacked in tokens_of(run).host.shard.weights(layer.index).items():
                assert stacked.shape[0] == len(hosted[layer.index]), parameter
        saved = {key for key in tokens_of(run).host.state_dict() if "/" not in key}
        assert {tuple(map(int, key.split(".")[1:4:2])) for key in saved} == {
            (layer, expert) for layer, experts in hosted.items() for expert in experts
        }


def reachable_tensors(root: object) -> Iterator[torch.Tensor]:
    """Every tensor with storage that can be reached from an object, the hub between parties left out."""
    seen: set[int] = set()
    todo = [root]
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, (type, types.ModuleType, InProcessHub)):
            continue
        if isinstance(item, dict) and "__builtins__" in item:  # a module's globals
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor) and not item.is_meta:
            yield item
        todo.extend(gc.get_referents(item))


def test_no_tensor_of_a_party_has_the_values_of_a_foreign_expert(tmp_path: Path):
    """Looks at every tensor a party can reach; its own experts are the positive control."""
    config = settings(train__rounds=1)
    models = full_models()
    parts = make_parts(config, models, tmp_path)
    federation, _ = run_in_process(config, list(parts.values()), tmp_path / "coordinator")
    experts = {name: tokens_of(federation.runs[name]).host.state_dict() for name in PARTIES}
    for name in PARTIES:
        held = [tensor.detach() for tensor in reachable_tensors(federation.runs[name])]
        for host in PARTIES:
            rows = [value.flatten() for key, value in experts[host].items() if key.endswith("down_proj")]
            found = [
                any(
                    bool((tensor.reshape(-1, row.numel()) == row).all(1).any())
                    for tensor in held
                    if tensor.dtype == row.dtype and tensor.numel() and tensor.numel() % row.numel() == 0
                )
                for row in rows
            ]
            assert all(found) if host == name else not any(found), (name, host)


def test_others_go_on_without_a_lost_party_and_its_experts_masked(tmp_path: Path):
    """Cedar dies in round 3 of 5; the others' parameters are those of a loop by hand without it and its experts."""
    config = settings(
        train__rounds=5, train__micro_batch=6, train__in_flight=1, deadline_s=4.0, lost_party="continue"
    )
    models = full_models()
    parts = make_parts(config, models, tmp_path)
    parts["cedar"] = replace(parts["cedar"], train=Deadly(**vars(parts["cedar"].train)))
    federation = InProcessFederation(config, tmp_path / "coordinator")
    federation.coordinate()
    for each in parts.values():
        federation.up(each)
    federation.join()
    assert isinstance(federation.ends["cedar"], Killed)
    assert any("going on without cedar" in status.state.note for status in federation.statuses)
    by_hand = ByHand(config, models, parts)
    by_hand.train([1, 2])
    by_hand.train([3, 4, 5], ("alder", "birch"), parts["cedar"].placement.hosted("cedar"))
    assert_same(federation, models, parties=("alder", "birch"))


def test_run_that_went_on_without_a_party_is_taken_up_with_its_older_checkpoint(tmp_path: Path):
    config = settings(train__rounds=7, deadline_s=4.0, lost_party="continue")
    models = full_models()
    parts = make_parts(config, models, tmp_path)
    cedar = Deadly(**vars(parts["cedar"].train))
    object.__setattr__(cedar, "last", 8)  # three micro-batches a round: dies in the third
    parts["cedar"] = replace(parts["cedar"], train=cedar)
    federation = InProcessFederation(config, tmp_path / "coordinator")
    federation.coordinate()
    for each in parts.values():
        federation.up(each)
    until(lambda: any(s.state.committed >= 4 for s in federation.statuses))
    federation.runs["alder"].stop()
    federation.join()
    stopped = federation.ends["alder"]
    assert isinstance(stopped, PartyResult)
    assert not stopped.finished
    federation, results = run_in_process(
        config, list(make_parts(config, models, tmp_path).values()), tmp_path / "coordinator"
    )
    assert all(result.finished and result.rounds == 7 for result in results.values())
    (restore,) = [status.state for status in federation.statuses if status.state.phase == "restore"]
    assert {name: saved.round for name, saved in restore.sources.items()} == {
        "alder": stopped.rounds,
        "birch": stopped.rounds,
        "cedar": 2,
    }
    assert not federation.statuses[-1].state.absent


def test_killed_party_comes_back_and_the_result_is_that_of_an_uninterrupted_run(tmp_path: Path):
    config = settings(train__rounds=6, deadline_s=4.0)
    models = full_models()
    parts = make_parts(config, models, tmp_path)
    federation = InProcessFederation(config, tmp_path / "coordinator")
    federation.coordinate()
    for each in parts.values():
        federation.up(each)
    until(lambda: any(s.state.phase == "compute" and s.state.round == 4 for s in federation.statuses))
    federation.kill("birch")
    federation.up(make_parts(config, models, tmp_path)["birch"])
    federation.join()
    assert all(not isinstance(end, BaseException) for end in federation.ends.values()), federation.ends
    restores = [s.state for s in federation.statuses if s.state.phase == "restore"]
    assert [state.round for state in restores] == [0, 2]
    train_by_hand(config, models, parts)
    assert_same(federation, models)


def test_clean_stop_and_a_later_start_give_the_parameters_of_an_uninterrupted_run(tmp_path: Path):
    config = settings(train__rounds=5, train__checkpoint_every=0)
    models = full_models()
    parts = make_parts(config, models, tmp_path)
    federation = InProcessFederation(config, tmp_path / "coordinator")
    federation.coordinate()
    for each in parts.values():
        federation.up(each)
    until(lambda: any(s.state.committed >= 2 for s in federation.statuses))
    federation.runs["cedar"].stop()
    federation.join()
    stopped = federation.ends["alder"]
    assert isinstance(stopped, PartyResult)
    assert not stopped.finished
    assert 2 <= stopped.rounds < 5
    federation, results = run_in_process(
        config, list(make_parts(config, models, tmp_path).values()), tmp_path / "coordinator"
    )
    assert all(result.finished for result in results.values())
    train_by_hand(config, models, parts)
    assert_same(federation, models)
    rounds = [row["round"] for row in read_metrics(tmp_path / "alder" / "private") if "lr" in row]
    assert rounds == [1, 2, 3, 4, 5]


class Unreadable(Sequences):
    """Text on a disk that fails."""

    failures = 10**6

    def batch(self, rows: Sequence[int]) -> Batch:
        if self.failures:
            object.__setattr__(self, "failures", self.failures - 1)
            raise DataError("disk error at /private/path, record 17", code="data-unreadable")
        return super().batch(rows)


def test_start_of_a_finished_run_says_so_and_trains_nothing(tmp_path: Path):
    config = settings(train__rounds=1)
    models = full_models()
    parts = make_parts(config, models, tmp_path)
    _, first = run_in_process(config, list(parts.values()), tmp_path / "coordinator")
    again = make_parts(config, models, tmp_path)
    _, second = run_in_process(config, list(again.values()), tmp_path / "coordinator")
    for name in PARTIES:
        assert second[name].finished
        assert second[name].loss == first[name].loss
        assert len([row for row in read_metrics(tmp_path / name / "private") if "lr" in row]) == 1


def test_lost_checkpoint_ends_the_start_and_names_who_lacks_it(tmp_path: Path):
    config = settings(train__rounds=5)
    models = full_models()
    federation = InProcessFederation(config, tmp_path / "coordinator")
    federation.coordinate()
    for each in make_parts(config, models, tmp_path).values():
        federation.up(each)
    until(lambda: any(s.state.committed >= 1 for s in federation.statuses))
    federation.runs["birch"].stop()
    federation.join()
    shutil.rmtree(tmp_path / "birch" / "private" / "checkpoints")
    federation = InProcessFederation(config, tmp_path / "coordinator")
    federation.coordinate()
    for each in make_parts(config, models, tmp_path).values():
        federation.up(each)
    federation.join()
    for name in (*PARTIES, "coordinator"):
        error = federation.ends[name]
        assert isinstance(error, CheckpointError)
        assert error.code == "checkpoint-none-common"
        assert "birch lacks round" in error.message


def test_status_is_written_anew_with_each_heartbeat_and_tells_of_a_silent_coordinator(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = settings(train__rounds=100000, train__checkpoint_every=0, join_deadline_s=600.0)
    parts = make_parts(config, full_models(), tmp_path)
    federation = InProcessFederation(config, tmp_path / "coordinator")
    federation.coordinate()
    for each in parts.values():
        federation.up(each)
    until(lambda: any(s.state.committed >= 1 for s in federation.statuses))
    federation.runs["alder"]._certificate_warning = lambda: "ends in 19 days"
    status: dict[str, object] = {}

    def beaten() -> bool:
        federation.runs["alder"]._beat(42.0)
        status.update(read_status(tmp_path / "alder"))
        return status["coordinator_silent_s"] == 42.0  # a heartbeat that is answered in between says 0

    until(beaten)
    assert (status["party"], status["certificate"]) == ("alder", "ends in 19 days")
    show({**status, "running": True, "age_s": 0.0})
    assert "silent for 42 s" in capsys.readouterr().out
    until(lambda: read_status(tmp_path / "alder")["coordinator_silent_s"] < 42.0)  # the next heartbeat was answered
    federation.runs["alder"].stop()
    federation.join()


def test_wait_for_a_party_out_of_reach_ends_as_soon_as_the_attempt_no_longer_counts(tmp_path: Path):
    config = settings(deadline_s=600.0)
    parts = make_parts(config, full_models(), tmp_path)
    federation = InProcessFederation(config, tmp_path / "coordinator")
    actor = federation.up(parts["alder"]).actor  # nobody else is there
    asked = iter([True, True, False])
    with pytest.raises(RoundError) as caught:
        actor._meet((), CancelToken(lambda: not next(asked, False)))
    assert caught.value.code == "round-interrupted"
    federation.kill("alder")


def test_error_at_one_party_aborts_the_attempt_and_the_result_is_the_same(tmp_path: Path):
    config = settings()
    models = full_models()
    parts = make_parts(config, models, tmp_path)
    flaky = Unreadable(**vars(parts["birch"].train))
    object.__setattr__(flaky, "failures", 1)
    parts["birch"] = replace(parts["birch"], train=flaky)
    federation, _ = run_in_process(config, list(parts.values()), tmp_path / "coordinator")
    train_by_hand(config, models, parts)
    assert_same(federation, models)
    committed = [s.state.committed_attempt for s in federation.statuses if s.state.phase == "step"]
    assert committed == [2, 1, 1, 1]


def test_party_whose_data_fails_ends_the_run_with_its_name_and_only_a_code(tmp_path: Path):
    config = settings(max_attempts=2)
    parts = make_parts(config, full_models(), tmp_path)
    parts["birch"] = replace(parts["birch"], train=Unreadable(**vars(parts["birch"].train)))
    federation = InProcessFederation(config, tmp_path / "coordinator")
    federation.coordinate()
    for each in parts.values():
        federation.up(each)
    federation.join()
    for name in (*PARTIES, "coordinator"):
        error = federation.ends[name]
        assert isinstance(error, RoundError)
        assert error.code == "data-unreadable"
        assert "birch failed in compute of round 1 (data-unreadable), 2 times in a row" in error.message
        assert "private" not in str(error)
