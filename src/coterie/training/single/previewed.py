"""What a run of `coterie train` will cost, from its settings."""

from __future__ import annotations

from torch import nn

from coterie.config import PrivacySpec, TrainConfig
from coterie.dp.plan import PrivacyPlan
from coterie.models.zoo.build import build_model
from coterie.training.data.documents import Documents, read_documents
from coterie.training.data.packing import Sequences
from coterie.training.data.tokenizer import get_tokenizer, tokenize
from coterie.training.planning.forecast import Forecast, forecast
from coterie.training.provenance import originals
from coterie.training.single.setup import check_fit, with_vocabulary


def preview(config: TrainConfig, spec: PrivacySpec) -> Forecast:
    """The forecast of a settings file. Reads the text and the model's config; no weight, and nothing is written.

    Raises:
        ConfigError, DataError, ModelError, BudgetError: as a run would.
    """
    data = config.data
    documents = read_documents(data.train, data, user_column=spec.user_column)
    tokenizer = get_tokenizer(data.tokenizer, config.model, data)
    model = build_model(with_vocabulary(config.model, tokenizer), meta=True)
    check_fit(model, tokenizer, data)
    return forecast_of(config, spec, plan_of(config, spec, model), documents, tokenize(documents, data, tokenizer))


def forecast_of(
    config: TrainConfig, spec: PrivacySpec, plan: PrivacyPlan, documents: Documents, records: Sequences
) -> Forecast:
    """The forecast of a run whose text is read.

    Raises:
        BudgetError: no noise reaches the budget, or lots are larger than the data.
    """
    pieces = originals(documents, records).pieces
    return forecast(spec, plan, records, pieces, tested=bool(config.data.test))


def plan_of(config: TrainConfig, spec: PrivacySpec, model: nn.Module) -> PrivacyPlan:
    """The plan of a run's settings with this `privacy` block."""
    return PrivacyPlan.of_settings(
        spec, model, config.train.rounds, lot_size=config.train.batch_size,
        seed=config.train.seed if spec.seeded else None,
    )  # fmt: skip
