"""Models as a config names them: a folder, a hub name, or a family with random weights; always through the seam."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, get_session
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.utils import logging as hf_logging

from coterie.config import ModelSpec
from coterie.errors import ModelError
from coterie.models import seam
from coterie.models.sizes import check_before_building
from coterie.models.zoo.bert_moe import BertMoeConfig, BertMoeForMaskedLM
from coterie.models.zoo.catalogue import causal_lm_class, causal_lm_types, family_source, own_config
from coterie.models.zoo.families import why_excluded

_HUB_PATIENCE_S = 10.0
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def torch_dtype(spec: ModelSpec) -> torch.dtype:
    """The number format a spec asks for."""
    return _DTYPES[spec.dtype]


def build_model(
    spec: ModelSpec, *, device: torch.device | str = "cpu", meta: bool = False, seed: int | None = None
) -> PreTrainedModel:
    """The model of a spec, its experts computed through the seam with local weights.

    Args:
        spec: names a family of random weights, or a checkpoint.
        device: where the weights go.
        meta: only the structure, on the meta device; no weights are read or drawn.
        seed: of random weights (``family``); None draws from torch's global generator.

    Raises:
        ModelError: unknown family, a dense model or one whose experts cannot be exchanged, a setting the config does
            not have, a missing folder, no network, or a checkpoint whose weights do not fit.
    """
    config = load_config(spec)
    model_class = class_of(config)
    config = own_config(model_class, config)
    check_before_building(config.get_text_config())
    if meta:
        return structure_of(config, torch_dtype(spec))
    if spec.family is not None:
        return random_model(config, torch_dtype(spec), seed=seed).to(device)
    model = _load(model_class, config, spec)
    seam.select(model)
    return model.to(device)


def random_model(config: PretrainedConfig, dtype: torch.dtype, *, seed: int | None) -> PreTrainedModel:
    """A model of a config with random weights, on the CPU.

    Raises:
        ModelError: the family is dense, stays out, or is unknown to the installed transformers.
    """
    model_class = class_of(config)
    with _seeded(seed):
        model = _of_config(model_class, config, dtype)
    seam.select(model)
    return model


def structure_of(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model of a config, on the meta device: no weights are read or drawn.

    Raises:
        ModelError: the family is dense, stays out, or is unknown to the installed transformers.
    """
    model_class = class_of(config)
    with torch.device("meta"):
        model = _of_config(model_class, config, dtype)
    seam.select(model)
    return model


def _of_config(model_class: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    try:
        return model_class._from_config(own_config(model_class, config), dtype=dtype)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"No {model_class.__name__} can be built from its config: {_reason(error)}",
            code="model-bad-setting",
            where="the model's config",
            why="its sizes do not fit each other",
            fix="compare it with the config of a published model of the family",
        ) from error


def load_config(spec: ModelSpec) -> PretrainedConfig:
    """The transformers config of a spec, with the spec's own settings put in.

    Raises:
        ModelError: as `build_model`.
    """
    if spec.family is not None:
        if spec.family not in (*CONFIG_MAPPING_NAMES, BertMoeConfig.model_type):
            raise _unknown_family(spec.family)
        return _with_settings(CONFIG_MAPPING[spec.family], {}, spec.config)
    source = _source(spec)
    try:
        config = AutoConfig.from_pretrained(source, revision=spec.revision, local_files_only=files_alone(spec))
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise _cannot_load(spec, "its config", error) from error
    if not spec.config:
        return config
    return _with_settings(type(config), config.to_dict(), spec.config)


