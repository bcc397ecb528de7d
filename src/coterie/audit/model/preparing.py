"""A run's settings and text made ready for an audit: half of the documents held out by secret coins, canaries put in.

Only a run whose members were chosen by chance says how much it leaks: documents that a person chose for training and
for testing differ, and an attack reads the difference. The prepared run is trained like any other, its ledger counts
like any other, and what it releases is released about the same text.

The folder, closed to others: ``train.yaml`` or ``party.yaml`` (the settings, with the text exchanged),
``train.jsonl``, ``held-out.jsonl``, ``test.jsonl`` and ``key.json``; the run goes to ``run/``.
"""

from __future__ import annotations

import json
import random
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coterie.audit.model.canaries import COPIES, Canary, make_new_tokens, make_sampled, make_secrets
from coterie.audit.model.key import HELD_OUT, TEST, TRAIN, Key, document_id
from coterie.config import (
    FederationConfig,
    PartyConfig,
    PartyPrivacy,
    PrivacyRules,
    TrainConfig,
    dump_yaml,
    load_yaml,
)
from coterie.dp.accounting.ledger import default_root
from coterie.errors import AuditError
from coterie.models.zoo.build import build_model
from coterie.storage import PRIVATE, file_digest, new_folder, write_whole, writing
from coterie.training.data.documents import Documents, read_documents
from coterie.training.data.tokenizer import encode, get_tokenizer
from coterie.training.single.setup import build_for, pick_device

FEWEST = 20
"""Documents (users, where they are the unit) without which coins decide nothing."""
USER = "user"
_LONGEST = 48
"""Most tokens of a sampled canary; it is one record where sequences have room for it."""


@dataclass(frozen=True)
class Amounts:
    """How much is put in and held out.

    Attributes:
        documents: most documents that get a coin; the rest is trained on in any case.
        names: secrets for each number of copies in ``copies``; twice as many are in no text.
        sampled, new_tokens: canaries of these kinds, of which a coin puts in every second.
    """

    documents: int = 2000
    names: int = 5
    copies: tuple[int, ...] = COPIES
    sampled: int = 100
    new_tokens: int = 50


@dataclass(frozen=True)
class PreparedAudit:
    """What was written.

    Attributes:
        settings: the file to train with.
        members, held_out: documents whose coin said so.
        canaries: how many of each kind; records: texts that they add to the run's.
    """

    settings: Path
    members: int
    held_out: int
    canaries: dict[str, int]
    records: int


def prepare_audit(
    settings: Path, out: Path, *, amounts: Amounts | None = None, seed: int | None = None
) -> PreparedAudit:
    """Write ``out``, from which `coterie train` or `coterie up` makes a run that can be audited.

    Args:
        settings: train.yaml or party.yaml; nothing in it changes, and nothing beside it.
        out: a folder that does not exist; it appears whole or not at all, readable by its owner alone.
        amounts: default: `Amounts`.
        seed: of coins and canaries, for tests: the key then says that they are no secret. Absent: the operating
            system's randomness.

    Raises:
        AuditError: ``out`` exists, or there are too few documents for coins to decide anything.
        ConfigError, DataError, ModelError: the settings do not fit the text or the model.
    """
    if out.exists():
        raise AuditError(f"{out} exists already.", code="audit-folder", fix="name a folder that does not exist yet")
    source = _Source.read(settings)
    amounts = amounts or Amounts()
    draw = random.Random(seed) if seed is not None else secrets.SystemRandom()
    salt = draw.randbytes(32).hex()
    documents, test = source.documents()
    coins = _flip(documents, amounts.documents, draw)
    model, tokenizer = source.start()
    canaries = _make_canaries(source, model, tokenizer, documents, test, amounts, draw)
    inside = [index for index in range(len(documents)) if coins.get(index, True)]
    outside = [index for index in range(len(documents)) if not coins.get(index, True)]
    planted = [(canary.text, f"canary-{number}") for number, canary in enumerate(
        canary for canary in canaries for _ in range(canary.copies)
    )]  # fmt: skip
    rows = [*_rows(documents, inside), *planted]
    draw.shuffle(rows)
    ids = {index: document_id(documents.texts[index], salt) for index in coins}
    both = {ids[i] for i in coins if coins[i]} & {ids[i] for i in coins if not coins[i]}  # one text of two users
    flipped = {ids[index]: coin for index, coin in coins.items() if ids[index] not in both}
    with writing(out), new_folder(out, 0o700) as aside:
        _write_rows(aside / TRAIN, rows, documents.users is not None)
        _write_rows(aside / HELD_OUT, _rows(documents, outside), documents.users is not None)
        if test is not None:
            _write_rows(aside / TEST, _rows(test, range(len(test))), False)
        Key(salt, flipped, tuple(canaries), file_digest(aside / TRAIN), seed is not None).write(aside)
        dump_yaml(aside / source.file, source.moved(out, test is not None))
    counts = {kind: sum(canary.kind == kind for canary in canaries) for kind in ("secret", "sampled", "new_token")}
    return PreparedAudit(
        out / source.file, sum(flipped.values()), len(flipped) - sum(flipped.values()), counts, len(planted)
    )


