"""What every settings model shares: frozen, no unknown key, paths that follow their file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo

BASE_FOLDER = "base_folder"
"""Key of the validation context that holds the folder relative paths start from."""


class Spec(BaseModel):
    """A block of settings. Values cannot change after loading; a key that is not listed is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


def _resolve(path: Path, info: ValidationInfo) -> Path:
    path = path.expanduser()
    context: dict[str, Any] = info.context or {}
    return Path(context[BASE_FOLDER], path) if BASE_FOLDER in context else path


LocalPath = Annotated[Path, AfterValidator(_resolve)]
"""A path; in a YAML file it starts from that file's folder."""
