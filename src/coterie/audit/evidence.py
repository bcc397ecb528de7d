"""Everything that the audit of one owner rests on, joined and checked to be of one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from coterie.audit.answers import Answers
from coterie.audit.fitting import unfit
from coterie.audit.transcript import Transcript
from coterie.config import FederationConfig, PartyConfig, PrivacyRules, load_yaml
from coterie.dp.noise.pooled import PooledNoise
from coterie.errors import CheckpointError, ConfigError, CoterieError
from coterie.federation.wire.recording import ANSWERS
from coterie.storage import json_object
from coterie.training.data.documents import read_documents
from coterie.training.data.tokenizer import load_tokenizer_from, tokenize
from coterie.training.folders import TOKENIZER_FOLDER, no_run, private_folder
from coterie.training.party.process import FEDERATION_FILE, PARTY_FILE, pooled_noise

Document = list[int]
"""Token ids."""


@dataclass(frozen=True)
class LedgerClaim:
    """What the owner's ledger says of the run."""

    epsilon: float
    delta: float
    noise_multiplier: float | None = None


@dataclass(frozen=True)
class Evidence:
    """What attacks may use, and the owner's answers, which only scoring reads.

    Attributes:
        owner: the party under attack.
        exchange, trunk: as agreed.
        privacy: what the owner claims; None where nothing bounds it.
        start: folder of the public starting checkpoint, in Hugging Face's form.
        public: public text, as token ids; none of it is the owner's.
        received: what each other party received from the owner.
        answers: the owner's key; None where it was not kept.
        run_folder: the owner's.
        masked: pushes were masked: what others received opens as sums of several parties.
        pooled: whose noise lies in every sum that others see; None: the owner's alone.
    """

    owner: str
    exchange: Literal["tokens", "experts"]
    trunk: Literal["private", "shared"]
    privacy: LedgerClaim | None
    start: Path
    public: Sequence[Document]
    received: Mapping[str, Transcript]
    answers: Answers | None
    run_folder: Path
    masked: bool = False
    pooled: PooledNoise | None = None

    @classmethod
    def read(
        cls,
        run_folder: Path,
        received: Sequence[Path],
        public: Sequence[Path] = (),
        start: Path | None = None,
        leave_out: Callable[[str], None] | None = None,
    ) -> Evidence:
        """Join what lies in folders.

        Args:
            run_folder: the owner's, of `coterie up`.
            received: run folders, or transcript folders, of other parties.
            public: files of public text, read as the owner's own settings read text. What is among the owner's
                records is left out.
            start: default: the model that federation.yaml names.
            leave_out: is told why a transcript cannot be used, and the others are; None: the reason is raised.

        Raises:
            CheckpointError: ``run-dir-none``; ``transcript-other-run``: a transcript or the key is of another run or
                other settings; ``transcript-own``; ``transcript-outsider``; ``transcript-twice``;
                ``transcript-damaged``; what `Transcript.read` and `Answers.read` raise.
            ConfigError: ``audit-start``: federation.yaml names no checkpoint.
            DataError: public text cannot be read.
        """
        marker = _marker(run_folder)
        party = load_yaml(run_folder / PARTY_FILE, PartyConfig)
        federation = load_yaml(run_folder / FEDERATION_FILE, FederationConfig)
        start = start or federation.model.path
        if start is None:
            raise ConfigError(
                f"{run_folder} started from no checkpoint, but from random weights that its settings describe.",
                code="audit-start",
                why="an adversary knows the starting model; the audit has to know it, too",
                fix="save the starting model in Hugging Face's form, and name its folder",
            )
        transcripts: dict[str, Transcript] = {}
        for folder in received:
            try:
                found = Transcript.read(folder, party.party)
                _check_same(folder, found.run, found.agreement, marker)
                _check_agreed(folder, found, federation, transcripts)
            except CoterieError as error:
                if leave_out is None:
                    raise
                leave_out(error.message)
            else:
                transcripts[found.party] = found
        answers = None
        if (private_folder(run_folder) / ANSWERS).is_dir():
            answers = Answers.read(run_folder)
            _check_same(run_folder, answers.run, answers.agreement, marker)
        return cls(
            owner=party.party,
            exchange=federation.exchange,
            trunk=federation.trunk,
            privacy=claim_of(run_folder),
            start=start,
            public=_public(party, run_folder, public),
            received=transcripts,
            answers=answers,
            run_folder=run_folder,
            masked=federation.aggregation == "masked",
            pooled=pooled_noise(federation) if isinstance(federation.privacy, PrivacyRules) else None,
        )


