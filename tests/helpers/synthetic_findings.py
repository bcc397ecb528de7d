"""Findings with figures that a person made up, to see what words and pages make of them."""

from __future__ import annotations

from typing import Any

from coterie.audit.adversaries import Adversary
from coterie.audit.findings import (
    Audited,
    Channel,
    Controls,
    ExpertsFigures,
    Finding,
    Findings,
    Identification,
    Over,
    PrivateFigures,
    RunKind,
    TokensFigures,
    Unit,
)
from coterie.audit.metrics import Estimate
from coterie.audit.verdicts import controls, headline, overall, verdicts

NOT_RUN = "not run"


def estimate(value: float, half: float = 0.01, count: int = 1000) -> Estimate:
    return Estimate(value, max(0.0, value - half), min(1.0, value + half), count)


def finding(value: float | None = 0.9, half: float = 0.01, prior: float | None = 0.17, **more: Any) -> Finding:
    values: dict[str, Any] = {
        "name": "linear discriminant",
        "adversary": Adversary.HOST_PUBLIC,
        "channel": Channel.ROWS,
        "unit": Unit.TOKENS,
        "sentence": "too few places" if value is None else f"{100 * value:.1f} % of all tokens were read",
        "reason": "too few places" if value is None else "",
    }
    found = None if value is None else estimate(value, half)
    return Finding(value=found, prior=None if prior is None else estimate(prior), **(values | more))


def working(positive: float = 0.997, negative: float = 0.171, prior: float = 0.168, half: float = 0.005) -> Controls:
    """Controls whose paired difference reaches ``half`` to both sides."""
    gap = Estimate(negative - prior, negative - prior - half, negative - prior + half, 1000)
    return controls(estimate(positive), estimate(negative), estimate(prior), gap, {})


def private(**given: Any) -> PrivateFigures:
    values = {
        "recovery": 0.171,
        "prior": 0.17,
        "advantage": 0.001,
        "auc": 0.58,
        "auc_limit": 0.86,
        "auc_allowed": 0.741,
        "epsilon_claimed": 8.0,
        "epsilon_lower": 0.5,
        "epsilon_ceiling": 3.6,
    } | given
    reasons = {name: NOT_RUN for name, value in values.items() if value is None}
    return PrivateFigures.model_validate(values | {"reasons": reasons})


def tokens() -> tuple[Finding, ...]:
    seen = {0: 1.0, 1: 0.93, 2: 0.96, 3: 0.75}
    ids = {0: 0.3, 1: 0.28, 2: 0.21, 3: 0.25}
    return (
        finding(0.981, name="all layers of one host"),
        finding(0.9995, 0.0004, adversary=Adversary.ALL_HOSTS, name="all layers of all hosts"),
        *(finding(share, unit=Unit.SEEN, layer=layer) for layer, share in seen.items()),
        *(
            finding(share, unit=Unit.SEEN, layer=layer, name="expert ids alone", channel=Channel.IDS)
            for layer, share in ids.items()
        ),
        *(
            finding(0.99, unit=Unit.NEXT, layer=layer, name="next token", channel=Channel.GRADIENTS)
            for layer in range(4)
        ),
    )


def experts() -> tuple[Finding, ...]:
    ranked = {"unit": Unit.PLACES, "channel": Channel.PUSHES, "name": "span of each expert's sum"}
    return (
        *(
            finding(share, 0.08, 0.15, lot=lot, simulated=lot < 16, **ranked)
            for lot, share in ((1, 0.98), (4, 0.8), (16, 0.28))
        ),
        *(
            finding(share, 0.08, 0.15, lot=lot, simulated=lot < 16, adversary=Adversary.ALL_HOSTS, **ranked)
            for lot, share in ((1, 1.0), (4, 0.98), (16, 0.43))
        ),
        finding(0.88, unit=Unit.BAG, channel=Channel.EMBEDDING, name="bag of tokens", lot=16, prior=0.6),
        member(0.988, 3.0),
    )


