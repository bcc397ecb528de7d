"""What the figures mean, in plain sentences; the same on the screen and in the report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from coterie.audit.findings import Findings
from coterie.audit.verdicts import percent
from coterie.demonstration.plan import ARMS, Arm, DemoPlan
from coterie.demonstration.results import Results
from coterie.demonstration.screen import megabytes
from coterie.dp.accounting.accountant import Mechanism, epsilon
from coterie.dp.noise.pooled import PooledNoise
from coterie.training.planning.exposure import Reach

NEAR = 0.03
"""How far above pooled training still counts as near it."""


def headline(results: Results) -> str:
    """The outcome in one phrase."""
    together = [ARMS[arm] for arm in results.wire if ARMS[arm].alone in results.arms]
    if not together:
        return "The demo ran; a comparison needs an arm alone and an arm together, with or without privacy."
    plan = results.plan
    if plan.quick:
        return (
            f"Every step works; {plan.rounds} rounds (private: {plan.private.rounds}) on so little text say nothing "
            "about the losses."
        )
    by_outcome: dict[str, list[str]] = {}
    for arm in together:
        by_outcome.setdefault(_outcome(results, arm), []).append(_called(results, arm))
    phrase = "; ".join(f"{_names(arms)}: {outcome}" for outcome, arms in by_outcome.items())
    return f"Together against alone. {phrase[0].upper()}{phrase[1:]}."


def meaning(results: Results) -> list[str]:
    """What the tables say, one phrase after the other."""
    plan, sentences = results.plan, []
    for arm in (ARMS[name] for name in results.wire):
        if not plan.quick:
            sentences += [*_against_alone(results, arm), *_against_pooled(results, arm)]
            sentences += _against_whole(results, arm)
        sentences += _state(results, arm)
    if plan.quick:
        return [*sentences, "This was a quick demo: it shows every step, and its losses show nothing."]
    if any(not ARMS[arm].private for arm in results.curves):
        sentences.append(
            f"Arms without privacy took {plan.rounds} rounds from the same public model, with the same seed and "
            f"learning rates, {plan.batch} sequences of {plan.sequence_length} tokens per party and round. Each "
            "party has little text on purpose; with plenty of its own it would gain less."
        )
    if any(ARMS[arm].private for arm in results.curves):
        private = plan.private
        sentences.append(
            f"Private arms took {private.rounds} rounds of about {private.lot_size} records per party from the same "
            "model, and all text that the party has, because a record hides among many. So compare them with each "
            "other, not with the arms above. A party adds the same noise alone and together; together it also learns "
            "from the others' sums."
        )
        sentences += [_shares(plan) for arm in results.wire if ARMS[arm].shared_noise]
    sentences.append(
        "A model this small shows the direction, not the size, of what a large one would gain. Lots and noise are "
        "secret and drawn anew, so private losses differ by some hundredths from run to run; an interval covers the "
        "choice of held-out text only."
    )
    return sentences


def not_protected(results: Results) -> list[str]:
    """What no figure above shows: who can read what."""
    arms = [ARMS[arm] for arm in results.wire]
    return [
        *(_tokens(results.audit) if any(arm.exchange == "tokens" for arm in arms) else ()),
        *(_unnoised(results.plan) if any(arm.exchange == "experts" and not arm.private for arm in arms) else ()),
        *(_ranked(results.audit) if any(arm.exchange == "experts" and not arm.private for arm in arms) else ()),
        *(_promised(results) if any(arm.private for arm in arms) else ()),
        *(_withstood(results.audit) if any(arm.private for arm in arms) else ()),
    ]


def _tokens(audit: Findings | None) -> Iterator[str]:
    read = audit.tokens.recovery if audit is not None else None
    phrase = "turn nearly all of them back into the text" if read is None else "turn them back into the text"
    measured = "" if read is None else f": in this run, {percent(read)} of all tokens, evaluation text among them"
    yield (
        "`tokens` does NOT keep the text from the other parties. For every token a hidden vector goes to the hosts "
        f"of its experts, and a host that knows the public model can {phrase}{measured}. The gradients that follow "
        "give away the next token."
    )
    yield (
        "TLS keeps everybody outside the federation out, and the coordinator sees no tensor; nothing in `tokens` "
        "hides text from the parties inside. Use it only among parties that may read each other's text."
    )


def _unnoised(plan: DemoPlan) -> Iterator[str]:
    model = plan.model
    reach = Reach(model["hidden_size"], model["num_experts"], model["num_experts_per_tok"])
    round_tokens = plan.batch * plan.sequence_length
    yield (
        "`experts` with `privacy: none` sends no hidden vector, but exact sums of gradients go to the hosts, and "
        "everybody sees how the weights changed. A push without noise gives whole records back: an expert's sum "
        "holds the hidden vectors of just the tokens that chose it, and a host that knows the public model rebuilds "
        f"the text from them, wholly up to about {reach.tokens:,} tokens a push with this model, in part beyond (a "
        f"round here has up to {round_tokens:,}). The way out is a budget."
    )


def _ranked(audit: Findings | None) -> Iterator[str]:
    """What one other party read from pushes of this run, and from smaller ones of the same records."""
    if audit is None or not audit.experts.lots:
        return
    phrase = ", ".join(
        f"{percent(share)} of {'a simulated' if lot in audit.experts.simulated else 'its own'} push of {lot} "
        f"record{'' if lot == '1' else 's'}"
        for lot, share in audit.experts.lots.items()
    )
    guess = audit.experts.prior
    alone = "" if guess is None else f"; the public model alone guesses {percent(guess)}"
    yield f"In this run one other party, given what stands before, read the next token for {phrase}{alone}."


def _withstood(audit: Findings | None) -> Iterator[str]:
    """What attacks on this run's noised sums came to."""
    private = None if audit is None else audit.experts_dp
    if private is None or private.recovery is None or private.prior is None:
        return
    found = private.intervals.get("advantage")
    width = f", {100 * found.low:+.1f} to {100 * found.high:+.1f} by its 95 % interval" if found is not None else ""
    yield (
        f"In this run attacks on the noised sums read {percent(private.recovery)} of places, the public model alone "
        f"{percent(private.prior)} (difference {100 * (private.advantage or 0.0):+.1f} points{width})."
    )
    if private.epsilon_lower is not None and private.epsilon_ceiling is not None:
        yield (
            f"The audited epsilon is at least {private.epsilon_lower:.2f}; {private.epsilon_claimed:.3g} is claimed, "
            f"and these canaries could have shown at most {private.epsilon_ceiling:.2f}."
        )


