"""What a run of `coterie train` is and will cost, from its settings."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from typing import Any

from torch import nn

from coterie.config import LoraSpec, PrivacySpec, TrainConfig
from coterie.dp.plan import PrivacyPlan
from coterie.models.lora import adapter_sizes, larger_than_matrix, load_peft
from coterie.models.preconditioner import Preconditioner, attach
from coterie.models.seam import expert_layers
from coterie.models.spread.spread import check_over
from coterie.models.zoo.build import build_model, torch_dtype
from coterie.training.data.documents import Documents, read_documents
from coterie.training.data.packing import Sequences
from coterie.training.data.tokenizer import get_tokenizer, tokenize
from coterie.training.planning.closed_form import Adapters, Shape, predict_adapters
from coterie.training.planning.forecast import Choice, Forecast, choices, forecast
from coterie.training.planning.full_or_lora import usual_lora
from coterie.training.planning.noise_bands import BandsChoice, bands_choices
from coterie.training.planning.rank_memory import held_of
from coterie.training.provenance import originals
from coterie.training.single.calibrated import Calibration, calibrate
from coterie.training.single.setup import check_fit, plan_of, with_vocabulary


@dataclass(frozen=True)
class AdaptersPreview:
    """The same text with adapters in place of full training: those of the settings, or of experts.

    Attributes:
        rank: of every update.
        adapters: values of them all.
        state_bytes: frozen weights, adapters, their gradients and moments, on the device; activations on top.
        calibration: what a round takes on this machine; None where it was not measured: without peft.
    """

    rank: int
    adapters: int
    state_bytes: int
    calibration: Calibration | None


@dataclass(frozen=True)
class Preview:
    """What a run is, from its settings, its text and its model's config.

    Attributes:
        parameters: of the model; expert_share: those in experts.
        state_bytes: weights, and gradients and AdamW's moments of what is trained, on the device; activations come on
            top.
        sequences, tokens: prepared, and predicted in them.
        rounds: planned.
        rank_bytes: of the same at each of the ranks that the settings ask for.
        devices: bytes of the same at each of 1, 2, ... ranks with whole models, which share the optimiser's part.
        experts_over: the same of ranks that hold all experts together.
        privacy: what it will spend; None without a budget.
        choices: what other lots and budgets would mean.
        bands: what noise in bands would.
        calibration: what a round takes on this machine; None where that was not asked for.
        full: the same where all weights are trained, whatever the settings train.
        lora: adapters in place of full training; None where neither the settings train any nor that was asked for.
        trained: values that are: all parameters, or those of adapters.
        remark: on adapters that are larger than what they adapt, where the settings train such.
    """

    parameters: int
    expert_share: float
    state_bytes: int
    sequences: int
    tokens: int
    rounds: int
    privacy: Forecast | None
    rank_bytes: int = 0
    devices: tuple[int, ...] = ()
    experts_over: tuple[int, ...] = ()
    choices: tuple[Choice, ...] = ()
    bands: tuple[BandsChoice, ...] = ()
    calibration: Calibration | None = None
    full: Calibration | None = None
    lora: AdaptersPreview | None = None
    trained: int = 0
    remark: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain figures."""
        spent = self.privacy.as_json() if self.privacy is not None else None
        return {**asdict(self), "privacy": spent}


def preview(config: TrainConfig, *, others: bool = False) -> Preview:
    """Look at a run's settings. Reads the text and the model's config; no weight, and nothing is written.

    Args:
        config: the settings.
        others: with `Preview.choices`, `Preview.bands`, and both ways to train; takes some seconds.

    Raises:
        ConfigError, DataError, ModelError, BudgetError: as a run would.
    """
    data, spec = config.data, config.privacy
    documents = read_documents(data.train, data, user_column=spec.user_column if spec is not None else None)
    tokenizer = get_tokenizer(data.tokenizer, config.model, data)
    model = build_model(with_vocabulary(config.model, tokenizer), meta=True)
    check_fit(model, tokenizer, data)
    if config.spread_over > 1:
        check_over(expert_layers(model), config.spread_over)
    records = tokenize(documents, data, tokenizer)
    if data.test:
        tokenize(read_documents(data.test, data), data, tokenizer)
    held = held_of(model, torch_dtype(config.model).itemsize)
    experts = sum(size for size, _ in held.experts.values())
    whole = experts + sum(held.rest.values())
    spending, other, bands = None, list[Choice](), list[BandsChoice]()
    if spec is not None:
        plan = plan_of(config, spec, model)
        spending = forecast_of(config, spec, plan, documents, records)
        if others:
            other = choices(plan, spending.units)
            bands = bands_choices(plan, spending.units, config.optim.momentum)
    factors = _factor_bytes(model, config)
    trained, state = whole, held.at_rank(1) + factors
    at_rank = held.at_rank(config.ranks, config.spread_over) + factors
    full = calibrate(config, tokenizer, records) if others else None
    calibration, lora = full, None
    if config.lora is not None:
        load_peft()
    if config.lora is not None or others:
        adapters = config.lora or usual_lora(expert_layers(model)[0])
        lora = _with_adapters(config, adapters, model, whole)
        if others and find_spec("peft") is not None:
            lora = replace(lora, calibration=calibrate(config, tokenizer, records, lora=adapters))
    if config.lora is not None and lora is not None:
        trained, state, at_rank, calibration = lora.adapters, lora.state_bytes, lora.state_bytes, lora.calibration
    return Preview(
        whole, experts / whole, state, len(records), records.predicted_tokens, config.train.rounds,
        spending, at_rank, held.over_devices(), held.over_experts(), tuple(other), tuple(bands), calibration, full,
        lora, trained, None if config.lora is None else larger_than_matrix(model, config.lora),
    )  # fmt: skip


def _factor_bytes(model: nn.Module, config: TrainConfig) -> int:
    """What a preconditioner adds to the weights in memory; that it fits the model is found here, too.

    Raises:
        ModelError: there is no such file, or it is of another model.
    """
    if config.preconditioner is None:
        return 0
    found = Preconditioner.load(config.preconditioner.path)
    attach(model, found)
    return sum(value.numel() for value in found.tensors().values()) * torch_dtype(config.model).itemsize


def _with_adapters(config: TrainConfig, spec: LoraSpec, model: nn.Module, weights: int) -> AdaptersPreview:
    sizes, itemsize = adapter_sizes(model, spec), torch_dtype(config.model).itemsize
    adapters = sum((*sizes.experts, *sizes.modules))
    need = predict_adapters("centralised", Shape(weights, 0, 1, 1, compute_bytes=itemsize), Adapters(adapters))
    return AdaptersPreview(spec.rank, adapters, need.device, None)


def forecast_of(
    config: TrainConfig, spec: PrivacySpec, plan: PrivacyPlan, documents: Documents, records: Sequences
) -> Forecast:
    """The forecast of a run whose text is read.

    Raises:
        BudgetError: no noise reaches the budget, or lots are larger than the data.
    """
    pieces = originals(documents, records, config.data).pieces
    return forecast(spec, plan, records, pieces, tested=bool(config.data.test))
