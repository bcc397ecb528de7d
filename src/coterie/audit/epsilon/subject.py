"""The private run that is audited: model, records and mechanism, made anew from its settings. Nothing is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from coterie.config import FederationConfig, PartyConfig, TrainConfig, load_yaml
from coterie.config.federation import party_privacy
from coterie.dp.accounting.accountant import Mechanism, epsilon
from coterie.dp.accounting.dataset import dataset_digest
from coterie.dp.accounting.ledger import FILE, Entry, default_root, ledger_folder
from coterie.dp.noise.bands import bands_of
from coterie.dp.noise.pooled import PooledNoise
from coterie.dp.plan import ComputeOptions, PrivacyPlan
from coterie.dp.private_data import PrivateData
from coterie.errors import AuditError, LedgerError
from coterie.models.lora import attach_adapters
from coterie.models.preconditioner import attach, in_trunk
from coterie.models.zoo.build import build_model
from coterie.storage import json_object
from coterie.training.data.documents import Documents, read_documents
from coterie.training.data.packing import Sequences
from coterie.training.data.tokenizer import get_tokenizer, load_tokenizer_from, tokenize
from coterie.training.folders import TOKENIZER_FOLDER, ledger_run, private_folder
from coterie.training.party.process import FEDERATION_FILE, PARTY_FILE, pooled_noise
from coterie.training.single.prepared import MARKER, prepare, read_config
from coterie.training.single.setup import check_fit, pick_device, with_vocabulary


@dataclass(frozen=True)
class Claim:
    """What a run says about itself, in public numbers.

    Attributes:
        epsilon, delta: of the whole run.
        mechanism: of a round.
        rounds: planned.
        clip_norm: C.
        eta: what a record's contribution may exceed C by, as a share of it, noise being calibrated to the sum.
        recorded: these numbers are those of the run's entry in the ledger; else its settings' alone.
        seeded: the run took its randomness from a seed, and is not private whatever its numbers are.
        bands: coefficients of noise in bands; empty where rounds' noise is independent.
        pooled: whose noise lies in all that others see; None: this party's own alone, whole.
    """

    epsilon: float
    delta: float
    mechanism: Mechanism
    rounds: int
    clip_norm: float
    eta: float | None = None
    recorded: bool = False
    seeded: bool = False
    bands: tuple[float, ...] = ()
    pooled: PooledNoise | None = None

    @property
    def own_noise(self) -> float:
        """The noise multiplier of what this party itself adds."""
        return self.mechanism.noise_multiplier * (1.0 if self.pooled is None else self.pooled.share)

    def spends(self) -> float:
        """Epsilon of the mechanism by the accountant, at the claim's delta."""
        return epsilon([(self.mechanism, self.rounds)], self.delta)


