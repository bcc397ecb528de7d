"""A federation's round: arithmetic by hand, and bytes that crossed."""

from __future__ import annotations

from pathlib import Path

import pytest

from coterie.cli.app import main
from coterie.config import FederationConfig, PrivacySpec, TrainConfig, dump_yaml
from coterie.training.party import planned_time
from coterie.training.party.in_process import run_in_process
from coterie.training.party.planned_time import planned_round
from coterie.training.planning.plan import make_plan
from coterie.training.planning.round_time import PartyLoad, experts_round, tokens_round
from coterie.training.single.calibrated import Calibration
from helpers.counted_products import CountedProducts
from helpers.federations import PARTIES, experts_settings, full_models, make_parts, settings
from helpers.private_settings import private_settings

SIZES = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_experts": 6, "num_experts_per_tok": 2, "max_position_embeddings": 32,
}  # fmt: skip
MODEL = {"family": "olmoe", "config": SIZES}


def test_experts_hide_the_fetch_behind_computing_and_never_the_push() -> None:
    quick = PartyLoad("alder", 10, 0.5, 1.0, 0.5, first=100, fetched=1000, served=800, pushed=2000, taken=1500)
    slow = PartyLoad("birch", 10, 2.0, 1.0, 0.5, first=100, fetched=1000, served=800, pushed=2000, taken=1500)
    found = experts_round([quick, slow], 100.0, rounds=3)
    alder, birch = found.parties
    # The first layer 1 s; then 5 s of computing beside 9 s of fetching; noise 1 s, masks 0.5 s; the push 20 s.
    assert alder.own == pytest.approx(1 + 9 + 1 + 0.5 + 20)
    assert (alder.computing, alder.fixed, alder.masks, alder.line) == pytest.approx((5, 1, 0.5, 25))
    # 20 s of computing hide all that comes after the first layer.
    assert birch.own == pytest.approx(1 + 20 + 1 + 0.5 + 20)
    assert (alder.waiting, birch.waiting) == pytest.approx((11, 0))
    assert (found.slowest, found.seconds, found.run_seconds) == ("birch", pytest.approx(42.5), pytest.approx(127.5))


def test_a_host_that_serves_everybody_is_the_line_that_all_wait_for() -> None:
    alone = PartyLoad("alder", 1, 0.0, fetched=0, served=3000, pushed=0, taken=6000)
    other = PartyLoad("birch", 1, 0.0, fetched=3000, pushed=6000)
    found = experts_round([alone, other], 100.0, rounds=1)
    assert [each.own for each in found.parties] == pytest.approx([90, 90])


def test_a_round_of_constant_work_ends_no_earlier_than_agreed() -> None:
    load = PartyLoad("alder", 2, 1.0, pushed=300)
    assert experts_round([load], 100.0, 1).seconds == pytest.approx(5)
    assert experts_round([load], 100.0, 1, push_after_s=30.0).seconds == pytest.approx(33)


def test_tokens_travel_while_others_are_computed_but_for_one_micro_batch() -> None:
    load = PartyLoad("alder", 4, 1.0, 0.25, fetched=200)
    assert tokens_round([load], 100.0, 1, in_flight=1).seconds == pytest.approx(4 + 2 + 0.25)
    assert tokens_round([load], 100.0, 1, in_flight=2).seconds == pytest.approx(4 + 0.5 + 0.25)
    narrow = PartyLoad("alder", 4, 1.0, 0.25, fetched=2000)
    assert tokens_round([narrow], 100.0, 1, in_flight=2).seconds == pytest.approx(20 + 0.25)


def test_planned_traffic_of_every_line_is_what_crossed_it(tmp_path: Path) -> None:
    """Both directions of each party's line, serving and taking included, over two rounds."""
    config = experts_settings(train__rounds=2, evaluate=False, weights_dtype="bfloat16")
    models = full_models()
    parts = make_parts(config, models, tmp_path)
    _, results = run_in_process(config, list(parts.values()), tmp_path / "coordinator")
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "num_experts", "num_experts_per_tok",
    )  # fmt: skip
    sizes = {name: getattr(models["alder"].config, name) for name in names}
    whole = config.model_copy(update={"model": config.model.model_copy(update={"config": sizes})})
    for each in (row for row in make_plan(whole).parties if row.exchange == "experts"):
        wire = results[each.party].wire.values()
        assert None not in (each.down, each.up, each.served, each.taken)
        # Two rounds, and the weights once more for the model that a party ends with.
        assert sum(peer["tensors_received"] for peer in wire) == 3 * each.down + 2 * each.taken  # type: ignore[operator]
        assert sum(peer["tensors_sent"] for peer in wire) == 3 * each.served + 2 * each.up  # type: ignore[operator]


@pytest.mark.parametrize(
    "config",
    [
        settings(model=MODEL),
        experts_settings(model=MODEL),
        private_settings(
            model=MODEL, privacy__lot_size=7, aggregation="masked", noise_multiplier=2.0, weights_dtype="bfloat16"
        ),
    ],
    ids=["tokens", "plain", "masked"],
)
def test_a_round_of_every_kind_is_measured_here(config: FederationConfig) -> None:
    with CountedProducts() as work:
        found = planned_round(config, make_plan(config), 9, bytes_per_second=1e6, clock=work.clock)
    assert [each.party for each in found.parties] == list(PARTIES)
    for each in found.parties:
        assert each.computing > 0
        assert each.line > 0
        assert (each.masks > 0) == (config.aggregation == "masked")
    assert found.run_seconds == found.seconds * config.train.rounds


def test_the_command_shows_the_round_of_the_slowest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Calibration(0.0, 3.0, 0.5, 0, (1, 2, 3), 0.0)
    asked: list[TrainConfig] = []

    def calibrated(config: TrainConfig, *_: object) -> Calibration:
        asked.append(config)
        return here

    monkeypatch.setattr(planned_time, "calibrate_model", calibrated)
    path = tmp_path / "federation.yaml"
    dump_yaml(path, private_settings(model=MODEL, privacy__lot_size=180, train__rounds=10))
    records = [word for each in ("alder=1600", "birch=800", "cedar=1200") for word in ("--records", each)]
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(path), *records, "--sequence-length", "10", "--speed", "birch=0.25"])
    assert ended.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    # The proposed lots are 240, 120 and 180 records of half a second; birch is four times as slow.
    assert "alder 120 s 3 s 0 s" in said
    assert "birch 240 s 12 s 0 s" in said
    assert "the slowest is birch" in said
    config, with_adapters = asked
    assert with_adapters.privacy == config.privacy
    assert isinstance(config.privacy, PrivacySpec)
    # Against hosts that choose the weights a record is computed alone, and so it is timed.
    assert (config.privacy.isolation, config.data.sequence_length) == ("exact", 10)
    assert "lot_sizes: {alder: 240, birch: 120, cedar: 180}" in said


@pytest.mark.parametrize("given", ["dogwood=1", "birch=0", "birch=fast", "birch=nan"])
def test_a_speed_that_is_none_is_one_sentence(given: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "federation.yaml"
    dump_yaml(path, private_settings(model=MODEL))
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(path), "--sequence-length", "10", "--speed", given])
    assert ended.value.code == 1
    assert "Error plan-speed" in capsys.readouterr().err
