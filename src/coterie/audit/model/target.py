"""What is attacked: a trained model, the start it was made from, and documents of which the owner knows the truth."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coterie.audit.model.canaries import Canary
from coterie.audit.model.claim import UnitEpsilon
from coterie.audit.model.key import HELD_OUT, KEY, TRAIN, Key, check_piles
from coterie.checkpoints import CheckpointStore
from coterie.config import DataSpec, FederationConfig, ModelSpec, PartyConfig, load_yaml, party_privacy
from coterie.dp.heads import head_of
from coterie.errors import AuditError, CheckpointError, as_argument
from coterie.models.split.exporter import export
from coterie.models.split.shards import MODEL_FOLDER, TRUNK_FILE, shard_file
from coterie.models.split.splitter import write_config
from coterie.models.zoo.build import build_model
from coterie.storage import json_object
from coterie.training.data.documents import Documents, read_documents
from coterie.training.data.tokenizer import load_tokenizer_from, tokenize
from coterie.training.folders import TOKENIZER_FOLDER, private_folder
from coterie.training.party.process import PARTY_FILE, settings_of_run
from coterie.training.single.prepared import MARKER, read_run
from coterie.training.single.setup import build_for, pick_device
from coterie.training.single.trained import load_trained

Load = Callable[[], PreTrainedModel]


class Design(StrEnum):
    """How members and others came about, which decides what a difference between them means."""

    COIN = "coin"
    """By secret coins before training: they differ in nothing else."""
    REFERENCE = "reference"
    """By a person; a model that saw none of the members is measured beside the attacked one."""
    SPLIT = "split"
    """By a person, and nothing to compare with: a difference means nothing."""


@dataclass(frozen=True)
class Target:
    """A model under attack. Models are read when they are needed, one at a time.

    Attributes:
        model: the trained one; start: the public one it began as.
        references: trained on text of the same kind, and on none of the members.
        data: how documents become sequences.
        members, others: the documents that were trained on, and those that were not.
        member_ids, other_ids: an id for each, by its content.
        population: documents that no model here trained on and nothing is asked about.
        canaries: what was planted, or could have been; empty for a run that was not prepared.
        claim: None for a run without privacy.
    """

    model: Load
    start: Load
    tokenizer: PreTrainedTokenizerBase
    data: DataSpec
    members: Documents
    others: Documents
    member_ids: tuple[str, ...]
    other_ids: tuple[str, ...]
    design: Design
    references: tuple[Load, ...] = ()
    population: Documents | None = None
    canaries: tuple[Canary, ...] = ()
    claim: UnitEpsilon | None = None

    @classmethod
    def of_run(
        cls,
        run_dir: Path,
        *,
        model: Path | None = None,
        parties: Sequence[Path] = (),
        references: Sequence[Path] = (),
        public: Sequence[Path] = (),
    ) -> Target:
        """A finished run of `coterie train`, or one party's of `coterie up`. A prepared run brings its key.

        Args:
            run_dir: its folder.
            model: for a party: the whole trained model, as `coterie export` writes it.
            parties: for a party, instead: run folders of all other parties, where they are on this machine.
            references: run folders or Hugging Face folders of models that saw none of this run's text.
            public: files of public text.

        Raises:
            AuditError: the model is not whole, the key is of another text, or a reference saw a member.
            CheckpointError, DataError, ModelError: something of the run is missing or changed.
        """
        _check_finished(run_dir)
        run = _party(run_dir, model, parties) if (run_dir / PARTY_FILE).is_file() else _alone(run_dir)
        return _put_together(run, references, public)


@dataclass(frozen=True)
class _Run:
    folder: Path
    data: DataSpec
    model: Load
    start: Load
    tokenizer: PreTrainedTokenizerBase
    user_column: str | None
    text: str | None
    claim: UnitEpsilon | None


def _alone(run_dir: Path) -> _Run:
    config, marker = read_run(run_dir)
    tokenizer = load_tokenizer_from(private_folder(run_dir) / "tokenizer")
    privacy = config.privacy
    claim = UnitEpsilon.of_run(str(marker["privacy_run"]), privacy.ledger, run_dir) if privacy is not None else None
    return _Run(
        run_dir, config.data, lambda: load_trained(run_dir).model, lambda: build_for(config, tokenizer), tokenizer,
        privacy.user_column if privacy is not None else None, marker.get("data"), claim,
    )  # fmt: skip


def _party(run_dir: Path, model: Path | None, parties: Sequence[Path]) -> _Run:
    config = settings_of_run(run_dir)
    federation = load_yaml(config.federation, FederationConfig)
    device = pick_device(config.device)
    marker = json_object((run_dir / MARKER).read_bytes())
    privacy = party_privacy(federation, config)
    name = f"{marker['run']}-{config.party}"
    claim = UnitEpsilon.of_run(name, privacy.ledger, run_dir) if privacy is not None else None
    if model is None:
        _check_parties(config, federation, str(marker["run"]), parties)

    def trained() -> PreTrainedModel:
        if model is not None:
            return build_model(ModelSpec(path=model, dtype=federation.model.dtype), device=device)
        return _joined(config, federation, parties)

    return _Run(
        run_dir, config.data, trained,
        lambda: build_model(federation.model, device=device, seed=federation.train.seed),
        load_tokenizer_from(private_folder(run_dir) / TOKENIZER_FOLDER),
        privacy.user_column if privacy is not None else None, marker.get("data"), claim,
    )  # fmt: skip


def _check_parties(config: PartyConfig, federation: FederationConfig, run: str, parties: Sequence[Path]) -> None:
    markers = [json_object((folder / MARKER).read_bytes()) for folder in parties]
    other = [folder for folder, marker in zip(parties, markers, strict=True) if marker.get("run") != run]
    if other:
        raise AuditError(
            f"{other[0]} is of another run than the one of {config.party} that is audited.",
            code="audit-model-other-run",
            why="a model of two runs' experts is nobody's",
            fix="name what the parties hold of this very run",
        )
    found = {str(marker["party"]) for marker in markers} | {config.party}
    missing = sorted(set(federation.parties) - found)
    if missing:
        raise AuditError(
            f"The model of {config.party} is not whole here: the experts of {', '.join(missing)} are missing.",
            code="audit-model-parts",
            why="a model with untrained experts would look as if it had forgotten what it was trained on",
            fix="name the other parties' run folders, or the folder that `coterie export` made",
        )


def _joined(config: PartyConfig, federation: FederationConfig, parties: Sequence[Path]) -> PreTrainedModel:
    """The trunk of the party and everybody's experts, of the newest round that all hold."""
    stores = []
    for folder in (config.run_dir, *parties):
        marker = json_object((folder / MARKER).read_bytes())
        name = f"{marker['run']}/{marker['party']}"
        stores.append(CheckpointStore(private_folder(folder) / "checkpoints", name))
    rounds = set.intersection(*(set(store.rounds()) for store in stores)) - {0}
    if not rounds:
        raise CheckpointError(
            "The parties hold no checkpoint of one round.",
            code="checkpoint-none",
            fix="name the run folders of one run, after its last round",
        )
    trunk, *_ = kept = [store.get(max(rounds)).path for store in stores]
    with tempfile.TemporaryDirectory(dir=private_folder(config.run_dir)) as aside:
        write_config(build_model(federation.model, meta=True), Path(aside, MODEL_FOLDER))
        if federation.lora is not None:  # checkpoints of adapters leave out what every party's shard holds
            Path(aside, TRUNK_FILE).symlink_to(config.trunk.absolute())
            for own in (settings_of_run(folder) for folder in (config.run_dir, *parties)):
                Path(aside, shard_file(own.party)).symlink_to(own.shard.absolute())
        shards = [path / "experts.safetensors" for path in kept]
        whole = export(Path(aside), Path(aside, "whole"), trunk=trunk / "trunk.safetensors", shards=shards)
        return build_model(ModelSpec(path=whole, dtype=federation.model.dtype), device=pick_device(config.device))