def _shares(plan: DemoPlan) -> str:
    """What shared noise changes."""
    parties, pooled = len(plan.parties), PooledNoise(len(plan.parties), plan.colluding)
    return (
        f"With shared noise a party adds {pooled.share:.2f} of its noise, and hosts read the sum of all alone: "
        f"that sum holds {math.sqrt(parties) * pooled.share:.2f} times the noise of one place, in place of "
        f"{math.sqrt(parties):.2f} times."
    )


def _if_more_collude(results: Results) -> Iterator[str]:
    """Against whom shared noise protects, and what is left against all others."""
    plan = results.plan
    parties, pooled = len(plan.parties), PooledNoise(len(plan.parties), plan.colluding)
    for arm in (name for name in results.wire if ARMS[name].shared_noise):
        left = []
        for party, figures in results.arms[arm].items():
            if figures.promise is None or party not in plan.units:
                continue
            noise = figures.promise.noise_multiplier * pooled.unknown(parties - 1)
            rate = min(1.0, plan.lot_of(party) / plan.units[party])
            left.append(epsilon([(Mechanism(noise, rate), figures.promise.rounds)], figures.promise.delta))
        if left:
            yield (
                f"With noise shared, that holds against any {plan.colluding} of the {parties - 1} other parties "
                f"together, and outsiders. If all others pool what they know, or leave their noise out, it is "
                f"epsilon {max(left):.1f}: a party's own share of the noise is all that is left."
            )


def _promised(results: Results) -> Iterator[str]:
    private = results.plan.private
    yield (
        f"`experts` with a budget promises (epsilon {private.epsilon:g}, delta {private.delta:g}) for each record, "
        f"here a sequence of at most {results.plan.sequence_length} tokens, against all other parties together. It "
        "does not hide a document that makes many records, what a person's records at several parties tell together, "
        "or how long a round takes."
    )
    yield from _if_more_collude(results)
    yield (
        "The losses above are NOT private. Each party measured its own, and the demo, which controls all parties, "
        "read them from their folders; in a real federation they stay where they are."
    )