def _marker(run_folder: Path) -> Mapping[str, Any]:
    try:
        marker = json_object((run_folder / "run.json").read_bytes())
        if marker["kind"] != "federation":
            raise ValueError("a run of one party alone")
        return {"run": str(marker["run"]), "agreement": str(marker["agreement"])}
    except (OSError, ValueError, KeyError):
        raise no_run(run_folder, " of `coterie up`") from None


def _check_same(folder: Path, run: str, agreement: str, marker: Mapping[str, Any]) -> None:
    if (run, agreement) != (marker["run"], marker["agreement"]):
        other = f"run {run[:8]}, not of {marker['run'][:8]}" if run != marker["run"] else "other settings"
        raise CheckpointError(
            f"What {folder} holds is of {other}.",
            code="transcript-other-run",
            why="answers and messages of two runs do not belong together, and every score would be wrong",
            fix="give what the parties recorded in this very run",
        )


def _check_agreed(
    folder: Path, found: Transcript, federation: FederationConfig, others: Mapping[str, Transcript]
) -> None:
    """A transcript of this run is of another party than the owner, of each once, and whole as far as it goes."""
    if found.party == found.sender:
        raise CheckpointError(
            f"{folder} holds what {found.party} itself received.",
            code="transcript-own",
            why="what can be read of a party stands in what the others received",
            fix="give the folders of the other parties",
        )
    if found.party not in federation.parties:
        raise CheckpointError(
            f"{folder} holds what {found.party[:80]} received, which is no party of this federation.",
            code="transcript-outsider",
            why="only parties of the agreement receive anything",
            fix="give the run folders of the parties that federation.yaml names",
        )
    if found.party in others:
        raise CheckpointError(
            f"{folder} holds what {found.party} received, which another folder holds, too.",
            code="transcript-twice",
            why="one of the two would count, and nobody could say which",
            fix="give one folder for each party",
        )
    agreed = (
        tuple(federation.parties),
        federation.exchange,
        federation.aggregation == "masked",
        federation.push_dtype,
        federation.weights_dtype,
    )
    dtypes = (str(dtype).removeprefix("torch.") for dtype in (found.push_dtype, found.weights_dtype))
    first = next(iter(others.values()), found)
    if (found.parties, found.exchange, found.masked, *dtypes) != agreed or (found.placement, found.parts) != (
        first.placement,
        first.parts,
    ):
        raise unfit(f"The head of the transcript in {folder}", "it names other settings")
    # Of `experts` an adversary reads what all others serve, too.
    (found if found.exchange == "tokens" else replace(found, sender=None)).check()


def claim_of(run_folder: Path) -> LedgerClaim | None:
    """What a run says that it spent; None without a budget."""
    for path in (private_folder(run_folder) / "result.json", run_folder / "status.json"):
        try:
            privacy = json_object(path.read_bytes()).get("privacy")
        except (OSError, ValueError):
            continue
        if privacy and privacy.get("epsilon") is not None:
            sigma = privacy.get("noise_multiplier")
            return LedgerClaim(
                float(privacy["epsilon"]), float(privacy["delta"]), None if sigma is None else float(sigma)
            )
        return None
    return None


def _public(party: PartyConfig, run_folder: Path, files: Sequence[Path]) -> list[Document]:
    if not files:
        return []
    tokenizer = load_tokenizer_from(private_folder(run_folder) / TOKENIZER_FOLDER)
    own = tokenize(read_documents((*party.data.train, *party.data.test), party.data), party.data, tokenizer)
    known = {tuple(own[row]["input_ids"].tolist()) for row in range(len(own))}
    found = tokenize(read_documents(files, party.data), party.data, tokenizer)
    ids = [found[row]["input_ids"].tolist() for row in range(len(found))]
    return [each for each in ids if tuple(each) not in known]
