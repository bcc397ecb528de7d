"""Checkpoints that are whole or absent: safetensors and JSON, written aside, synced, renamed, with digests.

A checkpoint is a folder of tensor files with ``manifest.json``, which names the run, the round and the size and
SHA-256 of every file. It is the same for plain and private runs, for one party's part of a federation and for a
private session; they differ in what they put in. A `CheckpointStore` keeps those of one run as
``FOLDER/round-00000100/``. A folder that ends in ``.part`` was being written when the process died; it is ignored.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from coterie.errors import CheckpointError
from coterie.models.split.origins import content_digest, origin_of, save_tensors
from coterie.models.split.trainings import Training
from coterie.models.spread.holdings import Holdings
from coterie.storage import (
    check_keys,
    check_known,
    file_digest,
    json_object,
    new_folder,
    put_away,
    sync_folder,
    write_json,
    writing,
)

FORMAT = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"round-(\d{8})")
_PART_DIGITS = 16
_FIELDS = ("format", "run", "round", "files", "state", "parts")

Content = Mapping[str, Mapping[str, Tensor]]
"""File stem (``weights``, ``optimizer``) to named tensors; written as ``{stem}.safetensors``."""


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint.

    Attributes:
        run: identity of the run it is of.
        round: rounds that were finished when it was written.
        path: its folder.
        digest: SHA-256 of the manifest, and so of everything in it.
        state: the JSON values that were saved with it.
        files: name of each tensor file to its bytes and their SHA-256.
        parts: digests of what ranks 1 and on wrote beside it, where several shared the run.
    """

    run: str
    round: int
    path: Path
    digest: str
    state: Mapping[str, Any]
    files: Mapping[str, tuple[int, str]]
    parts: tuple[str, ...] = ()

    def pieces(self, stem: str) -> Iterator[tuple[str, Tensor]]:
        """The tensors of one file, its own and then those of every part, by their names there.

        Raises:
            CheckpointError: as `load`; a part is missing, or is not what was written.
        """
        for each in (self, *self.others()):
            yield from each.load(stem).items()

    def others(self) -> Iterator[Checkpoint]:
        """What other ranks wrote of it.

        Raises:
            CheckpointError: a part is missing, or is not what was written.
        """
        for rank, digest in enumerate(self.parts, 1):
            part = read_checkpoint(part_folder(self.path, rank, digest))
            if part.digest != digest:
                raise _torn(part.path, "it is not what was written")
            yield part

    def load(self, stem: str, device: str = "cpu") -> dict[str, Tensor]:
        """The tensors of one file, after its digest was compared.

        Raises:
            CheckpointError: the file is missing or its bytes are not those that were written.
        """
        path = self.path / f"{stem}.safetensors"
        entry = self.files.get(path.name)
        if entry is None or not path.is_file():
            raise _torn(self.path, f"{path.name} is missing")
        if (path.stat().st_size, file_digest(path)) != entry:
            raise _torn(self.path, f"{path.name} is not what was written")
        try:
            return load_file(path, device=device)
        except SafetensorError as error:
            raise _torn(self.path, f"{path.name}: {error}") from None


def write_checkpoint(
    folder: Path,
    run: str,
    round_no: int,
    content: Content,
    state: Mapping[str, Any],
    *,
    named: str | None = None,
    lora: Mapping[str, Any] | None = None,
    trainings: tuple[Training, ...] = (),
    parts: Sequence[str] = (),
    bases: Mapping[str, str] = MappingProxyType({}),
) -> Checkpoint:
    """Save after ``round_no`` finished rounds, in the place of an older checkpoint in ``folder``.

    Args:
        folder: becomes the checkpoint.
        run: identity of the run.
        round_no: finished rounds.
        content: its tensor files.
        state: small values that JSON can hold.
        named: the run that each file says it is of, where several members write parts of one; default: ``run``.
        lora: settings of the adapters among the tensors.
        trainings: what is behind the weights, for whoever exports them.
        parts: digests of what other ranks have written with `write_part`.
        bases: by stem, the content digest of the file with the frozen weights that are left out here.

    Raises:
        CheckpointError: the disk is full or broken; what was there before is kept.
    """
    files = {}
    with writing(folder), new_folder(folder) as aside:
        for stem, tensors in content.items():
            path = aside / f"{stem}.safetensors"
            of = run if named is None else named
            save_tensors(path, tensors, of, round_no, lora, trainings, bases.get(stem, ""))
            files[path.name] = {"sha256": file_digest(path), "bytes": path.stat().st_size}
        manifest = {"format": FORMAT, "run": run, "round": round_no, "files": files, "state": dict(state)}
        manifest |= {"parts": list(parts)} if parts else {}
        write_json(aside / MANIFEST, manifest)
    return read_checkpoint(folder)