def _put_together(run: _Run, references: Sequence[Path], public: Sequence[Path]) -> Target:
    data = run.data
    inside = read_documents(data.train, data, user_column=run.user_column)
    if run.text is not None and tokenize(inside, data, run.tokenizer).digest() != run.text:
        raise CheckpointError(
            f"The training text of {run.folder} changed since the run was started.",
            code="run-changed",
            why="members would be documents that the model may never have seen",
            fix="put it back, or train anew",
        )
    test = read_documents(data.test, data) if data.test else None
    folder = data.train[0].parent
    key = Key.read(folder) if data.train == (folder / TRAIN,) and (folder / KEY).exists() else None
    free = data.model_copy(update={"format": None, "text": "text"})
    made_public = read_documents(public, free) if public else None
    loaded = tuple(_reference(path, inside) for path in references)
    common: dict[str, Any] = {
        "model": run.model, "start": run.start, "tokenizer": run.tokenizer, "data": data, "references": loaded,
        "claim": run.claim,
    }  # fmt: skip
    if key is not None:
        outside = read_documents((folder / HELD_OUT,), free)
        check_piles(key, map(key.id, inside.texts), map(key.id, outside.texts))
        members = tuple(text for text in inside.texts if key.coins.get(key.id(text)) is True)
        others = tuple(text for text in outside.texts if key.coins.get(key.id(text)) is False)
        return Target(
            **common, members=_distinct(members), others=_distinct(others),
            member_ids=_ids(key.id, members), other_ids=_ids(key.id, others), design=Design.COIN,
            population=_joined_documents(test, made_public), canaries=key.canaries,
        )  # fmt: skip
    texts = set(inside.texts)
    others = tuple(text for text in (test.texts if test is not None else ()) if text not in texts)
    return Target(
        **common, members=_distinct(inside.texts), others=_distinct(others), member_ids=_ids(str, inside.texts),
        other_ids=_ids(str, others), design=Design.REFERENCE if loaded else Design.SPLIT, population=made_public,
    )  # fmt: skip


