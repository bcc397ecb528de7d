"""Put a run's model together with its tokenizer and device, and check that they fit."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coterie.config import DataSpec, ModelSpec, PrivacySpec, TrainConfig
from coterie.dp.plan import PrivacyPlan
from coterie.errors import ConfigError
from coterie.models.lora import attach_adapters
from coterie.models.preconditioner import Preconditioner, attach, attached
from coterie.models.spread.loaded import build_spread
from coterie.models.zoo.build import build_model
from coterie.ranks.ranks import Ranks
from coterie.ranks.ways import gpu_of_this_rank
from coterie.training.loop import use_checkpointing

_KEPT = "preconditioner.safetensors"


def build_for(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, spread_over: Ranks | None = None
) -> PreTrainedModel:
    """The model of a config on its device; random weights come from the config's seed.

    Args:
        config: the settings.
        tokenizer: the model has to fit.
        spread_over: ranks of the run, where experts are spread over some of them each; None: the whole model.

    Raises:
        ConfigError: the model does not fit the tokenizer, the sequence length or the machine.
        ModelError: it cannot be built.
    """
    device = pick_device(config.device)
    spec, seed = with_vocabulary(config.model, tokenizer), config.train.seed
    if spread_over is None:
        model = build_model(spec, device=device, seed=seed)
    else:
        gathered = config.layers_over > 1
        model = build_spread(spec, spread_over, config.spread_over, gathered=gathered, device=device, seed=seed)
    if config.model.gradient_checkpointing:
        use_checkpointing(model)
    check_fit(model, tokenizer, config.data)
    return model


def as_trained(model: PreTrainedModel, config: TrainConfig, kept: Path | None = None) -> nn.Module:
    """What is trained of a model that `build_for` gave.

    Itself, with `privacy.preconditioner` in other coordinates; with `lora` peft's model around it.

    Args:
        model: is changed.
        config: the settings.
        kept: what a run has kept for itself; see `keep`. None: it begins.

    Raises:
        ModelError: peft is not installed, `lora` names what the model does not have, or the preconditioner is of
            another model.
    """
    if config.preconditioner is not None:
        attach(model, Preconditioner.load(kept / _KEPT if kept else config.preconditioner.path))
    return model if config.lora is None else attach_adapters(model, config.lora, config.train.seed)


def keep(model: nn.Module, folder: Path) -> None:
    """Keep a run's preconditioner with the run: the settings' file may be made anew, or go.

    Raises:
        OSError: the disk is full or broken.
    """
    factors = attached(model)
    if factors.factors:
        factors.save(folder / _KEPT)


def with_vocabulary(spec: ModelSpec, tokenizer: PreTrainedTokenizerBase) -> ModelSpec:
    """For random weights: the model's vocabulary and special tokens from the tokenizer, where not set by hand.

    No padding token is set: embeddings would freeze its row, and padding is masked anyway.
    """
    if spec.family is None or "vocab_size" in spec.config:
        return spec
    from_tokenizer = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
    }
    return spec.model_copy(update={"config": {**from_tokenizer, **spec.config}})


def check_fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: DataSpec) -> None:
    """Make sure that the model has a row for every token and a position for every place in a sequence.

    Raises:
        ConfigError: it has not.
    """
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Module)
    rows = next(embedding.parameters()).shape[0]
    if len(tokenizer) > rows:
        raise ConfigError(
            f"The tokenizer has {len(tokenizer)} tokens, the model's vocabulary only {rows}.",
            code="config-vocabulary",
            why="a token without a row would stop training in the middle",
            fix="use the tokenizer made for the model, or a smaller data.tokenizer.train.vocab_size",
        )
    if type(model).__name__.endswith("ForMaskedLM") and data.task != "label_words":
        raise ConfigError(
            f"{type(model).__name__} predicts masked tokens, and `coterie train` trains the next one.",
            code="config-masked-model",
            why="a masked model sees the token that it would have to predict",
            fix="use `data.task: label_words`, or a causal model",
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and data.sequence_length > positions:
        raise ConfigError(
            f"data.sequence_length is {data.sequence_length}, but the model has {positions} positions.",
            code="config-sequence-length",
            fix=f"set data.sequence_length to {positions} or less",
        )


def pick_device(name: str) -> torch.device:
    """`auto` takes the GPU when there is one; of several ranks on a machine each takes its own.

    Raises:
        ConfigError: `cuda` was asked for and there is none, or there are fewer than ranks.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is `cuda`, but torch finds no GPU.", code="config-no-gpu", fix="use `device: auto`")
    return gpu_of_this_rank() if name != "cpu" and torch.cuda.is_available() else torch.device("cpu")


def plan_of(config: TrainConfig, spec: PrivacySpec, model: nn.Module) -> PrivacyPlan:
    """The plan of a run's settings with this `privacy` block."""
    return PrivacyPlan.of_settings(
        spec, model, config.train.rounds, lot_size=config.train.batch_size,
        seed=config.train.seed if spec.seeded else None, momentum=config.optim.added_momentum,
    )  # fmt: skip
