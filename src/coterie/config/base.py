"""What every settings model shares: frozen, no unknown key, paths that follow their file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Set
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationInfo

BASE_FOLDER = "base_folder"
"""Key of the validation context that holds the folder relative paths start from."""


class Spec(BaseModel):
    """A block of settings. Values cannot change after loading; a key that is not listed is an error.

    Attributes:
        later_keys: keys that came when there were settings files, run folders and signed rosters without them. At
            their default they do not count in `content_hash`, so those stay valid.
    """

    later_keys: ClassVar[frozenset[str]] = frozenset()

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


def _check_path(value: Any) -> Any:
    """An empty path would be the settings' own folder; the others no file can have."""
    if isinstance(value, str):
        if not value.strip():
            raise ValueError("a path is missing here: write `.` for the folder of this file")
        if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ValueError("no file can have this name: it holds a character 0 or half of a surrogate pair")
    return value


def _resolve(path: Path, info: ValidationInfo) -> Path:
    if path.parts[:1] == ("~",):  # another user's `~name` is as likely a file of that name
        try:
            path = path.expanduser()
        except RuntimeError:
            raise ValueError("`~` stands for the home folder, and this user has none: write the whole path") from None
    context: dict[str, Any] = info.context or {}
    return Path(context[BASE_FOLDER], path) if BASE_FOLDER in context else path


LocalPath = Annotated[Path, BeforeValidator(_check_path), AfterValidator(_resolve)]
"""A path; in a YAML file it starts from that file's folder."""


def content_hash(spec: Spec, *, without: Set[str] = frozenset()) -> str:
    """Hex SHA-256 of settings: the same on every machine, for every order of keys.

    A path counts by its last component only, because it starts from a folder that differs between machines.

    Args:
        spec: the settings.
        without: top-level keys that do not count.
    """
    values = _portable({name: value for name, value in _counted(spec).items() if name not in without})
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _counted(value: Any) -> Any:
    """Settings as plain values, without later keys that are at their default."""
    if isinstance(value, Spec):
        fields = type(value).model_fields
        return {
            name: _counted(held)
            for name, held in value
            if name not in value.later_keys or held != fields[name].get_default(call_default_factory=True)
        }
    if isinstance(value, dict):
        return {key: _counted(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_counted(item) for item in value]
    return value


def _portable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _portable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_portable(item) for item in value]
    return value.name if isinstance(value, Path) else value