def write_part(folder: Path, rank: int, run: str, round_no: int, content: Content, state: Mapping[str, Any]) -> str:
    """Save what another rank than the first has of a checkpoint that the first writes to ``folder`` next.

    It lies under its digest: an older checkpoint in ``folder`` stays whole until the new one is in its place, of
    whatever run, round and number of ranks they are.

    Returns:
        The digest, for ``parts`` of `write_checkpoint`.

    Raises:
        CheckpointError: as `write_checkpoint`.
    """
    aside = part_folder(folder, rank, "being-written")
    digest = write_checkpoint(aside, run, round_no, content, state).digest
    place = part_folder(folder, rank, digest)
    with writing(place):
        if place.exists():
            put_away(aside)
        else:
            os.replace(aside, place)
            sync_folder(place.parent)
    return digest


def part_folder(folder: Path, rank: int, digest: str) -> Path:
    """Where another rank than the first puts what it has of a checkpoint in ``folder``."""
    return folder.with_name(f"{folder.name}.rank-{rank}") / digest[:_PART_DIGITS]


def keep_parts(folder: Path, rank: int, world: int) -> None:
    """Delete what a rank wrote beside earlier checkpoints in ``folder``; as rank 0, also of ranks that are gone."""
    for parts in folder.parent.glob(f"{escape(folder.name)}.rank-*"):
        number = parts.name.rpartition("-")[2]
        if number == str(rank):
            named = [part_folder(folder, rank, digest) for digest in read_checkpoint(folder).parts[rank - 1 : rank]]
            for part in set(parts.iterdir()) - set(named):
                put_away(part)
        elif rank == 0 and number.isdecimal() and int(number) >= world:
            put_away(parts)


def read_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in a folder; its tensors are not read.

    Raises:
        CheckpointError: it is not there, torn, of another format, or says what this version does not know.
    """
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
        manifest = json_object(raw)
        check_known(folder, "format", manifest["format"], {FORMAT}, CheckpointError)
        check_keys(folder, "field", manifest, _FIELDS, CheckpointError)
        for entry in manifest["files"].values():
            check_keys(folder, "field of a file", entry.keys(), ("bytes", "sha256"), CheckpointError)
        run, number, state = (manifest[key] for key in ("run", "round", "state"))
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        parts = tuple(str(digest) for digest in manifest.get("parts", ()))
    except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError, NotADirectoryError):
        raise _torn(folder, f"{MANIFEST} cannot be read") from None
    except OSError as error:  # the checkpoint may be whole: nothing follows from a disk that cannot be read now
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror or error}.",
            code="checkpoint-read",
            why="a checkpoint that counts would be taken for one that is lost",
            fix="mend that disk or its permissions, or allow more open files, then start again",
        ) from error
    return Checkpoint(run, number, folder, hashlib.sha256(raw).hexdigest(), state, files, parts)


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
        round_no: int,
        content: Content,
        state: Mapping[str, Any],
        *,
        named: str | None = None,
        lora: Mapping[str, Any] | None = None,
        trainings: tuple[Training, ...] = (),
        parts: Sequence[str] = (),
        bases: Mapping[str, str] = MappingProxyType({}),
    ) -> Checkpoint:
        """Save after ``round_no`` finished rounds; see `write_checkpoint`."""
        return write_checkpoint(
            self.path(round_no), self.run, round_no, content, state,
            named=named, lora=lora, trainings=trainings, parts=parts, bases=bases,
        )  # fmt: skip

    def rounds(self) -> list[int]:
        """Rounds of which a complete checkpoint is here, ascending."""
        return _rounds_in(self.folder)

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint, or None when there is none yet."""
        rounds = self.rounds()
        return self.get(rounds[-1]) if rounds else None

    def get(self, round_no: int) -> Checkpoint:
        """The checkpoint of one round.

        Raises:
            CheckpointError: it is not there, torn, of another run or of another format.
        """
        checkpoint = read_checkpoint(self.path(round_no))
        if (checkpoint.run, checkpoint.round) != (self.run, round_no):
            raise CheckpointError(
                f"{checkpoint.path} belongs to another run ({str(checkpoint.run)[:12]}, round {checkpoint.round}), "
                f"not to this one ({self.run[:12]}).",
                code="checkpoint-foreign",
                why="its weights were trained with other settings",
                fix="resume with the settings of that run, or choose another run_dir",
            )
        return checkpoint

    def keep_last(self, count: int) -> None:
        """Delete all but the newest ``count`` checkpoints."""
        for round_no in self.rounds()[:-count]:
            self.remove(round_no)

    def remove(self, round_no: int) -> None:
        """Delete the checkpoint of one round, if there is one. A crash meanwhile leaves no half of it to be found."""
        path = self.path(round_no)
        put_away(path)
        for part in path.parent.glob(f"{path.name}.rank-*"):
            put_away(part)

    def path(self, round_no: int) -> Path:
        """The folder of the checkpoint of a round, whether it is there or not."""
        return self.folder / f"round-{round_no:08d}"