def class_of(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The language-model class for a config: causal, or masked for a BERT with experts.

    Raises:
        ModelError: the family is dense, stays out, or is unknown to the installed transformers.
    """
    model_type = config.model_type
    if model_type == BertMoeConfig.model_type:
        return BertMoeForMaskedLM
    if model_type in causal_lm_types():
        return causal_lm_class(model_type)
    reason = why_excluded(config)
    if reason is not None:
        raise ModelError(
            f"Models of type `{model_type}` cannot be trained here: {reason}.",
            code="model-excluded-family",
            why="parties exchange experts, and a record's share in them is bounded, through one interface only",
            fix="choose a family from docs/models.md",
        )
    raise ModelError(
        f"`{model_type}` is not a Mixture-of-Experts family: there is no expert to share.",
        code="model-dense",
        fix="choose a family from docs/models.md, or turn a dense model into one with `coterie upcycle`",
    )


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """The tokenizer that comes with a model.

    Raises:
        ModelError: the spec names a family (random weights have no tokenizer), or there is none to load.
    """
    if spec.family is not None:
        raise ModelError(
            f"Family `{spec.family}` with random weights has no tokenizer of its own.",
            code="model-no-tokenizer",
            fix="set data.tokenizer to a path, or train one with data.tokenizer.train",
        )
    source = _source(spec)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=spec.revision, local_files_only=files_alone(spec))
    except (OSError, ValueError, KeyError) as error:
        raise _cannot_load(spec, "its tokenizer", error) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes of a folder without its files
        raise _cannot_load(spec, "its tokenizer", OSError("there are no tokenizer files"))
    return tokenizer


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without transformers' own progress bars and load reports: coterie checks the keys itself."""
    bars, level = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def check_keys(
    where: str, missing: set[str], unexpected: set[str], mismatched: set[Any], *, code: str = "model-bad-checkpoint"
) -> None:
    """Refuse a checkpoint that does not fill a model exactly; transformers would fill the gaps at random.

    Raises:
        ModelError: with the first few keys of each kind.
    """
    kinds = {
        "misses": missing,
        "has, beyond what the model knows,": unexpected,
        "has in another shape": {entry[0] if isinstance(entry, tuple) else entry for entry in mismatched},
    }
    problems = [f"{words} {_first_keys(keys)}" for words, keys in kinds.items() if keys]
    if problems:
        raise ModelError(
            f"{where} does not fit its config: it {'; it '.join(problems)}.",
            code=code,
            why="weights that are missing would be random, and weights that do not fit would be dropped",
            fix="check that the config and the weights are of the same model",
        )


def _first_keys(keys: set[str], shown: int = 4) -> str:
    ordered = sorted(keys)
    rest = f" and {len(ordered) - shown} more" if len(ordered) > shown else ""
    return ", ".join(f"`{key}`" for key in ordered[:shown]) + rest


def _load(model_class: type[PreTrainedModel], config: PretrainedConfig, spec: ModelSpec) -> PreTrainedModel:
    quantized = ask_for_plain_weights(config, _source(spec))
    try:
        with quiet_loading():
            model, info = model_class.from_pretrained(
                _source(spec),
                config=config,
                revision=spec.revision,
                local_files_only=files_alone(spec),
                dtype=torch_dtype(spec),
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that they are reported together with the rest, by us
            )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise _cannot_load(spec, "its weights", error) from error
    if getattr(model, "_hf_peft_config_loaded", False):
        raise _adapters_beside(_source(spec))
    check_keys(_source(spec), set(info["missing_keys"]), set(info["unexpected_keys"]), set(info["mismatched_keys"]))
    if quantized:
        make_plain(model, _source(spec))
    return model


_UNPACKED = ("mxfp4", "fp8")
"""Ways to quantise that transformers turns into ordinary weights while it loads them."""


def ask_for_plain_weights(config: PretrainedConfig, source: str) -> bool:
    """Whether a checkpoint is quantised; its config then asks transformers for ordinary weights.

    Raises:
        ModelError: it is quantised in a way that cannot be undone while loading.
    """
    how: Any = getattr(config, "quantization_config", None)
    if how is None:
        return False
    settings = how if isinstance(how, dict) else how.to_dict()
    method = str(getattr(settings.get("quant_method"), "value", settings.get("quant_method")))
    if method not in _UNPACKED:
        raise quantized_error(source, method)
    config.quantization_config = {**settings, "dequantize": True}
    return True


def quantized_error(source: str, method: str) -> ModelError:
    """A checkpoint whose quantised weights cannot be trained."""
    return ModelError(
        f"{source} is quantised ({method}); its weights cannot be trained or moved as they are.",
        code="model-quantized",
        why="quantised weights have no gradient",
        fix="use the checkpoint's float or bfloat16 version",
    )


def make_plain(model: PreTrainedModel, source: str) -> None:
    """Let a model that was unpacked while loading be saved under its own names, not under those of packed weights."""
    packed = next(
        (name for name, p in model.named_parameters() if p.dtype not in (*_DTYPES.values(), torch.float16)), ""
    )
    if packed or getattr(model.config, "quantization_config", None) is not None:
        raise quantized_error(source, f"`{packed}` stayed packed" if packed else "its config still says so")
    vars(model).pop("_weight_conversions", None)  # of the packed names; the class knows its own


def files_alone(spec: ModelSpec) -> bool:
    """Whether to look for a model on this machine alone: it is a folder's, or the hub cannot be reached."""
    return spec.path is not None or (spec.hub is not None and not _hub_answers())


@cache
def _hub_answers() -> bool:
    """One short question in place of the library's five tries for every file, which take half a minute."""
    try:
        get_session().head(constants.ENDPOINT, timeout=_HUB_PATIENCE_S)
    except Exception:  # of whichever HTTP library it uses, or that it was told to stay offline
        return False
    return True


def _source(spec: ModelSpec) -> str:
    if spec.path is None:
        assert spec.hub is not None
        return spec.hub
    path = Path(spec.path)
    if not path.is_dir():
        raise ModelError(
            f"There is no folder {path}.",
            code="model-no-folder",
            where="model.path",
            fix="give the folder of a Hugging Face checkpoint (config.json and *.safetensors)",
        )
    check_one_model(path)
    return str(path)


def check_one_model(folder: Path) -> None:
    """Make sure that whoever reads a checkpoint's folder finds the same weights in it.

    Raises:
        ModelError: it holds adapters beside the weights, which transformers would put into the model, or two sets of
            weights.
    """
    if (folder / "adapter_config.json").exists() and (folder / "config.json").exists():
        raise _adapters_beside(str(folder))
    if (folder / "model.safetensors").exists() and (folder / "model.safetensors.index.json").exists():
        raise ModelError(
            f"{folder} holds two sets of weights: model.safetensors and those of model.safetensors.index.json.",
            code="model-two-checkpoints",
            why="one of them is older, and which one is read depends on who reads",
            fix="move the older one to another folder",
        )


def _adapters_beside(source: str) -> ModelError:
    return ModelError(
        f"{source} holds a peft adapter beside a model's weights.",
        code="model-has-adapters",
        why="transformers would put it into the model, frozen weights and all, and a split would leave it out",
        fix="move the adapter to another folder, or merge it first (peft's merge_and_unload)",
    )


def _seeded(seed: int | None) -> Any:
    if seed is None:
        return nullcontext()
    return _forked(seed)


@contextmanager
def _forked(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _with_settings(
    config_class: type[PretrainedConfig], base: dict[str, Any], settings: dict[str, Any]
) -> PretrainedConfig:
    """A config from settings; those that only its text part knows go there.

    Raises:
        ModelError: a setting that the config does not have (transformers would keep it and ignore it), or a value
            that it refuses.
    """
    values = dict(base)
    text_class = config_class.sub_configs.get("text_config")
    for name, value in settings.items():
        if text_class is None:
            known = _knows(config_class, name)
            values[name] = value
        else:
            in_text = name not in config_class.sub_configs and _knows(text_class, name)
            in_whole = name in config_class.__dataclass_fields__
            known = in_text or in_whole
            values |= {name: value} if in_whole else {}
            values |= {"text_config": {**(values.get("text_config") or {}), name: value}} if in_text else {}
        if not known:
            raise _unknown_setting(name, config_class, text_class)
    values.pop("model_type", None)
    try:
        return config_class.from_dict(values)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ModelError(
            f"{config_class.__name__} refuses its settings: {_reason(error)}",
            code="model-bad-setting",
            where="model.config",
            fix="correct the value",
        ) from error


def _knows(config_class: type[PretrainedConfig], name: str) -> bool:
    """Whether a family reads a setting: a field, another name of one, or a name that only its code mentions."""
    if name in config_class.__dataclass_fields__ or name in config_class.attribute_map:
        return True
    return re.search(rf"""config\.{name}\b|["']{name}["']""", family_source(config_class.__module__)) is not None


def _unknown_setting(
    name: str, config_class: type[PretrainedConfig], text_class: type[PretrainedConfig] | None
) -> ModelError:
    known = sorted(_own_fields(config_class) | (_own_fields(text_class) if text_class else set()))
    near = difflib.get_close_matches(name, known, n=1)
    return ModelError(
        f"`{name}` is not a setting of {config_class.__name__}.",
        code="model-unknown-setting",
        where="model.config",
        why="transformers would keep it and never read it",
        fix=f"did you mean `{near[0]}`?" if near else f"its settings: {', '.join(known)}",
    )


def _own_fields(config_class: type[PretrainedConfig]) -> set[str]:
    return set(config_class.__dataclass_fields__) - set(PretrainedConfig.__dataclass_fields__)


def _reason(error: Exception) -> str:
    """One line of a library's error: its first, or its last where the first only names a validator."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if lines[0].rstrip().endswith(":") else 0].strip()


def _unknown_family(family: str) -> ModelError:
    near = difflib.get_close_matches(family, list(causal_lm_types()), n=1)
    return ModelError(
        f"`{family}` is not a model type of the installed transformers.",
        code="model-unknown-family",
        where="model.family",
        fix=f"did you mean `{near[0]}`?" if near else "choose one of: " + ", ".join(causal_lm_types()),
    )


def _cannot_load(spec: ModelSpec, part: str, error: Exception) -> ModelError:
    unknown = re.search(r"model type `([^`]*)` but .* does not recognize this architecture", str(error))
    if unknown is not None:
        return ModelError(
            f"{spec.path or spec.hub} is a `{unknown[1]}`, which the installed transformers does not know.",
            code="model-bad-checkpoint" if spec.path is not None else "model-bad-hub-model",
            where="model.path" if spec.path is not None else "model.hub",
            why="its code is in a newer transformers or in none; code that comes with weights is not run",
            fix="install a newer transformers that coterie allows, or take a family that `coterie models` lists",
        )
    if spec.path is not None:
        return ModelError(
            f"{spec.path} is not a checkpoint that can be loaded ({part}): {_reason(error)}",
            code="model-bad-checkpoint",
            where="model.path",
            fix="give the folder of a Hugging Face checkpoint with config.json and *.safetensors; `coterie export` "
            "makes one of what `coterie split` wrote",
        )
    if not _hub_answers() or "connect" in str(error).lower():
        return ModelError(
            f"Hub model {spec.hub} ({part}) is not on this machine and the hub cannot be reached.",
            code="model-no-network",
            where="model.hub",
            fix="download it where there is a network, and set model.path to its folder",
        )
    return ModelError(
        f"Hub model {spec.hub} cannot be loaded ({part}): {_reason(error)}",
        code="model-bad-hub-model",
        where="model.hub",
        fix="check the name, the revision and whether it needs a login (`hf auth login`)",
    )
