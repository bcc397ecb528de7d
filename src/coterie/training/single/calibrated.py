"""How long a round takes here and what it holds at its peak, from a short calibration before any weight is loaded.

Two models of the run's own widths, with few of its decoder layers and random weights, do a few rounds on synthetic
records of the text's lengths. A round's time is a part for the weights (optimizer step, noise) and a part for every
micro-batch or record, and both parts, as the peak, are straight lines in the number of layers: that is what a model
with more of the same layers adds. So the whole model's figures follow from four points, for a fraction of its memory.
"""

from __future__ import annotations

import copy
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from coterie.config import LoraSpec, TrainConfig
from coterie.dp.accounting.dataset import dataset_digest
from coterie.dp.accounting.lots import Lot
from coterie.dp.plan import ComputeOptions
from coterie.dp.private_data import PrivateData
from coterie.dp.setup import start_session
from coterie.models.lora import attach_adapters
from coterie.models.seam import expert_layers
from coterie.models.streaming.beside_adapters import without_merging
from coterie.models.zoo.build import load_config, random_model, structure_of, torch_dtype
from coterie.training.data.packing import Batch, Sequences
from coterie.training.experts.adapter_sums import adapter_engine
from coterie.training.loop import to_device, train_round, use_checkpointing
from coterie.training.optim import make_optimizer
from coterie.training.planning.allocations import peak_bytes
from coterie.training.single.setup import pick_device, plan_of, with_vocabulary

Clock = Callable[[], float]

_FEW, _MORE = 1, 3
"""Micro-batches, or physical batches of records, at which a round is timed."""
_TIMES, _MOST_TIMES = 3, 25
"""Of so many the median counts: a machine that others use is as slow for the run as for this."""
_WORK_S, _ROUNDS_S = 1.0, 3.0
"""Short ones are measured for so long."""
_SMALL, _MOST_PERIODS = 50_000_000, 4
"""By so many weights and periods, and by half of what there is, two models may differ: where they differ by one layer
of many, what is wrong with that layer's time counts as often as the whole model has layers. Of large models rounds
are long, and their times steadier."""


@dataclass(frozen=True)
class Calibration:
    """What rounds of a run are expected to take on this machine.

    Attributes:
        round_seconds: of one round, evaluation and checkpoints aside.
        fixed_seconds: of it, what weights take whatever the text: noise and optimiser step.
        unit_seconds: what every micro-batch, or with a budget every record or user, adds.
        peak_bytes: on the device during a round: weights, gradients, optimiser, activations.
        layers: decoder layers of the two models that were measured, and of the run's own.
        took_seconds: the calibration itself.
    """

    round_seconds: float
    fixed_seconds: float
    unit_seconds: float
    peak_bytes: int
    layers: tuple[int, int, int]
    took_seconds: float


@dataclass(frozen=True)
class _Point:
    """One model's figures: seconds of a round with no text, and of every unit of work; bytes at the peak."""

    fixed: float
    each: float
    peak: float

    def towards(self, other: _Point, steps: float) -> _Point:
        """On the line from this point to the other, so many times as far as the other is."""

        def on_line(one: float, two: float) -> float:
            return max(0.0, one + (two - one) * steps)

        return _Point(
            on_line(self.fixed, other.fixed), on_line(self.each, other.each), on_line(self.peak, other.peak)
        )


def calibrate(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequences,
    clock: Clock = time.monotonic,
    lora: LoraSpec | None = None,
) -> Calibration:
    """Measure small versions of a run's model on this machine.

    Args:
        config: the run's settings.
        tokenizer: of it.
        records: its text; lengths alone are used.
        clock: what is counted as time: seconds, or anything else that work adds to.
        lora: adapters that are trained in place of the weights, whatever the settings say of them.
    """
    whole = load_config(with_vocabulary(config.model, tokenizer))
    return calibrate_model(config.model_copy(update={"lora": lora}), whole, records, clock)


