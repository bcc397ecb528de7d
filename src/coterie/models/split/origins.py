"""Which run and round a file of weights is of, written into the file itself, so that only parts that belong together
are joined.

The safetensors header of every trunk and shard holds one JSON text under the key ``coterie``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from coterie.errors import ModelError
from coterie.models.split.trainings import Training, trainings_from
from coterie.models.tensors import raw_bytes
from coterie.storage import check_keys, json_object

KEY = "coterie"


@dataclass(frozen=True)
class Origin:
    """Where a file of weights comes from.

    Attributes:
        run: name of the run that trained it; empty for what `coterie split` wrote.
        round: finished rounds; 0 after a split.
        content: `content_digest` of its tensors.
        lora: settings of the adapters that were trained; None where the weights themselves were.
        trainings: what is behind the weights; see `coterie.models.split.trainings`.
        base: `content` of the file with the frozen weights, which this one leaves out; empty where it holds all.
    """

    run: str
    round: int
    content: str
    lora: Mapping[str, Any] | None = None
    trainings: tuple[Training, ...] = ()
    base: str = ""

    def metadata(self) -> dict[str, str]:
        """For the header of a safetensors file; one entry, since safetensors writes several in any order."""
        values = {name: value for name, value in asdict(self).items() if name != "base" or value}
        return {KEY: json.dumps(values, sort_keys=True, separators=(",", ":"))}

    def words(self) -> str:
        """For error texts."""
        return f"round {self.round} of run {self.run[:8]}" if self.run else "the split, before any training"


def save_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    run: str,
    round_no: int,
    lora: Mapping[str, Any] | None = None,
    trainings: tuple[Training, ...] = (),
    base: str = "",
) -> None:
    """Write a safetensors file that says where it comes from; see `Origin` for the arguments."""
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(plain, path, Origin(run, round_no, content_digest(plain), lora, trainings, base).metadata())


def origin_of(path: Path) -> Origin:
    """What a file says about itself; its tensors are not read.

    Raises:
        ModelError: no such file, torn, without an origin, or with one that this version does not know.
    """
    try:
        with safe_open(path, framework="pt", backend="pread") as file:
            text = (file.metadata() or {}).get(KEY)
        content = json_object(text or "null")
        known = [field.name for field in fields(Origin)]
        check_keys(path, f"field of `{KEY}` in the header", content, known, ModelError)
        trainings = trainings_from(content["trainings"], str(path))
        run, number, base = str(content["run"]), int(content["round"]), str(content.get("base", ""))
        return Origin(run, number, str(content["content"]), content["lora"], trainings, base)
    except (OSError, SafetensorError) as error:
        raise unreadable(path, error) from error
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ModelError(
            f"{path} does not say which run and round it is of.",
            code="model-no-origin",
            why="weights that do not belong together load without an error and compute nonsense",
            fix="use the files that `coterie split` or a run of this version wrote, as they are",
        ) from None


def check_content(path: Path) -> Origin:
    """Read a whole file and make sure that its tensors are those it was written with.

    Raises:
        ModelError: they are not, or as `origin_of`.
    """
    origin = origin_of(path)
    with safe_open(path, framework="pt", backend="pread") as file:  # a map would leave all that was read resident
        lines = (tensor_line(name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118 - no mapping
        found = digest_of_lines(lines)
    if found != origin.content:
        raise ModelError(
            f"{path} was changed after it was written as {origin.words()}.",
            code="model-changed-file",
            why="it would count as weights that it does not hold",
            fix="copy it again from where it was written",
        )
    return origin


def content_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors, in any order."""
    return digest_of_lines(tensor_line(name, tensor) for name, tensor in tensors.items())


def digest_of_lines(lines: Iterable[str]) -> str:
    """`content_digest` from what `tensor_line` gives for each tensor."""
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def tensor_line(name: str, tensor: Tensor) -> str:
    """One tensor's part of a content digest."""
    return f"{name} {tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(raw_bytes(tensor)).hexdigest()}"


def unreadable(path: Path, error: Exception) -> ModelError:
    """A file of weights that is absent or torn."""
    if not path.exists():
        return ModelError(f"There is no file {path}.", code="model-no-file", fix="make it with `coterie split`")
    return ModelError(
        f"{path} is not a whole safetensors file: {error}.",
        code="model-torn-file",
        why="a part of the weights would be missing or wrong",
        fix="copy it again and compare its SHA-256 with the one in manifest.json",
    )
