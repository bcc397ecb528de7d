"""A whole audit: every attack on every run in order, the controls, and what it all amounts to.

A piece that is missing (no transcript, no public text, too few members, a transcript of another run) ends no audit:
what could not be concluded is told, and the rest goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coterie.audit import pieces
from coterie.audit.adversaries import DEFAULT, Adversary
from coterie.audit.evidence import Evidence, claim_of
from coterie.audit.figures import experts_figures, private_figures, tokens_figures
from coterie.audit.findings import Audited, Controls, Finding, Findings, Outcome, PrivateFigures, RunKind, Verdict
from coterie.audit.identified import federation_run, identification, lone_run
from coterie.audit.verdicts import LABELS, headline, overall, verdicts
from coterie.config import FederationConfig, PrivacyRules, load_yaml
from coterie.training.party.process import FEDERATION_FILE, PARTY_FILE

Progress = Callable[[str], None]
"""Is told what is being done."""

_ALARM, _CONSISTENT = "ALARM", "consistent"
"""As the audit of epsilon says it."""
_MODEL, _EPSILON, _CONTROLS = 0.2, 0.3, 0.1
"""Shares of the time; attacks on an exchange have what is left."""


@dataclass(frozen=True)
class Asked:
    """One run to audit.

    Attributes:
        run: the owner's run folder.
        received: run folders, or transcripts, of other parties.
        public: files of public text.
        start: the public starting checkpoint; None: what the settings name.
        model: attack the trained model, too. Of a party it is put together from the run folders in ``received``.
        whole: the trained model of a party, as `coterie export` made it, where those are not all here.
        references: models that saw none of this text, for membership where no coins were tossed.
        canaries: records made for the audit of epsilon, which take time whatever the budget of time is.
    """

    run: Path
    received: tuple[Path, ...] = ()
    public: tuple[Path, ...] = ()
    start: Path | None = None
    model: bool = True
    whole: Path | None = None
    references: tuple[Path, ...] = ()
    canaries: int = pieces.CANARIES


@dataclass
class _Gathered:
    """What has come out so far."""

    findings: dict[RunKind, list[Finding]] = field(default_factory=dict)
    runs: list[Audited] = field(default_factory=list)
    epsilon: dict[RunKind, dict[str, Any]] = field(default_factory=dict)
    claimed: dict[RunKind, tuple[float, float]] = field(default_factory=dict)
    unpromised: dict[RunKind, dict[Adversary, str]] = field(default_factory=dict)
    untested: list[str] = field(default_factory=list)
    why_no_epsilon: str = ""
    evidence: Evidence | None = None
    pieces: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, piece: str) -> Iterator[None]:
        """Note how long a piece takes."""
        began = time.monotonic()
        yield
        self.pieces[piece] = self.pieces.get(piece, 0.0) + round(time.monotonic() - began, 1)


def public_files(folders: Sequence[Path]) -> tuple[Path, ...]:
    """The files in folders and below, in a fixed order; a file stands for itself."""
    found: list[Path] = []
    for folder in folders:
        found += [folder] if folder.is_file() else sorted(path for path in folder.rglob("*") if path.is_file())
    return tuple(found)


def audit(asked: Sequence[Asked], *, seed: int, budget_s: float, progress: Progress = lambda _: None) -> Findings:
    """Attack runs and judge what came out.

    Args:
        asked: the runs; at most one of each kind counts for the figures at the top, the last.
        seed: of everything that is drawn.
        budget_s: seconds to stay within, roughly.
        progress: called with what is being done.

    Raises:
        CheckpointError: a folder holds no run at all.
    """
    began, cpu = time.monotonic(), time.process_time()
    gathered = _Gathered()
    until = began + budget_s
    for place, one in enumerate(asked):
        left = (until - time.monotonic()) / (len(asked) - place)
        _one(one, gathered, seed, max(1.0, left * (1 - _CONTROLS)), progress)
    progress("trying the instruments on public text")
    with gathered.timed("controls"):
        measured = pieces.instruments(gathered.evidence, seed)
    return _concluded(gathered, measured, seed, time.monotonic() - began, time.process_time() - cpu)


# ---- one run ----


def _one(asked: Asked, gathered: _Gathered, seed: int, budget_s: float, progress: Progress) -> None:
    until = time.monotonic() + budget_s
    part = _identify(asked, gathered)
    claimed = part in gathered.claimed
    some = gathered.findings.setdefault(part, [])
    if part is not RunKind.ALONE and gathered.evidence is not None:
        progress(f"attacking what others received of {gathered.evidence.owner} ({LABELS[part].replace('`', '')})")
        share = 1.0 - (_MODEL if asked.model else 0.0) - (_EPSILON if part is RunKind.EXPERTS_DP else 0.0)
        with gathered.timed(f"{part.value}: exchange"):
            some += pieces.on_exchange(gathered.evidence, part, seed, budget_s * share)
    if asked.model:
        progress("attacking the trained model")
        with gathered.timed(f"{part.value}: trained model"):
            found = pieces.on_model(
                asked.run,
                seed,
                max(1.0, min(until - time.monotonic(), budget_s * _MODEL)),
                whole=asked.whole,
                parties=[folder for folder in asked.received if (folder / PARTY_FILE).is_file()],
                references=asked.references,
                public=asked.public,
            )
        if isinstance(found, str):
            gathered.untested.append(f"The trained model: {found}")
        else:
            some += found
    else:
        gathered.untested.append(f"The trained model ({LABELS[part]}): it was left out.")
    if part is RunKind.EXPERTS_DP or claimed:
        progress("epsilon from below")
        left = max(1.0, until - time.monotonic())
        with gathered.timed(f"{part.value}: epsilon"):
            epsilon = pieces.on_epsilon(asked.run, asked.start, seed, left, asked.canaries)
        if isinstance(epsilon, str):
            gathered.why_no_epsilon = epsilon
            gathered.untested.append(f"Epsilon from below: {epsilon}")
        else:
            gathered.epsilon[part] = epsilon


def _identify(asked: Asked, gathered: _Gathered) -> RunKind:
    """Read what the run left, and note what it is."""
    if not (asked.run / PARTY_FILE).is_file():
        claim = claim_of(asked.run)
        told = None if claim is None else (claim.epsilon, claim.delta)
        gathered.runs.append(lone_run(asked.run, told))
        part = RunKind.ALONE
    else:
        gathered.evidence = evidence = _evidence(asked, gathered)
        claim = evidence.privacy
        part = part_of(evidence, load_yaml(asked.run / FEDERATION_FILE, FederationConfig))
        gathered.runs.append(federation_run(evidence, part))
        gathered.unpromised[part] = unpromised(evidence)
    if claim is not None:
        gathered.claimed[part] = (claim.epsilon, claim.delta)
    return part


def unpromised(evidence: Evidence) -> dict[Adversary, str]:
    """Adversaries whom a run's claim does not cover: more others together than it speaks of."""
    pooled = evidence.pooled
    if pooled is None or pooled.colluding is None or pooled.parties - 1 <= pooled.colluding:
        return {}
    return {
        Adversary.ALL_HOSTS: f"Noise is shared: the claim is against any {pooled.colluding} of the "
        f"{pooled.parties - 1} other parties together, and not against all; the statement says what holds there."
    }