def calibrate_model(
    config: TrainConfig,
    whole: PretrainedConfig,
    records: Sequences,
    clock: Clock = time.monotonic,
    lora: LoraSpec | None = None,
) -> Calibration:
    """The same for a model whose config is known.

    Args:
        config: the run's settings.
        whole: the config of its model, vocabulary included.
        records: its text; lengths alone are used.
        clock: see `calibrate`.
        lora: adapters that a party of a federation trains in place of the weights.
    """
    began = time.monotonic()
    few, more, layers = depths(whole, torch_dtype(config.model))
    measure = _private if config.privacy is not None else _plain if lora is None else _plain_adapters
    points = [
        measure(config, _model(config, _shortened(whole, depth), lora or config.lora), records, clock)
        for depth in (few, more)
    ]
    steps = (layers - few) / (more - few) if more > few else 0.0
    point = points[0].towards(points[1], steps)
    work = _work(config, structure_of(copy.deepcopy(whole), torch_dtype(config.model)))
    return Calibration(
        point.fixed + point.each * work, point.fixed, point.each, round(point.peak), (few, more, layers),
        time.monotonic() - began,
    )  # fmt: skip


def _work(config: TrainConfig, structure: PreTrainedModel) -> float:
    """Micro-batches of a plain round; expected units of a private one."""
    if config.privacy is None:
        return math.ceil(config.train.batch_size / (config.train.micro_batch or config.train.batch_size))
    return plan_of(config, config.privacy, structure).lot_size


# -- models with fewer layers ---------------------------------------------------------------------------------------


