"""A federation that trains adapters, as it is planned, beside what it attached, moved, held and computed."""

from __future__ import annotations

import copy
import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from coterie.cli.app import main
from coterie.config import FederationConfig, LoraSpec, dump_yaml
from coterie.errors import ModelError
from coterie.federation.wire.transport import Lane, Message
from coterie.models.lora import adapter_sizes, attach_adapters
from coterie.models.seam import expert_layers
from coterie.models.zoo.tiny import VOCAB, tiny_model
from coterie.training.data.packing import pack
from coterie.training.party import planned_time
from coterie.training.party.in_process import InProcessFederation
from coterie.training.party.planned_time import planned_round, the_other_way
from coterie.training.planning.closed_form import Adapters, Shape, predict_adapters
from coterie.training.planning.full_or_lora import usual_lora
from coterie.training.planning.plan import make_plan
from coterie.training.single.calibrated import Calibration
from helpers.adapted_federations import adapted_parts
from helpers.counted_products import CountedProducts
from helpers.federations import PARTIES, experts_of, settings
from helpers.live_tensors import live_bytes
from helpers.recorded import watch

pytest.importorskip("peft")
LORA = LoraSpec(rank=2, alpha=4.0, modules=("q_proj",))
SIZES = {"hidden_size": 96, "intermediate_size": 96, "num_hidden_layers": 4, "num_experts": 12}
LENGTH, ROUNDS = 12, 2


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "nemotron_h"])
def test_adapters_are_counted_as_peft_attaches_them(family: str) -> None:
    model = tiny_model(family)
    spec = usual_lora(expert_layers(model)[0]).model_copy(update={"rank": 3, "modules": ("o_proj",)})
    counted = adapter_sizes(model, spec)
    adapted = attach_adapters(model, spec, seed=0)
    attached = sorted(param.numel() for param in adapted.parameters() if param.requires_grad)
    assert sorted((*counted.experts, *counted.modules)) == attached


def test_a_module_that_no_layer_is_called_is_refused_by_name() -> None:
    for name in ("q_projection", "experts"):
        with pytest.raises(ModelError, match=rf"(?s)`lora\.modules` names `{name}`.*choose from: .*q_proj"):
            attach_adapters(tiny_model("olmoe"), LoraSpec(modules=(name,)), seed=0)


def test_state_of_adapters_is_what_arithmetic_says() -> None:
    """Ten values trained of 1,000 frozen, in bfloat16, four of the ten hosted here; three parties, two layers."""
    shape = Shape(trunk=100, experts=900, layers=2, parties=3, own=300, compute_bytes=2, wire_bytes=2)
    assert predict_adapters("centralised", shape, Adapters(8, 2)).device == 2 * 1000 + 16 * 10
    found = predict_adapters("experts", shape, Adapters(8, 2, stored=4, matrix=25))
    assert found.device == 2 * 100 + 2 * 2 * 450 + 4 * (10 + 5)
    assert found.host == 2 * (900 + 4) + 16 * (4 + 2) + 12 * 10 + 4 * 3 * 4
    wide = predict_adapters("experts", replace(shape, compute_bytes=4), Adapters(8, 2, stored=4, matrix=25))
    assert wide.device == 4 * 100 + 2 * 2 * 450 + 4 * 25 + 4 * (10 + 5), "one expert's matrix is widened"