def part_of(evidence: Evidence, federation: FederationConfig) -> RunKind:
    """By what was agreed: a run under a budget that has not spent yet claims one all the same."""
    if evidence.exchange == "tokens":
        return RunKind.TOKENS
    bounded = evidence.privacy is not None or isinstance(federation.privacy, PrivacyRules)
    return RunKind.EXPERTS_DP if bounded else RunKind.EXPERTS


def _evidence(asked: Asked, gathered: _Gathered) -> Evidence:
    """All that was given, but for what others received and cannot be used: each is named."""

    def leave_out(why: str) -> None:
        gathered.untested.append(f"What another party received: {why}")

    found = Evidence.read(asked.run, asked.received, asked.public, asked.start, leave_out)
    for party, transcript in found.received.items():
        if transcript.stopped is not None:
            gathered.untested.append(
                f"What {party} received from round {transcript.stopped} on: its recording stopped there."
            )
    return found


# ---- what it amounts to ----


def _concluded(gathered: _Gathered, measured: Controls, seed: int, seconds: float, cpu_s: float) -> Findings:
    found = {part: tuple(some) for part, some in gathered.findings.items()}
    bounded = RunKind.EXPERTS_DP if RunKind.EXPERTS_DP in found else RunKind.ALONE
    private = private_figures(
        found.get(bounded) if bounded is RunKind.EXPERTS_DP or bounded in gathered.claimed else None,
        gathered.epsilon.get(bounded),
        gathered.claimed.get(bounded),
        gathered.why_no_epsilon,
    )
    judged: list[Verdict] = []
    for part, some in found.items():
        epsilon = gathered.epsilon.get(part)
        judged += verdicts(
            part,
            some,
            measured,
            private,
            contradicted(epsilon),
            premises=concluded(epsilon),
            unpromised=gathered.unpromised.get(part, {}),
        )
    return Findings(
        outcome=overall(judged),
        headline=headline(judged, found, private),
        tokens=tokens_figures(found.get(RunKind.TOKENS)),
        experts=experts_figures(found.get(RunKind.EXPERTS)),
        experts_dp=private,
        epsilon=gathered.epsilon.get(bounded),
        controls=measured,
        verdicts=tuple(judged),
        findings=found,
        tested=tuple(_tested(found, gathered)),
        untested=(*_untested(found, gathered), *ALWAYS_UNTESTED),
        next_settings=tuple(next_settings(judged, private, measured, found)),
        identification=identification(gathered.runs, seed, seconds, cpu_s, gathered.pieces),
    )


