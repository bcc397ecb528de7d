"""What a host learns of pushes that knows nothing of the model but its own experts: how many tokens chose each.

An expert's sum is one outer product for each of its tokens, so its rank counts them, up to the width. No token is
named: a span says whether a hidden vector is in it, and without the embedding there is no vector to ask about.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from coterie.audit import metrics
from coterie.audit.adversaries import Adversary
from coterie.audit.experts.case import Case, Owned, TimeBudget
from coterie.audit.experts.plain import counted, simulated
from coterie.audit.experts.simulate import rows_of
from coterie.audit.findings import Channel, Finding, Unit

_PUSHES = 8


def loads(case: Case, lot: int, clock: TimeBudget) -> Finding:
    """How often the rank of an expert's sum is just the number of tokens that chose the expert.

    Args:
        case: the run.
        lot: records in a push; pushes are made of the recorded round's records.
        clock: when to stop.
    """
    round_index = case.rounds()[0]
    visible = list(case.opened(Adversary.HOST_PUBLIC, round_index).experts)
    right, guessed, push = [], [], []
    for number, (some, opened) in enumerate(simulated(case, case.lot(round_index), lot, visible, _PUSHES)):
        if number and not clock.left:
            break
        chosen = choices(case, some)
        usual = round(sum(chosen[key] for key in visible) / len(visible))
        for key in visible:
            rank = opened.experts[key].first.rank if key in opened.experts else 0
            right.append(rank == chosen[key])
            guessed.append(usual == chosen[key])
            push.append(number)
    right_P, prior_P, push_P = torch.tensor(right), torch.tensor(guessed), torch.tensor(push)
    value, prior = (metrics.rate(some_P, push_P, seed=case.seed) for some_P in (right_P, prior_P))
    return Finding(
        name="number of an expert's tokens by rank",
        adversary=Adversary.HOST,
        channel=Channel.PUSHES,
        unit=Unit.LOADS,
        lot=lot,
        simulated=True,
        value=value,
        prior=prior,
        gain=metrics.advantage(right_P, prior_P, push_P, seed=case.seed),
        sentence="A host that knows nothing of the model names no token. The rank of an expert's sum told exactly "
        f"how many tokens chose the expert for {value.value:.0%} [{value.low:.0%}, {value.high:.0%}] of the sums of "
        f"simulated pushes of {counted(lot)}; their mean is right for {prior.value:.0%}.",
    )


def choices(case: Case, records: Sequence[Owned]) -> Counter[tuple[int, int]]:
    """How many tokens with a gradient chose each (layer, expert)."""
    found: Counter[tuple[int, int]] = Counter()
    for rows in rows_of(case.reader, [record.ids for record in records]):
        for layer, each in enumerate(rows.layers):
            learned = each.before_RG.abs().amax(1) > 0
            for expert, count in Counter(each.expert_R[learned].tolist()).items():
                found[layer, expert] += count
    return found
