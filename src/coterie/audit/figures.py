"""The few figures that stand for an audit. One that was not measured is null, with its reason."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from coterie.audit.adversaries import DEFAULT
from coterie.audit.findings import Channel, ExpertsFigures, Finding, PrivateFigures, TokensFigures, Unit
from coterie.audit.metrics import Estimate
from coterie.audit.verdicts import best

NOT_AUDITED = "no such run was audited"
_UNMEASURED = "no attack measured it"
_UNPROMISED = "nothing is promised of this test"
_ENDLESS = "it has no bound: no finite epsilon covers what was measured or could have been"
_BOUNDS = ("auc_allowed", "epsilon_claimed", "epsilon_lower", "epsilon_ceiling")


def tokens_figures(findings: Sequence[Finding] | None) -> TokensFigures:
    """Of the exchange `tokens`; None: not audited."""
    some = findings or ()
    read = best(some, DEFAULT, [Unit.TOKENS])
    layers: dict[str, float] = {}
    for finding in some:
        fits = finding.unit is Unit.SEEN and finding.adversary is DEFAULT and finding.channel is Channel.ROWS
        if fits and finding.layer is not None and finding.value is not None:
            layers[f"{finding.layer}"] = max(finding.value.value, layers.get(f"{finding.layer}", 0.0))
    values = {"recovery": _value(read), "prior": _prior(some, read)}
    return TokensFigures.model_validate({**_filled(values, findings), "layers": _ordered(layers)})


def experts_figures(findings: Sequence[Finding] | None) -> ExpertsFigures:
    """Of the exchange `experts` without a budget; None: not audited."""
    some = findings or ()
    lots: dict[str, float] = {}
    ranked = [f for f in some if f.unit is Unit.PLACES and f.adversary is DEFAULT and f.lot and f.value is not None]
    for finding in ranked:
        assert finding.value is not None
        lots[f"{finding.lot}"] = max(finding.value.value, lots.get(f"{finding.lot}", 0.0))
    own = max((f.lot for f in some if f.unit is Unit.PLACES and f.lot), default=None)
    read = best([f for f in ranked if f.lot == own], DEFAULT, [Unit.PLACES])
    auc = best([f for f in some if f.channel is not Channel.MODEL], DEFAULT, [Unit.AUC])
    values = {"recovery": _value(read), "prior": _prior(some, read), "auc": _value(auc)}
    made = {f"{f.lot}" for f in ranked if not f.simulated}
    sizes = {"lots": _ordered(lots), "simulated": tuple(lot for lot in _ordered(lots) if lot not in made)}
    return ExpertsFigures.model_validate({**_filled(values, findings), **sizes})


def private_figures(
    findings: Sequence[Finding] | None,
    epsilon: dict[str, Any] | None,
    claimed: tuple[float, float] | None,
    reason: str = "",
) -> PrivateFigures:
    """Of a run under a budget.

    Args:
        findings: of its attacks; None: no such run was audited.
        epsilon: its audit from below; None: not measured.
        claimed: (epsilon, delta) of the owner's ledger.
        reason: why ``epsilon`` is None.
    """
    some = findings or ()
    read = best([f for f in some if f.prior is not None], DEFAULT, [Unit.PLACES, Unit.TOKENS])
    own = [f for f in some if f.channel is not Channel.MODEL]
    auc = best(own, DEFAULT, [Unit.AUC]) or best(some, DEFAULT, [Unit.AUC])
    gain = None if read is None else read.gain
    values = {"recovery": _value(read), "prior": _prior(some, read), "advantage": gain, "auc": _value(auc)}
    filled = _filled(values, findings)
    filled["auc_limit"] = None if auc is None else auc.allowed
    if filled["auc_limit"] is None:
        filled["reasons"]["auc_limit"] = filled["reasons"].get("auc", _UNPROMISED)
    if read is not None and gain is None and read.value is not None and read.prior is not None:
        filled["advantage"] = read.value.value - read.prior.value
        del filled["reasons"]["advantage"]
    bounds: dict[str, float | None] = dict.fromkeys(_BOUNDS)
    if epsilon is not None:
        bounds = {name: epsilon[name] for name in _BOUNDS}
    endless = {name for name, value in bounds.items() if value is not None and math.isinf(value)}
    bounds |= dict.fromkeys(endless)
    if claimed is not None:
        bounds["epsilon_claimed"] = claimed[0]
    why = NOT_AUDITED if findings is None else reason or _UNMEASURED
    missing = {name: _ENDLESS if name in endless else why for name, value in bounds.items() if value is None}
    return PrivateFigures.model_validate({**filled, **bounds, "reasons": {**filled["reasons"], **missing}})


def _value(finding: Finding | None) -> Estimate | None:
    return None if finding is None else finding.value


def _prior(findings: Sequence[Finding], read: Finding | None) -> Estimate | None:
    """Of the attack whose recovery is told; else the strongest that was measured."""
    if read is not None and read.prior is not None:
        return read.prior
    measured = [f.prior for f in findings if f.prior is not None and f.unit in (Unit.TOKENS, Unit.SEEN, Unit.PLACES)]
    return max(measured, key=lambda prior: prior.value, default=None)


def _filled(values: dict[str, Estimate | None], audited: Sequence[Finding] | None) -> dict[str, Any]:
    """Numbers, their intervals, and reasons for those that are missing."""
    told = list(dict.fromkeys(finding.reason for finding in audited or () if finding.reason))
    reason = NOT_AUDITED if audited is None else "; ".join(told) or _UNMEASURED
    return {
        **{name: None if found is None else found.value for name, found in values.items()},
        "intervals": {name: found for name, found in values.items() if found is not None},
        "reasons": {name: reason for name, found in values.items() if found is None},
    }


def _ordered(values: dict[str, float]) -> dict[str, float]:
    return dict(sorted(values.items(), key=lambda pair: int(pair[0])))