def concluded(epsilon: dict[str, Any] | None) -> bool:
    """Whether the audit of epsilon measured its premises and left nothing open."""
    return epsilon is not None and bool(epsilon["premises"]) and epsilon["verdict"] == _CONSISTENT


def contradicted(epsilon: dict[str, Any] | None) -> list[str]:
    """What the audit of epsilon raises an alarm for, in sentences."""
    if epsilon is None or epsilon["verdict"] != _ALARM:
        return []
    told = [premise["sentence"] for premise in epsilon["premises"] if premise["verdict"] == _ALARM]
    for run in epsilon["one_run"]:
        if run["verdict"] == _ALARM:
            told.append(
                f"Canaries told apart by {run['score']} prove an epsilon of at least {run['alarm_lower']:.2f} where "
                f"{run['claimed']:g} was claimed."
            )
    return told or list(epsilon["sentences"])


def _tested(found: dict[RunKind, tuple[Finding, ...]], gathered: _Gathered) -> list[str]:
    told = []
    for part, some in found.items():
        for finding in some:
            if finding.value is not None:
                told.append(f"{LABELS[part]}: {finding.name}, on {finding.channel.value}")
    if gathered.epsilon:
        told += [f"premise: {premise['name']}" for each in gathered.epsilon.values() for premise in each["premises"]]
        canaries = max((run["canaries"] for each in gathered.epsilon.values() for run in each["one_run"]), default=0)
        if canaries:
            told.append(f"{canaries} canaries put in by coin flips, under a small claim of the audit's own")
    return list(dict.fromkeys(told))


def _untested(found: dict[RunKind, tuple[Finding, ...]], gathered: _Gathered) -> list[str]:
    reasons = [
        f"{LABELS[part]}: {finding.name}: {finding.reason}."
        for part, some in found.items()
        for finding in some
        if finding.reason
    ]
    return list(dict.fromkeys([*gathered.untested, *reasons, *played_instead(found)]))


def played_instead(found: Mapping[RunKind, Sequence[Finding]]) -> list[str]:
    """Which adversaries a stronger one stood in for, in sentences."""
    return [
        f"{LABELS[part]}: {Adversary.HOST.label}, who knows nothing but its own experts, on tokens: without the "
        f"embedding it has no vector to look for in a sum. {DEFAULT.label}, who also has the public checkpoint, was "
        "played in its place."
        for part in (RunKind.EXPERTS, RunKind.EXPERTS_DP)
        if any(finding.adversary is DEFAULT and finding.value is not None for finding in found.get(part, ()))
    ]


ALWAYS_UNTESTED = (
    "Sums of adapters (`lora`), and models with another head than next-token prediction (classifiers): no attack "
    "here reads them.",
    f"{Adversary.NETWORK.label}: times of encrypted frames, and how long a round takes.",
    "What several records of one person tell together, and what one person's records at several parties do.",
    "Attacks that nobody has thought of: a budget's proof covers them, an audit does not.",
)


def next_settings(
    judged: Sequence[Verdict],
    private: PrivateFigures,
    measured: Controls,
    found: dict[RunKind, tuple[Finding, ...]],
) -> list[str]:
    """What to try next, by what came out."""
    outcomes = {part: {v.outcome for v in judged if v.part is part} for part in RunKind}
    told = []
    if Outcome.ALARM in {v.outcome for v in judged}:
        told.append("Stop: do not pass on this model, keep run folders and ledger as they are, and report the alarm.")
    if Outcome.OPEN in outcomes[RunKind.TOKENS]:
        told.append(
            "`exchange: experts` with a `privacy` budget, if other parties may not read the text. Nothing makes "
            "`tokens` private."
        )
    if Outcome.OPEN in outcomes[RunKind.EXPERTS]:
        told.append("A `privacy` budget. Larger batches make a push harder to read whole and give no promise.")
    if Outcome.UNKNOWN in outcomes[RunKind.EXPERTS_DP]:
        told.append("More `--minutes`: two points need about 1,000 places, and records with a transcript.")
    ceiling, claimed = private.epsilon_ceiling, private.epsilon_claimed
    if ceiling is not None and claimed is not None and ceiling < claimed:
        told.append(
            f"More canaries: these could show {ceiling:.1f} at most; only the premises are tested at {claimed:.3g}."
        )
    if not measured.passed and (measured.positive is None or measured.negative is None):
        told.append("Public text (`--public`) of at least 20 documents, so that the instruments can be tried.")
    if any("coins" in finding.reason for some in found.values() for finding in some):
        told.append(
            "`coterie audit prepare`: only members chosen by coins tell how much the trained model gives away."
        )
    return told
