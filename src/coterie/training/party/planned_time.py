"""What a round of a federation takes where a party has a machine like this one: `coterie plan --sequence-length`.

Two models of few layers do rounds on made-up records (`coterie.training.single.calibrated`), masks are made for some
values, and bytes come from the plan; no weight is read and no text.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from coterie.config import DataSpec, FederationConfig, PrivacyRules, PrivacySpec, TrainConfig, TrainSpec
from coterie.dp.plan import PrivacyPlan
from coterie.errors import ConfigError
from coterie.federation.experts.masking.streams import Masks
from coterie.models import seam
from coterie.models.zoo.build import build_model, load_config
from coterie.training.data.packing import Sequences
from coterie.training.experts.push_grid import masked_width
from coterie.training.planning.full_or_lora import usual_lora
from coterie.training.planning.plan import FederationPlan, PartyPlan, make_plan
from coterie.training.planning.round_time import PartyLoad, RoundTime, experts_round, tokens_round
from coterie.training.single.calibrated import Calibration, Clock, calibrate_model

_LOT = 8
"""Records of a calibration's round: noise and step cost the same for every lot."""
_ALONE = 4
"""Records of a calibration's batch where each is computed alone in any case."""
_MASKED = 1 << 18


def planned_round(
    federation: FederationConfig,
    plan: FederationPlan,
    length: int,
    *,
    bytes_per_second: float,
    speeds: Mapping[str, float] | None = None,
    clock: Clock = time.monotonic,
) -> RoundTime:
    """A round by the exchange that federation.yaml names.

    Args:
        federation: its settings.
        plan: of it; where it proposes lots, these are computed.
        length: tokens of a record.
        bytes_per_second: of every party's line, in each direction.
        speeds: how fast a party's machine is beside this one; 1 where nothing is said.
        clock: seconds.

    Raises:
        ConfigError: a speed is of nobody.
        ModelError: the model cannot be built.
    """
    speeds = speeds or {}
    unknown = sorted(speeds.keys() - federation.parties.keys())
    if unknown:
        raise ConfigError(
            f"--speed names {unknown[0]}, which is no party of {federation.name}.",
            code="plan-speed",
            fix=f"parties: {', '.join(federation.parties)}",
        )
    here = _calibrated(federation, length, clock)
    masks = _mask_seconds(federation, clock)
    lots = {} if plan.equal_rates is None else {each.party: each.lot_size for each in plan.equal_rates.lots}
    loads = []
    for each in plan.trained_as_agreed(federation.exchange):
        slower = 1 / speeds.get(each.party, 1.0)
        units = lots.get(each.party, _units(federation, each.party))
        load = PartyLoad(each.party, units, here.unit_seconds * slower, here.fixed_seconds * slower)
        loads.append(_with_bytes(load, federation, plan, each, length, masks * slower))
    rounds = federation.train.rounds
    if federation.exchange == "tokens":
        return tokens_round(loads, bytes_per_second, rounds, in_flight=federation.train.in_flight)
    return experts_round(loads, bytes_per_second, rounds, federation.push_after_s)


def the_other_way(
    federation: FederationConfig,
    plan: FederationPlan,
    length: int,
    *,
    bytes_per_second: float,
    speeds: Mapping[str, float] | None = None,
    clock: Clock = time.monotonic,
) -> RoundTime | None:
    """The same where adapters are trained in place of all weights, in `experts`; or all weights where adapters were
    agreed on.

    Returns:
        None where peft is not installed, which adapters need.
    """
    if find_spec("peft") is None:
        return None
    lora = usual_lora(seam.expert_layers(build_model(federation.model, meta=True))[0])
    changed = {"lora": None} if plan.lora.agreed else {"lora": lora, "exchange": "experts"}
    other = federation.model_copy(update=changed)
    return planned_round(
        other, replace(make_plan(other), equal_rates=plan.equal_rates), length, bytes_per_second=bytes_per_second,
        speeds=speeds, clock=clock,
    )  # fmt: skip


def _with_bytes(
    load: PartyLoad, federation: FederationConfig, plan: FederationPlan, party: PartyPlan, length: int, masks: float
) -> PartyLoad:
    """Args: ``masks`` are the seconds of one value's."""
    if federation.exchange == "tokens":
        # Two of a token's four crossings go each way, and as many for tokens of others at the experts hosted here.
        return replace(load, fetched=round(plan.bytes_per_token * federation.train.batch_size * length))
    down, up, served, taken = party.down or 0, party.up or 0, party.served or 0, party.taken or 0
    if plan.lora.agreed:  # what is frozen came in the first round, and a round fetches adapters alone
        values, first = plan.lora.shared, down
    else:
        values, first = plan.experts + (plan.trunk if federation.trunk == "shared" else 0), plan.largest_layer_down
    return replace(
        load, first=first, fetched=down, served=served, pushed=up, taken=taken,
        mask_seconds=masks * values,
    )  # fmt: skip


def _units(federation: FederationConfig, party: str) -> int:
    if isinstance(federation.privacy, PrivacyRules):
        return federation.lot_of(party)
    return -(-federation.train.batch_size // federation.train.micro_batch)


def _calibrated(federation: FederationConfig, length: int, clock: Clock) -> Calibration:
    whole = load_config(federation.model)
    privacy = None
    rows = 4 * max(federation.train.micro_batch, _LOT)
    if isinstance(federation.privacy, PrivacyRules):
        rules = federation.privacy.model_dump()
        spec = PrivacySpec(**{**rules, "lot_size": _LOT, "max_lot": None, "sampler": "poisson", "unit": "record"})
        against = PrivacyPlan.of_settings(
            spec, build_model(federation.model, meta=True), federation.train.rounds, against_hosts=True
        )
        exact = against.isolation == "exact"
        privacy = spec.model_copy(
            update={"isolation": against.isolation, "physical_batch": _ALONE if exact else spec.physical_batch}
        )
        rows = max(rows, 16 * _LOT)
    config = TrainConfig(
        model=federation.model,
        data=DataSpec(train=(Path("made-up.jsonl"),), sequence_length=length),
        optim=federation.optim,
        train=TrainSpec(
            rounds=federation.train.rounds,
            batch_size=federation.train.batch_size,
            micro_batch=federation.train.micro_batch,
        ),
        privacy=privacy,
        run_dir=Path("made-up"),
    )
    vocabulary = int(whole.get_text_config().vocab_size)
    tokens = torch.randint(0, vocabulary, (rows * length,), generator=torch.Generator().manual_seed(0))
    records = Sequences(tokens.to(torch.int32), torch.arange(rows + 1) * length, torch.arange(rows))
    return calibrate_model(config, whole, records, clock, federation.lora)


def _mask_seconds(federation: FederationConfig, clock: Clock) -> float:
    """Of one value, with a stream for each other party."""
    if federation.aggregation != "masked":
        return 0.0
    me, *others = federation.parties
    masks = Masks(me, {name: secrets.token_bytes(32) for name in others}, secrets.token_bytes(32))
    integers, width = torch.zeros(_MASKED, dtype=torch.int64), masked_width(federation)
    masks.mask(0, integers, width)
    began = clock()
    masks.mask(1, integers, width)
    return (clock() - began) / _MASKED