def _outcome(results: Results, arm: Arm) -> str:
    parties = results.parties
    found = {party: results.difference(arm.name, arm.alone, party) for party in parties}
    better = [party for party, d in found.items() if d and d.high < 0]
    worse = [party for party, d in found.items() if d and d.low > 0]
    ties = [party for party in parties if party not in better and party not in worse]
    excess = _excess(results, arm).values()
    near = f", within {100 * NEAR:.0f} % of pooling all text" if excess and max(excess) <= NEAR else ""
    if len(better) == len(parties):
        return f"all {len(parties)} parties got a better model{near}"
    counts = [(better, "better"), (ties, "no different beyond chance"), (worse, "worse")]
    return ", ".join(f"{_names(some)} {words}" for some, words in counts if some) + near


def _called(results: Results, arm: Arm) -> str:
    within = f" within epsilon {results.plan.private.epsilon:g}" if arm.private else ""
    return f"`{arm.exchange}`{within}{', noise shared' if arm.shared_noise else ''}"


def _against_alone(results: Results, arm: Arm) -> Iterator[str]:
    if arm.alone not in results.arms:
        return
    yield f"{arm.title.capitalize()}, compared with training {_alone(arm)}: {_outcome(results, arm)}."
    for party in results.parties:
        ours, alone = results.arms[arm.name][party].loss, results.arms[arm.alone][party].loss
        at, lowest = results.best[arm.alone][party]
        if lowest < alone - 0.005 and at < results.plan.rounds_of(arm):
            beats = "still above" if lowest > ours else "below"
            yield (
                f"Alone, {party} was best after round {at} ({lowest:.3f}, {beats} the loss together) and then began "
                "to learn its little text by heart."
            )


def _alone(arm: Arm) -> str:
    return "alone under the same budget" if arm.private else "alone"


def _excess(results: Results, arm: Arm) -> dict[str, float]:
    """How far each party's loss is above that of pooled training, as a share; empty when that was not run."""
    if arm.pooled not in results.arms:
        return {}
    ours, pooled = results.arms[arm.name], results.arms[arm.pooled]
    return {party: ours[party].loss / pooled[party].loss - 1 for party in results.parties}


def _against_pooled(results: Results, arm: Arm) -> Iterator[str]:
    excess = _excess(results, arm)
    if not excess:
        return
    near = [party for party, share in excess.items() if share <= NEAR]
    phrase = ", ".join(f"{party} {100 * share:+.1f} %" for party, share in excess.items())
    far = "" if len(near) == len(excess) else f", so {len(excess) - len(near)} of {len(excess)} did not get there"
    under = "under one budget" if arm.private else "with all text"
    yield f"Against one process {under}: {phrase} (within {100 * NEAR:.0f} % counts as near{far})."


def _against_whole(results: Results, arm: Arm) -> Iterator[str]:
    """What sharing the noise changed at each party."""
    whole = [name for name in results.wire if ARMS[name].private and not ARMS[name].shared_noise]
    if not arm.shared_noise or not whole:
        return
    found = {party: results.difference(arm.name, whole[0], party) for party in results.parties}
    phrase = ", ".join(f"{party} {each.mean:+.3f}" for party, each in found.items() if each is not None)
    yield f"{arm.title.capitalize()}, compared with whole noise at every party: {phrase} nats per token."


def _state(results: Results, arm: Arm) -> Iterator[str]:
    if arm.alone not in results.arms:
        return
    whole = max(f.model_state_bytes for f in results.arms[arm.alone].values())
    part = max(f.model_state_bytes for f in results.arms[arm.name].values())
    yield (
        f"{arm.title.capitalize()}: a party held {megabytes(part)} of model, gradients and optimiser state instead "
        f"of {megabytes(whole)} ({100 * (1 - part / whole):.0f} % less)."
    )


def _names(parties: Iterable[str]) -> str:
    *most, last = parties
    return f"{', '.join(most)} and {last}" if most else last