def _rounds_in(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    matches = [match for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted(int(match[1]) for match in matches)


def _torn(path: Path, what: str) -> CheckpointError:
    others = [number for number in _rounds_in(path.parent) if path.name != f"round-{number:08d}"]
    return CheckpointError(
        f"The checkpoint {path} is damaged: {what}.",
        code="checkpoint-torn",
        why="training on from damaged weights would not be noticed later",
        fix=f"delete that folder to go on from round {others[-1]}" if others else "start the run again",
    )


# -- models --------------------------------------------------------------------------------------------------------


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name; those that share all their memory once, under their first name."""
    saved = model.state_dict(keep_vars=True)
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    tensors.update({name: buffer for name, buffer in model.named_buffers() if name in saved})
    seen: set[tuple[object, ...]] = set()
    kept = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if place not in seen or tensor.is_meta or not tensor.numel():
            seen.add(place)
            kept[name] = tensor
    return kept


def saved_weights(checkpoint: Checkpoint, model: nn.Module) -> dict[str, Tensor]:
    """What a model holds of a checkpoint's weights, whoever wrote them, by its own names.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    return Holdings(model).joined(checkpoint.pieces("weights"))


def changing_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Those of `model_tensors` that training can change: what requires a gradient, and buffers."""
    frozen = _frozen_tensors(model)
    return {name: tensor for name, tensor in model_tensors(model).items() if name not in frozen}


def frozen_digest(model: nn.Module) -> str:
    """Content digest of a model's other tensors, which checkpoints of adapters leave out."""
    return content_digest(_frozen_tensors(model))


def _frozen_tensors(model: nn.Module) -> dict[str, Tensor]:
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in model_tensors(model).items() if name in frozen}


def load_weights(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Put a checkpoint's weights into a model; the frozen ones that it leaves out are there already.

    Raises:
        CheckpointError: it is damaged, of another model, or goes with other frozen weights.
    """
    tensors, base = saved_weights(checkpoint, model), origin_of(checkpoint.path / "weights.safetensors").base
    if not base:
        load_model_tensors(model, tensors)
        return
    if base != frozen_digest(model):
        raise CheckpointError(
            f"{checkpoint.path} holds adapters of other weights than those that were loaded now.",
            code="checkpoint-base",
            why="adapters mean nothing without the weights that they were trained on",
            fix="put the checkpoint that `model` names back as it was when the run began, or start a new run in "
            "another run_dir",
        )
    _copy(changing_tensors(model), tensors)


def load_model_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy saved tensors into a model of the same shape.

    Raises:
        CheckpointError: a name is missing or unknown, or a shape differs.
    """
    _copy(model_tensors(model), tensors)


def _copy(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
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