def _flip(documents: Documents, most: int, draw: random.Random) -> dict[int, bool]:
    """A coin for each document; those of one user, and those of one text, share theirs."""
    owners: Sequence[str] = documents.users or [text.strip() for text in documents.texts]
    groups: dict[str, list[int]] = {}
    for index, owner in enumerate(owners):
        groups.setdefault(owner, []).append(index)
    if len(groups) < FEWEST:
        raise AuditError(
            f"The text has {len(groups)} {'users' if documents.users else 'different documents'}.",
            code="audit-too-few",
            why=f"with fewer than {FEWEST}, chance alone tells members from others",
            fix="audit a run with more text, or cut it into more documents (data.split_text)",
        )
    chosen = draw.sample(sorted(groups), min(most, len(groups)))
    # Half of them, to within one: a coin each could leave hardly any on one side. The coins are still exchangeable.
    draw.shuffle(chosen)
    half = (len(chosen) + draw.getrandbits(1)) // 2
    return {index: place < half for place, owner in enumerate(chosen) for index in groups[owner]}


def _make_canaries(
    source: _Source,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Documents,
    test: Documents | None,
    amounts: Amounts,
    draw: random.Random,
) -> list[Canary]:
    planted = make_secrets(draw, names=amounts.names, copies=amounts.copies)
    room = source.config.data.sequence_length - 1  # for the end token
    longest = max(map(len, encode(tokenizer, [canary.text for canary in planted]))) if planted else 0
    if longest > room:
        raise AuditError(
            f"A planted secret has {longest} tokens, and data.sequence_length is {room + 1}.",
            code="audit-short-sequences",
            why="the secret would be cut from the words that lead to it",
            fix=f"set data.sequence_length to {longest + 1} or more, or plant no secrets",
        )
    tokens = min(_LONGEST, max(2, room * 3 // 4))
    texts = [*documents.texts, *(test.texts if test is not None else ()), *(canary.text for canary in planted)]
    if amounts.sampled:
        planted += make_sampled(model, tokenizer, draw, count=amounts.sampled, tokens=tokens)
    if amounts.new_tokens:
        planted += make_new_tokens(model, tokenizer, texts, draw, count=amounts.new_tokens)
    return planted


def _rows(documents: Documents, indices: Iterable[int]) -> list[tuple[str, str]]:
    users = documents.users
    return [(documents.texts[index], users[index] if users is not None else "") for index in indices]


def _write_rows(path: Path, rows: Iterable[tuple[str, str]], users: bool) -> None:
    lines = [json.dumps({"text": text, USER: user} if users else {"text": text}) for text, user in rows]
    write_whole(path, ("\n".join(lines) + "\n").encode(), PRIVATE)


@dataclass(frozen=True)
class _Source:
    """Settings of a run that is to be audited, of either sort."""

    config: TrainConfig | PartyConfig
    federation: FederationConfig | None

    @classmethod
    def read(cls, path: Path) -> _Source:
        if path.is_file() and re.search(rb"^party\s*:", path.read_bytes(), re.MULTILINE):
            party = load_yaml(path, PartyConfig)
            return cls(party, load_yaml(party.federation, FederationConfig))
        return cls(load_yaml(path, TrainConfig), None)

    @property
    def file(self) -> str:
        return "train.yaml" if self.federation is None else "party.yaml"

    def documents(self) -> tuple[Documents, Documents | None]:
        """The text to train on and the text to test on."""
        data, privacy = self.config.data, self.config.privacy
        column = None if privacy is None or isinstance(privacy, str) else privacy.user_column
        test = read_documents(data.test, data) if data.test else None
        return read_documents(data.train, data, user_column=column), test

    def start(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The public model that the run starts from, and its tokenizer."""
        config = self.config
        if isinstance(config, TrainConfig):
            tokenizer = get_tokenizer(config.data.tokenizer, config.model, config.data)
            return build_for(config, tokenizer), tokenizer
        assert self.federation is not None
        tokenizer = get_tokenizer(config.data.tokenizer, self.federation.model, config.data)
        model = build_model(self.federation.model, device=pick_device(config.device), seed=self.federation.train.seed)
        return model, tokenizer

    def moved(self, out: Path, tested: bool) -> TrainConfig | PartyConfig:
        """The same settings for the prepared text, with a run folder of their own and the ledger they had."""
        config, folder = self.config, out.absolute()
        text: dict[str, Any] = {"train": (folder / TRAIN,), "test": (folder / TEST,) if tested else ()}
        text |= {"format": None, "text": "text"}
        changes: dict[str, Any] = {"data": config.data.model_copy(update=text), "run_dir": folder / "run"}
        ledger, privacy = default_root(config.run_dir), config.privacy
        if isinstance(config, PartyConfig):
            changes["ledger"] = config.ledger or ledger
            if privacy is None and self.federation is not None and isinstance(self.federation.privacy, PrivacyRules):
                privacy = PartyPrivacy()
        if privacy is not None and not isinstance(privacy, str):
            own: dict[str, Any] = {"ledger": privacy.ledger or ledger}
            if privacy.user_column is not None:
                own["user_column"] = USER
            changes["privacy"] = privacy.model_copy(update=own)
        return config.model_copy(update=changes)
