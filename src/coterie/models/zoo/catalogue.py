"""Which model types the installed transformers offers behind its experts interface.

Read from the sources of the installed release rather than from a list of ours, so that a newer release brings its
new families with it and an older one is never asked for what it lacks.
"""

from __future__ import annotations

import importlib
import inspect
from functools import cache
from pathlib import Path

import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_PRETRAINING_MAPPING_NAMES,
)

_MARK = "@use_experts_implementation"


def _models_folder() -> Path:
    return Path(transformers.__path__[0]) / "models"


@cache
def modeling_files() -> tuple[str, ...]:
    """Names of the transformers modules that hold an experts class behind the interface, sorted."""
    paths = _models_folder().glob("*/modeling_*.py")
    return tuple(sorted(path.parent.name for path in paths if _MARK in path.read_text(encoding="utf-8")))


@cache
def causal_lm_types() -> dict[str, str]:
    """Model types with a causal LM whose experts are behind the interface, with the name of that class.

    Aliases that name the same class stay in (``qwen3_5_moe`` and ``qwen3_5_moe_text``): both occur in checkpoints.
    A few families (``mistral4``) have a causal LM that ``AutoModelForCausalLM`` does not list; they are in, too.
    """
    modules = set(modeling_files())
    unlisted = {
        model_type: name
        for model_type, name in MODEL_FOR_PRETRAINING_MAPPING_NAMES.items()
        if isinstance(name, str) and name.endswith("ForCausalLM")
    }
    found = {
        model_type: name
        for model_type, name in (unlisted | dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)).items()
        if model_type_to_module_name(model_type) in modules
    }
    return dict(sorted(found.items()))


def causal_lm_class(model_type: str) -> type[PreTrainedModel]:
    """The class of a type that `causal_lm_types` lists. Imports its modeling file."""
    found: type[PreTrainedModel] = getattr(transformers, causal_lm_types()[model_type])
    return found


@cache
def family_source(config_module: str) -> str:
    """The Python source of the family that a configuration module belongs to, its modeling file included."""
    folder = Path(inspect.getfile(importlib.import_module(config_module))).parent
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py")))


def own_config(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PretrainedConfig:
    """The part of a config that a class wants: its text part, where the class is the text model of a composite."""
    is_text_class = model_class.config_class is config.sub_configs.get("text_config")
    return config.get_text_config() if is_text_class else config


def is_installed(module: str) -> bool:
    """Whether the installed transformers has a models module of this name."""
    return (_models_folder() / module).is_dir()


def modules_without_causal_lm() -> tuple[str, ...]:
    """Modules behind the interface for which transformers has no causal LM: vision, audio, diffusion, encoders."""
    covered = {model_type_to_module_name(model_type) for model_type in causal_lm_types()}
    return tuple(name for name in modeling_files() if name not in covered)
