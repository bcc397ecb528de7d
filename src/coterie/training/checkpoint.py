"""Checkpoints that are whole or absent: safetensors and JSON, written aside, synced, renamed, with digests.

``FOLDER/round-00000100/`` holds the tensor files and ``manifest.json``, which names the run, the round and the size
and SHA-256 of every file. A folder that ends in ``.part`` was being written when the process died; it is ignored.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from coterie.errors import CheckpointError
from coterie.models.origins import save_tensors
from coterie.models.trainings import Training
from coterie.storage import check_known, file_digest, json_object, new_folder, put_away, write_json, writing

FORMAT = 1
_MANIFEST = "manifest.json"
_NAME = re.compile(r"round-(\d{8})")


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint.

    Attributes:
        round: rounds that were finished when it was written.
        path: its folder.
        digest: SHA-256 of the manifest, and so of everything in it.
        state: the JSON values that were saved with it.
    """

    round: int
    path: Path
    digest: str
    state: Mapping[str, Any]


class CheckpointStore:
    """The checkpoints of one run, or of one party's part of it.

    Args:
        folder: where they are; made when the first one is written.
        run: identity of the run, for example the hash of its settings. A checkpoint of another is refused.
    """

    def __init__(self, folder: Path, run: str) -> None:
        self.folder = folder
        self.run = run

    def write(
        self,
        round_index: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        *,
        run: str | None = None,
        lora: Mapping[str, Any] | None = None,
        trainings: tuple[Training, ...] = (),
    ) -> Checkpoint:
        """Save after ``round_index`` finished rounds.

        Args:
            round_index: finished rounds.
            tensors: file stem (``weights``, ``optimizer``) to named tensors; written as ``{stem}.safetensors``.
            state: small values that JSON can hold.
            run: name of the run that each file says it is of, where several members write parts of one; default: this
                store's.
            lora: settings of the adapters among the tensors.
            trainings: what is behind the weights, for whoever exports them.

        Raises:
            CheckpointError: the disk is full or broken; what was there before is kept.
        """
        final = self._path(round_index)
        with writing(final):
            self._write(round_index, final, tensors, state, run or self.run, lora, trainings)
        return self._read_manifest(round_index)

    def rounds(self) -> list[int]:
        """Rounds of which a complete checkpoint is here, ascending."""
        if not self.folder.is_dir():
            return []
        found = [match for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name))]
        return sorted(int(match[1]) for match in found)

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint, or None when there is none yet."""
        rounds = self.rounds()
        return self._read_manifest(rounds[-1]) if rounds else None

    def get(self, round_index: int) -> Checkpoint:
        """The checkpoint of one round.

        Raises:
            CheckpointError: it is not there, torn, of another run or of another format.
        """
        return self._read_manifest(round_index)

    def load(self, checkpoint: Checkpoint, stem: str, device: str = "cpu") -> dict[str, Tensor]:
        """The tensors of one file, after its digest was compared.

        Raises:
            CheckpointError: the file is missing or its bytes are not those that were written.
        """
        path = checkpoint.path / f"{stem}.safetensors"
        try:
            entry = json_object((checkpoint.path / _MANIFEST).read_bytes())["files"].get(path.name)
            told = None if entry is None else (entry["bytes"], entry["sha256"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise self._torn(checkpoint.path, f"{_MANIFEST} cannot be read") from None
        if told is None or not path.is_file():
            raise self._torn(checkpoint.path, f"{path.name} is missing")
        if (path.stat().st_size, file_digest(path)) != told:
            raise self._torn(checkpoint.path, f"{path.name} is not what was written")
        try:
            return load_file(path, device=device)
        except SafetensorError as error:
            raise self._torn(checkpoint.path, f"{path.name}: {error}") from None

    def keep_last(self, count: int) -> None:
        """Delete all but the newest ``count`` checkpoints."""
        for round_index in self.rounds()[:-count]:
            self.remove(round_index)

    def remove(self, round_index: int) -> None:
        """Delete the checkpoint of one round, if there is one. A crash meanwhile leaves no half of it to be found."""
        put_away(self._path(round_index))

    def _write(
        self,
        round_index: int,
        final: Path,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        run: str,
        lora: Mapping[str, Any] | None,
        trainings: tuple[Training, ...],
    ) -> None:
        files = {}
        with new_folder(final) as aside:
            for stem, named in tensors.items():
                path = aside / f"{stem}.safetensors"
                save_tensors(path, named, run, round_index, lora, trainings)
                files[path.name] = {"sha256": file_digest(path), "bytes": path.stat().st_size}
            manifest = {"format": FORMAT, "run": self.run, "round": round_index, "files": files, "state": dict(state)}
            write_json(aside / _MANIFEST, manifest)

    def _path(self, round_index: int) -> Path:
        return self.folder / f"round-{round_index:08d}"

    def _read_manifest(self, round_index: int) -> Checkpoint:
        path = self._path(round_index)
        try:
            raw = (path / _MANIFEST).read_bytes()
            manifest = json_object(raw)
            check_known(path, "format", manifest["format"], {FORMAT}, CheckpointError)
            run, stored, state = (manifest[key] for key in ("run", "round", "state"))
        except (ValueError, KeyError, TypeError, FileNotFoundError, NotADirectoryError):
            raise self._torn(path, f"{_MANIFEST} cannot be read") from None
        except OSError as error:  # the checkpoint may be whole: nothing follows from a disk that cannot be read now
            raise CheckpointError(
                f"{path / _MANIFEST} cannot be read: {error.strerror or error}.",
                code="checkpoint-read",
                why="a checkpoint that counts would be taken for one that is lost",
                fix="mend that disk or its permissions, or allow more open files, then start again",
            ) from error
        if run != self.run or stored != round_index:
            raise CheckpointError(
                f"{path} belongs to another run ({str(run)[:12]}, round {stored}), not to this one "
                f"({self.run[:12]}).",
                code="checkpoint-foreign",
                why="its weights were trained with other settings",
                fix="resume with the settings of that run, or choose another run_dir",
            )
        return Checkpoint(round_index, path, hashlib.sha256(raw).hexdigest(), state)

    def _torn(self, path: Path, what: str) -> CheckpointError:
        others = [number for number in self.rounds() if self._path(number) != path]
        return CheckpointError(
            f"The checkpoint {path} is damaged: {what}.",
            code="checkpoint-torn",
            why="training on from damaged weights would not be noticed later",
            fix=f"delete that folder to go on from round {others[-1]}" if others else "start the run again",
        )


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name; tied ones once, under their first name."""
    saved = model.state_dict(keep_vars=True)
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    tensors.update({name: buffer for name, buffer in model.named_buffers() if name in saved})
    return tensors


def load_model_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy saved tensors into a model of the same shape.

    Raises:
        CheckpointError: a name is missing or unknown, or a shape differs.
    """
    own = model_tensors(model)
    different = sorted(own.keys() ^ tensors.keys()) or [n for n in own if own[n].shape != tensors[n].shape]
    if different:
        raise CheckpointError(
            f"The saved weights do not fit the model: {len(different)} tensors differ, first `{different[0]}`.",
            code="checkpoint-weights",
            why="a partly loaded model would train on random weights",
            fix="resume with the model settings the run was started with",
        )
    for name, tensor in own.items():
        tensor.data.copy_(tensors[name])