def _distinct(texts: Sequence[str]) -> Documents:
    """Every text once, in order: copies are no further evidence."""
    return Documents(tuple(dict.fromkeys(texts)))


def _ids(name: Callable[[str], str], texts: Sequence[str]) -> tuple[str, ...]:
    return tuple(name(text) for text in dict.fromkeys(texts))


def _joined_documents(*some: Documents | None) -> Documents | None:
    texts = [text for documents in some if documents is not None for text in documents.texts]
    return _distinct(texts) if texts else None


def _reference(path: Path, members: Documents) -> Load:
    """A model that saw none of the members: a run's, whose text is compared as far as it is here, or a checkpoint."""
    if (path / PARTY_FILE).is_file():
        raise AuditError(
            f"The reference {path} is a party's run.",
            code="audit-reference-party",
            why="a party holds a part of a model, of which every party trained the experts",
            fix="name a run of `coterie train` on other text, or the export of a federation without this one",
        )
    if (path / MARKER).is_file():
        config, _ = read_run(path)
        if all(file.is_file() for file in config.data.train):
            shared = set(read_documents(config.data.train, config.data).texts) & set(members.texts)
            if shared:
                raise AuditError(
                    f"The reference {path} was trained on {len(shared)} of the documents under attack.",
                    code="audit-reference-saw",
                    why="it would know them as well as the attacked model does, and hide what that one learnt",
                    fix="name a model that was trained on other text",
                )
        return lambda: load_trained(path).model
    return lambda: build_model(ModelSpec(path=path))


def _check_finished(run_dir: Path) -> None:
    try:
        finished = json_object((private_folder(run_dir) / "result.json").read_bytes())["finished"]
    except (OSError, ValueError, KeyError):
        finished = False
    if finished is not True:
        raise AuditError(
            f"{run_dir} has not finished.",
            code="audit-unfinished",
            why="its promise and its model are not yet what they will be",
            fix=f"coterie resume {as_argument(run_dir)}",
        )


def check_causal(model: PreTrainedModel) -> None:
    """Refuse a model that does not predict the next token of a text.

    Raises:
        AuditError: another head.
    """
    if head_of(model).kind != "next":
        raise AuditError(
            f"{type(model).__name__} does not predict next tokens.",
            code="audit-not-causal",
            why="the scores here are made of next-token probabilities",
            fix="audit a run of `coterie train` or `coterie up`; for a classifier, give the losses of its records to "
            "coterie.audit.metrics.Scores",
        )