def depths(config: PretrainedConfig, dtype: torch.dtype) -> tuple[int, int, int]:
    """Decoder layers of the two models to measure, and of the whole.

    A period is the least number of layers after which kinds of attention and MoE layers come again. The first model
    has one, after the layers before the first MoE layer, which are in both; the second has one more, or several where
    they are small.
    """
    text = config.get_text_config()
    layers = int(text.num_hidden_layers)
    structure = structure_of(copy.deepcopy(config), dtype)
    names = [layer.name for layer in expert_layers(structure)]
    moe = sorted({int(part) for name in names for part in name.split(".") if part.isdigit()})
    kinds = list(getattr(text, "layer_types", None) or [""] * layers)
    shape = [(kind, at in moe) for at, kind in enumerate(kinds)]
    lead = moe[0]
    period = next(
        step
        for step in range(1, layers + 1)
        if all(shape[at] == shape[at + step] for at in range(lead, layers - step))
    )
    few = lead + period
    if few + period >= layers:
        return layers, layers, layers
    of_period = sum(param.numel() for param in structure.parameters()) * period / layers
    periods = max(1, min(_MOST_PERIODS, (layers - few) // (2 * period), int(_SMALL / of_period)))
    return few, few + periods * period, layers


def _shortened(config: PretrainedConfig, depth: int) -> PretrainedConfig:
    """The config with its first layers alone; lists with an entry a layer are cut, too."""
    short = copy.deepcopy(config)
    text = short.get_text_config()
    layers = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == layers:
            setattr(text, name, value[:depth])
    text.num_hidden_layers = depth
    return short


def _model(config: TrainConfig, short: PretrainedConfig, lora: LoraSpec | None) -> nn.Module:
    model = random_model(short, torch_dtype(config.model), seed=0).to(pick_device(config.device))
    if config.model.gradient_checkpointing:
        use_checkpointing(model)
    return (model if lora is None else attach_adapters(model, lora, seed=0)).train()


def _text(model: nn.Module, records: Sequences) -> Sequences:
    """Random tokens in records of the same lengths."""
    vocabulary = int(model.config.get_text_config().vocab_size)  # type: ignore[union-attr,operator]
    tokens = torch.randint(0, vocabulary, records.tokens.shape, generator=torch.Generator().manual_seed(0))
    return replace(records, tokens=tokens.to(torch.int32), trained=None)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.requires_grad]


def _held(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


# -- measuring ------------------------------------------------------------------------------------------------------


def _once_more(times: int, began: float, seconds: float) -> bool:
    return times < _TIMES or (times < _MOST_TIMES and time.monotonic() - began < seconds)


def _usual(computes: Sequence[Callable[[], object]], device: torch.device, clock: Clock) -> list[float]:
    """What each takes, in the median of some tries: all in turn, so that a moment in which the machine has other work
    is not one's alone."""
    found: list[list[float]] = [[] for _ in computes]
    began = time.monotonic()
    while _once_more(len(found[0]), began, _WORK_S):
        for compute, times in zip(computes, found, strict=True):
            start = clock()
            compute()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(clock() - start)
    return [statistics.median(times) for times in found]


def line(amounts: tuple[int, int], seconds: Sequence[float]) -> tuple[float, float]:
    """What no work takes, and what every unit of it does, from what two amounts take."""
    (few, more), (one, two) = amounts, seconds
    each = max(0.0, (two - one) / (more - few)) if more > few else one / more
    return max(0.0, one - each * few), each


def _plain(config: TrainConfig, model: nn.Module, records: Sequences, clock: Clock) -> _Point:
    optimizer = make_optimizer(_trained(model), config.optim)

    def one_round(batches: Iterable[Batch]) -> None:
        train_round(model, optimizer, batches, lr=1e-6)

    with without_merging(model):
        return _timed(config, model, records, clock, one_round)


def _plain_adapters(config: TrainConfig, model: nn.Module, records: Sequences, clock: Clock) -> _Point:
    """As parties of a federation train them: the engine never forms ``W + B A``."""
    optimizer, engine = make_optimizer(_trained(model), config.optim), adapter_engine(model)
    engine.compared = True  # a party's run compares once, and a round is what is looked for
    device = next(model.parameters()).device

    def one_round(batches: Iterable[Batch]) -> None:
        for batch in batches:
            engine.accumulate(to_device(batch, device))
        for name, total in engine.take().items():
            engine.parameters[name].grad = total.to(device)
        optimizer.step()
        optimizer.zero_grad()

    return _timed(config, model, records, clock, one_round)


def _timed(
    config: TrainConfig,
    model: nn.Module,
    records: Sequences,
    clock: Clock,
    one_round: Callable[[Iterable[Batch]], None],
) -> _Point:
    device, text = next(model.parameters()).device, _text(model, records)
    size = config.train.micro_batch or config.train.batch_size
    spread = torch.linspace(0, len(text) - 1, _MORE * size).round().long().tolist()

    def do(count: int) -> None:
        one_round(text.batch(spread[at::_MORE][:size]) for at in range(count))

    peak = peak_bytes(lambda: do(_MORE), device)  # and the first, in which the optimiser makes its state
    counts = (_FEW, _MORE)
    seconds = _usual([partial(do, count) for count in counts], device, clock)
    return _Point(*line(counts, seconds), _held(model) + peak)


def _private(config: TrainConfig, model: nn.Module, records: Sequences, clock: Clock) -> _Point:
    spec = config.privacy
    if spec is None:
        raise ValueError("a run without a budget")
    device, text = next(model.parameters()).device, _text(model, records)
    optimizer = make_optimizer(_trained(model), config.optim)
    planned = plan_of(config, spec, model)
    plan = replace(planned, rounds=max(planned.rounds, _TIMES + 1))
    options = ComputeOptions.of_settings(spec)
    data = PrivateData.of(
        text, text.collate, users=text.users, records_per_user=plan.records_per_user,
        digest=dataset_digest(("calibration",)),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        session = start_session(
            model, optimizer, data, plan, options, ledger=Path(folder) / "ledger", schedule=lambda _: 1e-6
        )
        try:
            spread = np.linspace(0, len(text) - 1, _MORE * options.physical_batch).round().astype(np.int64)

            def sums(count: int) -> None:
                session.lot_sums.compute(Lot(1, np.unique(spread)[:count], np.arange(count)), "calibration")

            most = len(np.unique(spread))
            counts = (max(1, most // _MORE), most)
            seconds = _usual([partial(sums, count) for count in counts], device, clock)
            _, each = line(counts, seconds)

            def one_round() -> None:
                lot = session.next_lot()
                began = clock()
                session.step(lot)
                beside.append(clock() - began - each * len(lot))

            beside: list[float] = []
            peak = peak_bytes(one_round, device)
            beside.clear()
            began_all = time.monotonic()
            while len(beside) < plan.rounds - 1 and _once_more(len(beside), began_all, _ROUNDS_S):
                one_round()
            per_unit = len(text) / data.units.count
            return _Point(max(0.0, statistics.median(beside)), each * per_unit, _held(model) + peak)
        finally:
            session.close()