def member(auc: float, steep: float, **more: Any) -> Finding:
    rates = tuple((10 ** (place / 8 - 3), min(1.0, 10 ** (place / 8 - 3) * steep)) for place in range(25))
    told = {"unit": Unit.AUC, "channel": Channel.PUSHES, "name": "inner product with a record's gradient"}
    return finding(auc, 0.03, None, roc=rates, sentence=f"AUC {auc}", **(told | more))


def noised(gain_half: float = 0.015) -> tuple[Finding, ...]:
    told: dict[str, Any] = {"unit": Unit.PLACES, "channel": Channel.RELEASES, "name": "candidate weighed by the push"}
    return (
        finding(0.171, 0.02, 0.17, gain=Estimate(0.001, 0.001 - gain_half, 0.001 + gain_half, 2000), **told),
        member(0.58, 1.4, channel=Channel.RELEASES, name="membership in a lot", allowed=0.741),
    )


def model() -> tuple[Finding, ...]:
    return (
        member(0.61, 1.5, channel=Channel.MODEL, name="loss against the public start", allowed=0.741),
        finding(1.8, 0.0, None, unit=Unit.BITS, channel=Channel.MODEL, name="canaries, 4 copies", over=Over.PUBLIC),
        finding(None, unit=Unit.TPR, channel=Channel.MODEL, name="loss at 0.1 % false positives", prior=None),
    )


def findings(
    parts: dict[RunKind, tuple[Finding, ...]] | None = None,
    measured: Controls | None = None,
    budget: PrivateFigures | None = None,
) -> Findings:
    """A whole audit around given parts."""
    whole = {
        RunKind.TOKENS: tokens(),
        RunKind.EXPERTS: experts(),
        RunKind.EXPERTS_DP: noised(),
        RunKind.ALONE: model(),
    }
    some = whole if parts is None else parts
    measured = measured or working()
    budget = budget or private()
    judged = [
        verdict for part, found in some.items() for verdict in verdicts(part, found, measured, budget, premises=True)
    ]
    return Findings(
        outcome=overall(judged),
        headline=headline(judged, some, budget),
        tokens=TokensFigures(
            recovery=0.981,
            layers={"0": 1.0, "1": 0.93, "2": 0.96, "3": 0.75},
            prior=0.17,
            intervals={"recovery": estimate(0.981), "prior": estimate(0.17)},
        ),
        experts=ExpertsFigures(
            recovery=0.28, lots={"1": 0.98, "4": 0.8, "16": 0.28}, simulated=("1", "4"), prior=0.15, auc=0.988
        ),
        experts_dp=budget,
        controls=measured,
        verdicts=tuple(judged),
        findings=some,
        tested=("linear discriminants on hidden vectors of every layer", "spans of pushed sums at lots of 1, 4, 16"),
        untested=("sizes and times of encrypted frames", "models of more than 2 million parameters"),
        next_settings=("`aggregation: masked` hides each party's sum from single hosts.",),
        identification=Identification(
            version="0.1.0",
            commit="0123456789ab",
            packages={"torch": "2.7.1", "transformers": "5.2.0"},
            seed=7,
            seconds=81.2,
            cpu_s=140.5,
            machine="x86_64, 2 cores",
            at="2026-01-02T03:04:05Z",
            runs=(
                Audited(
                    part=RunKind.TOKENS,
                    owner="alder",
                    parties=("alder", "birch", "cedar"),
                    config_hash="5f" * 32,
                    model="qwen3_moe, 2.0M parameters",
                    start="9a" * 32,
                    rounds=48,
                    recorded=2,
                ),
                Audited(
                    part=RunKind.EXPERTS_DP,
                    owner="alder",
                    parties=("alder", "birch", "cedar"),
                    config_hash="6e" * 32,
                    model="qwen3_moe, 2.0M parameters",
                    start="9a" * 32,
                    rounds=10,
                    recorded=2,
                    claimed=(7.99, 1e-5),
                ),
            ),
        ),
    )