@dataclass(frozen=True)
class Subject:
    """What an audit of epsilon works on.

    Attributes:
        model: at its start, on its device; the audit leaves it as it was.
        records: the owner's sequences.
        plan, options: as the run was opened with.
        claim: what is audited.
        longest: tokens of the longest record that there may be.
    """

    model: nn.Module
    records: Sequences
    plan: PrivacyPlan
    options: ComputeOptions
    claim: Claim
    longest: int

    def data(self, records: Sequences | None = None) -> PrivateData:
        """The owner's records, or others in their place, as the run counts and collates them."""
        records = self.records if records is None else records
        return PrivateData.of(
            records, records.collate, users=records.users, records_per_user=self.plan.records_per_user
        )

    @property
    def vocabulary(self) -> int:
        """Rows of the model's table of tokens."""
        embedding: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        return int(embedding.weight.shape[0])

    @classmethod
    def of_settings(cls, config: TrainConfig) -> Subject:
        """A run of `coterie train`, started or not.

        Raises:
            AuditError: its settings have no budget.
            ConfigError, DataError, ModelError: see `coterie.training.single.prepared.prepare`.
        """
        if config.privacy is None:
            raise _no_claim("train.yaml has no `privacy` block")
        kept = private_folder(config.run_dir)
        prepared, documents = prepare(config, kept=kept if (kept / TOKENIZER_FOLDER).is_dir() else None)
        privacy = config.privacy
        plan = PrivacyPlan.of_settings(
            privacy, prepared.model, config.train.rounds, lot_size=config.train.batch_size,
            seed=config.train.seed if privacy.seeded else None, momentum=config.optim.added_momentum,
        )  # fmt: skip
        root = privacy.ledger or default_root(config.run_dir)
        return cls._of(
            prepared.model, prepared.train, documents, plan, ComputeOptions.of_settings(privacy), root,
            _run_name(config.run_dir, "privacy_run"), config.data.sequence_length,
        )  # fmt: skip

    @classmethod
    def of_party(cls, config: PartyConfig, federation: FederationConfig, start: Path | None = None) -> Subject:
        """A party of the exchange `experts` under a budget. Its model is whole here: no host is asked.

        Args:
            config: party.yaml.
            federation: federation.yaml.
            start: the public starting checkpoint, where it lies elsewhere than the settings say.

        Raises:
            AuditError: the party has no budget.
        """
        spec = party_privacy(federation, config)
        if spec is None:
            raise _no_claim("this party trains without a budget")
        data = config.data
        model_spec = federation.model if start is None else federation.model.model_copy(update={"path": start})
        kept = private_folder(config.run_dir) / TOKENIZER_FOLDER
        tokenizer = load_tokenizer_from(kept) if kept.is_dir() else get_tokenizer(data.tokenizer, model_spec, data)
        documents = read_documents(data.train, data, user_column=spec.user_column)
        records = tokenize(documents, data, tokenizer)
        if documents.users is not None:
            records = records.with_users(documents.users)
        seed = federation.train.seed
        model: nn.Module = build_model(
            with_vocabulary(model_spec, tokenizer), device=pick_device(config.device), seed=seed
        )
        check_fit(model, tokenizer, data)
        if federation.preconditioner is not None:
            attach(model, in_trunk(model, config.trunk))
        if federation.lora is not None:
            model = attach_adapters(model, federation.lora, seed)
        plan = PrivacyPlan.of_settings(
            spec, model, federation.train.rounds, seed=seed if spec.seeded else None, against_hosts=True,
            agreed_noise=federation.noise_multiplier, pooled=pooled_noise(federation),
            momentum=federation.optim.added_momentum,
        )  # fmt: skip
        root, run = spec.ledger or default_root(config.run_dir), _run_name(config.run_dir, "run")
        return cls._of(
            model, records, documents, plan, ComputeOptions.of_settings(spec), root,
            ledger_run(run, config.party) if run else "", data.sequence_length,
        )  # fmt: skip

    @classmethod
    def of_run(cls, run_folder: Path, start: Path | None = None) -> Subject:
        """The run in a folder, of `coterie train` or of `coterie up`.

        Raises:
            AuditError: it has no budget.
            CheckpointError: no run is there.
        """
        if (run_folder / PARTY_FILE).is_file():
            party = load_yaml(run_folder / PARTY_FILE, PartyConfig).model_copy(update={"run_dir": run_folder})
            return cls.of_party(party, load_yaml(run_folder / FEDERATION_FILE, FederationConfig), start)
        return cls.of_settings(read_config(run_folder))

    @classmethod
    def _of(
        cls, model: nn.Module, records: Sequences, documents: Documents, plan: PrivacyPlan, options: ComputeOptions,
        ledger: Path, run: str, longest: int,
    ) -> Subject:  # fmt: skip
        units = PrivateData.of(records, records.collate, users=records.users, records_per_user=plan.records_per_user)
        entry = _entry(ledger_folder(dataset_digest(documents.texts), ledger) / FILE, run) if run else None
        budget = plan.budget
        if entry is None:
            mechanism = plan.mechanism(plan.lots(units.units.count))
            claim = Claim(
                budget.epsilon, budget.delta, mechanism, plan.rounds, plan.clip_norm, seeded=plan.seed is not None,
                bands=() if plan.bands is None else plan.bands.coefficients, pooled=plan.pooled,
            )  # fmt: skip
        else:
            told = entry.get("budget", {"epsilon": budget.epsilon, "delta": budget.delta})
            plan = replace(plan, bands=bands_of(entry), pooled=PooledNoise.from_json(entry.get("pooled")))
            claim = Claim(
                float(told["epsilon"]), float(told["delta"]), Mechanism.from_json(entry["mechanism"]),
                int(entry["rounds"]), float(entry["clip_norm"]), float(entry["eta"]), True, bool(entry.get("seeded")),
                tuple(entry.get("bands", ())), plan.pooled,
            )  # fmt: skip
        # Randomness is the audit's own, so noise is found for the budget, as it is for a run that is private.
        own = claim.mechanism.noise_multiplier if claim.seeded else None
        return cls(model, records, replace(plan, seed=None, noise_multiplier=own), options, claim, longest)


def _no_claim(where: str) -> AuditError:
    return AuditError(
        "There is no epsilon to audit.",
        code="audit-no-claim",
        where=where,
        why="only a run under a budget claims one",
        fix="audit a run whose settings have `privacy.epsilon`",
    )


def _run_name(run_folder: Path, key: str) -> str:
    """What the run is called in its ledger; empty where it has not begun."""
    try:
        return str(json_object((run_folder / MARKER).read_bytes()).get(key, ""))
    except (OSError, ValueError):
        return ""


def _entry(path: Path, run: str) -> Mapping[str, Any] | None:
    """The run's entry in a ledger, which is read and neither locked nor touched; None where there is none.

    Raises:
        LedgerError: the chain is broken.
    """
    if not path.is_file():
        return None
    previous: Entry | None = None
    found: Mapping[str, Any] | None = None
    try:
        for line in path.read_bytes().splitlines(keepends=True):
            previous = Entry.read(line, previous, path)
            if previous.kind == "run" and previous.data["run"] == run:
                found = previous.data
    except (ValueError, KeyError) as error:
        raise LedgerError(
            f"{path} is damaged.",
            code="dp-ledger-tampered",
            why="what the run claims cannot be read from it",
            fix="put it back as it was",
        ) from error
    return found