def test_bytes_memory_and_work_of_a_federation_with_adapters_are_those_planned(tmp_path: Path) -> None:
    """Adapters as narrow beside the experts as rank 8 is in a model of width 2,048."""
    lora = LORA.model_copy(update={"rank": 1})
    config = settings(
        exchange="experts", privacy="none", trunk="private", lora=lora.model_dump(), train__rounds=ROUNDS,
        train__batch_size=4, train__micro_batch=1, evaluate=False, deadline_s=60.0,
    )  # fmt: skip
    one = tiny_model("olmoe", seed=0, **SIZES)
    parts = adapted_parts(config, {name: copy.deepcopy(one) for name in PARTIES}, tmp_path, lora)
    rows = torch.randint(3, VOCAB, (12, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    text = pack(rows, sequence_length=LENGTH, packing="records", end_id=None)
    config = config.model_copy(update={"model": config.model.model_copy(update={"config": sizes_of(one)})})
    plan, work = make_plan(config), CountedProducts()

    gc.collect()  # what earlier tests left would be counted now, and be gone later
    before, held, products = live_bytes(), [0], []
    federation = InProcessFederation(parts["alder"].federation, tmp_path / "coordinator")
    federation.coordinate()
    for name, each in parts.items():
        exchange = experts_of(federation.up(replace(each, train=text, test=None)))
        if name == "alder":
            own = exchange.contribution.sums

            def counted(*arguments, own=own):  # type: ignore[no-untyped-def]
                with work:
                    began = work.products
                    found = own(*arguments)
                    products.append(work.products - began)
                return found

            exchange.contribution.sums = counted  # type: ignore[method-assign]

            def look(peer: str, lane: Lane, message: Message) -> None:
                if message.kind == "push-chunk" and message.address.round == ROUNDS:
                    held.append(live_bytes())

            watch(exchange.host, look)
    federation.join()
    for end in federation.ends.values():
        if isinstance(end, BaseException):
            raise end

    for row in plan.lora.parties:
        wire = federation.ends[row.party].wire.values()  # type: ignore[union-attr]
        assert None not in (row.down, row.up, row.served, row.taken)
        # Adapters once more for the model that a party ends with.
        arrived = row.once + (ROUNDS + 1) * row.down + ROUNDS * row.taken  # type: ignore[operator]
        assert sum(peer["tensors_received"] for peer in wire) == arrived

    # Trunk and adapters were there before. On a processor layers are lent from the cache, none is copied.
    adapters, layer = plan.lora.adapters, plan.experts // plan.layers
    measured = max(held) - before + len(PARTIES) * 4 * (plan.trunk + adapters)
    planned = sum(row.need.host + row.need.device - 2 * 2 * layer for row in plan.lora.parties)
    assert planned / measured == pytest.approx(1, abs=0.1)

    with work:
        time = planned_round(config, plan, LENGTH, bytes_per_second=1e9, clock=work.clock)
    assert len(products) == ROUNDS
    assert min(products) > 1e6, "products of a round"
    alder = next(each for each in time.parties if each.party == "alder")
    assert (alder.computing + alder.fixed) / products[-1] == pytest.approx(1, abs=0.25)


def sizes_of(model: torch.nn.Module) -> dict[str, object]:
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "num_experts", "num_experts_per_tok",
    )  # fmt: skip
    return {name: getattr(model.config, name) for name in names}  # type: ignore[union-attr]


SMALL = {
    "name": "grove",
    "model": {"family": "olmoe", "config": {"vocab_size": 50, "num_attention_heads": 2, "num_key_value_heads": 2,
                                            "num_experts_per_tok": 2, "max_position_embeddings": 32, **SIZES}},
    "parties": {name: {"endpoint": f"127.0.0.1:{7000 + i}"} for i, name in enumerate(PARTIES)},
    "coordinator": {"endpoint": "127.0.0.1:7999"},
    "privacy": {"epsilon": 8.0, "delta": 1e-5, "lot_size": 8},
    "train": {"rounds": 4},
}  # fmt: skip


def test_the_command_sets_full_training_beside_adapters_either_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {}
    for name, lora in (("full", {}), ("adapters", {"lora": {"rank": 8}})):
        config = FederationConfig.model_validate({**SMALL, **lora})
        dump_yaml(tmp_path / f"{name}.yaml", config)
        with pytest.raises(SystemExit) as ended:
            main(["plan", str(tmp_path / f"{name}.yaml")])
        assert ended.value.code == 0
        said[name] = capsys.readouterr().out
    for text in said.values():
        assert text.count("all weights ") >= 6
        assert text.count(" adapters ") >= 3
        assert "neither depends on how many values are trained" in text
        assert "frozen experts cross once, in the first round" in text
        assert "so adapters suit a model that is trained already" in text
    assert "federation.yaml has `lora`" in said["adapters"]
    assert "`lora: {rank: 8}` in federation.yaml" in said["full"]


@pytest.mark.parametrize(("rank", "said"), [(48, False), (49, True)])
def test_adapters_of_a_federation_that_are_larger_than_their_matrix_are_remarked_on(
    rank: int, said: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """96 x 96 values of a projection down: a rank of 49 has 49 x 192 = 9,408 of them, one of 48 has as many."""
    dump_yaml(tmp_path / "f.yaml", FederationConfig.model_validate({**SMALL, "lora": {"rank": rank}}))
    with pytest.raises(SystemExit):
        main(["plan", str(tmp_path / "f.yaml")])
    shown = " ".join(capsys.readouterr().out.split())
    assert ("holds 9,408 values, and the matrix itself 9,216" in shown, "at most 48 does" in shown) == (said, said)


def test_a_round_is_planned_the_other_way_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computing takes 2 s in full and 1 s with adapters; what crosses is by hand: 12 experts, 8 of them elsewhere."""
    asked: list[LoraSpec | None] = []

    def calibrated(*arguments: Any) -> Calibration:
        lora = arguments[-1]
        asked.append(lora)
        return Calibration(0.0, 0.0, 2.0 if lora is None else 1.0, 0, (1, 2, 3), 0.0)

    monkeypatch.setattr(planned_time, "calibrate_model", calibrated)
    full, share = 4 * 8 * 3 * 96 * 96, 4 * 8 * 8 * (96 + 2 * 96 + 96 + 96)
    for lora in (None, LoraSpec(rank=8)):
        rules = {"exchange": "experts", "privacy": "none", "train": {"rounds": 4, "batch_size": 3, "micro_batch": 1}}
        config = FederationConfig.model_validate({**SMALL, **rules, "lora": lora and lora.model_dump()})
        plan = make_plan(config)
        agreed = planned_round(config, plan, 9, bytes_per_second=1e6)
        other = the_other_way(config, plan, 9, bytes_per_second=1e6)
        assert other is not None
        seconds = [found.parties[0] for found in ((agreed, other) if lora is None else (other, agreed))]
        assert [each.computing for each in seconds] == [3 * 2.0, 3 * 1.0]
        first = full / 4 * 2 / 1e6  # a layer; the other layers come while records are computed
        assert seconds[0].line == pytest.approx(first + 4 * full / 1e6, rel=0.02)
        assert seconds[1].line == pytest.approx((2 + 4) * share / 1e6, rel=0.1), "tensors are not cut over hosts"
    assert [lora is None for lora in asked] == [True, False, False, True]
